"""Live mode by the emulated CUDA operators: its operators against those of the CPU, what is launched, what the
host reads and when, and whole networks.
"""
# ruff: noqa: F811 (fixtures)

import numpy as np
import pytest
import torch

import prunekernels as pk
from cases.conv import lay_out
from cases.cuda import flow_network, flow_step
from cases.emulated_ops import GATHER, JOIN, PACK, SCATTER, UNPACK, copies, events, launched, library  # noqa: F401
from cases.networks import NETWORKS, mask_at_random
from prunekernels.live import LiveList

pytestmark = pytest.mark.slow  # compiles csrc/cuda

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ["nchw", "channels_last", "sliced"]
OURS = torch.ops.prunekernels


@pytest.fixture
def emulated(events):
    """The operators, logged in events."""
    return torch.ops.prunekernels_emulated


def draw(*size, dtype=torch.float32, layout="nchw", seed=0):
    x = torch.randint(-4, 5, size, generator=torch.Generator().manual_seed(seed))
    return lay_out(x.to(dtype), layout)


def live(channels, text):
    """Of 24 channels, say: "odd", "thirds", "late" (whole eights), "one", "none", "all"."""
    every = np.arange(channels)
    chosen = {"odd": every % 2 == 1, "thirds": every % 3 == 0, "late": every >= 8, "one": every == 5, "none": every < 0}
    return LiveList.of(np.flatnonzero(chosen.get(text, every >= 0)), channels)


def assert_alike(got, want):
    assert got.dtype == want.dtype and got.stride() == want.stride() and torch.equal(got, want)


PAIRS = [("odd", "thirds"), ("all", "late"), ("late", "all"), ("thirds", "all"), ("all", "odd"), ("late", "odd"),
         ("one", "thirds"), ("none", "odd"), ("odd", "none")]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_regroup(pair, dtype, layout, emulated, events):
    source, to = (live(24, text) for text in pair)
    move = source.remap(to, CPU)
    x = draw(3, source.count, 5, 4, dtype=dtype, layout=layout)
    assert_alike(emulated.regroup_channels(x, *move), OURS.regroup_channels(x, *move))
    assert launched(events) == [GATHER if to.count <= source.count else SCATTER]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("alpha", [1.0, -0.5])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_join(pair, dtype, layout, alpha, emulated, events):
    lists = [live(24, text) for text in pair]
    a, b = (lists[i].remap(lists[0].union(lists[1]), CPU) for i in (0, 1))
    x = draw(3, lists[0].count, 5, 4, dtype=dtype, layout=layout)
    z = draw(3, lists[1].count, 5, 4, dtype=dtype, layout="nchw", seed=1)
    args = (x, z, a.gather_index, b.gather_index, a.inverse, b.inverse, alpha)
    assert_alike(emulated.join_channels(*args), OURS.join_channels(*args))
    assert JOIN in launched(events) or dtype == torch.float64


def table(filters, channels, groups=1):
    """Of two lists; depthwise: of the first."""
    mask = torch.from_numpy(filters.mask())
    inputs = mask if groups > 1 else torch.from_numpy(channels.mask())
    return OURS.conv_mask(mask, None, inputs, filters.channels, len(inputs), groups)


