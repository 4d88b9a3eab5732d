"""The reference networks: the sizes the literature gives, their widths, and any image size."""

import pytest
import torch
from torch import nn

import prunekernels as pk
from prunekernels.live import recording
from prunekernels.train.models import MODELS, PadShortcut, build, scaled, with_new_weights, zero_kernels

# Parameters and multiply-adds of convolutions and linear layers, at 32x32 with 10 classes or 224x224 with 1000.
SIZES = {
    "vgg16_bn": (14_724_042, 313_201_664),
    "vgg_small": (288_746, 38_634_752),
    "resnet20": (269_722, 40_551_040),
    "resnet32": (464_154, 68_862_592),
    "resnet56": (853_018, 125_485_696),
    "resnet110": (1_727_962, 252_887_680),
    "resnet18": (11_689_512, 1_814_073_344),
    "resnet34": (21_797_672, 3_663_761_408),
    "resnet50": (25_557_032, 4_089_184_256),
    "mobilenet_v2": (3_504_872, 300_774_272),
    "densenet40": (1_019_722, 264_812_928),
}
IMAGENET = ("resnet18", "resnet34", "resnet50", "mobilenet_v2")


def multiply_adds(model, x):
    total = 0

    def count(layer, _, y):
        nonlocal total
        total += layer.weight[0].numel() * y.numel()

    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(count)
    model(x)
    return total


@pytest.mark.parametrize("name", MODELS)
def test_sizes(name):
    size = 224 if name in IMAGENET else 32
    with torch.device("meta"):
        model = build(name).eval()
        got = sum(p.numel() for p in model.parameters()), multiply_adds(model, torch.empty(1, 3, size, size))
    assert got == SIZES[name]
    assert model.classifier.out_features == (1000 if name in IMAGENET else 10)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("width", [0.9, 0.5, 0.3, 0.01, 1.5])
@pytest.mark.parametrize("name", MODELS)
def test_width_scales_the_filters_of_every_layer(name, width):
    with torch.device("meta"):
        full, narrow = build(name), build(name, width=width)
    convs = [(a, b) for a, b in zip(full.modules(), narrow.modules(), strict=True) if isinstance(a, nn.Conv2d)]
    assert [b.out_channels for _, b in convs] == [max(1, round(a.out_channels * width)) for a, _ in convs]
    assert all((a.groups > 1) == (a.groups == a.in_channels) for a, _ in convs)
    assert all(b.groups == b.in_channels for a, b in convs if a.groups > 1)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("size", [(8, 8), (9, 17), (33, 33)])
@pytest.mark.parametrize("name", MODELS)
def test_images_of_any_size(name, size):
    model = build(name, 7, width=0.25, in_channels=1)
    y = model(torch.randn(2, 1, *size))
    assert y.shape == (2, 7) and y.isfinite().all()
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet20", "resnet50", "densenet40", "mobilenet_v2"])
def test_activations_neither_explode_nor_vanish(name):
    model, spread = build(name), []
    model.pool.register_forward_hook(lambda _, x, __: spread.append(float(x[0].std())))
    with torch.no_grad():
        model(torch.randn(8, 3, 32, 32))
    assert 0.1 < spread[0] < 10


@pytest.mark.parametrize(("C", "K"), [(3, 5), (4, 4)])
def test_type_a_shortcut(C, K):
    x = torch.randn(2, C, 5, 6)
    y = PadShortcut(K - C, 2)(x)
    assert y.shape == (2, K, 3, 3)
    assert torch.equal(y[:, :C], x[:, :, ::2, ::2]) and not y[:, C:].any()


@pytest.mark.parametrize("name", MODELS)
def test_nothing_breaks_their_flow(name):
    model = build(name, width=0.25).double()
    pk.convert(model)
    masks = {}
    for layer in model.modules():
        if isinstance(layer, pk.MaskedConv2d):
            layer.set_masks(filter=masks.setdefault(layer.out_channels, torch.rand(layer.out_channels) < 0.6))
        elif isinstance(layer, pk.MaskedBatchNorm2d):
            layer.set_mask(masks.setdefault(layer.num_features, torch.rand(layer.num_features) < 0.6))
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = model(x)
    with recording(pk.flow(model)) as breaks:
        torch.testing.assert_close(model(x), expected)
    assert breaks == []


def test_scaled():
    assert [scaled(16, s) for s in (0.7, 0.5, 0.01, 1, 2)] == [11, 8, 1, 16, 32]


def test_new_weights():
    """As a builder draws them; kernels that are zero stay so, in training too, and nothing of the old is left."""
    model = build("resnet20", width=0.5)
    layer = model.stage2[1].body.conv1
    with torch.no_grad():
        layer.weight[3] = 0
        layer.weight[5, 2] = 0
        model.stem.norm.running_mean.fill_(7)
        model.stem.norm.weight.fill_(3)
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(0)
    assert with_new_weights(model) is model
    assert bool((model.stem.norm.running_mean == 0).all()) and bool((model.stem.norm.weight == 1).all())
    expected = (2 / (16 * 9)) ** 0.5
    assert float(layer.weight[4].detach().std()) == pytest.approx(expected, rel=0.2)
    zeros = zero_kernels(layer.weight)
    assert int(zeros.sum()) == 17 and bool(zeros[3].all()) and bool(zeros[5, 2])
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    optimizer.step()
    assert torch.equal(zero_kernels(layer.weight), zeros)
    convolutions = [name for name in old if "conv" in name]
    assert convolutions and all((dict(model.named_parameters())[name] != old[name]).any() for name in convolutions)


def test_unknown_name():
    with pytest.raises(ValueError, match="build: name: expected one of vgg16_bn, .*, densenet40, got 'resnet19'"):
        build("resnet19")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"width": 0}, "width: expected a positive share, got 0"),
        ({"num_classes": 0}, "num_classes: expected at least 1, got 0"),
        ({"in_channels": 0}, "in_channels: expected at least 1, got 0"),
    ],
)
def test_bad_arguments(name, arguments, text):
    with pytest.raises(ValueError, match=f"{name}: {text}"):
        build(name, **arguments)
