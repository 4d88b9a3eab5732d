"""The network benchmark's rows, summary, goals and files."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

import network
import networks.report as network_report
from harness.goals import goals
from networks.report import NETWORKS as REPORT
from networks.rows import GOALS, NetworkRow, summarise


def test_rows_of_older_files_have_todays_names(tmp_path):
    old = asdict(make_row(live_peak_mb=7.0, trials={"dense/nchw": 1.0, "live/nchw": 2.0}))
    old["quartiles"] = {"layer/channels_last": [1, 2, 3]}
    for name in ("layer_ms", "network_ms", "network_peak_mb"):
        old[name] = old.pop(name.replace("layer", "masked").replace("network", "live"))
    old["trials"] = {"dense/nchw": 1.0, "network/nchw": 2.0}
    (tmp_path / "n.json").write_text(json.dumps({"rows": [old]}))
    (row,) = REPORT.read(tmp_path / "n.json")[0]
    assert (row.masked_ms, row.live_ms, row.live_peak_mb, row.live_vs_dense) == (3.0, 2.0, 7.0, 2.0)
    assert row.quartiles == {"masked/channels_last": [1, 2, 3]}
    assert row.trials == {"dense/nchw": 1.0, "live/nchw": 2.0}


ROW = dict(network="n", batch=1, masks="joint", kept=0.5, direction="train", dense_ms=4.0, masked_ms=3.0)


ROW |= dict(live_ms=2.0, small_ms=1.9, layouts="nchw nchw nchw nchw", rounds=3, optimizer="masked")


def make_row(**changes):
    return NetworkRow(**ROW | changes)


def test_ratios_and_summary():
    rows = [make_row(), make_row(network="m", live_ms=5.0), make_row(network="o", small_ms=None)]
    assert (rows[0].masked_vs_dense, rows[0].live_vs_dense, rows[0].of_limit) == (4 / 3, 2, 0.95)
    assert rows[2].of_limit is None
    (s,) = summarise(rows)
    assert (s.networks, s.worst, s.worst_of_limit, s.lost_to_dense) == (3, "m", 0.38, 1)
    assert s.live_vs_dense == pytest.approx((2 * 2 * 0.8) ** (1 / 3))


def test_goals_name_the_rows_that_fail():
    rows = [
        make_row(),
        make_row(network="slow", live_ms=3.8),
        make_row(network="slow", kept=0.3, live_ms=3.8),
        make_row(masks="independent", small_ms=0.1),
        make_row(direction="infer", small_ms=0.1),
        make_row(kept=0.95, masks="independent", live_ms=4.2),
        make_row(kept=1.0, live_ms=3.9),
    ]
    bound, masked, live, dense, best = goals(rows, GOALS)
    assert best.goal.startswith("best mode, training step, joint: share") and best.reached == pytest.approx(1.9 / 3)
    assert (bound.target, bound.rows, bound.failing, bound.verdict) == (">= 0.9", 2, 1, "missed")
    assert bound.failing_most == "slow joint kept 0.5: 0.50" and bound.goal.endswith("kept 0.5")
    assert [(g.goal.partition(" mode")[0], g.verdict, g.rows) for g in (masked, live)] == [
        ("masked", "holds", 2), ("live", "holds", 2)
    ]  # fmt: skip
    assert (dense.target, dense.rows, dense.failing_most) == (">= 0.98", 2, "n independent kept 0.95: 0.95")
    assert all(g.goal.startswith("GPU") for g in goals([make_row(device="cuda")], GOALS))
    assert network_report.network_goals([make_row(kept=0.7)]) == ""


def test_compacted_mode_beside_the_small_network_and_dense():
    forms = dict(compacted_ms=1.6, dense_compile_ms=3.2, compacted_compile_ms=1.0, small_compile_ms=0.9)
    row = make_row(network="resnet18", **forms)
    assert (row.fastest_dense, row.best, row.live_vs_dense) == ("compiled", "compiled", 1.6)
    assert (row.compacted_vs_dense, row.best_vs_dense, row.compacted_vs_live) == (3.2, 3.2, 2)
    assert (row.compacted_of_small, row.compiled_of_small, row.best_of_small) == pytest.approx((1.1875, 0.9, 0.9))
    eager = make_row(compacted_ms=2.4)
    assert (eager.fastest_dense, eager.best, eager.compiled_of_small) == ("eager", "live", None)
    bf16 = make_row(network="resnet18", dtype="bfloat16", compacted_ms=2.5)
    found = {g.goal.partition(";")[0]: g for g in goals([row, eager, bf16], GOALS)}
    assert len(found) == 9
    over = found["best mode, ResNet-18, training step, joint, bf16: over dense"]
    assert (over.rows, over.reached, over.failing_most) == (1, 2, "resnet18 joint bfloat16 kept 0.5: 2.00")
    assert found["best mode, ResNet-18, training step, joint, fp32: over dense"].verdict == "holds"
    both = found["compacted, training step, joint: the same, both compiled, each"]
    assert (both.rows, both.verdict, both.reached) == (1, "missed", 0.9)
    below = found["compacted mode in its faster form, training step, joint: over live mode, each"]
    assert (below.rows, below.failing) == (3, 2)


def test_dense_in_float32_may_be_the_fastest():
    row = make_row(dtype="bfloat16", dense_compile_ms=3.8, dense_fp32_ms=2.5)
    assert (row.fastest_dense, row.live_vs_dense) == ("float32", 1.25) and row.masked_vs_dense == pytest.approx(2.5 / 3)
    found = {g.goal.partition(":")[0]: g for g in goals([row], GOALS)}
    assert found["masked mode, training step, joint"].verdict == "missed"
    assert found["live mode, training step, joint"].verdict == "holds"
    assert "dense_fp32_ms" in network_report.table([row]) and "dense_fp32_ms" not in network_report.table([make_row()])


def test_rows_of_different_dtypes_are_told_apart():
    rows = [make_row(), make_row(dtype="bfloat16")]
    table, summary = network_report.table(rows), network_report.summary(rows)
    assert "bfloat16" in table and "bfloat16" in summary and "clock" not in table


@pytest.mark.parametrize(
    "path", sorted((Path(network.__file__).parent / "results").glob("*-network*.json")), ids=lambda p: p.name
)
def test_committed_results_can_be_read_again(path):
    assert goals(REPORT.read(path)[0], GOALS)