WEIGHTS = {
    "plain": (live(40, "odd"), live(24, "thirds"), 1),
    "all filters": (live(40, "all"), live(24, "odd"), 1),
    "all channels": (live(40, "late"), live(24, "all"), 1),
    "one": (live(40, "one"), live(24, "one"), 1),
    "depthwise": (live(24, "thirds"), live(1, "all"), 24),
    "nothing": (live(40, "none"), live(24, "odd"), 1),
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [name for name in WEIGHTS if name != "nothing"])
def test_weights(case, dtype, layout, kernel, emulated, events):
    filters, channels, groups = WEIGHTS[case]
    pick = (table(*WEIGHTS[case]), filters.count, channels.count)
    weight = draw(filters.channels, channels.channels, kernel, kernel, dtype=dtype, layout=layout)
    assert_alike(emulated.pack_weight(weight, *pick), OURS.pack_weight(weight, *pick))
    grad = draw(filters.count, channels.count, kernel, kernel, dtype=dtype, layout=layout)
    for channels_last in (False, True):
        back = (grad, pick[0], filters.channels, channels.channels, channels_last)
        assert_alike(emulated.unpack_grad_weight(*back), OURS.unpack_grad_weight(*back))
    assert launched(events) == ([] if dtype == torch.float64 else [PACK, UNPACK, UNPACK])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_groups_with_lists_of_their_own(dtype, emulated):
    inputs = torch.tensor([0, 1, 1, 0, 1, 0, 1, 0, 0, 0, 0, 0], dtype=torch.bool)
    mask = OURS.conv_mask(torch.arange(9) % 3 < 2, None, inputs, 9, 12, 3)
    weight = draw(9, 4, 3, 3, dtype=dtype)
    assert_alike(emulated.pack_weight(weight, mask, 4, 2), OURS.pack_weight(weight, mask, 4, 2))
    grad = draw(4, 2, 3, 3, dtype=dtype)
    assert_alike(emulated.unpack_grad_weight(grad, mask, 9, 4, False), OURS.unpack_grad_weight(grad, mask, 9, 4, False))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_nothing_to_do(dtype, emulated):
    dead = (table(*WEIGHTS["nothing"]), 0, 0)
    assert emulated.pack_weight(draw(40, 24, 3, 3, dtype=dtype), *dead).shape == (0, 0, 3, 3)
    grad = emulated.unpack_grad_weight(draw(0, 0, 3, 3, dtype=dtype), dead[0], 40, 24, False)
    assert torch.equal(grad, torch.zeros(40, 24, 3, 3, dtype=dtype))
    move = live(24, "odd").remap(live(24, "all"), CPU)
    assert emulated.regroup_channels(draw(0, 12, 3, 3, dtype=dtype), *move).shape == (0, 24, 3, 3)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_poison_in_what_is_left_out(layout, emulated):
    nan = float("nan")
    every, odd = live(24, "all"), live(24, "odd")
    x = draw(2, 24, 3, 5, layout=layout)
    x[:, ::2] = nan
    assert emulated.regroup_channels(x, *every.remap(odd, CPU)).isfinite().all()
    weight = draw(24, 24, 3, 3, layout=layout)
    weight[::2], weight[:, ::2] = nan, nan
    pick = (table(odd, odd), 12, 12)
    assert emulated.pack_weight(weight, *pick).isfinite().all()


# ---- what the host reads


def join_args(seed=0):
    lists = live(24, "odd"), live(24, "thirds")
    a, b = (each.remap(lists[0].union(lists[1]), CPU) for each in lists)
    x, z = draw(2, 12, 3, 3, seed=seed).requires_grad_(), draw(2, 8, 3, 3, seed=1).requires_grad_()
    return x, z, *(t.clone() for t in (a.gather_index, b.gather_index, a.inverse, b.inverse)), 1.0


def regroup_args():
    return draw(2, 12, 3, 3).requires_grad_(), *(t.clone() for t in live(24, "odd").remap(live(24, "all"), CPU))


def pack_args():
    return draw(40, 24, 3, 3).requires_grad_(), table(*WEIGHTS["plain"]).clone(), 20, 8


CALLS = {"regroup_channels": (regroup_args, 2), "join_channels": (join_args, 4), "pack_weight": (pack_args, 1)}


@pytest.mark.parametrize("name", CALLS)
def test_lists_are_read_once_and_then_may_be_captured(name, library, emulated, events):
    make, lists = CALLS[name]
    args, op = make(), getattr(emulated, name)
    y = op(*args)
    assert events().count("download") == lists
    y.sum().backward()  # reads nothing that the forward pass has not
    assert copies(events) == []
    library.pk_pretend_to_capture(True)
    op(*args).sum().backward()
    assert copies(events) == []
    with pytest.raises(ValueError, match=rf"{name}: .*expected .* before the capture .*run a step.*, got a"):
        op(*make())


def test_a_list_that_several_operators_take(emulated, events):
    """What is kept of it is not the same for each."""
    index, x = torch.tensor([0, 2, 3], dtype=torch.int32), draw(2, 4, 3, 3)
    inverse = torch.tensor([0, -1, 1, 2], dtype=torch.int32)
    for _ in range(2):
        want = x[:, index.long()]
        assert torch.equal(emulated.gather_channels(x, index), want)
        assert torch.equal(emulated.regroup_channels(x, index, inverse), want)
        assert torch.equal(emulated.scatter_channels(want, index, 4), emulated.regroup_channels(want, inverse, index))
    assert events().count("download") == 3


def test_a_changed_list_is_read_again(emulated):
    index, inverse = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0, -1, 1, -1], dtype=torch.int32)
    x = draw(2, 4, 3, 3)
    emulated.regroup_channels(x, index, inverse)
    index += 1
    assert torch.equal(emulated.regroup_channels(x, index, inverse), x[:, [1, 3]])


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


