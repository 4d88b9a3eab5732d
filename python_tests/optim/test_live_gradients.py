"""pk.live_gradients_hook in one process, where averaging changes nothing: what DDP computes without it."""

import contextlib
import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn

import prunekernels as pk
from cases.live_gradients import assert_same, gradients, hooked, images, live_count, network, random, set_masks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed")


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
