"""The scripts of a GPU machine's session, with stand-ins for the machine."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch

import conv
import network
import plans
import prunekernels as pk
import sanitize
from layers.problems import Problem

BENCHMARKS = Path(conv.__file__).parent


# ---- scripts


def script(*argv, **environment):
    command = ["bash", str(BENCHMARKS / "gpu.sh"), *argv]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=60)


def test_gpu_script_is_well_formed():
    assert subprocess.run(["bash", "-n", BENCHMARKS / "gpu.sh"]).returncode == 0
    assert os.access(BENCHMARKS / "gpu.sh", os.X_OK)


def dry_run(*argv, **environment):
    """The lines of the steps."""
    done = script("--dry-run", *argv, **environment)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if " at most " in line]


def test_a_dry_run_prints_the_steps(tmp_path):
    environment = dict(COMMIT="abc1234-dirty", OUT=str(tmp_path / "out"))

    def names(*argv):
        return [line.partition(" at most")[0].strip() for line in dry_run(*argv, **environment)]

    first = ["header", "build", "instructions", "tiles", "plans"]
    assert names("--quick") == first
    assert names() == [*first, "networks", "profile", "tests", "kernels that run", "memcheck", "racecheck"]
    assert names("--only", "bench") == ["header", "build", "bench bf16", "bench fp32", "bench calls"]
    assert any("abc1234-dirty-quick-plans.json" in line for line in dry_run("--quick", **environment))
    assert not (tmp_path / "out").exists()


def test_at_most_eight_files_come_back():
    files = {word for line in dry_run() for word in line.split() if word.startswith("out/gpu/")}
    assert 3 <= len(files) < 8  # and the log


def test_benchmarks_the_script_runs_are_understood():
    """Their command lines, but for the device."""
    lines = [*dry_run(), *dry_run("--only", "bench")]
    commands = [line.partition("benchmarks/")[2].split() for line in lines if "benchmarks/" in line]
    scripts = {"conv.py": conv, "network.py": network, "plans.py": plans, "sanitize.py": sanitize}
    seen = set()
    for name, *words in commands:
        words = [word.replace("out/gpu/", "") for word in words if word not in ("--device", "cuda")]
        assert scripts[name].parse([*words, "--device", "cpu"])
        seen.add(name)
    assert seen == set(scripts)


@pytest.mark.parametrize("argv", [["--only", "all"], ["--only"], ["--fast"]])
def test_gpu_script_refuses(argv):
    done = script(*argv)
    assert done.returncode == 2 and "gpu.sh: " in done.stderr


PY = """#!/usr/bin/env bash
case "$*" in
  *get_device_capability*) echo 9.0a ;;
  *find_toolkit*) [[ -z ${NO_TOOLKIT-} ]] && echo /a/toolkit || { echo no nvcc; exit 1; } ;;
  *setup.py*) echo "builds for $TORCH_CUDA_ARCH_LIST with $CUDA_HOME"; sleep "${SLOW:-0}" ;;
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
def gpu_machine(tmp_path):
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


def test_gpu_script_goes_on_after_a_lost_device(gpu_machine, tmp_path):
    done = script("--only", "bench", **gpu_machine)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "builds for 9.0a with /a/toolkit" in done.stdout and "-h100-80gb-hbm3-abc1234-bf16.json" in done.stdout
    assert done.stdout.count("\n=== bench bf16") == 2 and "failed, exit code 3" in done.stdout
    assert {name: text for name, text in results(done).items() if name.startswith("bench")} == dict.fromkeys(
        ("bench bf16", "bench fp32", "bench calls"), "ok"
    )
    assert "=== bench calls" in (tmp_path / "out" / "log.txt").read_text()


def test_gpu_script_wants_a_toolkit(gpu_machine):
    done = script(**gpu_machine, NO_TOOLKIT="1")
    assert (done.returncode, done.stderr) == (2, "gpu.sh: no nvcc\n")


def test_gpu_script_reports_every_tool(gpu_machine):
    done = script("--quick", "--only", "tests", "--only", "sanitize", **gpu_machine)
    assert done.returncode == 1
    found = results(done)
    assert found["memcheck"] == "ok" and found["racecheck"] == "failed, exit code 9"
    assert "caching off: 1" in done.stdout and done.stdout.count("--kernel-name kns=prunekernels") == 2
    assert "no python_tests/cuda/test_conv.py" in found["tests"] or "no pytest" in found["tests"]


def test_gpu_script_runs_the_parts_in_order(gpu_machine):
    done = script(**gpu_machine)
    found = results(done)
    assert list(found)[:5] == ["header", "build", "instructions", "tiles", "plans"]
    assert found["plans"] == found["networks"] == "ok" and "no ncu" in found["profile"]


@pytest.mark.slow
def test_gpu_script_keeps_to_its_limit(gpu_machine):
    began = time.monotonic()
    done = script(LIMIT="6", SLOW="30", **gpu_machine)
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


# ---- every plan of a few layers


def test_plans_are_timed_and_written(tmp_path, capsys):
    path = tmp_path / "plans.json"
    assert plans.main(["--suite", "tiny", "--seconds", "0.001", "--json", str(path)]) == 0
    body = json.loads(path.read_text())
    layers = {row["name"] for row in body["rows"]}
    assert len(body["rows"]) == len(layers) * 2 * 3 and body["header"]["kept"] == 0.5
    assert all({"dense", "compact"} <= set(row["ms"]) and not row["wrong"] for row in body["rows"])
    assert "tiny:3x3" in capsys.readouterr().out


def test_halves():
    problem = Problem.parse("n1c24h8k40r3s1p1g1")
    runs, single = (plans.halves(problem, runs, seed=0) for runs in (True, False))
    assert runs.filter.view(-1, 8).float().mean(1).unique().tolist() == [0, 1]
    assert (int(single.filter.sum()), int(single.input.sum())) == (20, 12)
    assert plans.halves(Problem.parse("n1c3h8k40r3s1p1g1"), True, seed=0).input.all()  # an image
