"""Models of a public library: masked and live mode agree on them, and explain and count_flops understand them."""

import copy
import sys

import pytest
import torch
from torch import nn

import prunekernels as pk
from prunekernels.inspect.explain import explain
from prunekernels.inspect.flops import count_flops

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    for name, value in (("SECONDS", 0), ("WARMUPS", 0), ("MIN_ROUNDS", 1)):
        monkeypatch.setattr(sys.modules["prunekernels.inspect.explain"], name, value)
    with pk.plan.measure(False):
        yield


def resnet(layer_type):
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 24], depths=[2, 2], layer_type=layer_type, num_labels=5
    )
    return transformers.ResNetForImageClassification(config)


def mobilenet(tf_padding):
    config = transformers.MobileNetV2Config(depth_multiplier=0.25, tf_padding=tf_padding, classifier_dropout_prob=0)
    return transformers.MobileNetV2ForImageClassification(config)


def convnext():
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2}
    config = transformers.ConvNextConfig(**sizes, layer_scale_init_value=0.5, patch_size=2, num_labels=5)
    return transformers.ConvNextForImageClassification(config)


MODELS = {
    "resnet_basic": lambda: resnet("basic"),
    "resnet_bottleneck": lambda: resnet("bottleneck"),
    "mobilenet_v2": lambda: mobilenet(False),
    "mobilenet_v2_tf": lambda: mobilenet(True),
    "convnext": convnext,
}


def mask_jointly(model, kept=0.6):
    """One random mask for all layers of the same width: whatever meets in a sum has the same live channels."""
    masks: dict[int, torch.Tensor] = {}

    def of(channels):
        if channels not in masks:
            masks[channels] = torch.zeros(channels, dtype=torch.bool)
            masks[channels][torch.randperm(channels)[: max(1, round(channels * kept))]] = True
        return masks[channels]

    for module in model.modules():
        if isinstance(module, pk.MaskedConv2d):
            module.set_masks(filter=of(module.out_channels))
        elif isinstance(module, pk.MaskedBatchNorm2d):
            module.set_mask(of(module.num_features))


def mask_independently(model, kept=0.6):
    """A mask of its own for each layer, the norm's as the convolution's before it."""
    for module in model.modules():
        if isinstance(module, pk.MaskedConv2d):
            alive = torch.rand(module.out_channels) < kept
            module.set_masks(filter=alive)
        elif isinstance(module, pk.MaskedBatchNorm2d):
            module.set_mask(alive)


def make(name, mask=mask_jointly, dtype=torch.float64):
    torch.manual_seed(3)
    model = MODELS[name]().to(dtype)
    with torch.no_grad():  # norms as after some training
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 1.5)
    pk.convert(model)
    mask(model)
    return model


def step(model, x):
    """Logits, gradients and buffers of a training step, and the logits afterwards in eval mode."""
    x = x.clone().requires_grad_()
    logits = model.train()(x).logits
    logits.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    with torch.no_grad():
        return logits.detach(), x.grad, gradients, buffers, model.eval()(x).logits


# In float32 MobileNetV2's 52 norms over few pixels make a gradient's last bits large.
CASES = [(name, torch.float64) for name in MODELS]
CASES += [(name, torch.float32) for name in ("resnet_basic", "resnet_bottleneck", "convnext")]


@pytest.mark.parametrize("mask", [mask_jointly, mask_independently])
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_masked_and_live_mode_agree(name, dtype, mask):
    masked = make(name, mask, dtype)
    live = pk.flow(copy.deepcopy(masked))
    x = torch.randn(4, 3, 32, 32, dtype=dtype)
    tolerance = {} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(step(live, x), step(masked, x), **tolerance)


@pytest.mark.parametrize("mask", [mask_jointly, mask_independently])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "convnext"])
def test_nothing_falls_back_to_full_width(name, mask):
    explanation = explain(pk.flow(make(name, mask)), torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert explanation.fallbacks == []
    assert {row["mode"] for row in explanation.rows} == {"live"}


def test_layer_norms_stay_live():
    assert explain(pk.flow(make("convnext")), torch.randn(2, 3, 32, 32, dtype=torch.float64)).fallbacks == []


@pytest.mark.parametrize("name", MODELS)
def test_flops(name):
    model, x = make(name), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    masked, live = count_flops(model, x), count_flops(pk.flow(model), x)
    assert [row["layer"] for row in masked.rows] == [row["layer"] for row in live.rows]
    assert masked.dense == live.dense and masked.live < masked.dense
    if name == "convnext":  # every convolution is read through a layer norm
        assert live.live == masked.live
    else:
        assert live.live < 0.95 * masked.live
