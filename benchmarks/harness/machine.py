"""The header of a results file: the machine, the versions and the command that the results come from."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shlex
import statistics
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch

import prunekernels as pk
from harness.timing import WARMUPS, Clock

ROOT = Path(__file__).resolve().parents[2]


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    """What a command prints; None where it fails or does not exist."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None


@cache
def commit() -> str | None:
    """Short hash, with -dirty where tracked files differ; None outside a checkout. COMMIT in the environment overrides
    git."""
    git = ("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*")
    return os.environ.get("COMMIT") or _output(*git)


@cache
def driver() -> str | None:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")


@cache
def ceilings(dtype: torch.dtype) -> dict[str, float]:
    """What the GPU reaches: bytes read and written by a copy, and the rate of a matrix product of random numbers
    (zeros are faster)."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    size = 8192 if dtype != torch.float32 else 4096
    matrix = torch.randn(size, size, device="cuda", dtype=dtype)
    copy = _median_ms(lambda: target.copy_(source))
    product = _median_ms(lambda: matrix @ matrix)
    return {"copy GB/s": round(2 * 2**30 / copy / 1e6), "matrix TFLOP/s": round(2 * size**3 / product / 1e9, 1)}


def _median_ms(run: Callable[[], object]) -> float:
    clock = Clock("cuda")
    return statistics.median([clock(run) for _ in range(WARMUPS + 7)][WARMUPS:])


def header(
    script: str, argv: Sequence[str], args: argparse.Namespace, about: dict[str, object] | None = None
) -> dict[str, object]:
    """args: device, and on CUDA dtype and clock; about: what the command adds."""
    head: dict[str, object] = {
        "command": shlex.join(["python", f"benchmarks/{script}", *argv]),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load when done": round(os.getloadavg()[0], 1),  # above the threads: other processes were at work
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torch compiler": next((s.strip(" -") for s in torch.__config__.show().splitlines() if "GCC" in s), None),
        "torch isa": torch.backends.cpu.get_cpu_capability(),
        "build": pk.build_info(),
    }
    if args.device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        head |= {"gpu": torch.cuda.get_device_name(), "compute capability": f"{major}.{minor}", "driver": driver()}
        head |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "clock": args.clock}
        head |= ceilings(getattr(torch, args.dtype))
    return head | {"dtype": args.dtype, "device": args.device} | (about or {})
