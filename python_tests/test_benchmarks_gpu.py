"""What the harness does for GPUs and for runs that may be cut short, tried on CPU."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from test_benchmarks import SMALL, found, make_row

import conv
import gpu
import jobs
import prunekernels as pk
import report
import sanitize
from problems import Problem, live_count, load_suite, make_masks
from rivals import Ours, Wrong

BENCHMARKS = Path(conv.__file__).parent
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
    assert conv.main([*argv, "--rivals", "limit", *files(tmp_path)]) == 0
    rows = report.read_json(tmp_path / "r.json")
    assert [(r.mask, r.side) for r in rows] == [
        ("block", "8x4"),
        ("filter", "out"),
        ("filter", "both"),
        ("kernel", "-"),
    ]
    assert all(r.problem.startswith("n3c16") and r.density == 0.5 for r in rows if r.side != "both")
    assert all((r.dtype, r.device, r.clock, r.compaction_ms) == ("bfloat16", "cpu", "wall", None) for r in rows)
    assert [r.limit_ms is None for r in rows] == [True, False, False, True]
    assert "tflops" not in (tmp_path / "r.md").read_text()  # of interest on a GPU
    with (tmp_path / "r.csv").open() as file:
        assert [float(r["density"]) for r in csv.DictReader(file)] == [0.5, 0.5, 0.25, 0.5]


def test_float16_is_checked_and_timed(tmp_path):
    assert conv.main([*TWO, "--dtype", "float16", *files(tmp_path)]) == 0
    assert {r.dtype for r in report.read_json(tmp_path / "r.json")} == {"float16"}


def test_batches_by_suite_or_for_all():
    a, b = load_suite("tiny")[0], load_suite("resnet50")[0]
    assert [jobs.rebatched(p, {"": 3, "tiny": 5}).batch for p in (a, b)] == [5, 3]
    assert jobs.rebatched(b, {"tiny": 5}) == b


# ---- runs that are cut short


def not_run(folder):
    return json.loads((folder / "r.json").read_text())["not_run"]


def test_heavy_problems_first_and_kept_shares_as_given():
    heavy, light = Problem.parse(SMALL), Problem.parse('n1c8h6k16r1 "test:light"')
    other = Problem.parse('n1c8h6k8r1 "other:all"')  # all of its own suite
    todo = jobs.jobs([light, heavy, other], [("filter", "both"), ("block", "8x4")], [1.0, 0.5])
    ordered = jobs.most_telling_first(todo, [0.5, 1.0])
    assert [(j.problem, j.kept) for j in ordered[::2]] == [(p, k) for k in (0.5, 1.0) for p in (other, heavy, light)]
    assert [j.mask for j in ordered[:2]] == ["filter", "block"] and sorted(map(id, todo)) == sorted(map(id, ordered))


def test_out_of_time_names_what_was_not_run(tmp_path, monkeypatch, capsys):
    measure, now = conv.measure, [0.0]

    def slow(*args):
        now[0] += 40
        return measure(*args)

    monkeypatch.setattr(conv, "measure", slow)
    monkeypatch.setattr(conv.time, "monotonic", lambda: now[0])
    assert conv.main([*TWO, "--kept", "0.5", "1", "--minutes", "1", *files(tmp_path)]) == 0
    assert [(r.name, r.kept) for r in report.read_json(tmp_path / "r.json")] == [
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
    monkeypatch.setattr(jobs, "WRITE_EVERY", -1)
    argv = [*TWO, "--kept", "1", "0.5", *files(tmp_path), "--resume"]
    if error is SystemExit:
        with pytest.raises(SystemExit):
            conv.main(argv)
    else:
        assert conv.main(argv) == 0
    assert [r.kept for r in report.read_json(tmp_path / "r.json")] == [1.0, 0.5]
    left = ["test:light filter both kept 1", "test:light filter both kept 0.5"]
    assert not_run(tmp_path) == left and len((tmp_path / "r.csv").read_text().splitlines()) == 3
    assert not list(tmp_path.glob("*.part"))
    assert conv.main(argv) == 0
    assert seen[3:] == left and not_run(tmp_path) == []
    assert [r.job for r in report.read_json(tmp_path / "r.json")] == [*seen[:2], *left]


def test_a_time_limits_signal_interrupts():
    with pytest.raises(KeyboardInterrupt):
        conv.stop()


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
    assert [r.name for r in report.read_json(tmp_path / "r.json")] == ["test:small"]
    failed = json.loads((tmp_path / "r.json").read_text())["failed"]
    assert list(failed) == ["test:light filter both kept 0.5"]
    assert ("RuntimeError: misaligned" if error else "is wrong, largest error") in failed[list(failed)[0]]
    assert "## Failed\n\n- test:light" in (tmp_path / "r.md").read_text()
    assert "failed:\n- test:light" in capsys.readouterr().out


def test_a_lost_device_ends_the_run_and_the_rest_is_left(tmp_path, monkeypatch):
    spoil(monkeypatch, 8, RuntimeError("an illegal memory access"))
    monkeypatch.setattr(conv, "alive", lambda device: False)
    argv = [*TWO, "--keep-going", "--resume", *files(tmp_path)]
    assert conv.main(argv) == conv.LOST
    assert not_run(tmp_path) == ["test:light filter both kept 0.5"]
    assert conv.main(argv) == 1  # the rest is done, the failure stays
    rows, missing = report.read_results(tmp_path / "r.json")
    assert [r.name for r in rows] == ["test:light"] and list(missing.failed) == ["test:small filter both kept 0.5"]


# ---- CUDA graphs


class Stub:
    problem, direction = Problem.parse(SMALL), "fwd"

    def __init__(self):
        self.begun = 0

    def begin(self):
        self.begun += 1


def test_graphs_of_all_or_calls_of_all(monkeypatch, capsys):
    rivals = {"dense/nchw": Stub(), "limit/nchw": Stub()}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu, "record", lambda rival: f"graph of {id(rival)}")
    assert gpu.recorded(rivals) == {key: f"graph of {id(rival)}" for key, rival in rivals.items()}

    def refuses(rival):
        if rival is rivals["limit/nchw"]:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(gpu, "record", refuses)
    assert gpu.recorded(rivals) is None and [r.begun for r in rivals.values()] == [1, 1]
    assert "limit/nchw, fwd: no CUDA graph, RuntimeError: operation not permitted" in capsys.readouterr().err


def test_a_wrong_replay_of_ours_is_a_wrong_result(monkeypatch):
    class Mine(Ours, Stub):
        begin, __init__ = Stub.begin, Stub.__init__

    def record(rival):
        raise Wrong("y is wrong")

    monkeypatch.setattr(gpu, "record", record)
    with pytest.raises(Wrong, match="y is wrong, replayed from a CUDA graph"):
        gpu.recorded({"ours/nchw": Mine()})


def test_the_cpu_is_always_alive():
    assert gpu.alive("cpu")


# ---- rates and goals

GPU = dict(device="cuda", dtype="bfloat16", layout="channels_last", direction="fwd+bwd", clock="graph")
PROBLEM = "n2c8h6k4r3s1p1g1"  # 72 pixels in and out, 32 kernels


def test_rates_count_live_work_and_the_fewest_bytes():
    row = make_row(problem=PROBLEM, live_k=2, live_c=4, live_kernels=8, ms=1e-3, direction="fwd")
    assert row.density == 0.25
    assert row.tflops * 1e6 == pytest.approx(2 * 8 * 9 * 72)  # in a microsecond
    assert row.gb_s * 1e3 == pytest.approx(4 * (4 * 72 + 8 * 9 + 4 * 72))
    training = make_row(problem=PROBLEM, live_k=2, live_c=4, live_kernels=8, ms=1e-3, **GPU)
    assert training.tflops == pytest.approx(3 * row.tflops)
    sizes = (4 * 72 + 8 * 9 + 4 * 72) + (2 * 72 + 8 * 9 + 8 * 72) + (4 * 72 + 2 * 72 + 32 * 9)
    assert training.gb_s * 1e3 == pytest.approx(2 * sizes)
    image = make_row(problem="n2c3h6k4r3s1p1g1", live_kernels=12, ms=1e-3, direction="fwd+bwd")
    assert image.tflops * 1e6 == pytest.approx(2 * 2 * 12 * 9 * 72)


def test_goals_of_gpu_layers():
    rows = [
        make_row(**GPU, name="good", kept=0.7, ms=1.0, limit_ms=0.9, compaction_ms=1.4),
        make_row(**GPU, name="poor", kept=0.3, ms=1.0, limit_ms=0.8, compaction_ms=1.0, times=3),
        make_row(**GPU, name="lost", kept=1.0, ms=4.0, side="out"),
        make_row(**GPU | {"dtype": "float32"}, name="single", kept=0.5, limit_ms=0.1),
        make_row(**GPU | {"layout": "nchw"}, name="planes", kept=0.5, limit_ms=0.1),
    ]
    goals = found(rows)
    assert len(goals) == 3  # none of the CPU's
    rival = goals["GPU bf16 filters in and out: over compaction, mean >= 1.3"]
    assert (rival.reached, rival.rows, rival.verdict) == (pytest.approx(1.4**0.25), 2, "missed")
    limit = goals["GPU bf16 filters in and out: share of limit, mean >= 0.85"]
    assert (limit.reached, limit.failing, limit.verdict) == (pytest.approx((0.9 * 0.8**3) ** 0.25), 1, "missed")
    dense = goals["GPU any mask: over dense, each >= 0.98"]
    assert (dense.reached, dense.rows, dense.failing_most) == (0.5, 5, "lost out kept 1: 0.50")


def test_goal_of_gpu_blocks_is_measured_by_the_exact_density():
    block = dict(mask="block", side="64x16", limit_ms=None, problem=PROBLEM)
    rows = [
        make_row(**GPU | block, name="a", live_kernels=8, kept=0.3, ms=1.0, dense_ms=4.0),
        make_row(**GPU | block, name="b", live_kernels=16, kept=0.5, ms=1.0, dense_ms=0.9),
        make_row(**GPU | block, name="full", live_kernels=32, kept=0.9, ms=1.0, dense_ms=0.99),
    ]
    goals = found(rows)
    mean = goals["GPU bf16 blocks: over dense x density, mean >= 0.7"]
    assert (mean.reached, mean.rows, mean.failing) == (pytest.approx((1 * 0.45) ** 0.5), 2, 1)
    assert mean.failing_most == "b blocks kept 0.5: 0.45"
    assert goals["GPU any mask: over dense, each >= 0.98"].failing_most == "b blocks kept 0.5: 0.90"


def test_gpu_rows_survive_files_and_show_their_rates(tmp_path):
    rows = [make_row(**GPU, problem=PROBLEM), make_row(**GPU | {"dtype": "float32"}, problem=PROBLEM)]
    missing = report.Missing({"a filter both kept 1": "Wrong: b"}, ["c filter both kept 1"])
    report.write_json(tmp_path / "r.json", rows, {"gpu": "some"}, missing)
    assert report.read_results(tmp_path / "r.json") == (rows, missing)
    text = report.markdown(rows, {"gpu": "some"}, missing)
    assert "| tflops | gb_s | clock |" in text and "| dtype | mask |" in text
    assert {s.dtype for s in report.summarise(rows)} == {"bfloat16", "float32"}


# ---- scripts


def script(*argv, **environment):
    command = ["bash", str(BENCHMARKS / "gpu.sh"), *argv]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=60)


def test_gpu_script_is_well_formed():
    assert subprocess.run(["bash", "-n", BENCHMARKS / "gpu.sh"]).returncode == 0
    assert os.access(BENCHMARKS / "gpu.sh", os.X_OK)


@pytest.mark.parametrize("quick", [(), ("--quick",)])
def test_a_dry_run_prints_the_steps(quick, tmp_path):
    done = script("--dry-run", *quick, COMMIT="abc1234-dirty", OUT=str(tmp_path / "out"))
    assert done.returncode == 0 and not (tmp_path / "out").exists()
    steps = [line.partition(" at most")[0].strip() for line in done.stdout.splitlines() if " at most " in line]
    assert steps[:2] == ["header", "build"] and "memcheck" in steps and "racecheck" in steps
    assert steps[-1] == ("bench bf16" if quick else "bench calls")
    assert f"abc1234-dirty{'-quick' if quick else ''}-bf16.json" in done.stdout
    if not quick:
        assert "--mask filter block kernel --side both out in" in done.stdout and "bench fp32" in steps


def test_benchmarks_the_script_runs_are_understood():
    """Its command lines, but for the device."""
    lines = [line for line in script("--dry-run").stdout.splitlines() if line.startswith("bench ")]
    assert len(lines) == 3
    for line in lines:
        words = line.partition("conv.py ")[2].split()
        words[words.index("cuda")] = "cpu"
        words = [word.replace("out/gpu/", "") for word in words]
        assert conv.parse(words)[1]


@pytest.mark.parametrize("argv", [["--only", "all"], ["--only"], ["--fast"]])
def test_gpu_script_refuses(argv):
    done = script(*argv)
    assert done.returncode == 2 and "gpu.sh: " in done.stderr


PY = """#!/usr/bin/env bash
case "$*" in
  *get_device_capability*) echo 9.0a ;;
  *setup.py*) echo "builds for $TORCH_CUDA_ARCH_LIST"; sleep "${SLOW:-0}" ;;
  *"import pytest"*) exit 1 ;;
  *conv.py*) [[ -e $OUT/lost ]] && exit 0; touch "$OUT/lost"; exit 3 ;;
