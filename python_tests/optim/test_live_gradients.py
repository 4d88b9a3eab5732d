"""pk.live_gradients_hook: what DistributedDataParallel computes without it, from fewer bytes."""

import contextlib
import copy
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import prunekernels as pk
from cases.ranks import run_ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed")
SIZES = {"0": (16, 4, 9), "3": (12, 8, 9), "4": (8, 12, 1), "6": (6, 8, 4), "8": (5, 6 * 49, 1)}  # K, C / groups, R S


def network(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Tanh(), nn.Conv2d(16, 12, 3, groups=2),
        nn.Conv2d(12, 8, 1, bias=False), nn.GroupNorm(2, 8), nn.ConvTranspose2d(8, 6, 2), nn.Flatten(),
        nn.Linear(6 * 49, 5),
    )  # fmt: skip
    pk.convert(net, linears=True)
    return net


def random(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) > 0.4


def set_masks(net, seed=0):
    """Filters, what reads them, single kernels of one layer and single weights of another."""
    first, grouped, pointwise = (random(10 * seed + i, count) for i, count in enumerate((16, 12, 8)))
    net[0].set_masks(filter=first)
    net[1].set_mask(first)
    net[3].set_masks(filter=grouped, input=first)
    net[4].set_masks(filter=pointwise, input=grouped)
    net[5].set_mask(pointwise)
    net[6].set_masks(kernel=random(10 * seed + 3, 6, 8), input=pointwise)
    net[8].set_masks(kernel=random(10 * seed + 4, 5, 6 * 49))


