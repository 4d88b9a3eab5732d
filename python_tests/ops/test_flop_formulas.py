"""torch's FLOP counter sees the live work of masked layers, forward and backward, in both modes."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import prunekernels as pk
from prunekernels.train import models


def counted(run):
    with FlopCounterMode(display=False) as mode:
        run()
    return mode.get_total_flops()


def half_dead(net, norms=True):
    """Masks half of the filters of every convolution, and what follows from that."""
    pk.convert(net)
    for module in net.modules():
        if isinstance(module, pk.MaskedConv2d):
            module.set_masks(filter=torch.arange(module.out_channels) % 2 == 0)
        elif norms and isinstance(module, pk.MaskedBatchNorm2d):
            module.set_mask(torch.arange(module.num_features) % 2 == 0)
    return net


def chain():
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=2)]
    return nn.Sequential(*layers, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.Flatten(), nn.Linear(96, 2))


X = torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("masks", ["none", "filters", "kernels", "inputs", "all"])
def test_forward_is_what_count_flops_counts(masks, live):
    net = chain()
    pk.convert(net)
    if masks in ("filters", "all"):
        half_dead(net)
    if masks in ("kernels", "all"):
        net[6].set_masks(kernel=torch.rand(6, 8, generator=torch.Generator().manual_seed(0)) < 0.5)
    if masks in ("inputs", "all"):
        net[3].set_masks(input=torch.arange(8) != 2)
    pk.flow(net.eval(), live)
    with torch.no_grad():
        assert counted(lambda: net(X)) == 2 * pk.count_flops(net, X).live


def test_with_gradients_the_counter_itself_takes_live_tensors_to_full_width():
    """It puts a hook on every input and output of a module, and hooks on tensors see all channels."""
    net = pk.flow(half_dead(chain()).eval())
    live = counted(lambda: net(X))
    pk.flow(net, False)
    assert live == counted(lambda: net(X)) == 2 * pk.count_flops(net, X).live


@pytest.mark.slow
@pytest.mark.parametrize("live", [False, True])
def test_resnet18(live):
    """Half of the filters, and in masked mode all channels: half of the work of all convolutions."""
    net, x = models.build("resnet18", 10).eval(), torch.randn(2, 3, 32, 32)
    dense = counted(lambda: net(x))
    half_dead(net)
    linear = 2 * 2 * 512 * 10
    pk.flow(net, live)
    with torch.no_grad():
        total = counted(lambda: net(x))
    if live:
        assert total == 2 * pk.count_flops(net, x).live < dense / 3
    else:
        assert total == (dense - linear) // 2 + linear


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("input_grad", [False, True])
def test_backward_is_twice_forward(input_grad, live):
    """The gradient of the weight and that of the input cost as much as the forward pass does."""
    net = half_dead(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3)))
    net[2].set_masks(input=torch.arange(8) % 2 == 0)
    pk.flow(net, live)
    x = X.clone().requires_grad_(input_grad)
    y = net(x)
    forward, of_second = counted(lambda: net(x)), 2 * 2 * 36 * 9 * 3 * 4
    of_first = forward - of_second
    assert of_first == 2 * 2 * 64 * 9 * 4 * 3
    backward = counted(lambda: y.sum().backward())
    assert backward == 2 * of_second + of_first * (2 if input_grad else 1)


def test_dense_gradients_count_as_dense():
    layer = half_dead(nn.Sequential(nn.Conv2d(3, 8, 3)))[0]
    layer.weight_grad = "dense"
    y = layer(X)
    assert counted(lambda: y.sum().backward()) == 2 * 2 * 36 * 9 * 8 * 3


def test_by_layer():
    net = half_dead(chain())
    with FlopCounterMode(display=False) as mode:
        net(X)
    by_name = {name: sum(counts.values()) for name, counts in mode.get_flop_counts().items()}
    assert by_name["Sequential.0"] == 2 * 2 * 16 * 9 * 4 * 3 and by_name["Sequential.6"] == 2 * 2 * 16 * 3 * 8


def test_without_values_everything_is_live():
    layer = half_dead(nn.Sequential(nn.Conv2d(3, 8, 3)))[0]
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 3, 8, 8)
        assert counted(lambda: layer(x)) == 2 * 2 * 36 * 9 * 8 * 3
    with torch.device("meta"):
        meta = pk.MaskedConv2d(3, 8, 3)
        args = (None, None, (1, 1), (0, 0), (1, 1), 1, "auto")
        call = torch.ops.prunekernels.masked_conv2d
        assert counted(lambda: call(torch.empty(2, 3, 8, 8), meta.weight, None, meta._mask_table, *args)) == 31104
