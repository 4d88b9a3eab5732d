"""torchrun on two machines, of which one is cut off: each is a network namespace with a cable to the other."""

import shutil
import subprocess
import time

import pytest
import torch
import torch.distributed as dist

from cases.idx import write_idx
from cases.namespaces import ADDRESSES, cut, environment, inside, namespaces
from cases.ranks import run_ranks
from cases.train import comparable
from prunekernels import cli
from prunekernels.train import checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed"),
]
TIMEOUT, EPOCHS, PORT = 6, 5, 29511
WAITING, LATER = 120, 15  # seconds, on a busy machine: for the first epoch, beyond a timeout
SETTINGS = {
    "arch": "vgg_small", "width": 0.25, "epochs": EPOCHS, "batch": 16, "lr": 0.05, "method": "ghfp", "duty": 0.34,
    "mode": "masked", "augment": "shift", "layout": "contiguous", "timeout": TIMEOUT,
}  # fmt: skip


def arguments(data, out):
    given = SETTINGS | {"data": f"idx:{data}", "out": out}
    options = [part for key, value in given.items() for part in (f"--{key}", str(value))]
    return ["train", *options, "--deterministic", "--no-report"]


def undisturbed(rank, data):
    """The same run on two processes, whose checkpoints rank 0 keeps: what is comparable in them, by epoch."""
    kept, save = {}, checkpoint.save

    def save_and_keep(path, state):
        save(path, state)
        kept[state["epoch"]] = comparable(checkpoint.load(path))

    checkpoint.save = save_and_keep
    assert cli.main([*arguments(data, data.parent / "whole"), "--stop-after", str(EPOCHS - 1)]) == 0
    return kept


def until(holds, seconds):
    """Waits for something; returns how long that took."""
    begun = time.monotonic()
    while not holds():
        assert time.monotonic() - begun < seconds, f"expected an answer within {seconds} s"
        time.sleep(0.02)
    return time.monotonic() - begun


def started(data, folder, name, rank):
    """The torchrun of a machine, in its namespace, and the file with what it says."""
    command = ["-m", "torch.distributed.run", "--nnodes", 2, "--node-rank", rank, "--master-addr", ADDRESSES[0]]
    command += ["--master-port", PORT, "--nproc-per-node", 1, "-m", "prunekernels", *arguments(data, folder / "run")]
    said = folder / f"said {rank}"
    with open(said, "w") as file:
        given = environment(GLOO_SOCKET_IFNAME="veth0")
        return subprocess.Popen(inside(name, *command), env=given, stdout=file, stderr=file), said


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of the data, and what is comparable in each checkpoint of a run that nothing disturbs."""
    data = tmp_path_factory.mktemp("whole") / "data"
    write_idx(data, shape=(8, 8), counts=(1024, 32))
    return data, run_ranks(undisturbed, 2, data)[0]


def test_one_of_two_machines_is_cut_off(tmp_path, whole):
    """Both end with an error within the timeout. The checkpoint is that of an epoch; either machine trains on from it
    alone, if its folder is on storage of both."""
    (data, kept), path = whole, tmp_path / "run" / "checkpoint.pt"
    with namespaces(2, linked=True) as names:
        ranks = [started(data, tmp_path, name, rank) for rank, name in enumerate(names)]
        try:
            until(path.exists, WAITING)
            time.sleep(0.2)  # in the middle of the second epoch, or a later one
            cut(names[1])
            until(lambda: all("error" in said.read_text() for _, said in ranks), TIMEOUT + LATER)
            for rank, (process, said) in enumerate(ranks):
                assert process.wait(LATER) == 1, said.read_text()
                line = next(line for line in said.read_text().splitlines() if line.startswith("error"))
                assert f"train: rank {rank}: expected all 2 ranks to answer within {TIMEOUT} s, got: " in line
                assert line.endswith("; start those that are left again with --resume")
        finally:
            for process, _ in ranks:
                process.kill()
                process.wait()
        state = checkpoint.load(path)
        assert 1 <= state["epoch"] < EPOCHS and [file.name for file in path.parent.iterdir()] == [path.name]
        assert comparable(state) == kept[state["epoch"]]
        for name in names:
            alone(name, shutil.copytree(path.parent, tmp_path / name), state)


def alone(name, out, before):
    """One process in this namespace trains to the end."""
    command = inside(name, "-m", "prunekernels", "train", "--out", out, "--resume")
    ran = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    state = checkpoint.load(out / "checkpoint.pt")
    assert state["epoch"] == EPOCHS and state["history"][: before["epoch"]] == before["history"]
    assert all(torch.isfinite(t).all() for t in state["model"].values() if t.is_floating_point())
    assert (out / "summary.json").exists()
