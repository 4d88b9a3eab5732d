"""The layer benchmark's summary, goals and files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import conv
from cases.benchmark_layers import found, make_row
from harness.goals import goals
from layers import report
from layers.goals import GOALS


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


def test_goals_of_filters():
    full = dict(direction="fwd+bwd", dense_ms=4.0)
    rows = [
        make_row(**full, name="good", kept=0.7, ms=1.0, limit_ms=0.9),
        make_row(**full, name="poor", kept=0.3, ms=1.0, limit_ms=0.4, times=3),
        make_row(**full, name="lost", kept=0.95, ms=5.0, side="out", limit_ms=0.1),
        make_row(name="forward", kept=0.5, ms=9.0, limit_ms=0.1),
    ]
    said = found(rows)
    assert len(said) == 4
    mean = said["filters in and out: share of limit, mean >= 0.85"]
    assert mean.reached == pytest.approx((0.9 * 0.4**3) ** 0.25) and mean.margin == pytest.approx(mean.reached / 0.85)
    assert (mean.goal[-12:], mean.rows, mean.failing, mean.verdict) == ("kept 0.7 0.3", 2, 1, "missed")
    each = said["filters in and out: share of limit, each >= 0.6"]
    assert (each.reached, each.failing_most, each.verdict) == (0.4, "poor kept 0.3: 0.40", "missed")
    dense = said["filters: over dense, each >= 0.98"]
    assert (dense.reached, dense.rows, dense.failing_most) == (0.8, 3, "lost out kept 0.95: 0.80")
    overhead = said["overhead: time over dense's, without its noise, each <= 1.02"]
    assert (overhead.reached, overhead.margin, overhead.rows) == (1.25, pytest.approx(1.02 / 1.25), 1)
    assert all(f.verdict == "holds" and f.failing_most == "-" for f in goals(rows[:1], GOALS))


def test_dense_is_the_faster_of_its_forms():
    eager, compiled = (make_row(problem="n1c8h6k8r3s1p1g1", dense_compile_ms=ms) for ms in (3.0, 1.5))
    assert [(r.vs_dense, r.fastest_dense) for r in (eager, compiled)] == [(2, "eager"), (1.5, "compiled")]
    assert compiled.flat()["fastest_dense"] == "compiled" and "fastest_dense" in report.table([compiled])


def test_dense_against_itself_is_the_noise():
    full = dict(direction="fwd+bwd", kept=0.95, ms=2.1)
    rows = [make_row(**full, dense_again_ms=2.2), make_row(**full, dense_again_ms=1.9), make_row(**full)]
    assert [r.noise for r in rows] == [pytest.approx(1.1), pytest.approx(2 / 1.9), None]
    assert [s.noise for s in report.summarise(rows)] == [pytest.approx(1.1)]
    overhead = found(rows)["overhead: time over dense's, without its noise, each <= 1.02"]
    assert (overhead.reached, overhead.failing, overhead.rows) == (pytest.approx(1.05), 1, 3)


def test_goals_of_kernels_look_at_3x3_only():
    full = dict(mask="kernel", side="-", direction="fwd+bwd", limit_ms=None, problem="n1c8h6k8r3s1p1g1")
    rows = [
        make_row(**full, kept=0.5, ms=2.5),
        make_row(**full, name="b", kept=0.5, ms=1.0),
        make_row(**full, kept=0.15, ms=0.5, sparseprop_ms=2.0),
        make_row(**full | {"problem": "n1c8h6k8r1s1p0g1"}, name="1x1", kept=0.15, ms=9.0, sparseprop_ms=8.1),
        make_row(**full, kept=0.05, ms=0.25),
    ]
    said = found(rows)
    assert len(said) == 6
    even = said["kernels 3x3: over dense, mean >= 1"]
    assert even.reached == pytest.approx((0.8 * 2) ** 0.5) and (even.verdict, even.failing) == ("holds", 1)
    assert said["kernels 3x3: over dense, mean >= 3"].margin == pytest.approx(4 / 3)
    assert said["kernels 3x3: over SparseProp, mean >= 5"].margin == pytest.approx(0.8)
    assert said["kernels 3x3: over dense, mean >= 5"].reached == pytest.approx(8)
    assert said["kernels 3x3: over dense, each >= 0.98"].failing_most == "n kernels kept 0.5: 0.80"
    assert said["kernels: over SparseProp, each >= 0.98"].failing_most == "1x1 kernels kept 0.15: 0.90"


def test_goal_of_blocks_is_measured_by_the_exact_density():
    block = dict(mask="block", side="16x32", limit_ms=None, problem="n2c8h6k4r3s1p1g1", direction="fwd+bwd")
    bf16 = block | dict(dtype="bfloat16", layout="channels_last", dense_ms=4.0)
    rows = [
        make_row(**bf16, name="a", live_kernels=8, kept=0.3, ms=1.25),
        make_row(**bf16, name="b", live_kernels=16, kept=0.5, ms=4.0),
        make_row(**bf16, name="full", live_kernels=32, kept=0.9, ms=9.0),
        make_row(**bf16 | {"dtype": "float32"}, name="single", live_kernels=8, kept=0.3, ms=9.0),
    ]
    mean = found(rows)["bf16 blocks: over dense x density, mean >= 0.6"]
    assert (mean.reached, mean.rows, mean.failing) == (pytest.approx((0.8 * 0.5) ** 0.5), 2, 1)
    assert mean.failing_most == "b blocks kept 0.5: 0.50"


def test_goal_of_memory_and_no_goal_without_rows():
    rows = [make_row(direction="fwd+bwd", kept=0.6, ours_peak_mb=m, dense_peak_mb=10.0) for m in (10.9, 12.0, 5.0)]
    memory = found(rows)["peak memory over dense's, each <= 1.1"]
    assert (memory.reached, memory.rows, memory.failing) == (1.2, 3, 1)
    assert goals([make_row()], GOALS) == [] and report.layer_goals([make_row()]) == ""


def test_at_most_three_failing_problems_are_named_the_worst_first():
    rows = [make_row(direction="fwd+bwd", name=f"p{i}", kept=0.8, ms=3.0 + i) for i in range(5)]
    goal = found(rows)["filters: over dense, each >= 0.98"]
    assert goal.failing == 5 and goal.failing_most == "p4 kept 0.8: 0.29, p3 kept 0.8: 0.33, p2 kept 0.8: 0.40"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [{"problem": "p"}]}'])
def test_what_is_no_results_file_is_refused(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match="r.json: no results file"):
        report.read_rows(tmp_path / "r.json")


FILES = (Path(conv.__file__).parent / "results").glob("*.json")


RESULTS = [p for p in FILES if "benchmarks/conv.py" in json.loads(p.read_text())["header"]["command"]]


@pytest.mark.parametrize("path", sorted(RESULTS), ids=lambda p: p.name)
def test_committed_results_can_be_read_again(path):
    assert goals(report.read_rows(path), GOALS)
