"""torchrun on two machines, of which one is cut off: each is a network namespace with a cable to the other."""

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
TIMEOUT, EPOCHS, PORT = 8, 5, 29511
WAITING, LATER = 120, 10  # seconds, on a busy machine: for the first epoch, beyond a timeout
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


@pytest.mark.parametrize("left", [0, 1], ids=["the first machine", "the second machine"])
def test_one_of_two_machines_is_cut_off(tmp_path, whole, left):
    """Both end with an error within the timeout. The checkpoint is that of an epoch; the machine that is left trains on
    from it alone."""
    (data, kept), path = whole, tmp_path / "run" / "checkpoint.pt"
    with namespaces(2, linked=True) as names:
        ranks = [started(data, tmp_path, name, rank) for rank, name in enumerate(names)]
        try:
            until(path.exists, WAITING)
            time.sleep(0.2)  # in the middle of the second epoch, or a later one
            cut(names[1 - left])
            expected = f"rank {left}: expected all 2 ranks to answer within {TIMEOUT} s, got: "
            until(lambda: expected in ranks[left][1].read_text(), TIMEOUT + LATER)
            for process, said in ranks:
                assert process.wait(TIMEOUT + LATER) == 1, said.read_text()
                assert "; start those that are left again with --resume\n" in said.read_text()
        finally:
            for process, _ in ranks:
                process.kill()
                process.wait()
        state = checkpoint.load(path)
        assert 1 <= state["epoch"] < EPOCHS and [file.name for file in path.parent.iterdir()] == [path.name]
        assert comparable(state) == kept[state["epoch"]]
        alone = inside(names[left], "-m", "prunekernels", "train", "--out", tmp_path / "run", "--resume")
        ran = subprocess.run(alone, env=environment(), capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
    resumed = checkpoint.load(path)
    assert resumed["epoch"] == EPOCHS and resumed["history"][: state["epoch"]] == state["history"]
    assert (tmp_path / "run" / "summary.json").exists()
    assert all(torch.isfinite(t).all() for t in resumed["model"].values() if t.is_floating_point())
