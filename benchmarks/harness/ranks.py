"""Several processes (ranks) of this machine that talk over a loopback of their own, and the bytes that they send."""

from __future__ import annotations

import ctypes
import datetime
import fcntl
import multiprocessing
import os
import pickle
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 300  # seconds that a rank waits for the others
CLONE_NEWNET, GET_FLAGS, SET_FLAGS, UP = 0x40000000, 0x8913, 0x8914, 1  # of Linux: sched.h, sockios.h, if.h
QUIET = 0.1  # seconds after which the last acknowledgements have arrived


def own_network() -> bool:
    """Moves this thread, and the processes that it starts from now on, to a network that has nothing but a loopback.

    False: the system has none, or does not allow it; it takes root.
    """
    if not sys.platform.startswith("linux") or ctypes.CDLL(None).unshare(CLONE_NEWNET) != 0:
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(any_socket, GET_FLAGS, request))[1]
        fcntl.ioctl(any_socket, SET_FLAGS, struct.pack("16sh14x", b"lo", flags | UP))
    return True


def sent_bytes() -> int:
    """What went over the loopback of this process's network so far, with the headers of TCP, IP and Ethernet."""
    counts = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(counts.split(":")[1].split()[8])


class Meter:
    """Counts what all ranks send while they do something. Every rank calls it; they meet without a byte sent."""

    def __init__(self, barrier: Any, counts: bool) -> None:
        self._barrier, self._counts = barrier, counts

    def _now(self) -> int:
        self._barrier.wait(TIMEOUT)
        if self._counts:
            time.sleep(QUIET)
        sent = sent_bytes() if self._counts else 0
        self._barrier.wait(TIMEOUT)
        return sent

    def __call__(self, work: Callable[[], object]) -> float | None:
        """The bytes, per rank; None where the ranks have no network of their own."""
        before = self._now()
        work()
        return (self._now() - before) / dist.get_world_size() if self._counts else None


def run_ranks(work: Callable[..., Any], ranks: int, *args: Any) -> Any:
    """What work(meter, *args) returns on rank 0 of so many processes, which are joined by gloo."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "prunekernels"])
    with tempfile.TemporaryDirectory() as folder:
        lead = context.Process(target=_lead, args=(Path(folder), work, ranks, args))
        lead.start()
        lead.join()
        found = Path(folder) / "found"
        if lead.exitcode or not found.exists():
            raise RuntimeError(f"expected a result of {ranks} ranks, got exit status {lead.exitcode}")
        return pickle.loads(found.read_bytes())


def _lead(folder: Path, work: Callable[..., Any], ranks: int, args: tuple[Any, ...]) -> None:
    """The parent of all ranks, which shares its network with them. It has one thread yet, and so may fork."""
    counts, context = own_network(), multiprocessing.get_context("fork")
    barrier = context.Barrier(ranks)
    processes = [
        context.Process(target=_rank, args=(r, ranks, folder, barrier, counts, work, args)) for r in range(ranks)
    ]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes):  # the others wait for it
            for process in processes:
                process.terminate()
        time.sleep(0.05)
    sys.exit(max(abs(process.exitcode or 0) for process in processes))


def _rank(
    rank: int, ranks: int, folder: Path, barrier: Any, counts: bool, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timeout)
    found = work(Meter(barrier, counts), *args)
    if rank == 0:
        (folder / "found").write_bytes(pickle.dumps(found))
    barrier.wait(TIMEOUT)
    dist.destroy_process_group()
