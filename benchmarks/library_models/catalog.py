"""Networks of public libraries, built without weights and small, some with fewer blocks: what models.py tries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 10
IMAGE = 64


@dataclass
class Built:
    """A network and what it takes."""

    model: nn.Module
    example: Any
    training: Any = None  # what it takes in train mode, if that is something else
    core: tuple[nn.Module, Any] | None = None  # layers of it, and what they take, where the whole cannot be traced


@dataclass(frozen=True)
class Entry:
    name: str
    library: str
    build: Callable[[], Built]

    def __str__(self) -> str:
        return self.name


def images(size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def whole(model: nn.Module, size: int = IMAGE) -> Built:
    return Built(model, images(size))


# ---- timm

TIMM: Mapping[str, Mapping[str, Any]] = {
    "resnet18": {},
    "seresnet18": {},
    "ecaresnet26t": {"channels": (16, 32, 64, 128)},
    "skresnet18": {},
    "resnest14d": {},
    "resnetv2_50": {"layers": (2, 2, 2, 2)},
    "resnext50_32x4d": {"layers": (2, 2, 2, 2)},
    "regnetx_002": {},
    "regnety_002": {},
    "densenet121": {"block_config": (3, 4, 6, 4)},
    "vgg11_bn": {"mlp_ratio": 1 / 16},
    "efficientnet_b0": {},
    "mixnet_s": {},
    "mobilenetv3_small_050": {},
    "mobileone_s1": {},
    "repvgg_a0": {},
    "ghostnet_050": {},
    "convnext_atto": {},
    "edgenext_xx_small": {},
    "fastvit_t8": {},
    "dpn48b": {},
    "hrnet_w18_small": {},
    "inception_v3": {"size": 96},
    "cspresnet50": {},
    "cs3darknet_focus_s": {},
    "res2net50_26w_4s": {"layers": (2, 2, 2, 2)},
}


def _timm(name: str, size: int = IMAGE, **options: Any) -> Built:
    return whole(import_module("timm").create_model(name, pretrained=False, num_classes=CLASSES, **options), size)


# ---- torchvision


class BeforeBoxes(nn.Module):
    """What a detector of torchvision computes before it chooses boxes: features of an image, and its heads on them."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone = detector.backbone
        if hasattr(detector, "rpn"):
            self.rpn = detector.rpn
        else:
            self.head = detector.head

    def forward(self, x: Tensor) -> Any:
        features = list(self.backbone(x).values())
        return (features, self.rpn.head(features)) if hasattr(self, "rpn") else self.head(features)


def _detector(build: Callable[..., nn.Module], **options: Any) -> Built:
    """A whole detector: images of two sizes, in training with a box in each."""
    model = build(**options)
    pictures = [images(96, 1)[0], images(96, 1)[0, :, :80]]
    boxes = torch.tensor([[10.0, 12.0, 60.0, 70.0]])
    targets = [{"boxes": boxes + 4 * i, "labels": torch.tensor([i + 1])} for i in range(2)]
    return Built(model, pictures, (pictures, targets), (BeforeBoxes(model), images(96)))


def _detection(name: str, **options: Any) -> nn.Module:
    detection = import_module("torchvision.models.detection")
    weights: dict[str, Any] = {"weights": None, "weights_backbone": None}
    return getattr(detection, name)(num_classes=CLASSES, **weights, **options)  # type: ignore[no-any-return]


def _on_resnet18(name: str, **options: Any) -> nn.Module:
    """RetinaNet or FCOS over the pyramid of a ResNet-18: one head, used on every level."""
    detection = import_module("torchvision.models.detection")
    pyramid = import_module("torchvision.ops.feature_pyramid_network")
    backbone = detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        norm_layer=nn.BatchNorm2d,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=pyramid.LastLevelP6P7(256, 256),
    )
    return getattr(detection, name)(backbone, num_classes=CLASSES, **options)  # type: ignore[no-any-return]


SMALL: Mapping[str, Any] = {"min_size": 96, "max_size": 128}
DETECTORS: Mapping[str, Callable[[], Built]] = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": lambda: _detector(
        _detection, name="fasterrcnn_mobilenet_v3_large_320_fpn", **SMALL
    ),
    "ssdlite320_mobilenet_v3_large": lambda: _detector(_detection, name="ssdlite320_mobilenet_v3_large"),
    "retinanet_resnet18_fpn": lambda: _detector(_on_resnet18, name="RetinaNet", **SMALL),
    "fcos_resnet18_fpn": lambda: _detector(_on_resnet18, name="FCOS", **SMALL),
}


def _segmentation(name: str) -> Built:
    segmentation = import_module("torchvision.models.segmentation")
    return whole(getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=CLASSES))


# ---- ultralytics, segmentation_models_pytorch, transformers


class Results(nn.Module):
    """A network of ultralytics without the maps that its head hands on beside its results."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.net(x)
        found = found if self.training else found[1]
        return found["boxes"], found["scores"]


def _yolo(name: str) -> Built:
    return whole(Results(import_module("ultralytics").YOLO(f"{name}.yaml").model.requires_grad_(True)))


def _smp(kind: str, encoder: str) -> Built:
    smp = import_module("segmentation_models_pytorch")
    return whole(getattr(smp, kind)(encoder_name=encoder, encoder_weights=None, classes=CLASSES))


TRANSFORMERS: Mapping[str, Mapping[str, Any]] = {
    "ResNetForImageClassification": {
        "config": "ResNetConfig",
        "embedding_size": 32,
        "hidden_sizes": [64, 128, 256],
        "depths": [1, 1, 1],
    },
    "RegNetForImageClassification": {
        "config": "RegNetConfig",
        "embedding_size": 16,
        "hidden_sizes": [32, 64, 128],
        "depths": [1, 1, 1],
        "groups_width": 16,
    },
    "ConvNextForImageClassification": {
        "config": "ConvNextConfig",
        "hidden_sizes": [24, 48, 96, 192],
        "depths": [1, 1, 2, 1],
    },
    "MobileNetV2ForImageClassification": {"config": "MobileNetV2Config", "image_size": IMAGE},
    "SegformerForSemanticSegmentation": {
        "config": "SegformerConfig",
        "hidden_sizes": [16, 32, 64, 96],
        "depths": [1, 1, 1, 1],
        "decoder_hidden_size": 64,
    },
}


def _transformers(name: str, config: str, **options: Any) -> Built:
    transformers = import_module("transformers")
    model = getattr(transformers, name)(getattr(transformers, config)(num_labels=CLASSES, **options))
    example = {"pixel_values": images(IMAGE), "return_dict": True}
    return Built(model, example)


def _entries(library: str, build: Callable[..., Built], models: Mapping[str, Mapping[str, Any]]) -> list[Entry]:
    return [Entry(name, library, partial(build, name, **options)) for name, options in models.items()]


SEGMENTATION = ("deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large", "fcn_resnet50")
ENTRIES: Mapping[str, Entry] = {
    entry.name: entry
    for entry in (
        *_entries("timm", _timm, TIMM),
        *(Entry(name, "torchvision", build) for name, build in DETECTORS.items()),
        *_entries("torchvision", _segmentation, dict.fromkeys(SEGMENTATION, {})),
        *_entries("ultralytics", _yolo, dict.fromkeys(("yolov8n", "yolo11n"), {})),
        Entry("unet_resnet18", "segmentation_models_pytorch", partial(_smp, "Unet", "resnet18")),
        Entry("fpn_mobilenet_v2", "segmentation_models_pytorch", partial(_smp, "FPN", "mobilenet_v2")),
        *_entries("transformers", _transformers, TRANSFORMERS),
    )
}
