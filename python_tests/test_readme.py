"""README tells the truth: its code runs, its length holds, its numbers stand in a committed results file."""

import json
import re
from pathlib import Path

import pytest
import torch

import prunekernels as pk

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_runs(number):
    exec(compile(BLOCKS[number], f"README.md block {number}", "exec"), {"torch": torch, "pk": pk})


def test_first_block_prunes_what_it_says():
    names: dict = {}
    exec(BLOCKS[0], names)
    model, keep = names["model"], names["keep"]
    assert int(keep.sum()) == 32
    assert model[0].weight.grad[~keep].abs().max() == 0 < model[0].weight.grad[keep].abs().max()
    assert model[2].weight.grad[:, ~keep].abs().max() == 0


def test_length():
    assert len(README.splitlines()) <= 150


def test_names_exist():
    listed = re.findall(r"^\| `(\w+)\(", README, flags=re.M)
    assert listed
    missing = [name for name in listed if not hasattr(pk, name)]
    assert not missing


def test_measured_table_is_the_results_file():
    """Every row of the measured table is in the file the table names, to the printed digits."""
    source = re.search(r"`(benchmarks/results/[^`]+\.json)`", README)
    assert source is not None
    rows = json.loads((ROOT / source[1]).read_text())["rows"]
    measured = {(r["name"], r["kept"]): r for r in rows}
    lines = re.findall(r"^\| ([\w.:]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", README, flags=re.M)
    assert len(lines) >= 4
    for name, kept, *ratios in lines:
        row = measured[name, float(kept)]
        assert ratios == [f"{row[key]:.2f}" for key in ("vs_dense", "vs_compaction", "of_limit")]
    assert any(float(vs_dense) < 1 or float(of_limit) < 0.6 for _, _, vs_dense, _, of_limit in lines), "a losing row"


def test_methods_table_is_the_results_files():
    folder = "benchmarks/results/2026-11-24-epyc-2core-"
    assert f"`{folder}9f10d70-methods.json`, `...-4b4d01a-methods-pgp.json`" in README
    found = [json.loads((ROOT / f"{folder}{n}.json").read_text()) for n in ("4b4d01a-methods-pgp", "9f10d70-methods")]
    rows = {(s["arch"], s["method"], s["rate"], s["duty"]): s for f in found for s in f["summary"] if s["clip"] is None}
    pattern = r"^\| `([\w-]+)` \(([\d.]+)\) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$"
    lines = re.findall(pattern, README, flags=re.M)
    assert len(lines) >= 4
    for name, duty, *printed in lines:
        both = [rows[arch, name, 0.5, float(duty)] for arch in ("resnet20", "vgg_small")]
        assert printed == [f"{s[key]:.2f}" for s in both for key in ("accuracy", "vs_dense")]
    assert any(float(ratio) < 1 for *_, ratio in lines), "a losing row"
    dense = [rows[arch, "none", 0, 1]["accuracy"] for arch in ("resnet20", "vgg_small")]
    assert re.search(r"dense ([\d.]+) %.*dense ([\d.]+) %", README).groups() == tuple(f"{a:.2f}" for a in dense)


def test_network_table_is_the_results_file():
    source = re.search(r"`(benchmarks/results/[^`]+-network\.json)`", README)
    assert source is not None
    rows = json.loads((ROOT / source[1]).read_text())["rows"]
    trained = {(r["network"], r["masks"], r["kept"]): r for r in rows if r["direction"] == "train"}
    lines = re.findall(r"^\| (\w+) \| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", README, flags=re.M)
    assert len(lines) >= 4
    for name, masks, kept, *ratios in lines:
        row = trained[name, masks, float(kept)]
        assert ratios == [f"{row[key]:.2f}" for key in ("layer_vs_dense", "network_vs_dense", "of_limit")]
    assert any(float(vs_dense) < 1 for *_, vs_dense, _ in lines), "a losing row"
    inferred = [r for r in rows if r["direction"] == "infer"]
    shares = [r["of_limit"] for r in inferred]
    full = [r["network_vs_dense"] for r in inferred if r["kept"] == 0.95]
    said = re.search(r"Inference reaches ([\d.]+) to ([\d.]+) .*\(([\d.]+) to ([\d.]+)\)", README)
    assert said is not None
    assert said.groups() == tuple(f"{v:.2f}" for v in (min(shares), max(shares), min(full), max(full)))
