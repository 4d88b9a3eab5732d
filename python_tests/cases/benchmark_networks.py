"""Settings and masks of benchmarks/network.py, as small as they can be."""

from dataclasses import replace

import torch

from networks.models import NETWORKS, draw
from networks.setting import MaskedSetting, Setting


def make_setting(name="tiny_resnet", optimizer="masked", dtype=torch.float32, batch=2):
    return Setting(replace(NETWORKS[name], batch=batch), "cpu", dtype, optimizer, 0)


def make_masked(name="tiny_resnet", masks="joint", kept=0.5, **options):
    setting = make_setting(name, **options)
    return MaskedSetting(setting, masks, kept, draw(setting.wires, masks, kept, 0))
