"""README tells the truth: its quick start prunes what it says, its table has a losing row."""

import re

import pytest
import torch

from cases.pages import ROOT, blocks

README = ROOT / "README.md"


def test_quick_start_prunes_what_it_says():
    names: dict = {}
    first = next(block for block in blocks(README) if block.language == "python")
    exec(first.text, names)
    model, keep = names["model"], names["keep"]
    norms = model[0].weight.flatten(1).norm(dim=1)
    assert int(keep.sum()) == 32
    assert norms[keep].min() > norms[~keep].max()
    assert model[0].weight.grad[~keep].abs().max() == 0 < model[0].weight.grad[keep].abs().max()
    assert model[2].weight.grad[:, ~keep].abs().max() == 0


def test_quick_start_is_short():
    first = next(block for block in blocks(README) if block.language == "python")
    assert len([line for line in first.text.splitlines() if line]) <= 8


def test_measured_table_has_a_losing_row():
    rows = re.findall(r"^\| [\w-]+ \| (?:fp32|bf16) \| [\d.]+ \| ([\d.]+) \| ([\d.]+) \|", README.read_text(), re.M)
    assert len(rows) >= 4
    assert any(float(value) < 1 for row in rows for value in row)


def test_picture_is_on_the_first_screen():
    head = README.read_text().splitlines()[:12]
    (path,) = re.findall(r"!\[.+\]\((.+)\)", "\n".join(head))
    assert (ROOT / path).is_file()


@pytest.fixture
def in_double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_equivalent_holds_in_gradients(in_double):
    """The second block's claim, for the weight's gradient as well."""
    names: dict = {}
    for block in [block for block in blocks(README) if block.language == "python"][:2]:
        exec(block.text, names)
    layer, x, y = names["layer"], names["x"], names["y"]
    (expected,) = torch.autograd.grad(y.square().sum(), layer.weight)
    (got,) = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    torch.testing.assert_close(got, expected)
