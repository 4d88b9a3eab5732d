"""Problem lines, suites and masks of the layer benchmark."""

from __future__ import annotations

import pytest
import torch

from cases.benchmark_layers import VARIED
from layers.masks import live_count, make_masks
from layers.problems import SHAPES, Problem, load_suite, suites

LINES = [line for path in SHAPES.glob("*.txt") for line in path.read_text().splitlines() if line and line[0] != "#"]
# Multiply-adds of one image in millions, convolutions only, as the papers and the usual counting tools give them.
LITERATURE = {"resnet50": 4087, "vgg16_cifar": 313, "resnet56_cifar": 125.5, "mobilenet_v2": 299.5,
              "regnet": 3176, "efficientnet": 385}  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_every_line_survives_parse_and_format(line):
    assert Problem.parse(line).format() == line


@pytest.mark.parametrize("line", ["n2c4h6w5k4r3s2p1g2d2", "n1c1h1k1r1s1p0g1"])
def test_unnamed_line_survives(line):
    problem = Problem.parse(line)
    assert problem.format() == problem.shape == line and problem.times == 1


def test_defaults_of_a_line():
    assert Problem.parse('n1c4h6k8r3 "a*2"') == Problem(1, 4, 6, 6, 8, 3, 1, 0, 1, 1, "a", 2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("n1c4h6", "malformed"),
        ('n1c4h6k8r3 "a*b"', "malformed"),
        ("n0c4h6k8r3", "at least 1"),
        ("n1c4h6k8r3s0", "at least 1"),
        ("n1c4h6k8r3g3", "groups must divide"),
        ("n1c4h2k8r3", "empty output"),
    ],
)
def test_bad_lines_are_refused(line, message):
    with pytest.raises(ValueError, match=message):
        Problem.parse(line)


@pytest.mark.parametrize("name", LITERATURE)
def test_suites_have_the_multiply_adds_of_the_literature(name):
    assert sum(p.macs * p.times for p in load_suite(name)) / 1e6 == pytest.approx(LITERATURE[name], rel=0.02)


@pytest.mark.parametrize("name", suites())
def test_names_are_unique_and_carry_the_suite(name):
    names = [p.name for p in load_suite(name)]
    assert len(set(names)) == len(names) and all(n.startswith(f"{name}:") for n in names)


def test_output_size_is_that_of_conv2d():
    for line in VARIED:
        p = Problem.parse(line)
        y = torch.nn.functional.conv2d(torch.zeros(p.x_shape), torch.zeros(p.weight_shape), **p.conv_args)
        assert y.shape == p.out_shape


@pytest.mark.parametrize("kept", [0.01, 0.3, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("side", ["both", "out", "in"])
def test_filter_masks_have_exact_counts(side, kept):
    p = Problem.parse("n1c24h4k40r3s1p1g1")
    masks = make_masks(p, "filter", side, kept)
    assert masks.live_filters.sum() == (live_count(40, kept) if side != "in" else 40)
    assert masks.live_inputs(1).sum() == (live_count(24, kept) if side != "out" else 24)
    assert (masks.filter is None, masks.input is None, masks.kernel) == (side == "in", side == "out", None)


@pytest.mark.parametrize("kept", [0.1, 0.5, 1.0])
def test_kernel_masks_have_exact_counts(kept):
    masks = make_masks(Problem.parse("n1c24h4k40r3s1p1g2"), "kernel", "both", kept)
    assert masks.kernel.shape == (40, 12) and masks.kernel.sum() == masks.pairs.sum() == live_count(480, kept)


def test_grouped_masks_are_even_and_depthwise_ones_agree():
    p = Problem.parse("n1c16h4k32r3s1p1g4")
    masks = make_masks(p, "filter", "both", 0.5)
    assert masks.filter.view(4, 8).sum(1).tolist() == [4] * 4 and masks.input.view(4, 4).sum(1).tolist() == [2] * 4
    masks = make_masks(Problem.parse("n1c16h4k32r3s1p1g16"), "filter", "both", 0.5)
    assert torch.equal(masks.filter.view(16, 2).any(1), masks.input) and masks.input.sum() == 8


def test_masks_follow_the_seed():
    p = Problem.parse("n1c24h4k40r3s1p1g1")
    a, b, c = (make_masks(p, "filter", "both", 0.5, seed).filter for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
