"""What a result has to say about where it comes from."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

import prunekernels as pk
from harness.gpu import ceilings, driver

ROOT = Path(__file__).resolve().parents[2]


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@cache
def commit() -> str | None:
    """Short hash, with -dirty where tracked files differ; None outside a checkout. COMMIT says it where git cannot."""
    if given := os.environ.get("COMMIT"):
        return given
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None


def header(args: argparse.Namespace, argv: Sequence[str], script: str = "conv.py") -> dict[str, object]:
    head: dict[str, object] = {
        "command": shlex.join(["python", f"benchmarks/{script}", *argv]),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load when done": round(os.getloadavg()[0], 1),  # above the threads: somebody else was at work
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
    layout = {"layout of ours" if script == "conv.py" else "layout": args.layout}
    return head | {"dtype": args.dtype, "device": args.device, "plan": args.plan} | layout
