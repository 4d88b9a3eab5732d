"""The benchmark harness: problem lines, masks, the summary's arithmetic, and that a wrong result is never timed."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import conv
import prunekernels as pk
import report
import timing
from case import Case
from problems import SHAPES, Problem, live_count, load_suite, make_masks, suites
from rivals import RIVALS, Compaction, Limit, Ours

LINES = [line for path in SHAPES.glob("*.txt") for line in path.read_text().splitlines() if line and line[0] != "#"]
SMALL = 'n1c8h6k8r3s1p1g1 "test:small*2"'
VARIED = ["n2c8h6w5k12r3s2p1g1", "n1c6h5k4r1s1p0g1", "n2c8h6k16r3s1p1g4", "n1c12h6k12r3s1p2g12d2", "n1c3h8k6r3s1p1g1"]
# Multiply-adds of one image in millions, convolutions only, as the papers and the usual counting tools give them.
LITERATURE = {"resnet50": 4087, "vgg16_cifar": 313, "resnet56_cifar": 125.5, "mobilenet_v2": 299.5}


@pytest.fixture(autouse=True)
def one_thread():
    """Faster for problems this small; and the harness sets the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def test_an_image_is_not_pruned_and_gets_no_gradient():
    p = Problem.parse("n1c3h8k8r3s1p1g1")
    masks = make_masks(p, "filter", "both", 0.5)
    assert masks.input is None and masks.live_filters.sum() == 4
    assert Ours(Case.make(p, masks, torch.float32, "cpu"), "fwd+bwd", "nchw").outputs == ["y", "grad_w"]


def make_case(line, pattern="filter", side="both", kept=0.5):
    p = Problem.parse(line)
    return Case.make(p, make_masks(p, pattern, side, kept), torch.float32, "cpu")


@pytest.mark.parametrize("direction", ["fwd", "grad_weight", "fwd+bwd"])
@pytest.mark.parametrize("pattern_side", ["filter both", "filter out", "filter in", "kernel -"])
@pytest.mark.parametrize("line", VARIED)
def test_everybody_agrees_with_the_reference(line, pattern_side, direction):
    case = make_case(line, *pattern_side.split())
    for rival in conv.contenders(case, direction, "both"):
        rival.check()


def test_limit_and_compaction_do_the_live_work_only():
    case = make_case("n1c16h4k32r3s1p1g4")
    limit = Limit(case, "fwd+bwd", "nchw")
    assert limit.w.shape == (16, 2, 3, 3) and limit.x.shape[1] == 8
    assert limit.zeros == [(1, 16, 4, 4), (1, 8, 4, 4)]
    assert not case.small.ragged and make_case("n1c16h4k32r3s1p1g1", "kernel").small.ragged
    depthwise = make_case("n1c12h6k12r3s1p1g12").small
    assert depthwise.groups == 6 and depthwise.taps is None


WRONG = {
    "scaled": lambda y: y * 1.01,
    "nan": lambda y: y * float("nan"),
    "shape": lambda y: y[:, 1:],
    "dead": lambda y: torch.where(y == 0, 1e-20, y),
    "gradient": lambda y: 2 * y - y.detach(),
}


@pytest.mark.parametrize(("spoil", "direction"), [(s, "fwd" if s != "gradient" else "fwd+bwd") for s in WRONG])
def test_a_wrong_result_is_never_timed(monkeypatch, spoil, direction):
    true = pk.masked_conv2d

    monkeypatch.setattr(pk, "masked_conv2d", lambda *args, **kwargs: WRONG[spoil](true(*args, **kwargs)))
    monkeypatch.setattr(conv, "interleaved", lambda *_: pytest.fail("timed"))
    with pytest.raises(SystemExit, match="test:small.*ours"):
        conv.main(["--problem", SMALL, "--direction", direction])


def test_a_wrong_rival_is_never_timed(monkeypatch):
    monkeypatch.setattr(Compaction, "forward", lambda self: self.w.new_zeros(self.problem.out_shape))
    monkeypatch.setattr(conv, "interleaved", lambda *_: pytest.fail("timed"))
    with pytest.raises(SystemExit, match="compaction"):
        conv.main(["--problem", SMALL, "--direction", "fwd"])


def test_interleaved_runs_everybody_equally_often():
    calls = {"a": 0, "b": 0}

    def run(name):
        calls[name] += 1

    timings = timing.interleaved({name: lambda name=name: run(name) for name in calls}, "cpu", 0)
    assert calls == dict.fromkeys(calls, timing.WARMUPS + timing.MIN_ROUNDS)
    assert all(t.low <= t.median <= t.high and t.rounds == timing.MIN_ROUNDS for t in timings.values())