esac
"""
SANITIZER = """#!/usr/bin/env bash
case "$*" in
  --help) echo "--kernel-name arg" ;;
  *racecheck*) echo "========= ERROR"; exit 9 ;;
  *) echo "caching off: $PYTORCH_NO_CUDA_MEMORY_CACHING" ;;
esac
"""
TOOLS = {"nvidia-smi": "#!/usr/bin/env bash\necho NVIDIA H100 80GB HBM3\n", "py": PY, "compute-sanitizer": SANITIZER}


@pytest.fixture
def machine(tmp_path):
    """A make-believe GPU machine: whatever is run there is one of the tools above."""
    for name, text in TOOLS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    return dict(PATH=path, PYTHON=str(tmp_path / "py"), OUT=str(tmp_path / "out"), COMMIT="abc1234")


def results(done):
    """The script's last table: by step, what became of it."""
    lines = done.stdout.rpartition("\n=== h100-80gb-hbm3, abc1234")[2].splitlines()
    return {line[:20].strip(): line.partition(" s  ")[2] for line in lines if " s  " in line}


def test_gpu_script_goes_on_after_a_lost_device(machine, tmp_path):
    done = script("--only", "bench", **machine)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "builds for 9.0a" in done.stdout and "-h100-80gb-hbm3-abc1234-bf16.json" in done.stdout
    assert done.stdout.count("\n=== bench bf16") == 2 and "failed, exit code 3" in done.stdout
    assert {name: text for name, text in results(done).items() if name.startswith("bench")} == dict.fromkeys(
        ("bench bf16", "bench fp32", "bench calls"), "ok"
    )
    assert "=== bench calls" in (tmp_path / "out" / "log.txt").read_text()


