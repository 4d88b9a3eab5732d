"""benchmarks/trainings: rows, means over seeds, comparisons with baselines, and what the goals say."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from cases.trainings import training_row as row
from trainings.goals import verdicts
from trainings.rows import TrainingRow
from trainings.run import came_back
from trainings.summary import summarise, tables

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


# ---- rows


def test_times_are_those_of_the_fastest_form():
    found = row()  # 8 epochs of 10 steps; 1 s in float32, 0.5 s in bfloat16, a small network half of that
    assert (found.dense_seconds, found.fp32_seconds, found.small_epoch_seconds) == (40, 80, 2.5)
    assert found.best_seconds == 20
    assert row(kind="dense", seconds=999.0).best_seconds == 40
    assert row(kind="scratch", seconds=999.0).best_seconds == 20


@pytest.mark.parametrize(("seconds", "epochs"), [(1.0, 8), (20.0, 8), (20.1, 10), (25.0, 10), (27.5, 12), (80.0, 32)])
def test_epochs_for_the_methods_time(seconds, epochs):
    """At least as long as the method, at least its epochs, and even."""
    assert row(seconds=seconds).scratch_epochs == epochs


def test_rows_in_a_file():
    found = row(seconds=1 / 3, came_back=[None, 1 / 3], options={"clip": False})
    flat = json.loads(json.dumps(found.flat()))
    assert (flat["seconds"], flat["came_back"], flat["epochs"]) == (0.333333, [None, 0.333333], 8)
    again = TrainingRow(**flat)
    assert (
        again.spec == found.spec
        and again.job == found.job == "vgg_small seed 0 method 8 epochs ghfp 0.5 duty 0.1 clip=False"
    )


def test_what_came_back():
    states = [torch.tensor(s) for s in ([0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 0, 1], [0, 0, 1, 2], [0, 0, 2, 2])]
    assert came_back(states) == [None, pytest.approx(1 / 3), 0.5, 0.0]


def test_what_came_back_early():
    assert row().came_back_early == pytest.approx(0.1)  # of epochs 2 to 4: the first had nothing soft-dead
    assert row(came_back=[None] * 8).came_back_early is None


# ---- means and comparisons


def test_means_over_seeds():
    rows = [row(points=90.0), row(points=92.0, seed=1, seconds=80.0, multiply_adds=35)]
    (found,) = summarise(rows)
    assert (found.seeds, found.accuracy, found.spread) == (2, pytest.approx(91), pytest.approx(2))
    assert found.vs_dense == pytest.approx((2 * 0.5) ** 0.5) and found.vs_fp32 == pytest.approx(2)
    assert (found.multiply_adds, found.parameters) == (pytest.approx(0.3), pytest.approx(0.3))
    assert (found.latency_1, found.latency_64) == (pytest.approx(1), pytest.approx(4))
    assert found.came_back == pytest.approx(0.1) and found.came_back_by_epoch[:2] == [None, pytest.approx(0.2)]
    assert found.over_scratch is found.over_literal is found.over_scratch_time is found.time_of_literal is None


def test_dense_training_goes_by_its_own_clock():
    """What it lacks of 1 says how near the steps beside a run come to a whole run."""
    (found,) = summarise([row(kind="dense", seconds=50.0)])
    assert (found.vs_dense, found.vs_fp32) == (pytest.approx(0.8), pytest.approx(1.6))


def compared():
    """Two seeds of a method, each with its baselines, and others that are none."""
    return [
        row(points=90.0, seconds=40.0), row(points=91.0, seconds=30.0, seed=1),
        row(kind="scratch", points=88.0), row(kind="scratch", points=90.0, seed=1),
        row(kind="scratch", points=89.5, epochs=16), row(kind="scratch", points=91.5, epochs=12, seed=1),
        row(kind="literal", points=90.5, seconds=80.0, duty=1.0), row(kind="literal", points=90.0, seed=1, duty=1.0),
        row(kind="scratch", key="other", points=1.0), row(kind="scratch", arch="resnet20", points=1.0),
        row(kind="literal", points=1.0, method="sfp"), row(kind="literal", points=1.0, rate=0.3),
        row(kind="scratch", points=1.0, epochs=14), row(kind="scratch", points=1.0, seed=2),
        row(kind="dense", points=99.0),
    ]  # fmt: skip


def test_comparisons_pair_the_seeds():
    found = next(s for s in summarise(compared()) if s.kind == "method")
    assert found.over_scratch.mean == pytest.approx(1.5) and found.over_scratch.error == pytest.approx(0.5)
    assert found.over_scratch_time.mean == pytest.approx(0.0) and found.scratch_epochs == 14
    assert found.over_literal.mean == pytest.approx(0.25) and found.over_literal.pairs == 2
    assert found.time_of_literal == pytest.approx((40 / 80 * 30 / 20) ** 0.5) and found.scratch == pytest.approx(89)
    assert {s.kind for s in summarise(compared())} == {"method", "literal", "dense"}


def test_a_seed_without_its_baseline_is_not_compared():
    rows = [r for r in compared() if not (r.kind == "scratch" and r.seed == 1)]
    found = next(s for s in summarise(rows) if s.kind == "method")
    assert (found.over_scratch.pairs, found.over_scratch.mean, found.seeds) == (1, pytest.approx(2), 2)


def test_time_over_literal_is_that_beside_each():
    """The machine was half as fast while the literal run was made."""
    slow = {form: 2 * ms for form, ms in row().dense_step_ms.items()}
    rows = [row(seconds=20.0), row(kind="literal", seconds=80.0, duty=1.0, dense_step_ms=slow)]
    assert summarise(rows)[0].time_of_literal == pytest.approx(0.5)


def test_tables():
    text = tables(summarise(compared()), markdown=True)
    assert "| vgg_small | method | ghfp | 0.5 | 0.1 | 2 | 90.50 | 1.00 |" in text
    assert "| 89.00 | +1.50 ± 0.50, p 0.2 | 0.5 | +0.00 ± 0.50, p 1 | 14 | +0.25 ± 0.75, p 0.8 |" in text
    assert "### Share of the soft-dead filters that came back, by epoch" in text
    assert "p, signs" in tables(summarise(compared()), markdown=False)


# ---- goals


def goal(text, rows, network="vgg_small"):
    found = [v for v in verdicts(summarise(rows), 0.1) if text in v.goal and v.network == network]
    return (found[0].verdict, found[0].reached) if found else None


def methods(points, **given):
    """Rows of methods, by their points."""
    return [row(method=method, points=p, **given) for method, p in points.items()]


SCRATCH = row(kind="scratch", points=90.0)
FIVE = {"sfp": 91.0, "asfp": 91.5, "ghfp": 92.0, "pgp": 91.0, "csgd": 90.0}


@pytest.mark.parametrize(
    ("change", "none_below", "many"),
    [
        ({}, ("holds", "none of 5 below"), ("holds", "4: asfp +1.50, ghfp +2.00, pgp +1.00, sfp +1.00")),
        ({"csgd": 89.9}, ("missed", "1 of 5 below: csgd -0.10"), ("holds", "4: ")),
        ({"pgp": 90.9}, ("holds", "none of 5"), ("missed", "3: asfp +1.50, ghfp +2.00, sfp +1.00")),
        (dict.fromkeys(FIVE, 90.5), ("holds", "none of 5"), ("missed", "0")),
    ],
)
def test_goals_over_scratch(change, none_below, many):
    rows = [*methods(FIVE | change), SCRATCH]
    for text, expected in (("none below 0", none_below), ("at least 4", many)):
        verdict, reached = goal(text, rows)
        assert verdict == expected[0] and expected[1] in reached


def test_goal_over_scratch_is_about_the_default_duty_and_rate():
    rows = [*methods({"sfp": 80.0}, duty=1.0), *methods({"sfp": 80.0}, rate=0.3), *methods({"sfp": 91.0}), SCRATCH]
    assert goal("none below 0", rows) == ("holds", "none of 1 below")


@pytest.mark.parametrize(
    ("points", "seconds", "accuracy", "time"),
    [
        (89.81, 24.0, ("holds", "none of 1 below"), ("holds", "none of 1 above")),
        (89.79, 24.1, ("missed", "1 of 1 below: ghfp -0.21"), ("missed", "1 of 1 above: ghfp 0.60")),
    ],
)
def test_goals_over_literal(points, seconds, accuracy, time):
    rows = [row(points=points, seconds=seconds), row(kind="literal", points=90.0, seconds=40.0, duty=1.0)]
    assert goal("over literal", rows) == accuracy and goal("of literal's: at most 0.6", rows) == time


@pytest.mark.parametrize(("longer", "verdict"), [(90.5, "holds"), (90.6, "missed")])
def test_goal_over_scratch_time(longer, verdict):
    rows = [row(points=91.0), row(points=89.0, method="sfp"), row(kind="scratch", points=longer)]
    expected = f"best: ghfp {91 - longer:+.2f}"
    assert goal("over scratch-time", rows) == (verdict, expected)


@pytest.mark.parametrize(("share", "verdict"), [(0.05, "holds"), (0.04, "missed")])
def test_goal_of_what_came_back(share, verdict):
    rows = [
        row(method="sfp", came_back=[None, share, share]), row(method="ghfp", came_back=[None, 0.3, 0.3]),
        row(method="csgd", came_back=[None] * 3), row(method="pgp", came_back=[0.0] * 3),
        row(method="sfp", kind="literal", duty=1.0),
    ]  # fmt: skip
    assert goal("came back", rows) == (verdict, f"ghfp 0.300, sfp {share:.3f}; literal sfp 0.100")
    assert goal("came back", rows[:-1]) is None


@pytest.mark.parametrize(("seconds", "verdict"), [(40.0, "holds"), (41.0, "missed")])
def test_goal_over_dense(seconds, verdict):
    rows = [row(method="csgd", seconds=20.0), row(method="fpagl", seconds=seconds), row(seconds=90.0)]
    assert goal("over the fastest dense", rows) == (verdict, f"csgd 2.00, fpagl {40 / seconds:.2f}")


@pytest.mark.parametrize(("points", "verdict"), [(90.5, "holds"), (90.4, "missed")])
def test_goal_of_budgets(points, verdict):
    flops = {"kind": "budget", "options": {"budget": "flops"}}
    rows = [row(points=points, **flops), row(points=90.0, kind="uniform", rate=0.3), row(points=1.0)]
    assert goal('budget="flops"', rows) == (verdict, f"ghfp {points - 90:+.2f}")


def test_the_mean_over_networks():
    rows = [
        *methods({"sfp": 91.0, "ghfp": 89.5}), SCRATCH,
        *methods({"sfp": 89.0, "ghfp": 91.5}, arch="resnet20"), row(kind="scratch", points=90.0, arch="resnet20"),
    ]  # fmt: skip
    assert goal("none below 0", rows) == ("missed", "1 of 2 below: ghfp -0.50")
    assert goal("none below 0", rows, "resnet20") == ("missed", "1 of 2 below: sfp -1.00")
    assert goal("none below 0", rows, "mean") == ("holds", "none of 2 below")
    assert goal("at least 4", rows, "mean") == ("missed", "0")
    assert goal("none below 0", rows[:3], "mean") is None


def test_a_goal_says_how_many_seeds_it_rests_on():
    rows = [row(seed=0), row(seed=1), SCRATCH]
    (found,) = [v for v in verdicts(summarise(rows), 0.1) if "none below" in v.goal]
    assert found.seeds == 1


# ---- committed results

FILES = [p for p in sorted(RESULTS.glob("*-methods*.json")) if '"kind"' in p.read_text()]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_committed_results_say_what_their_rows_say(path):
    body = json.loads(path.read_text())
    rows = [TrainingRow(**r) for r in body["rows"]]
    (duty,) = {row.duty for row in rows if row.kind == "method"}
    summaries = summarise(rows)
    assert body["goals"] == [asdict(v) for v in verdicts(summaries, duty)] and body["goals"]
    text = path.with_suffix(".md").read_text()
    assert tables(summaries, markdown=True) in text and body["header"]["command"] in text
