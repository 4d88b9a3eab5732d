"""Live mode against masked mode: outputs, gradients, statistics; single layers, networks, bad input."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from cases.live import assert_same_step, in_flow, live_list, step, without_dropout
from cases.networks import EXACT, NETWORKS, Bottleneck, Head, conv_norm, images, mask_at_random, trained
from prunekernels.live import LiveTensor, full_width, recording
from prunekernels.live.tensor import wrap


def assert_modes_agree(net, x, exact=False, flows=None):
    network = in_flow(net)
    with recording(network) as fallbacks:
        got = step(network, x)
    assert_same_step(got, step(net, x), exact)
    if flows is not None:
        assert (not fallbacks) == flows, fallbacks


NO_VIEW = ("plain", torch.channels_last)

# ---- networks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("name", EXACT)
def test_exact_on_integers(name, layout):
    if (name, layout) == NO_VIEW:
        pytest.skip("torch itself cannot flatten this by a view")
    for seed in range(2):
        net = mask_at_random(trained(name, seed, exact=True), seed, kernels=0 if seed == 1 else 0.3)
        assert_modes_agree(net.to(memory_format=layout), images(exact=True).to(memory_format=layout), exact=True)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", NETWORKS)
def test_training_step(name, seed):
    net = without_dropout(mask_at_random(trained(name, seed), seed)).train()
    for layer in net.modules():
        if isinstance(layer, pk.MaskedConv2d) and seed == 1:
            layer.weight_grad = "dense"
        if isinstance(layer, pk.MaskedConv2d) and seed == 2:
            layer.grad_scale = torch.rand(layer.out_channels).round(decimals=1)
    layout = torch.channels_last if seed == 3 and name != "plain" else torch.contiguous_format
    assert_modes_agree(net.to(memory_format=layout), images(3).to(memory_format=layout))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", NETWORKS)
def test_inference(name, mode):
    net = mask_at_random(trained(name), 5)
    with mode():
        x = images()
        torch.testing.assert_close(in_flow(net)(x), net(x), rtol=1e-9, atol=1e-9)


def everywhere(net, filters, norms=True):
    """Masks every layer alike. filters(K) -> mask."""
    for layer in net.modules():
        if isinstance(layer, pk.MaskedConv2d):
            layer.set_masks(filter=filters(layer.out_channels))
        elif isinstance(layer, pk.MaskedBatchNorm2d) and norms:
            layer.set_mask(filters(layer.num_features))
    return net


PATTERNS = {
    "all dead": lambda K: torch.zeros(K, dtype=torch.bool), "none dead": lambda K: torch.ones(K, dtype=torch.bool),
    "one live": lambda K: torch.arange(K) == K // 2, "one dead": lambda K: torch.arange(K) != 1,
    "half": lambda K: torch.arange(K) % 2 == 0,
}  # fmt: skip


@pytest.mark.thinned(2)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norms", [True, False], ids=["masked norms", "unmasked norms"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", NETWORKS)
def test_one_pattern_for_all(name, pattern, norms, training):
    net = without_dropout(everywhere(trained(name), PATTERNS[pattern], norms)).train(training)
    assert_modes_agree(net, images())


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"halves", "excite", "excite_linear"}))
def test_joint_masks_never_break_the_flow(name):
    net = without_dropout(everywhere(trained(name), PATTERNS["half"])).train()
    assert_modes_agree(net, images(), flows=True)


def test_several_steps_with_masks_changing_between():
    nets = [without_dropout(mask_at_random(trained("basic"), 1)).train()]
    nets.append(in_flow(nets[0]))
    optimizers = [torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9) for net in nets]
    for i in range(4):
        x = images()
        for net, optimizer in zip(nets, optimizers, strict=True):
            mask_at_random(net, i)
            optimizer.zero_grad()
            step(net, x)
            optimizer.step()
    for got, want in zip(nets[1].state_dict().values(), nets[0].state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


def test_masks_that_change_between_forward_and_backward():
    grads = []
    trained_net = trained("plain")
    for net in (trained_net, in_flow(trained_net)):
        everywhere(net, PATTERNS["half"])
        y = net(images() * 0 + 1)
        for layer in net.modules():
            if isinstance(layer, pk.MaskedConv2d):
                layer.filter_mask[0] = False
        y.sum().backward()
        grads.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(grads[1], grads[0])


def test_a_mask_changed_between_two_uses():
    net = in_flow(everywhere(trained("plain"), PATTERNS["half"]))
    x, plain = images(), trained("plain")
    for pattern in ("half", "one live", "none dead", "half", "all dead", "one dead"):
        torch.testing.assert_close(everywhere(net, PATTERNS[pattern])(x), everywhere(plain, PATTERNS[pattern])(x))


# ---- one layer ------------------------------------------------------------------------------------------------------

LISTS = {"all": range(8), "some": (0, 1, 3, 6), "one": (6,), "none": ()}
LAYERS = {
    "3x3": {"padding": 1}, "no bias": {"padding": 1, "bias": False}, "1x1": {"kernel_size": 1},
    "stride": {"stride": 2, "padding": (1, 0)}, "dilation": {"dilation": 2, "padding": 2},
    "same": {"padding": "same"}, "valid": {"padding": "valid"},
    "same even": {"kernel_size": 2, "padding": "same", "bias": False},
    "reflect": {"padding": 1, "padding_mode": "reflect"}, "circular": {"padding": (1, 2), "padding_mode": "circular"},
    "replicate same": {"padding": "same", "padding_mode": "replicate"}, "groups": {"groups": 4, "padding": 1},
    "depthwise": {"groups": 8, "padding": 1}, "depthwise no bias": {"groups": 8, "bias": False},
    "multiplier": {"groups": 8, "out_channels": 16, "bias": False},
    "more filters": {"out_channels": 12, "bias": False},
    "depthwise stride": {"groups": 8, "stride": 2, "padding": "valid", "padding_mode": "zeros"},
}  # fmt: skip
K_MASK = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1], dtype=torch.bool)
MASKS = {
    "none": {}, "filter": {"filter": K_MASK}, "input": {"input": K_MASK.flip(0)}, "kernel": {"kernel": 3},
    "filter and kernel": {"filter": K_MASK, "kernel": 2}, "hard": {"hard": K_MASK},
    "dead": {"filter": ~K_MASK.bool() & False},
    "hard and soft": {"hard": K_MASK, "filter": K_MASK & (torch.arange(8) > 2)},
    "no inputs": {"input": K_MASK & False}, "whole filters by kernels": {"kernel": 0},
    "all of them": {"filter": K_MASK, "kernel": 2, "input": K_MASK.roll(1)},
}  # fmt: skip


def integer_layer(masks, out_channels=8, kernel_size=3, **args):
    torch.manual_seed(3)
    layer = pk.MaskedConv2d(8, out_channels, kernel_size, **args).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randint(-4, 5, p.shape))
    given = dict(MASKS[masks])
    for name in ("filter", "hard"):
        if name in given:
            given[name] = given[name].repeat(out_channels)[:out_channels]
    if "kernel" in given:
        index = torch.arange(layer.kernel_mask.numel()).view(layer.kernel_mask.shape)
        given["kernel"] = index % given["kernel"] != 0 if given["kernel"] else index >= 2 * index.shape[1]
    layer.set_masks(**given)
    return layer


def layer_step(layer, channels, layout):
    compact = torch.randint(-4, 5, (2, len(channels), 5, 6)).double().to(memory_format=layout).requires_grad_()
    x = wrap(compact * 1, live_list(channels, 8))
    y = layer(x if layer._flow else full_width(x))
    wide = full_width(y)
    (wide * torch.arange(1.0, wide.numel() + 1).view(wide.shape)).sum().backward()
    return y, {"y": wide.detach(), "x": compact.grad} | {name: p.grad for name, p in layer.named_parameters()}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("weight_grad", ["masked", "dense", "scaled"])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_between_live_tensors(layer, masks, weight_grad):
    channels_last = (list(LAYERS).index(layer) + list(MASKS).index(masks)) % 2
    layout = torch.channels_last if channels_last else torch.contiguous_format
    layer = integer_layer(masks, **LAYERS[layer])
    layer.weight_grad = "dense" if weight_grad == "dense" else "masked"
    layer.grad_scale = torch.arange(layer.out_channels) * 0.5 if weight_grad == "scaled" else None
    for channels in LISTS.values():
        torch.manual_seed(4)
        _, want = layer_step(layer, channels, layout)
        network = pk.flow(nn.Sequential(copy.deepcopy(layer)))[0]
        network.zero_grad()
        torch.manual_seed(4)
        y, got = layer_step(network, channels, layout)
        assert_same_step(got, want, exact=True)
        layer.zero_grad()
        if type(y) is LiveTensor:
            assert y.live.count == y.compact.shape[1] < y.shape[1]


NORMS = {
    "same": lambda K: K % 2 == 0, "fewer": lambda K: K % 4 == 0, "more": lambda K: K % 2 < 1 or K < 5,
    "all": lambda K: True, "others": lambda K: K % 2 == 1, "none": lambda K: False,
}  # fmt: skip


@pytest.mark.parametrize("args", [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_whose_mask_is_not_the_filters(norm, training, args):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, **args), nn.ReLU(), nn.Conv2d(8, 4, 3)).double()
    if net[1].weight is not None:
        nn.init.normal_(net[1].weight), nn.init.normal_(net[1].bias)
    pk.convert(net)
    net[0].set_masks(filter=torch.arange(8) % 2 == 0)
    net[1].set_mask(torch.tensor([NORMS[norm](K) for K in range(8)]))
    assert_modes_agree(net.train(training), images(), flows=norm != "none")


def test_a_dead_filter_under_an_unmasked_norm_is_a_constant():
    net = pk.flow(trained("plain"))
    net[0][0].set_masks(filter=torch.arange(8) != 3)
    y = nn.Sequential(*net[0])(images())
    assert type(y) is not LiveTensor and y[:, 3].unique().numel() == 1 == torch.relu(y[:1, 3, 0, 0]).numel()


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_another_input_width_is_refused_by_name():
    net = in_flow(mask_at_random(trained("plain"), 1))
    for channels in (2, 4):
        with pytest.raises(ValueError, match=f"MaskedConv2d: input: expected 3 channels, got .1, {channels}, 8, 8"):
            net(torch.zeros(1, channels, 8, 8, dtype=torch.float64))


def test_a_live_tensor_of_another_width_is_refused_by_name():
    net = pk.flow(nn.Sequential(integer_layer("filter"), nn.ReLU(), pk.MaskedConv2d(6, 4, 1).double()))
    with pytest.raises(ValueError, match="MaskedConv2d: input: expected 6 channels"):
        net(torch.zeros(1, 8, 8, 8, dtype=torch.float64))
    net = pk.flow(nn.Sequential(integer_layer("filter"), pk.MaskedBatchNorm2d(6).double()))
    with pytest.raises(ValueError, match="MaskedBatchNorm2d: input: expected 6 channels"):
        net(torch.zeros(1, 8, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize("size", [(3, 8, 8), (0, 3, 8, 8), (1, 3, 8, 8), (2, 3, 16, 8)], ids=str)
def test_inputs_of_any_size(size):
    class Pooled(nn.Sequential):
        def forward(self, x):
            return super().forward(x).mean((-1, -2))

    net = Pooled(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.MaxPool2d(2), nn.Conv2d(6, 4, 1)).double()
    pk.convert(net)
    mask_at_random(net, 2)
    assert_modes_agree(net, torch.randn(size, dtype=torch.float64))


class Twice(nn.Module):
    """A layer with two inputs whose lists differ, and a second layer that shares its weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv_norm(3, 8), conv_norm(3, 8)
        self.shared, self.other = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, stride=2)
        self.other.weight = self.shared.weight

    def forward(self, x):
        y, z = self.shared(self.a(x)), self.shared(self.b(x))
        return self.other(self.shared(y + z)) + self.other(self.a(x))


