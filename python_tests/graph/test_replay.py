"""Where a network chooses by value, rounding decides between equal scores; anything else is a difference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import prunekernels as pk
from prunekernels.graph.replay import recorded, replayed


class Score(nn.Module):
    """Equal everywhere, but for some of 8 places beside each other, by a little, where the layer before is narrow."""

    def __init__(self, little: float) -> None:
        super().__init__()
        self.little = little

    def forward(self, found: Tensor, width: int) -> Tensor:
        places = torch.arange(len(found)) % 8
        return 0.5 + (self.little if width < 8 else 0.0) * places.to(found)


class Chooses(nn.Module):
    """The places of an image in the order of their scores."""

    def __init__(self, little: float) -> None:
        super().__init__()
        self.conv, self.head, self.score = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), Score(little)

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = self.conv(x).relu()
        found = self.head(hidden)[0].flatten(1).T
        scores = self.score(found, hidden.shape[1])
        order = scores.argsort(descending=True, stable=True)
        return [found[order], scores[order]]


def shrunk(model: Chooses) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 12, 12)
    pk.convert(model)
    layer = model.conv
    assert isinstance(layer, pk.MaskedConv2d)
    layer.set_masks(torch.arange(8) % 2 == 0)
    return pk.shrink(model.eval(), x, form="module"), x


def test_shrink_takes_a_network_that_rounding_makes_choose_otherwise() -> None:
    torch.manual_seed(0)
    small, x = shrunk(Chooses(little=2.0**-53))
    assert small.get_parameter("conv.weight").shape[0] == 4
    with torch.no_grad():
        found, scores = small(x)
    assert found.shape == (144, 4) and torch.allclose(scores, torch.tensor(0.5))


def test_shrink_refuses_a_network_that_the_width_makes_choose_otherwise() -> None:
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="gives other outputs on small layers"):
        shrunk(Chooses(little=1e-9))


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-6)


def twins() -> tuple[nn.Sequential, nn.Sequential, Tensor]:
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)) for _ in range(2))
    b.load_state_dict(a.state_dict())
    return a, b, torch.randn(4, 3)


@torch.no_grad()
def test_outputs_that_are_close_take_the_place_of_ones_own() -> None:
    a, b, x = twins()
    b[2].bias += 1e-7
    with recorded(b) as calls:
        want = b(x)
    with replayed(a, calls, close) as apart:
        got = a(x)
    assert not apart and torch.equal(got, want) and not torch.equal(a(x), want)


@torch.no_grad()
def test_outputs_that_are_not_close_stay_and_are_named() -> None:
    a, b, x = twins()
    b[2].bias += 1
    with recorded(b) as calls:
        b(x)
    own = a(x)
    with replayed(a, calls, close) as apart:
        got = a(x)
    assert apart == ["2"] and torch.equal(got, own)


@torch.no_grad()
@pytest.mark.parametrize("more", ["recorded", "replayed"])
def test_another_number_of_calls_is_named(more: str) -> None:
    a, b, x = twins()
    with recorded(b) as calls:
        b(x)
        _ = b[0](x) if more == "recorded" else None
    with replayed(a, calls, close) as apart:
        a(x)
        _ = a[0](x) if more == "replayed" else None
    assert apart == ["0"]


@torch.no_grad()
def test_outputs_of_another_shape_stay() -> None:
    a, b, x = twins()
    b[0], b[2] = nn.Linear(3, 2), nn.Linear(2, 2)
    b[2].weight.copy_(a[2].weight[:, :2])
    with recorded(b) as calls:
        b(x)
    with replayed(a, calls, lambda *_: True) as apart:
        a(x)
    assert not apart
