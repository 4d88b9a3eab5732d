"""The harness in runs that may be cut short or may fail, and over many kinds of masks."""

from __future__ import annotations

import csv
import json

import pytest
import torch

import conv
from cases.benchmark_layers import SMALL
from harness import command, record
from layers import jobs
from layers.baselines import Ours
from layers.masks import live_count, make_masks
from layers.problems import Problem, load_suite
from layers.report import LAYERS, read_rows

TWO = ["--problem", SMALL, "--problem", 'n1c8h6k16r1 "test:light"', "--rounds", "1", "--threads", "1"]


def files(folder):
    return [word for name in ("json", "csv", "md") for word in (f"--{name}", str(folder / f"r.{name}"))]


# ---- block masks


@pytest.mark.parametrize("kept", [0.01, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(
    ("line", "block", "grid"),
    [
        ("n1c24h4k40r3s1p1g1", "16x8", (1, 3, 3)),  # the last filters are a block of 8
        ("n1c64h4k128r1", "64x16", (1, 2, 4)),
        ("n1c24h4k40r3s1p1g2", "16x8", (2, 2, 2)),
        ("n1c12h6k12r3s1p1g12", "64x16", (12, 1, 1)),
        ("n1c3h6k8r3", "64x16", (1, 1, 1)),
    ],
)
def test_block_masks_have_exact_counts(line, block, grid, kept):
    p = Problem.parse(line)
    masks = make_masks(p, "block", block, kept)
    assert masks.filter is None and masks.input is None and torch.equal(masks.kernel, masks.pairs)
    groups, rows, columns = grid
    height, width = map(int, block.split("x"))
    blocks = [
        tile
        for group in masks.kernel.view(groups, p.filters // groups, -1)
        for row in group.split(height)
        for tile in row.split(width, 1)
    ]
    assert len(blocks) == groups * rows * columns
    assert all(tile.all() or not tile.any() for tile in blocks)
    assert sum(bool(tile.any()) for tile in blocks) == live_count(len(blocks), kept)


def test_masks_of_all_kinds_in_one_run(tmp_path):
    argv = ["--problem", "n2c16h6k32r3s1p1g1", "--mask", "block", "filter", "kernel", "--side", "out", "both"]
    argv += [
        "--block",
        "8x4",
        "--kept",
        "0.5",
        "--batch",
        "3",
        "--dtype",
        "bfloat16",
        "--rounds",
        "1",
        "--threads",
        "1",
    ]
    assert conv.main([*argv, "--baselines", "limit", *files(tmp_path)]) == 0
    rows = read_rows(tmp_path / "r.json")
    assert [(r.mask, r.side) for r in rows] == [
        ("block", "8x4"),
        ("filter", "out"),
        ("filter", "both"),
        ("kernel", "-"),
    ]
    assert all(r.problem.startswith("n3c16") and r.density == 0.5 for r in rows if r.side != "both")
    assert all((r.dtype, r.device, r.clock, r.compaction_ms) == ("bfloat16", "cpu", "wall", None) for r in rows)
    assert [r.limit_ms is None for r in rows] == [True, False, False, True]
    assert "tflops" not in (tmp_path / "r.md").read_text()  # shown for a GPU only
    with (tmp_path / "r.csv").open() as file:
        assert [float(r["density"]) for r in csv.DictReader(file)] == [0.5, 0.5, 0.25, 0.5]


def test_float16_is_checked_and_timed(tmp_path):
    assert conv.main([*TWO, "--dtype", "float16", *files(tmp_path)]) == 0
    assert {r.dtype for r in read_rows(tmp_path / "r.json")} == {"float16"}


def test_batches_by_suite_or_for_all():
    a, b = load_suite("tiny")[0], load_suite("resnet50")[0]
    assert [jobs.rebatched(p, {"": 3, "tiny": 5}).batch for p in (a, b)] == [5, 3]
    assert jobs.rebatched(b, {"tiny": 5}) == b


# ---- runs that are cut short


def not_run(folder):
    return json.loads((folder / "r.json").read_text())["not_run"]


def test_heavy_problems_first_and_keep_ratios_as_given():
    heavy, light = Problem.parse(SMALL), Problem.parse('n1c8h6k16r1 "test:light"')
    other = Problem.parse('n1c8h6k8r1 "other:all"')  # all of its own suite
    todo = jobs.jobs([light, heavy, other], [("filter", "both"), ("block", "8x4")], [1.0, 0.5])
    ordered = jobs.most_telling_first(todo, [0.5, 1.0])
    assert [(j.problem, j.keep_ratio) for j in ordered[::2]] == [
        (p, k) for k in (0.5, 1.0) for p in (other, heavy, light)
    ]
    assert [j.mask for j in ordered[:2]] == ["filter", "block"] and sorted(map(id, todo)) == sorted(map(id, ordered))


def test_out_of_time_names_what_was_not_run(tmp_path, monkeypatch, capsys):
    measure, now = conv.measure, [0.0]

    def slow(*args):
        now[0] += 40
        return measure(*args)

    monkeypatch.setattr(conv, "measure", slow)
    monkeypatch.setattr(conv.time, "monotonic", lambda: now[0])
    assert conv.main([*TWO, "--kept", "0.5", "1", "--minutes", "1", *files(tmp_path)]) == 0
    assert [(r.name, r.kept) for r in read_rows(tmp_path / "r.json")] == [
        ("test:small", 0.5),
        ("test:light", 0.5),
    ]
    assert not_run(tmp_path) == ["test:small filter both kept 1", "test:light filter both kept 1"]
    assert (
        "## Not run, for want of time\n\n- filter both kept 1: 2: test:small, test:light\n"
        in (tmp_path / "r.md").read_text()
    )
    printed = capsys.readouterr()
    assert "out of time" in printed.err and "not run:\n- filter both kept 1: 2: test:small" in printed.out


def test_without_any_time_all_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(conv, "measure", lambda *_: pytest.fail("ran"))
    assert conv.main([*TWO, "--minutes", "1e-9", *files(tmp_path)]) == 1
    assert len(not_run(tmp_path)) == 2 and "test:light" in (tmp_path / "r.md").read_text()
    assert (tmp_path / "r.csv").read_text().startswith("problem,name,times")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_run_that_is_killed_has_written_what_was_done_and_is_resumed(tmp_path, monkeypatch, error):
    """An interruption ends in order; with SystemExit only what had been written before is there."""
    measure, seen = conv.measure, []

    def dies(case, direction, args, job):
        seen.append(str(job))
        if len(seen) == 3:
            raise error
        return measure(case, direction, args, job)

    monkeypatch.setattr(conv, "measure", dies)
    monkeypatch.setattr(record, "WRITE_EVERY", -1)
    argv = [*TWO, "--kept", "1", "0.5", *files(tmp_path), "--resume"]
    if error is SystemExit:
        with pytest.raises(SystemExit):
            conv.main(argv)
    else:
        assert conv.main(argv) == 0
    assert [r.kept for r in read_rows(tmp_path / "r.json")] == [1.0, 0.5]
    left = ["test:light filter both kept 1", "test:light filter both kept 0.5"]
    assert not_run(tmp_path) == left and len((tmp_path / "r.csv").read_text().splitlines()) == 3
    assert not list(tmp_path.glob("*.part"))
    assert conv.main(argv) == 0
    assert seen[3:] == left and not_run(tmp_path) == []
    assert [r.job for r in read_rows(tmp_path / "r.json")] == [*seen[:2], *left]


def test_a_time_limits_signal_interrupts():
    with pytest.raises(KeyboardInterrupt):
        command.stop()


# ---- what fails


def spoil(monkeypatch, filters, error):
    forward = Ours.forward

    def spoiled(self):
        if self.problem.filters == filters and error is not None:
            raise error
        return forward(self) * (2 if self.problem.filters == filters else 1)

    monkeypatch.setattr(Ours, "forward", spoiled)


@pytest.mark.parametrize("error", [None, RuntimeError("misaligned\naddress")])
def test_going_on_after_a_failure_of_ours(tmp_path, monkeypatch, capsys, error):
    spoil(monkeypatch, 16, error)
    assert conv.main([*TWO, "--keep-going", *files(tmp_path)]) == 1
    assert [r.name for r in read_rows(tmp_path / "r.json")] == ["test:small"]
    failed = json.loads((tmp_path / "r.json").read_text())["failed"]
    assert list(failed) == ["test:light filter both kept 0.5"]
    assert ("RuntimeError: misaligned" if error else "is wrong, largest error") in failed[list(failed)[0]]
    assert "## Failed\n\n- test:light" in (tmp_path / "r.md").read_text()
    assert "failed:\n- test:light" in capsys.readouterr().out


def test_a_lost_device_ends_the_run_and_the_rest_is_left(tmp_path, monkeypatch):
    spoil(monkeypatch, 8, RuntimeError("an illegal memory access"))
    monkeypatch.setattr(command, "alive", lambda device: False)
    argv = [*TWO, "--keep-going", "--resume", *files(tmp_path)]
    assert conv.main(argv) == command.LOST
    assert not_run(tmp_path) == ["test:light filter both kept 0.5"]
    assert conv.main(argv) == 1  # the rest is done, the failure stays
    rows, missing = LAYERS.read(tmp_path / "r.json")
    assert [r.name for r in rows] == ["test:light"] and list(missing.failed) == ["test:small filter both kept 0.5"]