def make_row(**changes):
    texts = dict(problem="p", name="n", mask="filter", side="both", direction="fwd", layout="nchw", plan="dense")
    counts = dict(times=1, kept=0.5, live_k=1, live_c=1, live_kernels=1)
    times = dict(ms=1.0, dense_ms=2.0, masked_dense_ms=3.0, compaction_ms=1.0, sparseprop_ms=None, limit_ms=0.5)
    return replace(report.Row(**texts, **counts, **times), **changes)


def test_summary_weights_by_multiplicity_and_counts_losses():
    rows = [make_row(), make_row(name="slow", times=3, ms=4.0, compaction_ms=3.96), make_row(kept=0.9, limit_ms=None)]
    summary, other = report.summarise(rows)
    assert summary.vs_dense == pytest.approx((2 * 0.5**3) ** 0.25)
    assert (summary.worst, summary.worst_ratio) == ("slow", 0.125)
    assert (summary.problems, summary.lost_to_dense, summary.lost_to_compaction) == (2, 1, 0)
    assert (other.of_limit, other.worst_ratio, other.vs_sparseprop) == (None, 2.0, None)


@pytest.mark.parametrize(
    ("speedups", "expected"),
    [
        ({0.9: 0.5, 0.5: 2.0}, 0.7),
        ({0.9: 1.1, 0.5: 2.0}, 0.9),
        ({0.9: 0.5, 0.5: 0.9}, None),
        ({0.9: 0.5, 0.5: 1.0}, 0.5),
    ],
)
def test_break_even(speedups, expected):
    assert report.break_even(speedups) == (None if expected is None else pytest.approx(expected))


def test_command_line_end_to_end(tmp_path, capsys):
    files = {name: tmp_path / f"r.{name}" for name in ("json", "csv", "md", "png")}
    where = ["--json", files["json"], "--csv", files["csv"], "--md", files["md"]]
    if plotted := find_spec("matplotlib") is not None:
        where += ["--plot", files["png"]]
    argv = ["--problem", SMALL, "--kept", "0.5", "1", "--direction", "all", "--seconds", "0", *map(str, where)]
    assert conv.main([*argv, "--threads", "1"]) == 0
    body = json.loads(files["json"].read_text())
    assert body["header"]["threads"] == 1 and "--kept 0.5 1" in body["header"]["command"]
    assert {(r["direction"], r["kept"]) for r in body["rows"]} == {(d, k) for d in conv.DIRECTIONS for k in (0.5, 1.0)}
    assert all(r["times"] == 2 and r["ms"] > 0 and r["limit_ms"] > 0 for r in body["rows"])
    assert set(body["rows"][0]["quartiles"]) == {
        f"{who}/{layout}" for who in ("ours", "dense", "masked_dense", "compaction", "limit") for layout in conv.FORMATS
    }
    assert len(body["summary"]) == 8 and len(body["break_even"]) == 4
    with files["csv"].open() as file:
        assert len(list(csv.DictReader(file))) == 8
    printed = capsys.readouterr().out
    assert "| test:small |" in files["md"].read_text() and "vs_dense" in printed
    assert printed.splitlines()[-1] == (f"plot: {files['png']}" if plotted else f"md: {files['md']}")
    assert not plotted or files["png"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "nothing to run"),
        (["--suite", "nope"], "unknown suite 'nope'"),
        (["--problem", "n1c2"], "malformed problem line 'n1c2'"),
        (["--suite", "tiny", "--kept", "0"], "--kept"),
        (["--suite", "tiny", "--kept", "0.5", "1.5"], "--kept"),
        (["--suite", "tiny", "--kept", "nan"], "--kept"),
        (["--suite", "tiny", "--threads", "0"], "--threads"),
        (["--suite", "tiny", "--seconds", "-1"], "--seconds"),
        (["--suite", "tiny", "--direction", "sideways"], "--direction"),
        (["--suite", "tiny", "--json", "/no/such/folder/r.json"], "cannot write /no/such/folder/r.json"),
    ],
)
def test_bad_arguments_end_with_one_line_and_code_2(argv, message, capsys, monkeypatch):
    monkeypatch.setattr(conv, "run", lambda *_: pytest.fail("ran"))
    with pytest.raises(SystemExit) as stopped:
        conv.main(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1


def test_help_names_every_suite(capsys):
    with pytest.raises(SystemExit) as stopped:
        conv.main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and all(name in text for name in suites())


def test_rivals_have_names_of_their_own():
    assert len({r.family for r in (*RIVALS, Ours)}) == len(RIVALS) + 1