def test_gpu_script_reports_every_tool(machine):
    done = script("--quick", "--only", "tests", "--only", "sanitize", **machine)
    assert done.returncode == 1
    found = results(done)
    assert found["memcheck"] == "ok" and found["racecheck"] == "failed, exit code 9"
    assert "caching off: 1" in done.stdout and done.stdout.count("--kernel-name kns=prunekernels") == 2
    assert "no python_tests/test_cuda.py" in found["tests"] or "no pytest" in found["tests"]


def test_gpu_script_keeps_to_its_limit(machine):
    began = time.monotonic()
    done = script(LIMIT="6", SLOW="30", **machine)
    assert done.returncode == 1 and time.monotonic() - began < 20
    assert "build" in done.stdout and "stopped at its limit" in done.stdout


# ---- what a sanitizer watches


def test_sanitizers_trials_are_right_on_cpu(monkeypatch, capsys):
    todo = sanitize.trials()
    assert len(todo) == len(set(todo)) == len(sanitize.LINES) * 3 * 3 * 2 * len(sanitize.PLANS)
    monkeypatch.setattr(sanitize, "trials", lambda: todo[:40])
    assert sanitize.main(["--device", "cpu"]) == 0
    assert capsys.readouterr().out == "40 trials\n"
    assert sanitize.main(["--device", "cpu", "--minutes", "1e-9"]) == 0
    assert "out of time: 40 of 40 trials not run" in capsys.readouterr().out


def test_a_wrong_trial_is_named(monkeypatch, capsys):
    monkeypatch.setattr(
        sanitize, "trials", lambda: [(sanitize.LINES[0], "float32", ("filter", "both"), "nchw", "dense")]
    )
    monkeypatch.setattr(pk, "masked_conv2d", lambda x, w, **_: torch.zeros(2, 40, 9, 7) * w.sum() * x.sum())
    assert sanitize.main(["--device", "cpu"]) == 1
    assert f"failed: {sanitize.LINES[0]} float32 nchw filter masks, plan dense: Wrong: " in capsys.readouterr().out
