"""explain and count_flops on networks as people have them: padded on the way, frozen, in eval and inference mode."""

import functools
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from prunekernels.inspect.flops import count_flops

explain = functools.partial(pk.explain, modes=())  # with modes: see test_explain_modes.py


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    for name, value in (("SECONDS", 0), ("WARMUPS", 0), ("MIN_ROUNDS", 1)):
        monkeypatch.setattr(sys.modules["prunekernels.inspect.explain"], name, value)
    with pk.plan.measure(False):
        yield


class SamePadding(nn.Conv2d):
    """As timm's Conv2dSame: pads its input by what the stride needs, so that it takes inputs below its kernel size."""

    def forward(self, x):
        pad = [max(0, (-(-n // s) - 1) * s + k - n) for n, k, s in zip(x.shape[-2:], (5, 5), (2, 2), strict=True)]
        x = F.pad(x, (pad[1] // 2, pad[1] - pad[1] // 2, pad[0] // 2, pad[0] - pad[0] // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride)


class TwoArguments(nn.Conv2d):
    def forward(self, x, scale):
        return super().forward(x) * scale


class Net(nn.Module):
    """Two inputs, a result that is no tensor, and layers of several kinds."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.mid, self.same, self.head = nn.Conv2d(8, 8, 1), SamePadding(8, 6, 5, stride=2), nn.Conv2d(6, 4, 1)

    def forward(self, x, other=None, *, scale=1):
        x = self.mid(F.relu(self.norm(self.stem(x))))
        if other is not None:
            x = x + self.mid(other)
        return {"features": [x, None], "out": self.head(self.same(x)) * scale}


X = torch.randn(2, 3, 6, 6)
EXAMPLES = {
    "tensor": X,
    "two inputs": (X, torch.randn(2, 8, 3, 3)),
    "dict": {"scale": 2, "x": X},
    "example": pk.Example(X, other=torch.randn(2, 8, 3, 3), scale=2),
}


def frozen_first(net):
    net.stem.requires_grad_(False)
    return net


def all_frozen(net):
    return net.requires_grad_(False)


def in_part_frozen(net):
    net.mid.weight.requires_grad_(False)
    return net


STATES = {
    "train": nn.Module.train,
    "eval": nn.Module.eval,
    "frozen first": frozen_first,
    "frozen": all_frozen,
    "frozen in part": in_part_frozen,
}


def make(live):
    net = Net()
    pk.convert(net)
    net.stem.set_masks(filter=torch.arange(8) < 5)
    net.norm.set_mask(torch.arange(8) < 5)
    net.mid.set_masks(input=torch.arange(8) < 5, filter=torch.arange(8) > 2)
    return pk.flow(net, live)


def check(explanation, net, backward=True):
    assert [row["layer"] for row in explanation.rows] == ["stem", "mid", "same", "head"]
    for row in explanation.rows:
        assert row["untimed"] is None and row["ms"] > 0 and row["dense_ms"] > 0
        trains = backward and net.get_submodule(row["layer"]).weight.requires_grad
        assert (row["grad_weight"] is not None) == trains
    assert "speed-up" in str(explanation)
    assert [row["live_filters"] for row in explanation.rows][:2] == [5, 5]


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", EXAMPLES)
def test_explain(name, state, live):
    net = STATES[state](make(live))
    was_training, before = net.training, {key: value.clone() for key, value in net.state_dict().items()}
    check(explain(net, EXAMPLES[name]), net)
    check(explain(net, EXAMPLES[name], backward=False), net, backward=False)
    assert net.training == was_training and all(p.grad is None for p in net.parameters())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", EXAMPLES)
def test_count_flops(name, state, live):
    flops = count_flops(STATES[state](make(live)), EXAMPLES[name])
    assert [row["layer"] for row in flops.rows] == ["stem", "mid", "same", "head"]
    assert 0 < flops.live < flops.dense


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("live", [False, True])
def test_inside_inference_mode(live, mode):
    net = make(live)
    with mode():
        check(explain(net, torch.randn(2, 3, 6, 6)), net)
        assert count_flops(net, torch.randn(2, 3, 6, 6)).rows


@pytest.mark.parametrize("live", [False, True])
def test_a_network_of_inference_mode(live):
    with torch.inference_mode():
        net = make(live)
    check(explain(net, X), net, backward=False)
    with torch.inference_mode():
        check(explain(net, X), net, backward=False)
    assert count_flops(net, X).rows


def test_a_layer_that_cannot_run_alone():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), TwoArguments(4, 2, 1)

        def forward(self, x):
            return self.second(self.first(x), 2.0)

    explanation = explain(Scaled(), X)
    first, second = explanation.rows
    assert first["ms"] > 0 and first["untimed"] is None
    assert second["ms"] is second["dense_ms"] is None and second["live_filters"] == 2
    assert second["untimed"].startswith("TypeError: ") and "'scale'" in second["untimed"]
    assert str(explanation).splitlines()[-1] == f"not timed: second: {second['untimed']}"


def test_a_subclass_that_takes_and_gives_no_tensor_is_no_layer():
    class Wrapped(nn.Conv2d):
        def forward(self, batch):
            return {"y": super().forward(batch["x"])}

    assert explain(Wrapped(3, 4, 1), ({"x": X},)).rows == count_flops(Wrapped(3, 4, 1), ({"x": X},)).rows == []


def test_a_layer_with_a_parametrized_weight():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 2, 1)))
    assert all(row["untimed"] is None and row["ms"] > 0 for row in explain(net, X).rows)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize(
    "name", ["tf_efficientnet_b0", "tf_mobilenetv3_small_100", "resnetv2_50x1_bit", "nf_regnet_b0"]
)
def test_timm(name, live):
    timm = pytest.importorskip("timm")
    net = timm.create_model(name, pretrained=False).eval()
    pk.convert(net)
    net.requires_grad_(False)
    rows = explain(pk.flow(net, live), torch.randn(1, 3, 64, 64)).rows
    assert len(rows) == sum(isinstance(m, nn.Conv2d) for m in net.modules())
    assert all(row["untimed"] is None for row in rows)
