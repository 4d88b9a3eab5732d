"""A run on several processes: the same training as on one, one report, and an end where a process is lost."""

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

import prunekernels as pk
from cases.ranks import processes, run_ranks
from cases.train import tiny_config, tiny_data, tiny_run
from prunekernels import cli
from prunekernels.train import checkpoint, distributed, finalize, loop, setup
from prunekernels.train.data import train_batches
from prunekernels.train.loop import Trainer
from prunekernels.train.run import train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed"),
]
GHFP = {"method": "ghfp", "duty": 0.34, "deterministic": True, "augment": "shift+flip", "epochs": 3}


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("augment", ["none", "shift+flip"])
def test_shares_make_up_the_batches(ranks, augment):
    data = tiny_data()

    def batches(share):
        return list(train_batches(data, 16, 7, 1, augment, share))

    parts = [batches(lambda n, r=r: slice(n * r // ranks, n * (r + 1) // ranks)) for r in range(ranks)]
    for whole, *shares in zip(batches(slice), *parts, strict=True):
        assert max(len(y) for _, y in shares) - min(len(y) for _, y in shares) <= 1
        assert torch.equal(torch.cat([x for x, _ in shares]), whole[0])
        assert torch.equal(torch.cat([y for _, y in shares]), whole[1])


# ---- the same training as on one process


@contextlib.contextmanager
def no_norms():
    """Runs train a network without norms: the statistics of norms are those of a rank's own images."""
    before = setup.network

    def network(config, data, width=None):
        layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(12 * 36, 4))

    setup.network = network
    try:
        yield
    finally:
        setup.network = before


def trained(out, stop_after=None, **given):
    """Of a run, or its next epochs where it has a checkpoint: what comes out."""
    with no_norms():
        if (out / "checkpoint.pt").exists():
            run = Trainer.resumed(out, {"stop_after": stop_after}, data=tiny_data())
        else:
            run = tiny_run(out, stop_after=stop_after, **(GHFP | given))
        run.run()
    return {
        "states": run.states, "history": run.history, "weights": [p.detach() for p in run.model.parameters()],
        "ranks": run.ranks, "live": run.modes._live,
    }  # fmt: skip


def several(rank, folder):
    """Whole runs, the first and the second half of others, and what is refused."""
    result = {
        "whole": trained(folder / "whole"),
        "first": trained(folder / "first 2", stop_after=2),
        "second": trained(folder / "first 1"),  # one process has trained the first two epochs
        "measured": trained(folder / "measured", method="pgp", measure=True, duty=None),
        "coarse": trained(folder / "coarse", method="coarse-pruning", duty=None, options={"masks": 4}),
        "compacted": trained(folder / "compacted", mode="compacted"),
        "masked": trained(folder / "masked", mode="masked"),
    }
    sparing = trained(folder / "sparing", mode="masked", live_gradients=True)
    result["sent"] = sparing["live"].sent_bytes / sparing["live"].full_bytes
    result["sparing"] = sparing | {"live": None}
    with pytest.raises(ValueError, match=r"train: lr: expected 0.05 on all ranks, as on rank 0, got 0.1 on rank 1"):
        tiny_run(folder / "none", lr=0.1 if rank == 1 else 0.05)
    with pytest.raises(ValueError, match=r"train: data: expected .* on all ranks, as on rank 0, got .* on rank 1"):
        tiny_run(folder / "none", data=tiny_data(size=16 if rank == 1 else 8))
    with pytest.raises(ValueError, match=r"train: batch: expected at least 2 images for each of the 2 ranks, got 3"):
        tiny_run(folder / "none", batch=3)
    with pytest.raises(FileNotFoundError, match="expected what `prunekernels train` wrote, got no such file"):
        Trainer.resumed(folder / "none")  # only rank 0 has looked
    finalize.SECONDS = 0.1
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        given = {"out": str(folder / "run"), "arch": "vgg_small", "width": 0.25, "size": 8, "batch": 300, "epochs": 2}
        result["summary"] = train(given | {"method": "ghfp", "report": False})
    with pytest.raises(FileExistsError, match="train: out: expected a folder without a run"):
        train(given)
    return result | {"said": said.getvalue()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def two(folder):
    pytest.importorskip("sklearn")
    with pk.plan.measure(False):
        trained(folder / "first 1", stop_after=2)
    return run_ranks(several, 2, folder)


@pytest.fixture(scope="module")
def one(folder):
    with pk.plan.measure(False):
        return {
            "whole": trained(folder / "whole of one"),
            "measured": trained(folder / "measured of one", method="pgp", measure=True, duty=None),
            "coarse": trained(folder / "coarse of one", method="coarse-pruning", duty=None, options={"masks": 4}),
            "compacted": trained(folder / "compacted of one", mode="masked"),
        }


def assert_alike(got, expected):
    """The same masks, the same numbers to rounding."""
    assert all(map(torch.equal, got["states"], expected["states"]))
    assert any(bool((states > 0).any()) for states in expected["states"])
    for row, other in zip(got["history"], expected["history"], strict=True):
        for name in ("loss", "train_accuracy", "accuracy", "live", "computed"):
            assert row[name] == pytest.approx(other[name], rel=1e-4), name
    for a, b in zip(got["weights"], expected["weights"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("case", ["whole", "measured", "coarse", "compacted"])
def test_ranks_train_as_one_process(two, one, case):
    assert two[0][case]["ranks"] == 2 and one[case]["ranks"] == 1
    assert_alike(two[0][case], one[case])
    assert all(map(torch.equal, two[0][case]["weights"], two[1][case]["weights"]))


def test_live_gradients_alone_give_the_same_bits(two):
    for rank in two:
        assert all(map(torch.equal, rank["sparing"]["weights"], rank["masked"]["weights"]))
        assert rank["masked"]["live"] is None and 0 < rank["sent"] < 0.8


def uneven(rank, folder):
    return trained(folder / "three")


def test_ranks_with_uneven_shares_train_as_one_process(folder, one):
    """16 images on three ranks: 5, 5 and 6."""
    assert_alike(run_ranks(uneven, 3, folder)[0], one["whole"])


@pytest.mark.parametrize("ranks", [1, 2])
def test_resume_on_another_number_of_ranks(two, one, folder, ranks):
    before = checkpoint.load(folder / f"first {3 - ranks}" / "checkpoint.pt") if ranks == 1 else None
    with pk.plan.measure(False):
        got = two[0]["second"] if ranks == 2 else trained(folder / "first 2")
    assert_alike(got, one["whole"])
    if before is not None:
        assert got["history"][:2] == before["history"] == two[0]["first"]["history"]


# ---- one report


def test_rank_0_alone_prints_and_writes(two, folder):
    assert two[0]["summary"]["ranks"] == 2 and two[1]["summary"] is None and two[1]["said"] == ""
    lines = [line for line in two[0]["said"].splitlines() if "  loss " in line]
    assert len(lines) == 2 and all(line.endswith("  masks equal on all 2 ranks") for line in lines)
    assert {path.name for path in (folder / "run").iterdir()} == {"checkpoint.pt", "small.pt", "summary.json"}
    assert not (folder / "none").exists()


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_statistics_become_means(name):
    seen = run_ranks(statistics, 2, name)
    assert torch.equal(seen[0][0], seen[1][0]) and not torch.equal(seen[0][1], seen[1][1])
    torch.testing.assert_close(seen[0][0], (seen[0][1] + seen[1][1]) / 2)


def statistics(rank, name):
    """After and before they are averaged."""
    torch.manual_seed(rank)
    norm = pk.MaskedBatchNorm2d(3)
    norm(torch.randn(4, 3, 5, 5) * (1 + rank))
    before = getattr(norm, name).clone()
    distributed.average_statistics(norm)
    return getattr(norm, name), before


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with distributed.joined(None, 1.0):
        assert not dist.is_initialized() and distributed.rank() == 0 and distributed.local_rank() is None
    net = nn.Linear(2, 2)
    assert distributed.wrapped(net) is net and distributed.share(10) == slice(0, 10)
    assert tiny_config("unused", timeout=5.0).timeout == 5


# ---- processes of their own

QUICK = "--arch vgg_small --width 0.25 --batch 16 --no-report".split()


def started(rank, port, out, act, *arguments):
    """What torchrun starts: the command, in no process group yet. Rank 1 comes late, and acts before its epoch 2."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    finalize.SECONDS, loop.load, run_epoch = 0.1, lambda *_: tiny_data(), Trainer.run_epoch

    def run_epoch_of_rank_1(self):
        if self.epoch == 1 and act is not None:
            act()
        run_epoch(self)

    if rank == 1:
        Trainer.run_epoch = run_epoch_of_rank_1
        time.sleep(0.5)
    with open(out / f"said {rank}", "w") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = cli.main(["train", *QUICK, *arguments, "--out", str(out / "run"), "--timeout", "4"])
    sys.exit(status)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def hanging():
    time.sleep(60)


def run_command(out, act, *arguments):
    """The exit status of rank 0, and what each rank has said."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = processes()
    ranks = [context.Process(target=started, args=(rank, port, out, act, *arguments)) for rank in range(2)]
    for process in ranks:
        process.start()
    ranks[0].join(timeout=60)
    status = ranks[0].exitcode
    for process in ranks:
        if act is not None:
            process.kill()
        process.join()
    return status, [(out / f"said {rank}").read_text() for rank in range(2)]


@pytest.mark.parametrize("act", [killed, hanging])
def test_a_lost_rank_ends_the_run(tmp_path, act):
    """Rank 1 joins late, trains an epoch and is lost; rank 0 says so, and its checkpoint stays."""
    status, said = run_command(tmp_path, act, "--epochs", "3")
    assert said[0].count("masks equal on all 2 ranks") == 1 and said[1] == ""
    assert status == 2 and "error: train: rank 0: expected all 2 ranks to answer within 4 s, got: " in said[0]
    assert said[0].endswith("; start those that are left again with --resume\n")
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["epoch"] == 1


def test_the_command(tmp_path):
    """The group is left before rank 0 shrinks and times the network."""
    status, said = run_command(tmp_path, None, "--method", "ghfp", "--epochs", "2")
    assert status == 0 and said[0].count("masks equal on all 2 ranks") == 2 and said[1] == ""
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint.pt", "small.pt", "summary.json"}


def test_torchrun(tmp_path):
    pytest.importorskip("sklearn")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [
        "-m",
        "prunekernels",
        "train",
        *QUICK,
        "--method",
        "ghfp",
        "--size",
        "8",
        "--epochs",
        "2",
        "--stop-after",
        "1",
    ]
    given = {**os.environ, "OMP_NUM_THREADS": "1", "PRUNEKERNELS_MEASURE": "0"}
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, env=given, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("masks equal on all 2 ranks") == 1
    assert done.stdout.count("stopped after 1 of 2 epochs: --resume goes on") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
