"""Masked layers that are built on the meta device: everything is live once they have memory."""

import copy

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.averages import masked_net

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
KEEP = torch.arange(8) % 3 != 0


def on_meta():
    with torch.device("meta"):
        return masked_net()


def masked(net):
    return [m for m in net.modules() if isinstance(m, (pk.MaskedConv2d, pk.MaskedBatchNorm2d))]


def assert_computes_as(net, state):
    plain = masked_net()
    pk.restore(plain)
    plain.load_state_dict(state, strict=False)
    torch.testing.assert_close(net.eval()(X), plain.eval()(X))


def assert_all_live(net):
    layers = masked(net)
    assert len(layers) == 5
    for layer in layers:
        assert all(mask.all() and mask.device.type == "cpu" for mask in layer._masks.values())
        assert all((layer._buffers[name] == 1).all() for name in layer._mask_names)
        assert getattr(layer, "density", 1) == 1
    assert "/" not in repr(net)


@pytest.fixture
def dirty_memory(monkeypatch):
    """Memory that to_empty gets holds what it likes."""
    empty_like = torch.empty_like

    def dirty(x, **options):
        made = empty_like(x, **options)
        if made.is_meta:
            return made
        return made.random_(0, 2) if not made.is_floating_point() else made.uniform_(-1, 2)

    monkeypatch.setattr(torch, "empty_like", dirty)


@pytest.mark.parametrize("reset", [False, True])
def test_to_empty(dirty_memory, reset):
    net = on_meta()
    assert masked(net)[0].density == 1 and masked(net)[0].filter_mask.is_meta
    net.to_empty(device="cpu")
    if reset:
        for module in net.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    assert_all_live(net)
    net.load_state_dict(masked_net(seed=3).state_dict())
    assert_computes_as(net, masked_net(seed=3).state_dict())


def test_to_empty_of_one_layer(dirty_memory):
    layer = pk.MaskedConv2d(4, 8, 3, device="meta").to_empty(device="cpu")
    assert layer.density == 1
    layer.set_masks(filter=KEEP)
    assert layer(torch.randn(1, 4, 5, 5))[:, ~KEEP].abs().max() == 0


def test_to_empty_elsewhere_keeps_masks(dirty_memory):
    layer = pk.MaskedConv2d(4, 8, 3)
    layer.set_masks(filter=KEEP)
    layer.to_empty(device="cpu")
    assert torch.equal(layer.filter_mask, KEEP) and layer.density == KEEP.float().mean()


def test_reset_parameters_makes_all_live():
    net = masked_net()
    net[0].set_masks(filter=KEEP, hard=KEEP)
    net[1].set_mask(KEEP)
    net[0].reset_parameters()
    net[1].reset_parameters()
    assert_all_live(net)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("is_plain", [False, True], ids=["masked checkpoint", "plain checkpoint"])
def test_load_state_dict(dirty_memory, assign, is_plain):
    source = masked_net(seed=5)
    if not is_plain:
        source[0].set_masks(filter=KEEP)
        source[1].set_mask(KEEP)
        source[3].set_masks(input=KEEP, kernel=torch.arange(48).view(6, 8) % 5 != 0)
    else:
        pk.restore(source)
    state = copy.deepcopy(source.state_dict())
    net = on_meta() if assign else on_meta().to_empty(device="cpu")
    net.load_state_dict(state, strict=True, assign=assign)
    torch.testing.assert_close(net.eval()(X), source.eval()(X))
    assert all(mask.device.type == "cpu" for layer in masked(net) for mask in layer._masks.values())
    if is_plain:
        assert_all_live(net)
    else:
        assert torch.equal(net[0].filter_mask, KEEP) and torch.equal(net[3].kernel_mask, source[3].kernel_mask)
    net[0].set_masks(filter=~KEEP)
    assert net[0](X)[:, KEEP].abs().max() == 0 and net[0](X)[:, ~KEEP].abs().max() > 0


def put_by_setattr(module, key, value):
    setattr(module, key, nn.Parameter(value) if key in module._parameters else value)


def put_by_load(module, key, value):
    module.load_state_dict({key: value}, strict=False, assign=True)


@pytest.mark.parametrize("put", [put_by_setattr, put_by_load])
@pytest.mark.parametrize(
    "order",
    [list, reversed, lambda items: sorted(items, key=lambda item: item[0])],
    ids=["forward", "backward", "sorted"],
)
def test_tensors_put_in_one_by_one(put, order):
    """As the loaders of transformers 5 and 4 do, which go through the names of a checkpoint."""
    source, net = masked_net(seed=5), on_meta()
    source[0].set_masks(filter=KEEP)
    source[1].set_mask(KEEP)
    source[3].set_masks(input=KEEP)
    for name, value in order(list(copy.deepcopy(source.state_dict()).items())):
        owner, _, key = name.rpartition(".")
        put(net.get_submodule(owner), key, value)
        repr(net)
    torch.testing.assert_close(net.eval()(X), source.eval()(X))
    assert torch.equal(net[0].filter_mask, KEEP) and net[0].density == KEEP.float().mean()
    assert torch.equal(net[3].input_mask, KEEP)


def test_masks_put_in_before_a_move_count():
    net = on_meta()
    state = masked_net(seed=5)
    state[0].set_masks(filter=KEEP)
    for name, value in copy.deepcopy(state.state_dict()).items():
        owner, _, key = name.rpartition(".")
        put_by_setattr(net.get_submodule(owner), key, value)
    net.double()
    assert torch.equal(net[0].filter_mask, KEEP) and net[0].weight.dtype == torch.float64


def test_a_mask_may_be_put_in_as_bool():
    layer = pk.MaskedConv2d(4, 8, 3)
    layer.filter_mask = KEEP
    assert torch.equal(layer.filter_mask, KEEP) and layer._buffers["filter_mask"].dtype == torch.float32
    assert layer(torch.randn(1, 4, 5, 5))[:, ~KEEP].abs().max() == 0


@pytest.mark.parametrize("to", [torch.float64, torch.bfloat16, torch.float16])
def test_stored_masks_stay_float32(to):
    net = masked_net()
    net[0].set_masks(filter=KEEP)
    net.to(to)
    assert net[0].weight.dtype == to and net[0]._buffers["filter_mask"].dtype == torch.float32
    assert torch.equal(net[0].filter_mask, KEEP)


def test_to_meta_and_back(dirty_memory):
    net = masked_net()
    net[0].set_masks(filter=KEEP)
    net.to("meta")
    net.to_empty(device="cpu")
    assert_all_live(net)


def test_share_memory():
    net = masked_net().share_memory()
    assert net[0]._buffers["filter_mask"].is_shared()
    net[0].set_masks(filter=KEEP)
    assert net[0](X)[:, ~KEEP].abs().max() == 0


def test_replicas_of_data_parallel_leave_the_layer_alone():
    """A replica's buffers are on another device."""
    net = masked_net()
    net[0].set_masks(filter=KEEP)
    mask, table = net[0].filter_mask, net[0]._mask_table
    replica = net[0]._replicate_for_data_parallel()
    for name in replica._mask_names:
        replica._buffers[name] = replica._buffers[name].to("meta")
    assert replica.filter_mask.is_meta and replica._mask_table.is_meta
    assert net[0].filter_mask is mask and net[0]._mask_table is table and torch.equal(mask, KEEP)
