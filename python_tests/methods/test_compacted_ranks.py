"""Methods on two ranks in compacted mode: DistributedDataParallel is wrapped around each set of masks' network."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import prunekernels as pk
from cases.methods import chain, share
from cases.ranks import run_ranks
from prunekernels import methods

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed"),
]
CASES = {
    "gradient sums": (methods.PGP, {"fine_tune": 0}),
    "taylor": (methods.GHFP, {"criterion": "taylor"}),
    "activations": (methods.PruneWhileTraining, {"criterion": "mean_activation"}),
}


def train(rank, world, case, mode):
    cls, options = CASES[case]
    net, wrapped = chain(dtype=torch.float64), {}
    optimizer = pk.optim.MaskedSGD(net.parameters(), lr=0.05, momentum=0.9)
    options = {"duty": 0.5, "steps_per_epoch": 4} | options
    method = cls(net, optimizer, 0.5, 3, **options, example_input=torch.randn(2, 3, 6, 6).double(), mode=mode)
    for epoch in range(3):
        for x, y in share(epoch, rank, world):
            key = method.net is not net and method.compaction.cut
            if key not in wrapped:
                wrapped[key] = DistributedDataParallel(method.net)
            method.opt.zero_grad()
            F.cross_entropy(wrapped[key](x.double()), y).backward()
            method.opt.step()
            method.step()
        method.end_epoch()
        assert pk.check_same_masks(net) == world
    return {"states": method.states, "weights": [p.detach() for p in net.parameters()], "wrapped": len(wrapped)}


def work(rank, world):
    return {(case, mode): train(rank, world, case, mode) for case in CASES for mode in ("masked", "compacted")}


@pytest.fixture(scope="module")
def results():
    return run_ranks(work, 2, 2)


@pytest.mark.parametrize("case", CASES)
def test_both_ranks_train_alike(results, case):
    first, second = (result[case, "compacted"] for result in results)
    assert first["wrapped"] > 1
    assert all(torch.equal(codes, second["states"][name]) for name, codes in first["states"].items())
    assert all(map(torch.equal, first["weights"], second["weights"]))


@pytest.mark.parametrize("case", CASES)
def test_ranks_prune_as_in_masked_mode(results, case):
    masked, compacted = (results[0][case, mode] for mode in ("masked", "compacted"))
    assert all(torch.equal(codes, compacted["states"][name]) for name, codes in masked["states"].items())
    for a, b in zip(masked["weights"], compacted["weights"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
