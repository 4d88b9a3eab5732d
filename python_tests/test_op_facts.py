"""The table of facts against the operators themselves, and that live mode and the network's graph both go by it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from prunekernels.graph.analysis import ChannelAnalysis
from prunekernels.graph.rules.table import RULES
from prunekernels.graph.trace import op_name, trace
from prunekernels.live.channel_list import LiveList
from prunekernels.live.tensor import FilledTensor, LiveTensor, wrap
from prunekernels.op_facts import FACTS, keeps_zero, operators

# Arguments behind the first; of operators that keep nothing such that zero moves, of random ones such that they draw.
ARGUMENTS = {
    **dict.fromkeys(("dropout", "dropout2d", "feature_dropout", "alpha_dropout"), (0.5, True)),
    **dict.fromkeys(("adaptive_max_pool2d", "adaptive_avg_pool2d", "max_pool2d", "avg_pool2d"), (2,)),
    **dict.fromkeys(("upsample_nearest2d", "_upsample_nearest_exact2d", "interpolate", "upsample"), ((5, 6),)),
    **dict.fromkeys(("upsample_bilinear2d", "upsample_bicubic2d"), ((5, 6), False)),
    **dict.fromkeys(operators("reduction"), ((2, 3),)),
    **{"hardtanh": (0.5, 1.0), "threshold": (0.5, 0.1), "clamp": (0.5, 1.0), "clamp_min": (0.5,), "clamp_max": (-0.5,)},
    **{"pow": (0,), "lp_pool2d": (2, 2), "rrelu": (0.1, 0.3, True), "to": (torch.float64,)},
}
KEEP_ZERO = keeps_zero("pointwise", "random", "pool", "reduction")
SIZE = (2, 3, 4, 4)


def function(name):
    """As users call it; ATen's where they cannot."""
    return next(getattr(owner, name) for owner in (F, torch, torch.ops.aten) if hasattr(owner, name))


def behind(name, x):
    return function(name)(x, *ARGUMENTS.get(name, ()))


@pytest.mark.filterwarnings("ignore:.*upsample.*is deprecated", "ignore:dropout2d")
@pytest.mark.parametrize("name", [*KEEP_ZERO, *keeps_zero("copy")])
def test_zero_stays(name):
    y = behind(name, torch.zeros(SIZE))
    assert y.shape[:2] == SIZE[:2] and bool((y == 0).all())


@pytest.mark.parametrize("value", [-1.5, 0.5, 2.0])
@pytest.mark.parametrize("name", [name for name, fact in FACTS.items() if fact.keeps in ("constant", "unpadded")])
def test_every_constant_stays(name, value):
    assert bool((behind(name, torch.full(SIZE, value)) == value).all())


@pytest.mark.parametrize("name", [name for name, fact in FACTS.items() if fact.keeps == "unpadded"])
def test_padding_moves_a_constant_and_not_zero(name):
    assert set(function(name)(torch.ones(SIZE), 2, 2, 1).unique().tolist()) == {0.25, 0.5, 1.0}
    assert bool((function(name)(torch.zeros(SIZE), 2, 2, 1) == 0).all())


@pytest.mark.parametrize("name", [name for name, fact in FACTS.items() if fact.keeps == "nothing" and name != "sqrt"])
def test_zero_moves(name):
    assert bool((behind(name, torch.zeros(SIZE)) != 0).any())


def test_the_slope_of_sqrt_at_zero():
    x = torch.zeros(1, requires_grad=True)
    x.sqrt().backward()
    assert torch.isinf(x.grad).all()


@pytest.mark.filterwarnings("ignore:.*upsample.*is deprecated", "ignore:dropout2d")
@pytest.mark.parametrize("name", [name for name in KEEP_ZERO if hasattr(F, name) or hasattr(torch, name)])
def test_live_mode_stays_live_exactly_there(name):
    f = function(name)
    arguments = ARGUMENTS.get(name, ())
    if FACTS[name].kind == "random":
        arguments = (*arguments[:-1], False)
    x = wrap(torch.randn(2, 2, 4, 4).clamp(-0.9, 0.9), LiveList.of([0, 2], 3))
    y = f(x, *arguments)
    assert type(y) is LiveTensor and y.live is x.live
    torch.testing.assert_close(y.full(), f(x.full(), *arguments), equal_nan=True)


@pytest.mark.parametrize("name", [name for name in operators("pointwise", "random") if FACTS[name].keeps == "nothing"])
def test_live_mode_makes_no_channel_zero_elsewhere(name):
    """It goes to full width, or knows what a dead channel has become."""
    x = wrap(torch.rand(2, 2, 4, 4), LiveList.of([0, 2], 3))
    y = behind(name, x)
    assert type(y) in (torch.Tensor, FilledTensor)
    if type(y) is FilledTensor:
        torch.testing.assert_close(y.to_dense(), behind(name, x.full()), equal_nan=True)


class All(nn.Module):
    """Every operator with a rule in the graph, each on the same two live and two dead channels."""

    names = [name for name in operators("pointwise", "copy", "pool", "reduction") if name in RULES]

    def __init__(self):
        super().__init__()
        self.conv = pk.MaskedConv2d(3, 4, 1, bias=False)
        self.conv.set_masks(filter=torch.arange(4) < 2)

    def forward(self, x):
        x = self.conv(x)
        return tuple(behind(name, x) for name in self.names if name not in ("to", "_to_copy", "alias", "detach"))


def test_the_graph_follows_zeros_exactly_there():
    analysis = ChannelAnalysis(trace("test", All(), torch.rand(2, 3, 4, 4)))
    seen = {}
    for node in analysis.traced.graph.nodes:
        channels = analysis.tracked(node)
        if op_name(node) in All.names:
            seen[op_name(node)] = channels is not None and channels.values.tolist()[2:] == [0, 0]
    assert len(seen) > 40
    assert seen == {name: FACTS[name].keeps != "nothing" or name == "sqrt" for name in seen}
