"""benchmarks/whole_run.py: phases and what they predict, its rows, goals and files."""

from __future__ import annotations

import json

import pytest
import torch

import whole_run
from harness.contender import Wrong
from harness.goals import goals
from whole_run import GOALS, RUNS, DenseRun, Phase, PrunedRun, RunRow


@pytest.fixture
def tiny():
    return whole_run.parse(["--tiny", "--epochs", "2", "--steps", "5", "--duty", "0.4"])


def data():
    torch.manual_seed(0)
    return [(torch.randn(4, 3, 8, 8), torch.randint(10, (4,))) for _ in range(2)]


def test_what_a_phase_predicts():
    phase = Phase.of([9.0, 2.0, 1.0, 6.0])
    assert (phase.steps, phase.first, phase.later, phase.total, phase.predicted) == (4, 9.0, 3.0, 18.0, 12.0)
    assert Phase.of([3.0]).predicted == 3


@pytest.mark.parametrize("mode", whole_run.MODES)
def test_an_epoch_has_a_phase_between_any_two_changes_of_masks(mode, tiny):
    batches, seen = data(), []
    run = PrunedRun("vgg_small", "nchw", mode, batches[0][0], tiny)

    class Counting:
        """A step takes 10 ms, and 100 ms where it is the first with its widths; an epoch's end takes 7."""

        def __call__(self, work):
            before = run.method.steps
            work()
            if run.method.steps == before + 1:
                widths = [int(m.weight.shape[0]) for m in run.method.net.modules() if isinstance(m, torch.nn.Conv2d)]
                seen.append(tuple(widths))
                return 100.0 if before in (0, 3) else 10.0
            return 7.0

    for _ in range(2):
        run.epoch(batches, 5, Counting())
    assert [(p.steps, p.first, p.later) for p in run.phases] == [(3, 100, 10), (2, 100, 10)] * 2
    assert run.ends == [7, 7] and run.seconds == pytest.approx((4 * 100 + 6 * 10 + 14) / 1e3)
    assert run.predicted == pytest.approx(0.1) and run.live == 0.5 and run.method.finished
    assert (len(set(seen)) > 1) == (mode == "compacted")  # the others keep their width


def test_dense_runs_have_one_phase_an_epoch_and_nan_is_an_error(tiny):
    run = DenseRun("vgg_small", "channels_last")
    run.epoch(data(), 3, whole_run.Clock("cpu"))
    assert [p.steps for p in run.phases] == [3] and run.seconds >= run.phases[0].total / 1e3
    with torch.no_grad():
        run.model.classifier.bias.fill_(torch.nan)
    with pytest.raises(Wrong, match="expected finite losses"):
        run.epoch(data(), 1, whole_run.Clock("cpu"))


def make_row(**changes):
    row = dict(network="resnet20", batch=64, mode="compacted", rate=0.5, duty=0.1, coupling="joint", epochs=8, steps=60)
    row |= dict(layout="nchw", live=0.5, dense_s=40.0, run_s=20.0, changes_s=0.5, ends_s=0.1, setup_s=1.0)
    return RunRow(**row | dict(vs_dense=2.0, predicted_vs_dense=2.05, of_prediction=0.976) | changes)


def test_goals():
    rows = [make_row(), make_row(network="resnet56", of_prediction=0.9), make_row(mode="masked", of_prediction=0.5)]
    (found,) = goals([*rows, make_row(rate=0.7, of_prediction=0.1)], GOALS)
    assert (found.rows, found.failing, found.reached) == (2, 1, 0.9)
    assert found.failing_most == "resnet56 compacted joint kept 0.5: 0.90"


@pytest.mark.slow
def test_end_to_end(tmp_path, capsys):
    files = ["--json", str(tmp_path / "w.json"), "--md", str(tmp_path / "w.md")]
    argv = ["--tiny", "--networks", "vgg_small", "--epochs", "2", "--steps", "4", "--threads", "1"]
    assert whole_run.main([*argv, *files]) == 0
    rows, _ = RUNS.read(tmp_path / "w.json")
    assert [r.mode for r in rows] == ["compacted", "masked"]
    for row in rows:
        assert row.vs_dense == pytest.approx(row.dense_s / row.run_s) and row.live == 0.5
        assert row.of_prediction == pytest.approx(row.vs_dense / row.predicted_vs_dense)
        assert [phase[0] for phase in row.phases] == [3, 1, 3, 1] and row.setup_s > 0
    assert len(json.loads((tmp_path / "w.json").read_text())["goals"]) == 1
    assert "vgg_small, compacted mode: " in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["--networks", "resnet18"], ["--modes", "dense"], ["--duty", "2"], ["--epochs", "0"]])
def test_bad_command_lines_are_refused(argv, capsys):
    with pytest.raises(SystemExit):
        whole_run.main(argv)
    assert f"argument {argv[0]}" in capsys.readouterr().err
