"""Networks whose input or output is not one tensor, and parts of networks."""

import sys
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.networks import Basic, Head, assert_same_function, conv_norm

Pair = namedtuple("Pair", "first second")


def images(*shape):
    return torch.randint(-4, 5, shape).double()


def whole(net):
    """A masked network in float64 and eval mode whose weights are integers, so that its outputs are exact."""
    torch.manual_seed(0)
    net.double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-300  # adds nothing; torch 2.11 refuses 0
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randint(-2, 3, p.shape) if p.dim() > 1 else torch.randint(1, 3, p.shape))
    pk.convert(net)
    return net.eval()


class Net(nn.Module):
    """Three inputs of any kind, and an output that holds both its results."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = conv_norm(3, 8), Basic(8, 8), Head(8)

    def forward(self, pixels, mask=None, *, options=None, scale=1, head=True):
        if isinstance(pixels, list):
            pixels = torch.stack(pixels)
        if isinstance(pixels, dict):
            pixels = pixels["pixels"]
        x = self.block(self.stem(pixels))
        if mask is not None:
            x = x * mask
        if options is not None and options["shift"] is not None:
            x = x + options["shift"][0]
        return self.result(self.head(x) * scale if head else None, x)

    def result(self, logits, features):
        return logits, features


class Dicts(Net):
    def result(self, logits, features):
        return OrderedDict(logits=logits, all=[features, {"features": (features, 3, None)}])


class Named(Net):
    def result(self, logits, features):
        return Pair(logits, features)


X = images(2, 3, 8, 8)
MASK = torch.tensor([0.0, 1.0]).double().view(2, 1, 1, 1)
EXAMPLES = {
    "tensor": X,
    "tuple": (X, MASK),
    "none": (X, None),
    "dict": {"pixels": X, "mask": MASK},
    "dict in another order": {"scale": 2, "head": True, "mask": MASK, "pixels": X},
    "dict as an argument": ({"pixels": X},),
    "images": [images(3, 8, 8), images(3, 8, 8)],
    "images and more": pk.Example([images(3, 8, 8)], scale=2),
    "nested": pk.Example(X, options={"shift": [images(2, 8, 8, 8), 1], "unused": None}, head=False),
    "flags": pk.Example({"pixels": X}, None, scale=3, head=True),
}
KINDS = {"tuple": Net, "dicts": Dicts, "named": Named}


def make(kind=Net):
    net = whole(kind())
    keep = torch.arange(8) % 2 == 0
    net.block.first[0].set_masks(filter=keep)
    net.block.first[1].set_mask(keep)
    return net


def outputs(net, example):
    with torch.no_grad():
        return pk.Example.of("test", example).call(net)


def assert_equal(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert type(got) is type(want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_shrink(name, kind):
    net = make(KINDS[kind])
    small = pk.shrink(net, EXAMPLES[name])
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
    assert_equal(outputs(small, EXAMPLES[name]), outputs(net, EXAMPLES[name]))


@pytest.mark.parametrize("name", EXAMPLES)
def test_coupled_groups(name):
    groups = pk.coupled_groups(make(), EXAMPLES[name])
    assert [group.layers for group in groups] == [("stem.0", "block.second.0"), ("block.first.0",)]
    assert groups[1].readers.keys() == {"block.second.0"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_tidy_masks(name):
    net = make()
    before = outputs(net, EXAMPLES[name])
    tidied = pk.tidy_masks(net, EXAMPLES[name])
    assert tidied.inputs == {"block.second.0": [1, 3, 5, 7]} and not tidied.filters and not tidied.channels
    assert_equal(outputs(net, EXAMPLES[name]), before)


@pytest.mark.parametrize("name", EXAMPLES)
def test_count_flops(name):
    rows = pk.count_flops(make(), EXAMPLES[name]).rows
    assert [row["layer"] for row in rows][:3] == ["stem.0", "block.first.0", "block.second.0"]
    assert rows[1]["live"] == rows[1]["dense"] // 2


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("method", [pk.methods.GHFP, pk.methods.CSGD])
def test_methods(method, name):
    net = make().train()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    found = method(net, optimizer, rate=0.5, epochs=1, example_input=EXAMPLES[name])
    assert found.channel_masks.norms["block.first.0"] == ["block.first.1"]
    assert "block.first.0" in found.layers


def test_any_batch_of_named_inputs():
    net = make()
    small = pk.shrink(net, {"pixels": images(1, 3, 8, 8), "mask": images(1, 1, 1, 1)})
    for batch in (1, 3, 5):
        example = {"mask": images(batch, 1, 1, 1), "pixels": images(batch, 3, 8, 8)}
        assert_equal(outputs(small, example), outputs(net, example))


class Variadic(nn.Module):
    """Takes any arguments by position and any by name."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, *more, **named):
        x = named["x"] if "x" in named else more[0]
        return {"y": self.last(self.first(x).relu()) + sum(more[1:]) + named.get("shift", 0)}


