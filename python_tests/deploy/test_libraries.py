"""Networks of torchvision and timm, small and saved: also those that drop paths in training."""

import pytest
import torch

import prunekernels as pk
from cases.deploy import assert_same_network, round_trip

TORCHVISION = [
    "resnet18", "mobilenet_v3_small", "efficientnet_b0", "squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5",
    "regnet_y_400mf",
]  # fmt: skip
TIMM = ["resnet18", "efficientnet_b0", "mobilenetv3_small_100", "convnext_atto", "regnetx_002", "repvgg_a0"]


def assert_round_trip(net, folder):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    pk.convert(net)
    groups = [group for group in pk.coupled_groups(net, x) if not group.is_output]
    for group in groups[: len(groups) // 2]:
        group.set_masks(net, torch.arange(group.width) % 4 != 1)
    small = pk.shrink(net.eval(), x, form="module")
    assert_same_network(small, round_trip(small, folder), x)


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name, tmp_path):
    models = pytest.importorskip("torchvision.models")
    assert_round_trip(getattr(models, name)(num_classes=5), tmp_path / "net")


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_timm(name, tmp_path):
    timm = pytest.importorskip("timm")
    net = timm.create_model(name, num_classes=5, drop_path_rate=0.2)
    assert_round_trip(net, tmp_path / "net")
