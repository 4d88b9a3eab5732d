"""Several processes on this machine, joined by gloo."""

import datetime
import multiprocessing
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

import prunekernels as pk

TIMEOUT = 60  # seconds that a rank waits for the others


def processes():
    """The context of new processes. They come from a server that has imported what DDP loads at first, so that they
    start in a tenth of a second.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "prunekernels"])
    return context


def run_ranks(work, world, *args):
    """Calls work(rank, *args) in as many processes as ranks, each in the default process group; returns their results.

    work: a function of a test module. An error of a rank is raised here.
    """
    processes()
    with tempfile.TemporaryDirectory() as folder:
        join = torch.multiprocessing.start_processes(
            _rank, (world, folder, work, args), nprocs=world, join=False, start_method="forkserver"
        )
        while not join.join(timeout=TIMEOUT):
            pass
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(rank, world, folder, work, args):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timeout)
    try:
        with pk.plan.measure(False):
            torch.save(work(rank, *args), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
