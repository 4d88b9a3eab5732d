"""benchmarks/mask_change.py: which masks follow each other, its rows, goals and files."""

from __future__ import annotations

import json

import pytest
import torch

import mask_change
from cases.benchmark_networks import make_setting
from harness.goals import goals
from mask_change import CHANGED, GOALS, MODES, ChangeRow, masks_of


def counts(live):
    return [int(mask.sum()) for mask in live.filters.values()]


def test_masks_of_each_kind_of_change():
    setting = make_setting()
    new, alike, both = ([masks_of(setting, change, i) for i in range(7)] for change in mask_change.CHANGES)
    assert len({tuple(counts(live)) for live in new}) == 7
    assert len({tuple(counts(live)) for live in alike}) == 1
    first = "stem.conv"
    assert not any(a.filters[first].equal(b.filters[first]) for a, b in zip(alike, alike[1:], strict=False))
    assert all(both[i].filters[first].equal(both[i % 2].filters[first]) for i in range(7))
    assert not both[0].filters[first].equal(both[1].filters[first])


@pytest.mark.parametrize("mode", MODES)
def test_a_row_in_compacted_mode_and_others(mode, monkeypatch):
    """Which steps are timed as what: a step's time is the number of steps so far, all else takes a millisecond."""
    steps, real = [], MODES[mode]

    class Counted(real):
        def run_counted(self):
            steps.append(tuple(int(p.numel()) for p in self.model.parameters()))

        def enter(self, direction):
            super().enter(direction)
            self.run = self.run_counted

    def clock(run):
        before = len(steps)
        run()
        return float(len(steps)) if len(steps) > before else 1.0

    monkeypatch.setitem(MODES, mode, Counted)
    setting = make_setting()
    monkeypatch.setattr(mask_change, "CompactedMode", Counted if mode == "compacted" else int)
    row = mask_change.measured(setting, mode, "new", 3, clock)
    assert len(steps) == mask_change.SEEN + 3 * (1 + mask_change.LATER)
    assert (row.first_ms, row.later_ms, row.set_ms) == (8, 10, 1)  # 4, 8, 12; 5 to 7, 9 to 11, 13 to 15
    assert (row.change_ms, row.leave_ms, row.enter_ms) == ((3, 1, 1) if mode == "compacted" else (1, None, None))
    assert row.extra_steps == pytest.approx((row.change_ms + 8) / 10 - 1)
    assert len(set(steps)) == (4 if mode == "compacted" else 1)  # the small network has new sizes each time


def make_row(**changes):
    row = dict(network="resnet20", batch=64, mode="compacted", change="new", changes=5, leave_ms=1.0, set_ms=1.0)
    row |= dict(enter_ms=2.0, change_ms=4.0, first_ms=70.0, later_ms=60.0, extra_steps=0.23)
    return ChangeRow(**row | changes)


def test_goals():
    rows = [
        make_row(),
        make_row(change="alike", change_ms=6.0),
        make_row(network="resnet50", change_ms=49.0, extra_steps=1.1),
        make_row(mode="masked", leave_ms=None, enter_ms=None, change_ms=80.0, extra_steps=9.0),
    ]
    small, large, steps, epoch = goals(rows, GOALS)
    assert (small.rows, small.reached, small.verdict) == (2, 6.0, "missed")
    assert small.failing_most == "resnet20 compacted alike kept 0.5: 6.00"
    assert (large.rows, large.verdict) == (1, "holds")
    assert (steps.rows, steps.failing, steps.reached) == (3, 1, 2.1)
    assert (epoch.rows, epoch.failing, epoch.reached) == (4, 1, 1.09)


@pytest.mark.slow
def test_end_to_end(tmp_path, capsys):
    threads = torch.get_num_threads()
    files = ["--json", str(tmp_path / "c.json"), "--md", str(tmp_path / "c.md")]
    argv = ["--tiny", "--networks", "resnet20", "--changes", "1", "--threads", "1"]
    assert mask_change.main([*argv, "--modes", "live", "compacted", *files]) == 0
    torch.set_num_threads(threads)
    rows, _ = CHANGED.read(tmp_path / "c.json")
    assert [(r.mode, r.change) for r in rows] == [(m, c) for m in ("live", "compacted") for c in mask_change.CHANGES]
    assert all(min(r.set_ms, r.first_ms, r.later_ms) > 0 for r in rows)
    assert [r.leave_ms is None for r in rows] == [True] * 3 + [False] * 3
    assert len(json.loads((tmp_path / "c.json").read_text())["goals"]) == 3
    assert "compacted mode, counts alternating: a change costs" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["--networks", "vgg16"], ["--modes", "dense"], ["--changes", "0"], ["--kinds", "x"]])
def test_bad_command_lines_are_refused(argv, capsys):
    with pytest.raises(SystemExit):
        mask_change.main(argv)
    assert f"argument {argv[0]}" in capsys.readouterr().err
