"""Group.is_output: whose channels are the network's outputs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from cases.networks import Basic, Head, conv_norm

X = torch.randn(2, 3, 16, 16)


def outputs(net, example=X):
    """The layers of all groups that are outputs."""
    return [name for group in pk.coupled_groups(net.eval(), example) if group.is_output for name in group.layers]


class Net(nn.Module):
    """A stem, a head, and a function that makes the result of both."""

    def __init__(self, result, head=None):
        super().__init__()
        self.stem = conv_norm(3, 8)
        self.head = nn.Conv2d(8, 4, 1) if head is None else head
        self.result = result

    def forward(self, x):
        return self.result(self.head(self.stem(x)))


def topk(y):
    scores, at = y.flatten(2).max(1).values.topk(3)
    return {"scores": scores.sigmoid(), "at": at}


def attention(y):
    y = y.flatten(2)
    return torch.softmax(y.transpose(1, 2) @ y, -1)


RESULTS = {
    "as it is": lambda y: y,
    "relu and a pooled classifier": lambda y: F.adaptive_avg_pool2d(F.relu(y), 1).flatten(1),
    "mean": lambda y: y.mean((2, 3)),
    "segmentation": lambda y: F.interpolate(y, scale_factor=4, mode="bilinear").softmax(1),
    "classes of pixels": lambda y: y.argmax(1),
    "boxes": lambda y: y.permute(0, 2, 3, 1).reshape(len(y), -1, 2).exp(),
    "several": lambda y: [{"a": y[:, :1].sigmoid()}, (y[:, 2:], 3, None)],
    "topk": topk,
    "attention": attention,
    "a product with numbers": lambda y: y.flatten(2).softmax(2) @ torch.arange(256.0),
    "a loss": lambda y: F.cross_entropy(y, torch.zeros(2, 16, 16, dtype=torch.long)),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_convolutional_head(name):
    assert outputs(Net(RESULTS[name])) == ["head"]


class Fixed(nn.Module):
    """As the distribution of a box in YOLO: a softmax over bins, and a product with their fixed positions."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bins", torch.arange(4.0))

    def forward(self, y):
        return y.flatten(2).transpose(1, 2).softmax(2) @ self.bins


def test_a_product_with_a_buffer_is_no_layer():
    assert outputs(Net(Fixed())) == ["head"]


class Weighted(nn.Module):
    def __init__(self, op):
        super().__init__()
        self.op, self.weight = op, nn.Parameter(torch.randn(4, 4))

    def forward(self, y):
        return self.op(y.mean((2, 3)).exp().cumsum(1), self.weight)


LAYERS = {
    "linear": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
    "linear behind pixels": nn.Sequential(nn.Flatten(2), nn.Linear(256, 2)),
    "a transposed convolution": nn.ConvTranspose2d(4, 2, 2, stride=2),
    "a product": Weighted(lambda y, w: y @ w),
    "a product with what a parameter gives": Weighted(lambda y, w: y @ w.t().relu()),
    "sizes": lambda y: torch.zeros(len(y), y.shape[1]) + torch.arange(y.shape[-1] // 4),
    "zeros": torch.zeros_like,
}


@pytest.mark.parametrize("name", LAYERS)
def test_what_a_layer_reads_is_no_output(name):
    own = ["result"] if name == "a transposed convolution" else []  # of the layers that may be masked
    assert outputs(Net(LAYERS[name])) == own


@pytest.mark.parametrize(
    "head",
    [nn.GroupNorm(2, 8), nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Softplus()), nn.Dropout(), nn.PReLU(8)],
    ids=["group norm", "depthwise", "dropout", "prelu"],
)
def test_what_keeps_channels_apart_hands_outputs_on(head):
    names = ["stem.0", "head.0"] if isinstance(head, nn.Sequential) else ["stem.0"]
    assert outputs(Net(lambda y: y, head)) == names


class Trunk(nn.Module):
    """Features of two stages: the first is read by the second as well."""

    def __init__(self, features):
        super().__init__()
        self.features = features
        self.stem, self.first = conv_norm(3, 8), Basic(8, 8)
        self.down, self.second, self.head = conv_norm(8, 12), Basic(12, 12), Head(12)

    def forward(self, x):
        first = self.first(self.stem(x))
        second = self.second(self.down(first))
        return {"first": first, "second": second} if self.features else self.head(second)


def test_features_that_a_network_returns():
    assert outputs(Trunk(False)) == []
    assert outputs(Trunk(True)) == ["stem.0", "first.second.0", "down.0", "second.second.0"]


def test_a_part_of_a_network():
    net = Trunk(False)
    assert outputs(net.first, torch.randn(2, 8, 16, 16)) == ["second.0"]
    assert outputs(nn.Sequential(net.stem, net.first, net.down)) == ["2.0"]


class Slices(nn.Module):
    """One convolution whose channels are an output in part."""

    def __init__(self):
        super().__init__()
        self.both, self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 2, 1)

    def forward(self, x):
        first, second = self.both(x).chunk(2, 1)
        return first, self.b(self.a(second))


def test_slices():
    assert outputs(Slices()) == ["both", "b"]


# ---- public libraries


@pytest.mark.parametrize(
    "name", ["squeezenet1_1", "resnet18", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"]
)
def test_torchvision(name):
    models = pytest.importorskip("torchvision.models")
    heads = {
        "squeezenet1_1": ["classifier.1"],
        "resnet18": [],
        "deeplabv3_mobilenet_v3_large": ["classifier.4"],
        "lraspp_mobilenet_v3_large": ["classifier.low_classifier", "classifier.high_classifier"],
    }
    extra = {} if name in ("squeezenet1_1", "resnet18") else {"weights_backbone": None}
    net = models.get_model(name, weights=None, **extra)
    assert outputs(net, torch.randn(2, 3, 64, 64)) == heads[name]


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n"])
def test_heads_of_yolo(name):
    ultralytics = pytest.importorskip("ultralytics")
    net = ultralytics.YOLO(f"{name}.yaml").model
    heads = [f"model.{len(net.model) - 1}.{branch}.{i}.2" for i in range(3) for branch in ("cv2", "cv3")]
    found = outputs(net, torch.rand(1, 3, 64, 64))
    assert set(heads) <= set(found)
    # The rest are the means of boxes, and the feature maps that the head returns beside its results.
    others = [name for name in found if name not in heads]
    assert f"model.{len(net.model) - 1}.dfl.conv" in others and len(others) < 12
