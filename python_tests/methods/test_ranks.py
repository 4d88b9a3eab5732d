"""Methods on several ranks: each sees its own images, and all decide the same."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from cases.methods import chain, convs, residual, share
from cases.ranks import run_ranks
from prunekernels import methods
from prunekernels.methods import ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed"),
]
X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(3))
EPOCHS = 2
CASES = {
    "weights": (methods.GHFP, {}),
    "geometric median": (methods.ASFP, {"criterion": "geometric_median", "budget": "global"}),
    "gradient sums": (methods.PGP, {}),
    "gradient norms": (methods.RPGP, {"coupling": "joint", "example_input": X}),
    "taylor": (methods.GHFP, {"criterion": "taylor"}),
    "updates": (methods.SFP, {"criterion": "update_norm"}),
    "activations": (methods.PruneWhileTraining, {"criterion": "mean_activation"}),
    "random": (methods.GHFP, {"criterion": "random"}),
    "random, a seed of its own on each rank": (methods.GHFP, {"criterion": "random", "seed": "rank"}),
    "coarse": (methods.CoarsePruning, {"data": "own", "masks": 5, "start": 0, "kernel_start": 1, "seed": "rank"}),
    "coarse, by halves": (methods.CoarsePruning, {"data": "own", "masks": 9, "start": 0, "halving": True}),
    "clusters": (methods.CSGD, {"example_input": X, "seed": "rank"}),
}


def train(rank, world, case, live):
    cls, options = CASES[case]
    own = {"seed": rank} if options.get("seed") == "rank" else {}
    if options.get("data") == "own":
        own["data"] = [*share(9, rank, world), *share(10, rank, world)]
    net = chain() if cls is not methods.CSGD else residual()
    if live:
        pk.flow(net)
    model = nn.parallel.DistributedDataParallel(net) if world > 1 else net
    optimizer = pk.optim.MaskedSGD(net.parameters(), lr=0.05, momentum=0.9)
    duty = {} if cls in (methods.CoarsePruning, methods.CSGD) else {"duty": 0.5}
    method = cls(model, optimizer, rate=0.5, epochs=3, **(duty | options | own))
    for epoch in range(EPOCHS):
        for x, y in share(epoch, rank, world):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            method.step()
        method.end_epoch()
        assert pk.check_same_masks(net) == world
    return {"states": method.states, "weights": [p.detach() for p in net.parameters()], "names": list(method.layers)}


def work(rank, world, cases):
    return {case: train(rank, world, *case) for case in cases}


IN_BOTH_MODES = ("weights", "gradient sums", "activations", "random, a seed of its own on each rank")
EVERY = [(case, live) for case in CASES for live in (False, True) if live or case in IN_BOTH_MODES]
AS_ONE = ["weights", "taylor", "random"]
OF_FOUR = [(case, True) for case in ("weights", "taylor", "activations", "random, a seed of its own on each rank")]


@pytest.fixture(scope="module")
def results():
    return {2: run_ranks(work, 2, 2, EVERY), 4: run_ranks(work, 4, 4, OF_FOUR)}


@pytest.mark.parametrize(("world", "case"), [*((2, case) for case in EVERY), *((4, case) for case in OF_FOUR)])
def test_all_ranks_decide_the_same(results, world, case):
    first, *others = [result[case] for result in results[world]]
    if "clusters" not in case:
        assert any(bool((codes > 0).any()) for codes in first["states"].values())
    for other in others:
        assert other["names"] == first["names"]
        assert all(torch.equal(other["states"][name], codes) for name, codes in first["states"].items())
        assert all(map(torch.equal, other["weights"], first["weights"]))


@pytest.mark.parametrize("case", AS_ONE)
def test_as_one_process_would(two, case):
    """Without norms, whose statistics are of a rank's own images, ranks and one process with all images agree."""
    got, expected = two[0][2][case], without_norms(0, 1, case)
    for name, codes in expected["states"].items():
        assert torch.equal(got["states"][name], codes)
    for a, b in zip(got["weights"], expected["weights"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def without_norms(rank, world, case):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 4))
    pk.flow(pk.convert(net) and net)
    model = nn.parallel.DistributedDataParallel(net) if world > 1 else net
    optimizer = torch.optim.SGD(net.parameters(), 0.05, 0.9)
    cls, options = CASES[case]
    method = cls(net, optimizer, rate=0.5, epochs=3, duty=0.5, **options)
    for epoch in range(EPOCHS):
        for x, y in share(epoch, rank, world, whole=world == 1):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            method.step()
        method.end_epoch()
    return {"states": method.states, "weights": [p.detach() for p in net.parameters()]}


def test_one_process():
    scores = {"a": torch.tensor([1.0, 2.0])}
    assert ranks.mean(scores) is scores and ranks.largest(3, X) == 3
    assert ranks.summed([1, 2], X) == [1, 2] and ranks.of_rank_0("seeds") == "seeds"


def uneven(rank, world):
    """Rank 0 has two batches more than the others."""
    net = pk.flow(chain())
    model = nn.parallel.DistributedDataParallel(net)
    optimizer = pk.optim.MaskedSGD(net.parameters(), lr=0.05)
    method = methods.GHFP(net, optimizer, rate=0.5, epochs=3, duty=0.5)
    steps = []
    for epoch in range(2):
        with model.join():
            for x, y in list(share(epoch, rank, world))[: 4 if rank == 0 else 2]:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                method.step()
        method.end_epoch()
        steps.append(method.steps_per_epoch)
    live = [int(conv.filter_mask.sum()) for conv in convs(net).values()]
    return {"ranks": pk.check_same_masks(net), "steps": steps, "live": live}


def differing(rank, world):
    """A mask that one rank has alone is found, on every rank."""
    net = chain()
    if rank == 1:
        net[3].set_masks(filter=torch.arange(12) > 2)
    with pytest.raises(
        ValueError, match=r"check_same_masks: 3: expected the masks of rank 0 on all \d ranks, got .* 1"
    ):
        pk.check_same_masks(net)
    alone = [dist.new_group([r]) for r in range(world)][rank]  # each rank decides for itself
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    method = methods.GHFP(net, optimizer, epochs=2, criterion="random", seed=rank, process_group=alone)
    return method.states


def several(rank, world):
    as_one = {case: without_norms(rank, world, case) for case in AS_ONE}
    return uneven(rank, world), differing(rank, world), as_one


@pytest.fixture(scope="module")
def two():
    return run_ranks(several, 2, 2)


def test_uneven_epochs_join(two):
    assert two[0][0] == two[1][0] and two[0][0]["ranks"] == 2
    assert two[0][0]["steps"] == [4, 4]  # the longest


def test_masks_that_differ_are_found(two):
    a, b = two[0][1], two[1][1]
    assert any(not torch.equal(a[name], b[name]) for name in a)
