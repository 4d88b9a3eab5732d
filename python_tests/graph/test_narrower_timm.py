"""Narrower on networks of other libraries, against an analysis anew."""

import pytest
import torch

import prunekernels as pk
from cases.networks import mask_at_random
from graph.test_narrower import assert_same
from prunekernels.graph.narrower import Narrower
from prunekernels.graph.trace import trace

TIMM = (
    "resnet18 resnetv2_50 regnety_002 mobilenetv3_small_050 efficientnet_b0 convnext_atto ghostnet_050 "
    "res2net50_26w_4s densenet121 dla34 hrnet_w18_small cspresnet50 vovnet39a seresnet18 nf_resnet26 inception_v3 "
    "mixnet_s skresnet18 resnest14d resnext50_32x4d dpn68 ecaresnet26t edgenext_xx_small"
)


def check(net, x):
    pk.convert(net.eval())
    traced = trace("test", net, x)
    narrower = Narrower.of(traced, net)
    for seed in range(2):
        assert assert_same(narrower, mask_at_random(net, seed), traced) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM.split())
def test_compacted_narrower_timm(name):
    timm = pytest.importorskip("timm")
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    check(timm.create_model(name, pretrained=False), torch.randn(2, 3, 96, 96))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["googlenet", "shufflenet_v2_x0_5", "mnasnet0_5", "squeezenet1_1"])
def test_compacted_narrower_torchvision(name):
    models = pytest.importorskip("torchvision.models")
    args = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    check(models.get_model(name, weights=None, **args), torch.randn(2, 3, 64, 64))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolov8n", "yolo11n"])
def test_compacted_narrower_yolo(name):
    ultralytics = pytest.importorskip("ultralytics")
    check(ultralytics.YOLO(f"{name}.yaml").model, torch.randn(2, 3, 64, 64))
