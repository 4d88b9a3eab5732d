"""Weights that FSDP splits over two ranks: masked layers work on them; what would need whole weights says so."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import prunekernels as pk
from cases.ranks import run_ranks

fsdp = pytest.importorskip("torch.distributed.fsdp")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed"),
]
LIVE = torch.tensor([1, 0, 1, 1, 0, 1, 1], dtype=torch.bool)  # seven filters do not divide by two
SPLIT = "expected its whole weight on each rank, got one that FSDP has split: use DistributedDataParallel, or give "
STEPS = 3


def masked_net(live):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 6, 1), nn.Flatten(),
        nn.Linear(6 * 25, 4),
    )  # fmt: skip
    pk.convert(net)
    set_masks(net, LIVE)
    return pk.flow(net) if live else net


def set_masks(net, mask):
    net[0].set_masks(filter=mask)
    net[1].set_mask(mask)
    net[3].set_masks(input=mask)


def images(step, rank):
    return torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(10 * step + rank))


def train(net, model, optimizer, rank, after_backward=None):
    """Outputs of some steps, the masks of the last being others on all ranks."""
    outputs = []
    for step in range(STEPS):
        if step == STEPS - 1:
            set_masks(net, ~LIVE)
        optimizer.zero_grad()
        y = model(images(step, rank))
        y.square().mean().backward()
        if after_backward is not None:
            after_backward()
        optimizer.step()
        outputs.append(y.detach())
    return outputs


def by_ddp(rank, live):
    net = masked_net(live)
    model = nn.parallel.DistributedDataParallel(net)
    outputs = train(net, model, torch.optim.SGD(net.parameters(), 0.1, 0.9), rank)
    return {"outputs": outputs, "weights": [p.detach() for p in net.parameters()]}


def by_fully_shard(rank, live):
    net = masked_net(live)
    fsdp.fully_shard(net[3])
    fsdp.fully_shard(net)
    assert pk.check_same_masks(net) == 2
    outputs = train(net, net, torch.optim.SGD(net.parameters(), 0.1, 0.9), rank)
    parts = [p.to_local().shape for p in net.parameters()]
    return {"outputs": outputs, "weights": [p.full_tensor().detach() for p in net.parameters()], "parts": parts}


def by_ignored_params(rank, live):
    """Masked layers stay whole, and so does what works on them: the loop averages their gradients."""
    net = masked_net(live)
    whole = [
        p for module in net if isinstance(module, (pk.MaskedConv2d, pk.MaskedBatchNorm2d)) for p in module.parameters()
    ]
    fsdp.fully_shard(net, ignored_params=set(whole))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, foreach=False)

    def average():
        for p in whole:
            dist.all_reduce(p.grad)
            p.grad /= 2

    outputs = train(net, net, optimizer, rank, average)
    weights = [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for p in net.parameters()]
    method = pk.methods.SFP(net, optimizer, rate=0.5, epochs=1)
    method.end_epoch()
    assert pk.check_same_masks(net) == 2
    return {"outputs": outputs, "weights": weights, "dead": int((~net[0].filter_mask).sum())}


def by_fsdp_1(rank, live, use_orig_params):
    net = masked_net(live)
    model = fsdp.FullyShardedDataParallel(net, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    outputs = train(net, model, torch.optim.SGD(model.parameters(), 0.1, 0.9), rank)
    refused = {}
    for name, work in refusals(net).items():
        if use_orig_params or name in ("bind", "method"):  # otherwise its parameters are of no layer
            refused[name] = message(work)
    return {"outputs": outputs, "refused": refused}


def refusals(net):
    def bound():
        pk.optim.bind(torch.optim.SGD(net.parameters(), 0.1), net)

    def method():
        pk.methods.GHFP(net, torch.optim.SGD(net.parameters(), 0.1), epochs=2)

    return {"bind": bound, "method": method, "zero_dead": net[0].zero_dead, "to_conv": net[0].to_conv}


def message(work):
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refused(rank):
    net = masked_net(live=False)
    fsdp.fully_shard(net)
    more = {
        "optimizer": lambda: pk.optim.MaskedSGD(net.parameters(), 0.1),
        "norm": net[1].zero_dead,
        "restore": lambda: pk.restore(net),
    }
    return {name: message(work) for name, work in (refusals(net) | more).items()}


def several(rank):
    result = {}
    for live in (False, True):
        for work in (by_ddp, by_fully_shard, by_ignored_params):
            result[work.__name__, live] = work(rank, live)
        for original in (False, True):
            result["by_fsdp_1", original, live] = by_fsdp_1(rank, live, original)
    return result | {"refused": refused(rank)}


@pytest.fixture(scope="module")
def two():
    return run_ranks(several, 2)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("how", ["by_fully_shard", "by_ignored_params"])
def test_fsdp_trains_as_ddp(two, how, live):
    for rank in two:
        expected, got = rank["by_ddp", live], rank[how, live]
        for a, b in zip([*got["outputs"], *got["weights"]], [*expected["outputs"], *expected["weights"]], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    if how == "by_fully_shard":  # dimension 0 is split: filters
        assert [rank[how, live]["parts"][0][0] for rank in two] == [4, 3]
    else:
        assert two[0][how, live]["dead"] == 3


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("original", [False, True])
def test_fsdp_1_trains_as_ddp(two, original, live):
    for rank in two:
        for a, b in zip(rank["by_fsdp_1", original, live]["outputs"], rank["by_ddp", live]["outputs"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bind", "method", "zero_dead", "to_conv", "norm", "restore"])
def test_fsdp_is_refused_where_weights_must_be_whole(two, name):
    for rank in two:
        assert SPLIT in rank["refused"][name] and "ignored_params" in rank["refused"][name]


def test_fsdp_is_refused_by_masked_optimizers(two):
    expected = (
        "ValueError: MaskedSGD: params: expected whole tensors (a torch.optim optimizer takes split ones), got one"
    )
    assert two[0]["refused"]["optimizer"].startswith(expected)


def test_fsdp_1_is_refused_where_weights_must_be_whole(two):
    for name, text in two[0]["by_fsdp_1", True, False]["refused"].items():
        assert SPLIT in text, name
    flat = two[0]["by_fsdp_1", False, False]["refused"]  # one flat parameter for all layers
    assert (
        flat["bind"] == "ValueError: bind: optimizer: expected parameters of the model's masked layers, got only others"
    )
    assert flat["method"].endswith("others in skip, got one that is computed, or flattened by FSDP, in 0")