X, W = torch.zeros(2, 4, 3, 3), torch.zeros(6, 4, 3, 3)
TABLE = OURS.conv_mask(torch.arange(6) > 1, None, torch.arange(4) > 0, 6, 4, 1)
PAIRED = OURS.conv_mask(None, torch.arange(24).view(6, 4) > 0, None, 6, 4, 1)
WRONG = {
    "regroup_channels: index": [(X, ints(0, 4), ints(0, -1, -1, -1)), (X, ints(-2), ints(0, -1, -1, -1)),
                                (X, torch.tensor([0]), ints(0, -1, -1, -1))],
    "regroup_channels: inverse": [(X, ints(0), ints(0)), (X, ints(0), ints(1, -1, -1, -1))],
    "regroup_channels: x": [(X[0], ints(0), ints(0)), (X.int(), ints(0), ints(0, -1, -1, -1))],
    "join_channels: b": [(X, X[:1], *[ints(0, 1, 2, 3)] * 4, 1.0), (X, X.double(), *[ints(0, 1, 2, 3)] * 4, 1.0)],
    "join_channels: b_index": [(X, X, ints(0, 1, 2, 3), ints(0), *[ints(0, 1, 2, 3)] * 2, 1.0),
                               (X, X, ints(0, 1, 2, 3), ints(0, 1, 2, 7), *[ints(0, 1, 2, 3)] * 2, 1.0)],
    "join_channels: a_inverse": [(X, X, *[ints(0, 1, 2, 3)] * 2, ints(0), ints(0, 1, 2, 3), 1.0)],
    "pack_weight: mask": [(W, ints(*range(50)), 4, 3), (W[:5], TABLE, 4, 3), (W[:, :3], TABLE, 4, 3),
                          (W, PAIRED, 6, 4)],
    "pack_weight: filters, channels": [(W, TABLE, 4, 4), (W, TABLE, 6, 3)],
    "pack_weight: weight": [(W[0], TABLE, 4, 3), (W.int(), TABLE, 4, 3)],
    "unpack_grad_weight: grad": [(W, TABLE, 6, 4, False), (W[0], TABLE, 6, 4, False)],
    "unpack_grad_weight: mask": [(W[:4, :3], TABLE, 5, 4, False), (W[:4, :3], TABLE, 6, 3, False)],
}  # fmt: skip


@pytest.mark.parametrize(("said", "at"), [(said, at) for said, calls in WRONG.items() for at in range(len(calls))])
def test_errors(said, at, emulated):
    with pytest.raises((ValueError, RuntimeError), match=f"{said}.*expected .*, got ") as why:
        getattr(emulated, said.partition(":")[0])(*WRONG[said][at])
    with pytest.raises((ValueError, RuntimeError)) as as_on_the_cpu:
        getattr(OURS, said.partition(":")[0])(*WRONG[said][at])
    assert str(why.value).partition(" expected")[0] == str(as_on_the_cpu.value).partition(" expected")[0]


# ---- networks


RUNS = [(name, layout) for name in NETWORKS for layout in LAYOUTS[:2]]
RUNS.remove(("plain", "channels_last"))  # its view() asks for the other one


@pytest.fixture
def steady(library, events, monkeypatch):
    """Runs a step in which the host reads no tensor, copies none to the device, and they act as if capturing."""
    reading = ("cpu", "numpy", "item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__")

    def refuse(*args, **kwargs):
        raise AssertionError("this waits for the device")

    def run(step):
        events()
        library.pk_pretend_to_capture(True)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "from_numpy", refuse)
            for name in reading:
                patch.setattr(torch.Tensor, name, refuse)
            result = step()
        library.pk_pretend_to_capture(False)
        assert copies(events) == []
        return result

    return run


@pytest.mark.parametrize(("name", "layout"), RUNS)
def test_networks(name, layout, steady):
    """The numbers of masked mode; from the second step on nothing waits for the device."""
    net, x = flow_network(name, layout)
    with pk.plan.force("compact"):
        for seed in range(2):
            mask_at_random(net, seed)
            want = flow_step(pk.flow(net, False), x)
            flow_step(pk.flow(net), x)
            for a, b in zip(steady(lambda: flow_step(net, x)), want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Combined(torch.nn.Module):
    def __init__(self, combine):
        super().__init__()
        self.conv, self.combine = pk.MaskedConv2d(3, 13, 3), combine
        self.conv.set_masks(filter=torch.arange(13) % 3 > 0)

    def forward(self, x, plain):
        return self.combine(self.conv(x), plain)


COMBINE = {
    "mul": torch.mul,
    "add": torch.add,
    "added": lambda a, b: torch.add(b, a),
    "cat": lambda a, b: torch.cat([b, a], 1).relu(),
}


@pytest.mark.parametrize("name", COMBINE)
def test_with_a_plain_tensor(name, steady):
    """The list of a plain tensor's channels is in no layer's keeping."""
    net, x, plain = pk.flow(Combined(COMBINE[name])), torch.randn(2, 3, 6, 6), torch.randn(2, 13, 4, 4)
    net(x, plain)
    got = steady(lambda: net(x, plain))
    torch.testing.assert_close(got, pk.flow(net, False)(x, plain))
