"""Two ranks on this machine: masks are buffers, so DistributedDataParallel sends them along."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

import prunekernels as pk
from cases.ranks import run_ranks

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


def work(rank):
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
    return {
        "masks": [net[0].filter_mask, net[1].channel_mask, net[3].input_mask],
        "same buffer": net[0].filter_mask is buffer,
        "hidden": hidden,
        "grads": grads,
        "weights": [p.detach() for p in model.parameters()],
        "modes": [in_a_mode(rank, **given) for given in MODES],
    }


MODES = [
    {"live": live, **given}
    for live in (False, True)
    for given in (
        {},
        {"broadcast_buffers": False},
        {"static_graph": True},
        {"find_unused_parameters": True},
        {"gradient_as_bucket_view": True},
    )
]


def in_a_mode(rank, live, **options):
    """What three steps give, the masks of the third being new: on rank 0 alone where buffers are broadcast."""
    net = masked_net(seed=0)
    set_masks(net)
    if live:
        pk.flow(net)
    optimizer = pk.optim.MaskedSGD(net.parameters(), lr=0.1, weight_decay=0.1, freeze="dead")
    pk.optim.bind(optimizer, net)
    with warnings.catch_warnings():  # broadcast_buffers has another name from torch 2.13 on
        warnings.simplefilter("ignore", FutureWarning)
        model = nn.parallel.DistributedDataParallel(net, **options)
    derived = []
    for layer in (net[0], net[1], net[3]):
        layer._derive = lambda derive=layer._derive: (derived.append(step), derive())
    right, moved = [], []
    for step in range(4):
        if step == 2 and (rank == 0 or not options.get("broadcast_buffers", True)):
            net[0].set_masks(filter=~LIVE)
            net[1].set_mask(~LIVE)
            net[3].set_masks(input=~LIVE)
        x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(10 * step + rank))
        before = net[0].weight.detach().clone()
        optimizer.zero_grad()
        y = model(x)
        y.square().mean().backward()
        plain = masked_net(seed=0)
        plain.load_state_dict(net.state_dict())
        pk.restore(plain)
        right.append(torch.allclose(y, plain(x), atol=1e-5))
        optimizer.step()
        moved.append((net[0].weight != before).flatten(1).any(1))
    return {"right": right, "moved": moved, "derived": derived, "weights": [p.detach() for p in net.parameters()]}


@pytest.fixture(scope="module")
def results():
    return run_ranks(work, 2)


@pytest.mark.parametrize("mode", range(len(MODES)), ids=[str(given) for given in MODES])
def test_modes_of_ddp(results, mode):
    """Whatever is asked of DDP: new masks act at once on every rank, and only then layers read them anew."""
    ranks = [result["modes"][mode] for result in results]
    assert all(map(torch.equal, ranks[0]["weights"], ranks[1]["weights"]))
    for rank in ranks:
        assert [moved.tolist() for moved in rank["moved"]] == [m.tolist() for m in (LIVE, LIVE, ~LIVE, ~LIVE)]
        assert set(rank["derived"]) <= {0, 2} and rank["derived"].count(2) <= 6
        assert rank["right"] == [True] * 4


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


@pytest.mark.parametrize("wrapper", [nn.DataParallel, nn.parallel.DistributedDataParallel])
def test_methods_look_through_wrappers(wrapper, tmp_path):
    net = masked_net(seed=0)
    is_ddp = wrapper is nn.parallel.DistributedDataParallel
    if is_ddp:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = wrapper(net)
        method = pk.methods.SFP(model, torch.optim.SGD(model.parameters(), 0.1), rate=0.5, epochs=1)
        method.end_epoch()
        x = torch.randn(2, 3, 5, 5)
        assert method.model is net and list(method.layers) == ["0", "3"] and int(net[0].filter_mask.sum()) == 3
        assert torch.equal(model(x), net(x))
    finally:
        if is_ddp:
            dist.destroy_process_group()