def test_a_layer_used_twice_and_shared_parameters():
    net = Twice().double()
    pk.convert(net)
    for layer, modulus in ((net.a[0], 2), (net.a[1], 2), (net.b[0], 3), (net.b[1], 3), (net.shared, 5), (net.other, 4)):
        mask = torch.arange(8) % modulus != 0
        layer.set_mask(mask) if isinstance(layer, pk.MaskedBatchNorm2d) else layer.set_masks(filter=mask)
    assert_modes_agree(net, images(), flows=True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_filter_mask_that_empties_a_layer_before_a_norm(training):
    for norm in (True, False):
        net = nn.Sequential(conv_norm(3, 8), Bottleneck(8, 4, 8), Head(8)).double()
        pk.convert(without_dropout(net))
        net[1].body[0][0].set_masks(filter=torch.zeros(4, dtype=torch.bool))
        if norm:
            net[1].body[0][1].set_mask(torch.zeros(4, dtype=torch.bool))
        assert_modes_agree(net.train(training), images())


def test_a_list_stored_before_the_masks_changed():
    """A live tensor keeps its values and its list when the masks of its layer change."""
    net = pk.flow(nn.Sequential(integer_layer("filter"), integer_layer("all of them")))
    y = net[0](torch.ones(1, 8, 5, 5, dtype=torch.float64))
    wide = y.to_dense().clone()
    net[0].set_masks(filter="all")
    net[1].set_masks(filter="all", kernel="all", input="all")
    plain = copy.deepcopy(net[1])
    plain._flow = False
    assert torch.equal(full_width(net[1](y)), plain(wide)) and torch.equal(y.to_dense(), wide)


@pytest.mark.parametrize("model", [nn.Sequential(nn.Conv2d(3, 4, 1)), nn.Identity()])
def test_flow_needs_masked_layers(model):
    with pytest.raises(ValueError, match="flow: model: expected masked layers, got none in"):
        pk.flow(model)


def test_flow_needs_a_bool():
    with pytest.raises(ValueError, match="flow: enabled: expected True or False, got 1"):
        pk.flow(trained("plain"), 1)


def test_inputs_that_are_live_need_no_flow():
    layer = integer_layer("filter")
    x = wrap(torch.ones(2, 3, 5, 5, dtype=torch.float64), live_list((0, 2, 7), 8))
    assert type(layer(x)) is LiveTensor
    assert torch.equal(full_width(layer(x)), layer(x.to_dense()))
    assert torch.equal(F.conv2d(x, layer.weight), F.conv2d(x.to_dense(), layer.weight))


def test_a_filter_whose_inputs_all_arrive_dead():
    """Without a bias it is zero, so the layer does not pass it on."""
    layer = pk.MaskedConv2d(3, 2, 1, bias=False)
    layer.set_masks(kernel=torch.tensor([[True, False, False], [True, True, True]]))
    x = wrap(torch.randn(1, 2, 4, 4), live_list((1, 2), 3))
    assert layer(x).live.host.tolist() == [1]
    torch.testing.assert_close(full_width(layer(x)), layer(x.to_dense()))
