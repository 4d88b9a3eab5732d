"""Networks of public libraries train in compacted mode as in masked mode."""

import functools

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.compacted import assert_same_training, batches, both_modes
from prunekernels.graph import coupled_groups


def sgd(net):
    return torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=0.01)


def prepared(net):
    """float64, without random numbers, norms as after some training, converted."""
    net = net.double().train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("drop_prob", "drop_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    pk.convert(net)
    return net


def independently(net, seed):
    generator = torch.Generator().manual_seed(seed)
    alive = None
    for module in net.modules():
        if isinstance(module, pk.MaskedConv2d):
            alive = torch.rand(module.out_channels, generator=generator) < 0.6
            module.set_masks(filter=alive)
        elif isinstance(module, pk.MaskedBatchNorm2d) and module.num_features == len(alive):
            module.set_mask(alive)


def masks_of(net, x, seed):
    """Masks by groups, then independent ones."""
    groups = coupled_groups(net, x)
    generator = torch.Generator().manual_seed(seed)
    keeps = [torch.rand(group.width, generator=generator) < 0.6 for group in groups]

    def jointly(net):
        for group, keep in zip(groups, keeps, strict=True):
            group.set_masks(net, keep)

    def apart(net):
        for module in net.modules():
            if isinstance(module, pk.MaskedConv2d):
                module.set_masks(input="all")
        independently(net, seed)

    return jointly, apart


def agree(net, size=32, close=None):
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    data = batches((3, 3, size, size), steps=1)
    rounds = [(masks, data) for masks in masks_of(net, x, seed=1)]
    trained = both_modes(net, sgd, x, rounds, close={"rtol": 1e-6, "atol": 1e-7})
    assert_same_training(*trained, close=close or {"rtol": 1e-6, "atol": 1e-7})
    with pk.compacted(trained[2], x, trained[3]) as (small, _):
        assert type(small) is type(net)
        return sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in net.parameters())


class Logits(nn.Module):
    """What a transformers model returns, by its field."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).logits


def transformers_models():
    transformers = pytest.importorskip("transformers")
    resnet = functools.partial(transformers.ResNetConfig, embedding_size=8, hidden_sizes=[8, 12], depths=[2, 2])
    return {
        "resnet_basic": lambda: transformers.ResNetForImageClassification(resnet(layer_type="basic", num_labels=5)),
        "resnet_bottleneck": lambda: transformers.ResNetForImageClassification(resnet(layer_type="bottleneck")),
        "mobilenet_v2": lambda: transformers.MobileNetV2ForImageClassification(
            transformers.MobileNetV2Config(depth_multiplier=0.25, tf_padding=True, classifier_dropout_prob=0)
        ),
        "convnext": lambda: transformers.ConvNextForImageClassification(
            transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, patch_size=2)
        ),
    }


SLOW = pytest.param("mobilenet_v2", marks=pytest.mark.slow)  # 52 convolutions


@pytest.mark.parametrize("name", ["resnet_basic", "resnet_bottleneck", "convnext", SLOW])
def test_transformers(name):
    torch.manual_seed(0)
    kept = agree(prepared(Logits(transformers_models()[name]())))
    assert kept < 0.8 or name == "convnext"  # where a layer norm reads every convolution


TIMM = {
    "resnet10t": {},
    "mobilenetv3_small_050": {},
    "regnetx_002": {},
    "densenet121": {"growth_rate": 8, "block_config": (2, 2, 2, 2)},
    "ghostnet_050": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model(name, pretrained=False, num_classes=5, **TIMM[name])
    agree(prepared(net), size=64)