Z = images(2, 4, 6, 6)


@pytest.mark.parametrize(
    "example",
    [X, (X, Z, Z), {"shift": Z, "x": X}, pk.Example(X, Z, shift=2), pk.Example(X, 1, shift=Z)],
    ids=["one", "three", "named", "both", "number"],
)
def test_variadic(example):
    net = whole(Variadic())
    net.first.set_masks(filter=torch.arange(8) < 5)
    assert [group.is_output for group in pk.coupled_groups(net, example)] == [False, True]
    small = pk.shrink(net, example)
    assert small.first.out_channels == 5
    assert_equal(outputs(small, example), outputs(net, example))


@pytest.mark.parametrize(
    ("given", "other"),
    [
        (pk.Example(X, scale=2), pk.Example(X, scale=3)),
        (pk.Example(X, head=False), pk.Example(X, head=True)),
        ((X, None), (X, MASK)),
    ],
)
def test_another_constant_is_an_error_and_never_another_result(given, other):
    net = make()
    small = pk.shrink(net, given, form="graph")
    outputs(small, given)
    with pytest.raises((AssertionError, RuntimeError), match="expected .*, as in the example given to shrink"):
        outputs(small, other)
    small = pk.shrink(net, given, form="module")
    try:
        got = outputs(small, other)
    except RuntimeError:  # layers that the example did not reach are not small
        return
    assert_equal(got, outputs(net, other))


@pytest.mark.parametrize("example", [(), {}, pk.Example(3), []], ids=["tuple", "dict", "number", "list"])
@pytest.mark.parametrize("tool", [pk.shrink, pk.tidy_masks, pk.coupled_groups])
def test_an_example_without_a_tensor(tool, example):
    expected = rf"{tool.__name__}: example_input: expected arguments with a tensor among them, got Example\("
    with pytest.raises(TypeError, match=expected):
        tool(make(), example)


@pytest.mark.parametrize("example", [None, "image"])
@pytest.mark.parametrize("tool", [pk.shrink, pk.tidy_masks, pk.coupled_groups, pk.count_flops, pk.explain])
def test_no_example(tool, example):
    with pytest.raises(TypeError, match=f"{tool.__name__}: example_input: expected a tensor, a tuple of arguments, "):
        tool(make(), example)


# ---- parts of networks


class Detector(nn.Module):
    """As torchvision's: a list of images, a backbone that gives several sizes, and boxes that depend on values."""

    def __init__(self):
        super().__init__()
        self.backbone = Backbone()
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, images):
        found = []
        for features in self.backbone(torch.stack(images)).values():
            scores = self.head(features).flatten(2)
            found.append(scores if scores.amax() > 100 else scores[:, :, scores.amax((0, 1)) > 0])
        return found


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.last = conv_norm(3, 8), Basic(8, 8), conv_norm(8, 8, stride=2)

    def forward(self, x):
        first = self.inner(self.stem(x))
        return OrderedDict(first=first, last=self.last(first))


def detector():
    net = whole(Detector())
    keep = torch.arange(8) < 5
    for conv, norm in (net.backbone.inner.first[:2], net.backbone.last[:2]):
        conv.set_masks(filter=keep)
        norm.set_mask(keep)
    net.head.set_masks(filter=torch.tensor([True, False, True, True, True]))
    return net


