"""Two ranks on this machine: masks are buffers, so DistributedDataParallel sends them along."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn

import prunekernels as pk

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed"),
]
LIVE = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool)


def masked_net(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(
        pk.MaskedConv2d(3, 6, 3, padding=1, bias=False), pk.MaskedBatchNorm2d(6), nn.ReLU(), pk.MaskedConv2d(6, 4, 1)
    )
    net(torch.randn(2, 3, 4, 4))  # fills every cache before the masks arrive
    return net


def set_masks(net):
    net[0].set_masks(filter=LIVE)
    net[1].set_mask(LIVE)
    net[3].set_masks(input=LIVE)


def work(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        net = masked_net(seed=rank)
        buffer = net[0].filter_mask
        if rank == 0:
            set_masks(net)
        model = nn.parallel.DistributedDataParallel(net)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(10 + rank))
        hidden = []
        net[0].register_forward_hook(lambda module, args, out: hidden.append(out.detach()))
        grads = []
        for step in range(3):
            if step == 2 and rank == 0:  # a new mask on rank 0 reaches the others with the next forward
                net[0].set_masks(filter=~LIVE)
            optimizer.zero_grad()
            model(x).square().sum().backward()
            grads.append([p.grad.clone() for p in model.parameters()])
            optimizer.step()
        result = {
            "masks": [net[0].filter_mask, net[1].channel_mask, net[3].input_mask],
            "same buffer": net[0].filter_mask is buffer,
            "hidden": hidden,
            "grads": grads,
            "weights": [p.detach() for p in model.parameters()],
        }
        torch.save(result, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_masks_reach_rank_1_in_place(results):
    assert results[1]["same buffer"]
    assert all(map(torch.equal, results[0]["masks"], results[1]["masks"]))
    assert torch.equal(results[1]["masks"][0], ~LIVE) and torch.equal(results[1]["masks"][1], LIVE)


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_computes_with_the_masks(results, rank):
    first, _, last = results[rank]["hidden"]
    assert not first[:, ~LIVE].count_nonzero() and first[:, LIVE].count_nonzero()
    assert not last[:, LIVE].count_nonzero() and last[:, ~LIVE].count_nonzero()


@pytest.mark.parametrize("rank", [0, 1])
def test_dead_gradients_are_zero(results, rank):
    assert not results[rank]["grads"][0][0][~LIVE].count_nonzero()
    assert results[rank]["grads"][0][0][LIVE].count_nonzero()


def test_ranks_stay_together(results):
    for a, b in zip(results[0]["grads"], results[1]["grads"], strict=True):
        assert all(map(torch.equal, a, b))
    assert all(map(torch.equal, results[0]["weights"], results[1]["weights"]))


def test_gradients_are_the_mean_over_ranks(results):
    torch.set_num_threads(1)
    per_rank = []
    for rank in range(2):
        net = masked_net(seed=0)
        set_masks(net)
        x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(10 + rank))
        net(x).square().sum().backward()
        per_rank.append([p.grad for p in net.parameters()])
    for got, a, b in zip(results[0]["grads"][0], *per_rank, strict=True):
        torch.testing.assert_close(got, (a + b) / 2)