def live_count(net):
    """Entries that a gradient has by the masks; of single weights those in rows and columns with a live one."""
    count = 0
    for name, (K, C, taps) in SIZES.items():
        layer = net[int(name)]
        inputs = layer.input_mask.view(layer.groups, 1, C).expand(-1, K // layer.groups, -1).reshape(K, C)
        kernels = layer.kernel_mask & layer.filter_mask[:, None] & inputs
        if taps == 1:
            kernels = kernels.any(1)[:, None] & kernels.any(0)
        count += taps * int(kernels.sum()) + (0 if layer.bias is None else int(layer.filter_mask.sum()))
    return count + sum(2 * int(net[i].channel_mask.sum()) for i in (1, 5))


def images(seed, count=4):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def hooked(net, hook=pk.live_gradients_hook, **options):
    """The network in DDP with the hook, and the hook's state."""
    model = DistributedDataParallel(net, **options)
    state = pk.LiveGradients(net)
    model.register_comm_hook(state, hook)
    return model, state


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert a is b is None or (a.dtype == b.dtype and torch.equal(a, b))


# ---- one process, in which averaging changes nothing


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("flow", [False, True], ids=["masked", "live"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}, {"static_graph": True}], ids=str)
def test_gradients_are_those_without_it(alone, flow, layout, options):
    """After changes of masks too. What is sent is what the masks leave."""
    net = pk.flow(network(), flow).to(memory_format=layout)
    plain = copy.deepcopy(net)
    model, state = hooked(net, **options)
    for step in range(4):
        for each in (net, plain):
            set_masks(each, step // 2)
        x = images(step).to(memory_format=layout)
        assert_same(gradients(model, x), gradients(plain, x))
        assert state.sent_bytes == 4 * live_count(net) < 0.8 * state.full_bytes
        assert state.full_bytes == 4 * sum(p.numel() for p in net.parameters())
    assert repr(state) == f"LiveGradients(live={live_count(net)}/{state.full_bytes // 4})"


def test_all_live_sends_buckets_as_they_are(alone):
    model, state = hooked(network())
    assert_same(gradients(model, images(0)), gradients(network(), images(0)))
    assert state.sent_bytes == state.full_bytes > 0


def test_a_dead_filter_in_a_hundred_is_not_worth_packing(alone):
    net = nn.Sequential(pk.MaskedConv2d(4, 100, 3))
    model, state = hooked(net)
    for dead, share in ((1, 1.0), (10, 0.9)):
        net[0].set_masks(filter=torch.arange(100) >= dead)
        gradients(model, images(0))
        assert state.sent_bytes == share * state.full_bytes


def test_everything_dead(alone):
    net = network()
    model, state = hooked(net)
    for layer in (net[0], net[3], net[4], net[6], net[8]):
        layer.set_masks(filter=torch.zeros(layer.out_channels, dtype=torch.bool))
    for norm in (net[1], net[5]):
        norm.set_mask(torch.zeros_like(norm.channel_mask))
    assert not any(grad.any() for grad in gradients(model, images(0)))
    assert state.sent_bytes == 0 < state.full_bytes


@pytest.mark.parametrize("flow", [False, True], ids=["masked", "live"])
def test_soft_dead_filters_that_learn_are_sent(alone, flow):
    net = pk.flow(nn.Sequential(pk.MaskedConv2d(4, 10, 3), pk.MaskedConv2d(10, 6, 3)), flow)
    net[0].set_masks(filter=torch.arange(10) >= 5, hard=torch.arange(10) >= 2)
    net[0].weight_grad = "dense"
    plain = copy.deepcopy(net)
    model, state = hooked(net)
    expected = gradients(plain, images(0))
    assert [bool(row.any()) for row in expected[0]] == [False] * 2 + [True] * 8
    assert_same(gradients(model, images(0)), expected)
    assert state.full_bytes - state.sent_bytes == 4 * (2 * 36 + 5)  # of a dead filter the bias is dead
    net[0].weight_grad = plain[0].weight_grad = "masked"  # counts as a change of masks
    assert_same(gradients(model, images(0)), gradients(plain, images(0)))
    assert state.full_bytes - state.sent_bytes == 4 * (5 * 36 + 5)


def test_no_sync_and_accumulated_gradients(alone):
    net, plain = network(), network()
    for each in (net, plain):
        set_masks(each)
    model, _ = hooked(net)
    for step in range(3):
        with model.no_sync() if step < 2 else contextlib.nullcontext():
            model(images(step)).square().sum().backward()
        plain(images(step)).square().sum().backward()
    assert_same([p.grad for p in net.parameters()], [p.grad for p in plain.parameters()])


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.a, self.b = pk.MaskedConv2d(4, 8, 3), pk.MaskedConv2d(8, 6, 1), pk.MaskedConv2d(8, 6, 1)
        for layer in (self.body, self.a, self.b):
            layer.set_masks(filter=random(layer.out_channels, layer.out_channels))

    def forward(self, x, head):
        return getattr(self, head)(self.body(x))


def test_unused_parameters(alone):
    net, plain = TwoHeads(), TwoHeads()
    model, _ = hooked(net, find_unused_parameters=True)
    for head in ("a", "b", "a"):
        for each in (model, plain):
            each.zero_grad()
            each(images(0), head).square().sum().backward()
        assert_same([p.grad for p in net.parameters()], [p.grad for p in plain.parameters()])


def test_mixed_dtypes_and_small_buckets(alone):
    """One bucket has numbers of one dtype."""
    net = network()
    net[8].double()
    net.insert(8, Double())
    set_masks(nn.Sequential(*(layer for layer in net if not isinstance(layer, Double))))
    plain = copy.deepcopy(net)
    model, state = hooked(net, bucket_cap_mb=0.001)
    for seed in range(2):  # buckets are made anew behind the first step
        assert_same(gradients(model, images(seed)), gradients(plain, images(seed)))
    assert state.sent_bytes < 0.8 * state.full_bytes


class Double(nn.Module):
    def forward(self, x):
        return x.double()


def test_fewer_bits_on_the_wire(alone):
    """By the wrapper that torch has for it: half of the bytes, and what float16 rounds them to."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_wrapper

    net, plain = network(), network()
    for each in (net, plain):
        set_masks(each)
    model, state = hooked(net, fp16_compress_wrapper(pk.live_gradients_hook))
    expected = [grad.half().float() for grad in gradients(plain, images(0))]
    assert_same(gradients(model, images(0)), expected)
    assert state.sent_bytes == 2 * live_count(net)


class Tied(nn.Module):
    """Two masked layers with one weight, of which each has other filters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = pk.MaskedConv2d(4, 8, 3, bias=False), pk.MaskedConv2d(4, 8, 3, bias=False)
        self.b.weight = self.a.weight
        self.a.set_masks(filter=torch.arange(8) < 4)
        self.b.set_masks(filter=torch.arange(8) >= 6)

    def forward(self, x):
        return self.a(x) + self.b(x)


def test_a_weight_of_two_layers_is_sent_whole(alone):
    model, state = hooked(Tied())
    expected = gradients(Tied(), images(0))
    assert_same(gradients(model, images(0)), expected)
    assert state.sent_bytes == state.full_bytes and expected[0][:4].any() and expected[0][6:].any()


def test_a_computed_weight(alone):
    """What it is computed from is sent whole."""

    def made():
        net = network()
        nn.utils.parametrizations.weight_norm(net[0])
        set_masks(net)
        return net

    model, state = hooked(made())
    assert_same(gradients(model, images(0)), gradients(made(), images(0)))
    assert state.sent_bytes < state.full_bytes


def test_dead_entries_are_zero_whatever_the_loss_adds(alone):
    net = network()
    set_masks(net)
    model, _ = hooked(net)
    (model(images(0)).sum() + net[0].weight.square().sum()).backward()
    assert not net[0].weight.grad[~net[0].filter_mask].any() and net[0].weight.grad[net[0].filter_mask].all()


def test_compacted_mode_has_nothing_to_leave_out(alone):
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3))
    pk.convert(net)
    net[0].set_masks(filter=torch.arange(8) > 3)
    net[2].set_masks(input=torch.arange(8) > 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pk.compacted(net, images(0), optimizer) as (small, _):
        model, state = hooked(small)
        gradients(model, images(0))
        assert state.sent_bytes == state.full_bytes == 4 * (4 * 4 * 9 + 4 + 6 * 4 * 9 + 6)
        assert repr(state) == "LiveGradients(live=370/370)"


def test_a_module_with_the_hook_is_pickled(alone):
    net = network()
    set_masks(net)
    model, _ = hooked(net)
    gradients(model, images(0))
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again.module[0].filter_mask, net[0].filter_mask)


