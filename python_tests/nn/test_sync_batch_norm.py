"""MaskedSyncBatchNorm on two processes, against one process that has both batches."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from cases.judged import MODES, assert_same_network, pair, pruned_by_a_method, take
from cases.ranks import run_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed"),
]
LIVE = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool)
SPLITS = [(5, 2), (3, 4), (1, 6)]  # images of each rank, by step
EXACT = {"rtol": 0, "atol": 1e-12}


def images(step, shape=(7, 3, 7, 6)):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(shape, generator=generator, dtype=torch.float64), torch.randint(4, (7,), generator=generator)


def values_of(net):
    """By name: parameters, statistics and stored masks."""
    return {name: t.detach().clone() for name, t in (*net.named_parameters(), *net.named_buffers())}


# ---- a network under DDP, whose masks a method changes


def trained(rank, mode):
    """What each step had and made."""
    net, _ = pair(mode)
    pk.convert_sync_batchnorm(net)
    assert [type(net[i]) for i in (1, 4)] == [pk.MaskedSyncBatchNorm] * 2
    model = nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    method = pruned_by_a_method(model, optimizer)
    steps = []
    for step, split in enumerate(SPLITS):
        x, labels = (t.split(split)[rank].clone() for t in images(step))
        before = values_of(net)
        optimizer.zero_grad()
        y = model(x.requires_grad_())
        F.cross_entropy(y, labels, reduction="sum").backward()
        grads = {name: p.grad.clone() for name, p in net.named_parameters()}
        steps.append({"before": before, "y": y.detach(), "x.grad": x.grad, "grads": grads, "after": values_of(net)})
        optimizer.step()
        method.step()
        method.end_epoch()
    steps.append({"before": values_of(net), "y": model.eval()(images(9)[0]).detach()})
    return steps


@pytest.mark.parametrize("mode", MODES)
def test_training_is_that_of_one_process(results, mode):
    net, judge = pair(mode)
    *steps, last = zip(*(result[mode] for result in results), strict=True)
    for step, ranks in enumerate(steps):
        copy_values(net, judge, ranks[0]["before"])
        x, labels = images(step)
        judge.zero_grad()
        y = judge(x.requires_grad_())
        F.cross_entropy(y, labels, reduction="sum").backward()
        torch.testing.assert_close(torch.cat([rank["y"] for rank in ranks]), y, **EXACT)
        torch.testing.assert_close(torch.cat([rank["x.grad"] for rank in ranks]), x.grad, **EXACT)
        copy_values(net, None, ranks[1]["after"])
        for name, parameter in net.named_parameters():
            parameter.grad = 2 * ranks[1]["grads"][name]  # DDP gives the mean
        assert_same_network(net, judge, **EXACT)
    copy_values(net, judge, last[0]["before"])
    assert 0 < net[1].channel_mask.sum() < 8, "the method pruned"
    for rank in last:
        torch.testing.assert_close(rank["y"], judge.eval()(images(9)[0]), **EXACT)


@torch.no_grad()
def copy_values(net, judge, values):
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        tensor.copy_(values[name])
    if judge is not None:
        take(judge, net)


# ---- the norm by itself

NORMS = {
    "plain": {},
    "no factors": {"affine": False},
    "no bias": {"bias": False},
    "no statistics": {"track_running_stats": False},
    "cumulated": {"momentum": None},
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "all live": {"mask": "all"},
    "all dead": {"mask": torch.zeros(6, dtype=torch.bool)},
    "empty batch": {"split": (7, 0)},
    "empty batch of vectors": {"split": (0, 7), "size": ()},
    "one value each": {"size": (), "split": (1, 1), "batch": 2},
    "vectors": {"size": ()},
    "signals": {"size": (5,)},
    "volumes": {"size": (2, 3, 2)},
    "channels last": {"layout": torch.channels_last},
    "live": {"flow": 1},
    "padded": {"flow": 5},
    "padded, no factors": {"flow": 5, "affine": False},
}


def make_norm(cls, mask=LIVE, split=None, size=None, batch=None, layout=None, flow=None, **options):
    torch.manual_seed(1)
    norm = cls(6, **({"dtype": torch.float64} | options))
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    norm.set_mask(mask)
    if flow is not None:
        pk.flow(nn.Sequential(norm), align=flow)
    return norm


def norm_images(step, size=(4, 3), batch=7, layout=torch.contiguous_format, dtype=torch.float64, **_):
    (x, _), (grad, _) = (images(seed, (batch, 6, *size)) for seed in (step, 50 + step))
    x = x * 3 + torch.arange(6.0).view(6, *[1] * len(size))
    return [t.to(dtype).contiguous(memory_format=layout) for t in (x, grad)]


def norm_alone(rank, norm, case):
    """Two batches, with other masks at the second; then eval mode, in which ranks do not wait for each other."""
    seen = []
    for step in range(2):
        if step and "mask" not in case:
            norm.set_mask(~LIVE)
        x, grad = (t.split(case.get("split", (5, 2)))[rank] for t in norm_images(step, **case))
        norm.zero_grad()
        y = norm(x.requires_grad_())
        assert isinstance(y, pk.LiveTensor) == ("flow" in case)
        y = y.to_dense() if "flow" in case else y
        y.backward(grad)
        seen += [y.detach(), x.grad]
        assert all(p.grad is not None for p in norm.parameters())
        seen += [p.grad for p in norm.parameters()]
    if rank == 1:
        norm.eval()(x)
    return seen, {name: b.clone() for name, b in norm.named_buffers()}, y.stride()


def judged_norm(case):
    norm = make_norm(pk.MaskedBatchNorm2d, **(case | {"dtype": torch.float64, "flow": None}))
    seen = []
    for step in range(2):
        if step and "mask" not in case:
            norm.set_mask(~LIVE)
        x, grad = (t.double() for t in norm_images(step, **case))
        live = norm.channel_mask.view(6, *[1] * (x.dim() - 2))
        norm.zero_grad()
        y = torch.where(live, by_torch(norm, torch.where(live, x.requires_grad_(), 0)), 0)
        y.backward(grad)
        seen += [y.detach(), x.grad, *(p.grad for p in norm.parameters())]
    return seen, dict(norm.named_buffers())


def by_torch(norm, x):
    """nn.BatchNorm of the whole batch, with the statistics of dead channels left alone."""
    before = norm.running_mean, norm.running_var
    after = [None if t is None else t.clone() for t in before]
    factor = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked += 1
        factor = 1 / float(norm.num_batches_tracked) if factor is None else factor
    y = F.batch_norm(x, *after, norm.weight, norm.bias, True, factor, norm.eps)
    for old, new in zip(before, after, strict=True):
        if old is not None:
            old.copy_(torch.where(norm.channel_mask, new, old))
    return y


@pytest.mark.parametrize("name", NORMS)
def test_norm(results, name):
    case = NORMS[name]
    (got, buffers, strides), (other, _, _) = (result["norms"][name] for result in results)
    want, want_buffers = judged_norm(case)
    per_step = len(want) // 2
    dtype = case.get("dtype", torch.float64)
    near = {
        torch.float64: EXACT,
        torch.float32: {"rtol": 1e-5, "atol": 1e-5},
        torch.bfloat16: {"rtol": 0.05, "atol": 0.1},
    }
    for i, (a, b, judge) in enumerate(zip(got, other, want, strict=True)):
        of_batch = i % per_step < 2
        assert a.dtype == b.dtype == dtype
        joined = torch.cat([a, b]) if of_batch else a.double() + b.double()
        torch.testing.assert_close(joined.double(), judge, msg=lambda text, i=i: f"{i}: {text}", **near[dtype])
        dead = ~(LIVE if i < per_step else ~LIVE)
        if "mask" not in case:
            assert not (joined[:, dead] if of_batch else joined[dead]).count_nonzero()
    assert buffers.keys() == want_buffers.keys()
    for key, value in buffers.items():
        torch.testing.assert_close(value.double(), want_buffers[key].double(), **near[dtype])
    if name == "channels last":
        assert strides[1] == 1


# ---- copies, groups, and what is refused


class Activated(nn.SyncBatchNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def copies(rank):
    """A copy, a network from a state dict, and one of compiled code, by the batches of two ranks."""
    pk.register_adapter(Activated, output=lambda layer, y: 2 * y)
    norm = make_norm(pk.MaskedSyncBatchNorm)
    x, _ = (t.split((5, 2))[rank] for t in norm_images(0))
    other = pk.MaskedSyncBatchNorm(6, dtype=torch.float64)
    other.load_state_dict(norm.state_dict())
    made = {"copy": copy.deepcopy(norm), "state dict": other, "norm": norm}
    activated = Activated(6).double()
    activated.load_state_dict(norm.state_dict(), strict=False)
    pk.convert(activated)
    activated.set_mask(LIVE)
    made["compiled"] = torch.compile(nn.Sequential(nn.Identity(), activated), backend="eager")
    return {name: each(x).detach() for name, each in made.items()}


def test_copies_share_statistics_too(results):
    want = results[0]["copies"].pop("norm"), results[1]["copies"].pop("norm")
    for result, expected in zip(results, want, strict=True):
        for name, y in result["copies"].items():
            y = y / 2 if name == "compiled" else y
            torch.testing.assert_close(y, expected, msg=lambda text, name=name: f"{name}: {text}", **EXACT)


def groups(rank):
    """Each rank is a group of its own: statistics are its own, and copies have the same group."""
    of_rank = [dist.new_group([0]), dist.new_group([1])][rank]
    norm = make_norm(pk.MaskedSyncBatchNorm, process_group=of_rank)
    both = make_norm(pk.MaskedSyncBatchNorm, process_group=dist.new_group([0, 1]))
    x = norm_images(0)[0].split((5, 2))[rank]
    plain = copy.deepcopy(norm).to_norm()
    small = pk.shrink(nn.Sequential(nn.Conv2d(6, 6, 1), norm, nn.Conv2d(6, 2, 1)).double(), x, form="module")
    with pytest.raises(TypeError, match="process_group: expected None for a layer that is pickled"):
        torch.save(norm, "/dev/null")
    return {
        "alone": norm(x).detach(),
        "copy": copy.deepcopy(norm)(x).detach(),
        "both": copy.deepcopy(both)(x).detach(),
        "same group": copy.deepcopy(norm).process_group is plain.process_group is small[1].process_group is of_rank,
        "small": (type(small[1]), small[1].num_features),
    }


def test_groups(results):
    for rank, x in enumerate(norm_images(0)[0].split((5, 2))):
        got, norm = results[rank]["groups"], make_norm(pk.MaskedBatchNorm2d)
        assert got["same group"] and got["small"] == (nn.SyncBatchNorm, 4)
        want = norm(x)
        for name in ("alone", "copy"):
            torch.testing.assert_close(got[name], want, **EXACT)
    torch.testing.assert_close(torch.cat([r["groups"]["both"] for r in results]), norm(norm_images(0)[0]), **EXACT)


def refused(rank):
    """Errors on all ranks, before any of them waits for another; and work of one rank alone."""
    norm = make_norm(pk.MaskedSyncBatchNorm)
    x = norm_images(0)[0]
    with pytest.raises(RuntimeError, match=r"expected eval mode, got training on 2 processes"):
        torch.func.vmap(norm)(x[None])
    with pytest.raises(RuntimeError, match=r"expected eval mode, got training on 2 processes"):
        torch.jit.trace(norm, x)
    with pytest.raises(ValueError, match=r"MaskedSyncBatchNorm: input: expected \[N, 6, \.\.\.\], got \[6\]"):
        norm(x[0, :, 0, 0])
    with pytest.raises(ValueError, match="expected 6 channels"):
        norm(x[:, :5])
    grad = torch.autograd.grad(norm(x.requires_grad_()).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()
    if rank == 0:  # one rank writes a small network, maybe of a network with a part that only trains
        small = pk.shrink(OnlyTrains().double(), torch.randn(2, 3, 4, 4, dtype=torch.float64))
        assert type(small.norm) is nn.SyncBatchNorm and small.norm.num_features == 4
    if rank == 0:
        norm.set_mask(~LIVE)
    return norm(norm_images(0)[0]).detach()


class OnlyTrains(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 1), nn.SyncBatchNorm(6), nn.Conv2d(6, 2, 1)
        self.more = nn.Conv2d(6, 2, 1)
        pk.convert(self)
        self.conv.set_masks(filter=LIVE), self.norm.set_mask(LIVE)

    def forward(self, x):
        x = self.norm(self.conv(x))
        return (self.head(x), self.more(x)) if self.training else self.head(x)


def test_masks_that_differ_do_not_hang(results):
    """Each rank has statistics of the ranks in which a channel is live."""
    norm = make_norm(pk.MaskedBatchNorm2d)
    for result, mask in zip(results, (~LIVE, LIVE), strict=True):
        norm.set_mask(mask)
        torch.testing.assert_close(result["refused"], norm(norm_images(0)[0]).detach(), **EXACT)


def work(rank):
    norms = {name: make_norm(pk.MaskedSyncBatchNorm, **case) for name, case in NORMS.items()}
    return {
        **{mode: trained(rank, mode) for mode in MODES},
        "norms": {name: norm_alone(rank, norm, NORMS[name]) for name, norm in norms.items()},
        "copies": copies(rank),
        "groups": groups(rank),
        "refused": refused(rank),
    }


@pytest.fixture(scope="module")
def results():
    return run_ranks(work, 2)