def test_the_whole_is_followed_on_the_path_of_the_example():
    """Which scores are returned depends on values. The head, which reads both levels, ties what makes them."""
    groups = pk.coupled_groups(detector(), [images(3, 8, 8)])
    stem, inner = ("stem.0", "inner.second.0", "last.0"), ("inner.first.0",)
    assert [group.layers for group in groups] == [
        *(tuple(f"backbone.{name}" for name in names) for names in (stem, inner)), ("head",)
    ]  # fmt: skip
    assert [group.is_output for group in groups] == [False, False, True]


@pytest.mark.parametrize(("form", "last"), [("module", 8), ("graph", 5)])
@pytest.mark.parametrize("live", [False, True])
def test_shrink_of_a_part(live, form, last):
    net, batch = detector(), [images(3, 8, 8), images(3, 8, 8)]
    want = outputs(net, batch)
    if live:
        pk.flow(net)
        assert_equal(outputs(net, batch), want)
    net.backbone = pk.shrink(net.backbone, torch.stack(batch), form=form)
    assert getattr(net.backbone.inner.first, "0").out_channels == 5
    assert getattr(net.backbone.last, "0").out_channels == last  # the rest reads all of its channels
    assert_equal(outputs(net, batch), want)


def test_tidy_masks_of_a_part_keeps_what_the_rest_reads():
    net, batch = detector(), [images(3, 8, 8)]
    want = outputs(net, batch)
    tidied = pk.tidy_masks(net.backbone, torch.stack(batch))
    assert not tidied.filters and tidied.inputs == {"inner.second.0": [5, 6, 7]}
    assert_equal(outputs(net, batch), want)


def test_groups_of_a_part():
    net = detector()
    groups = pk.coupled_groups(net.backbone, images(2, 3, 8, 8))
    assert [group.layers for group in groups] == [("stem.0", "inner.second.0"), ("inner.first.0",), ("last.0",)]
    small = pk.shrink(net.backbone, images(2, 3, 8, 8))
    assert_same_function(net.backbone, small, images(3, 3, 8, 8))


# ---- public libraries


def test_backbone_of_a_torchvision_detector():
    detection = pytest.importorskip("torchvision.models.detection")
    torch.manual_seed(0)
    net = detection.retinanet_resnet50_fpn_v2(
        weights=None, weights_backbone=None, num_classes=3, min_size=32, max_size=32, score_thresh=0.0
    )
    pk.convert(net.eval().double())
    for name, module in net.backbone.named_modules():
        if name.endswith("conv1"):
            module.set_masks(filter=torch.arange(module.out_channels) % 4 == 0)
        elif name.endswith("bn1"):
            module.set_mask(torch.arange(module.num_features) % 4 == 0)
    batch = [torch.rand(3, 32, 32).double(), torch.rand(3, 32, 32).double()]
    flops = pk.count_flops(net, batch)
    assert 0 < flops.live < flops.dense
    want = outputs(net, batch)
    parameters = sum(p.numel() for p in net.parameters())
    net.backbone = pk.shrink(net.backbone, torch.stack(batch))
    assert sum(p.numel() for p in net.parameters()) < 0.8 * parameters
    got = outputs(net, batch)
    assert len(want[0]["scores"]) > 0
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_batch_of_transformers(monkeypatch):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[2, 2], layer_type="basic")
    net = transformers.ResNetForImageClassification(config).eval()
    pk.convert(net)
    batch = transformers.BatchEncoding({"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])})
    for group in pk.coupled_groups(net, batch):
        group.set_masks(net, torch.arange(group.width) % 2 == 0)
    assert pk.count_flops(net, batch).live < 0.4 * pk.count_flops(net, batch).dense
    monkeypatch.setattr(sys.modules["prunekernels.inspect.explain"], "SECONDS", 0)
    with pk.plan.measure(False):
        rows = pk.explain(net, batch).rows
    assert len(rows) == sum(isinstance(m, nn.Conv2d) for m in net.modules())
    small = pk.shrink(net, batch)
    want, got = outputs(net, batch), outputs(small, batch)
    assert type(got) is type(want) and got.keys() == want.keys() == {"loss", "logits"}
    torch.testing.assert_close(got.logits, want.logits)
    torch.testing.assert_close(got.loss, want.loss)