# ---- several processes


def counted(rank, steps, **options):
    """Of each step: the gradients with the hook and without it, in the bytes that both gave to all_reduce."""
    sent, real = [], dist.all_reduce

    def all_reduce(tensor, *args, **kwargs):
        if tensor.is_floating_point():
            sent.append(tensor.numel() * tensor.element_size())
        return real(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce
    net, plain = network(), network()
    model, state = hooked(net, **options)
    reference = DistributedDataParallel(plain, **options)
    found = []
    for step in range(steps):
        for each in (net, plain):
            set_masks(each, step // 2)
        x = images(100 * step + rank)
        expected = gradients(reference, x)
        sent.clear()
        got = gradients(model, x)
        found.append((got, expected, sum(sent), state.sent_bytes, 4 * live_count(net)))
    dist.all_reduce = real
    return found


def of_two(rank):
    with warnings.catch_warnings():  # broadcast_buffers has another name from torch 2.13 on
        warnings.simplefilter("ignore", FutureWarning)
        return {
            "counted": counted(rank, 4), "views": counted(rank, 2, gradient_as_bucket_view=True),
            "differ": differ(rank), "weight_grad": other_weight_grad(rank), "restored": restored(rank),
            "broadcast": broadcast(rank), "late": late(rank),
        }  # fmt: skip


def differ(rank):
    """Other filters of a layer, as many on each rank; and the same filters of other layers. The error of each."""
    errors = []
    for layer, shift in ((1, rank), (1 + rank, 0)):
        net = nn.Sequential(pk.MaskedConv2d(4, 8, 3), pk.MaskedConv2d(8, 8, 1), pk.MaskedConv2d(8, 8, 1))
        model, _ = hooked(net, broadcast_buffers=False)
        gradients(model, images(0))
        net[layer].set_masks(filter=torch.arange(8) % 2 == shift)
        with pytest.raises(ValueError) as error:
            gradients(model, images(0))
        errors.append(str(error.value))
    return errors


def other_weight_grad(rank):
    net = network()
    set_masks(net)
    model, _ = hooked(net, broadcast_buffers=False)
    net[0].weight_grad = "dense" if rank else "masked"
    with pytest.raises(ValueError) as error:
        gradients(model, images(0))
    return str(error.value)


def restored(rank):
    """Other masks on one rank between two steps, the same ones in the steps: nothing to agree on."""
    net = network()
    set_masks(net)
    model, _ = hooked(net, broadcast_buffers=False)
    found = [gradients(model, images(rank))]
    if rank == 0:
        set_masks(net, 1)
        set_masks(net)
    return [*found, gradients(model, images(rank))]


def broadcast(rank):
    """Only rank 0 changes its masks, and DDP broadcasts buffers in the next forward pass."""
    net = network()
    model, state = hooked(net)
    gradients(model, images(rank))
    if rank == 0:
        set_masks(net)
    return [*gradients(model, images(rank)), torch.tensor([state.sent_bytes, 4 * live_count(net)])]


def late(rank):
    """Only rank 0 changes its masks: the error of each rank. The last thing that a group does."""
    net = network()
    model = DistributedDataParallel(net, broadcast_buffers=False)
    model.register_comm_hook(pk.LiveGradients(net, timeout=1.0), pk.live_gradients_hook)
    gradients(model, images(0))
    if rank == 0:
        set_masks(net)
    with pytest.raises(RuntimeError) as error:
        gradients(model, images(0))
        dist.barrier()
    return str(error.value)


@pytest.fixture(scope="module")
def two():
    return run_ranks(of_two, 2)


@pytest.mark.parametrize("case", ["counted", "views"])
def test_two_ranks_get_the_same_bits_as_without_it(two, case):
    """A sum of two numbers does not depend on their order; a half of it is exact."""
    for rank in two:
        for got, expected, *_ in rank[case]:
            assert_same(got, expected)
    assert any(grad.any() for grad in two[0][case][0][0])


def test_two_ranks_send_what_the_masks_leave(two):
    for rank in two:
        for _, expected, sent, told, live in rank["counted"]:
            assert sent == told == live < 4 * sum(grad.numel() for grad in expected)


def test_other_masks_on_a_rank_are_an_error_on_all(two):
    for rank in two:
        assert len(rank["differ"]) == 2
        for error in rank["differ"]:
            assert error.startswith("check_same_masks: 1: expected the masks of rank 0 on all 2 ranks, got others on ")
        assert "got equal masks, but another weight_grad on some of them" in rank["weight_grad"]


def test_a_change_that_is_undone_before_the_step_is_none(two):
    assert_same(two[0]["restored"][0], two[0]["restored"][1])
    assert_same(two[0]["restored"][0], two[1]["restored"][1])


def test_masks_that_are_broadcast(two):
    first, second = (rank["broadcast"] for rank in two)
    assert_same(first, second)
    sent, live = first[-1].tolist()
    assert sent == live and any(grad.any() for grad in first[:-1])


def test_a_change_on_one_rank_alone_is_an_error_there(two):
    """And on the other one, which waits for its gradients, where that process ends."""
    expected = (
        "live_gradients_hook: expected all ranks to change their masks before the same step, as this one (rank 0)"
    )
    assert two[0]["late"].startswith(f"{expected} did, got: ")
    assert two[1]["late"]


def of_four(rank):
    return counted(rank, 3), in_a_group(rank)


def in_a_group(rank):
    """Ranks 0 and 1 train together, and 2 and 3, each pair with masks of its own: with the hook and without it."""
    group = [dist.new_group(pair) for pair in ([0, 1], [2, 3])][rank // 2]
    found = []
    for has_hook in (True, False):
        net = network()
        set_masks(net, rank // 2)
        model = DistributedDataParallel(net, process_group=group)
        if has_hook:
            model.register_comm_hook(pk.LiveGradients(model, group), pk.live_gradients_hook)
        found.append(gradients(model, images(rank)))
    return found


@pytest.mark.slow
def test_four_ranks():
    """Sums of four numbers depend on their order, which depends on the place in the bucket."""
    ranks, pairs = zip(*run_ranks(of_four, 4), strict=True)
    for got, expected in pairs:
        assert_same(got, expected)
    assert not torch.equal(pairs[0][0][0], pairs[2][0][0])
    for rank in ranks:
        for (got, expected, sent, told, live), (of_first, *_) in zip(rank, ranks[0], strict=True):
            assert sent == told == live
            assert_same(got, of_first)
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))


def uneven(rank):
    """Rank 1 has two more batches."""
    net = network()
    set_masks(net)
    model, _ = hooked(net)
    with model.join():
        for step in range(1 + 2 * rank):
            grads = gradients(model, images(step))
    return grads


@pytest.mark.slow
def test_uneven_inputs():
    """A rank that has no batch left sends zeros."""
    net = network()
    set_masks(net)
    expected = [grad / 2 for grad in gradients(net, images(2))]
    for got, grad in zip(run_ranks(uneven, 2)[1], expected, strict=True):
        torch.testing.assert_close(got, grad)
