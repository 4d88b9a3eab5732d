"""explain: what it says of each layer, and that it leaves model and torch as they were. Times: only that they exist."""

import functools
import sys

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.layers import FILTERS, INPUTS, KERNELS
from prunekernels.train.models import build

explain = functools.partial(pk.explain, modes=())  # with modes: see test_explain_modes.py
module = sys.modules["prunekernels.inspect.explain"]


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0)
    monkeypatch.setattr(module, "MIN_ROUNDS", 1)


def make():
    model = nn.Sequential(pk.MaskedConv2d(3, 4, 3), nn.ReLU(), pk.MaskedConv2d(4, 6, 3), nn.Conv2d(6, 2, 1))
    model[2].set_masks(filter=FILTERS, kernel=KERNELS, input=INPUTS)
    return model


def without_times(rows):
    assert all(row["untimed"] is None for row in rows)
    left = ("ms", "dense_ms", "untimed", "compacted_filters")
    return [{key: value for key, value in row.items() if key not in left} for row in rows]


@pytest.mark.parametrize("backward", [True, False])
def test_rows(backward):
    model = make()
    with pk.plan.force("compact"):
        rows = explain(model, torch.randn(2, 3, 9, 9), backward=backward).rows

    def plans(forward, grad_input, grad_weight):
        backwards = (grad_input, grad_weight) if backward else (None, None)
        return dict(zip(pk.plan.DIRECTIONS, (forward, *backwards), strict=True))

    compact = "compact" if pk.has_extension() else "dense"
    kernels = int((KERNELS & FILTERS[:, None] & INPUTS).sum())
    assert without_times(rows) == [
        {"layer": "0", "mode": "masked", "filters": 4, "live_filters": 4, "inputs": 3, "live_inputs": 3, "kernels": 12,
         "live_kernels": 12, **plans("dense", None, "dense"), "calls": 1},
        {"layer": "2", "mode": "masked", "filters": 6, "live_filters": 4, "inputs": 4, "live_inputs": 3, "kernels": 24,
         "live_kernels": kernels, **plans(*[compact] * 3), "calls": 1},
        {"layer": "3", "mode": "plain", "filters": 2, "live_filters": 2, "inputs": 6, "live_inputs": 6, "kernels": 12,
         "live_kernels": 12, **plans(*["dense"] * 3), "calls": 1},
    ]  # fmt: skip
    assert all(row["ms"] > 0 and row["dense_ms"] > 0 for row in rows)


def test_an_all_live_layer_is_dense_whatever_is_forced():
    with pk.plan.force("compact"):
        assert explain(make(), torch.randn(2, 3, 9, 9)).rows[0]["forward"] == "dense"


def test_what_wants_no_gradient():
    model = make()
    model[2].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    rows = explain(model, torch.randn(2, 3, 9, 9)).rows
    assert [row["grad_input"] is None for row in rows] == [True, False, False]
    assert [row["grad_weight"] is None for row in rows] == [False, True, False]
    model.requires_grad_(False)
    assert all(row["grad_weight"] is None and row["ms"] > 0 for row in explain(model, torch.randn(2, 3, 9, 9)).rows)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layers_run_at_the_size_and_layout_of_their_input(layout, monkeypatch):
    seen = []
    forward = pk.MaskedConv2d.forward
    monkeypatch.setattr(pk.MaskedConv2d, "forward", lambda self, x: seen.append(x) or forward(self, x))
    model = make().to(memory_format=layout)
    explain(model, torch.randn(2, 3, 9, 8).to(memory_format=layout))
    of_second = [x for x in seen if x.shape[1] == 4]
    assert len(of_second) > 1 and {x.shape for x in of_second} == {(2, 4, 7, 6)}
    assert all(x.is_contiguous(memory_format=layout) for x in of_second)


class Gated(nn.Module):
    """conv -> masked norm -> conv -> sigmoid -> conv: behind the sigmoid no channel is zero."""

    def __init__(self, **second):
        super().__init__()
        self.first, self.norm = pk.MaskedConv2d(3, 4, 1), pk.MaskedBatchNorm2d(4)
        self.second = pk.MaskedConv2d(4, 4, 3, **second)
        self.gate, self.last = nn.Sequential(nn.Sigmoid()), pk.MaskedConv2d(4, 2, 1)
        self.first.set_masks(filter=torch.arange(4) < 2)
        self.norm.set_mask(torch.arange(4) < 2)
        self.second.set_masks(filter=torch.arange(4) < 3)

    def forward(self, x):
        return self.last(self.gate(self.second(self.norm(self.first(x)))))


def told(explanation, *keys):
    return [tuple(row[key] for key in keys) for row in explanation.rows]


def test_live_mode():
    model = Gated()
    masked = explain(model, torch.randn(2, 3, 5, 5))
    assert {mode for (mode,) in told(masked, "mode")} == {"masked"} and masked.fallbacks == []
    with pk.plan.force("dense"):
        live = explain(pk.flow(model), torch.randn(2, 3, 5, 5))
    assert told(live, "layer", "mode", "live_filters", "live_inputs", "live_kernels", *pk.plan.DIRECTIONS) == [
        ("first", "live", 2, 3, 6, "small", None, "small"),
        ("second", "live", 3, 2, 6, "small", "small", "small"),
        ("last", "live", 2, 4, 8, "small", "small", "small"),
    ]
    assert live.fallbacks == [{"op": "conv2d (channels that hold 0.5)", "module": "last", "count": 1}]
    assert str(live).endswith("full width: conv2d (channels that hold 0.5) in last, 1 x")
    assert all(row["ms"] > 0 for row in live.rows)


@pytest.mark.trials
@pytest.mark.skipif(not pk.has_extension(), reason="without the extension there is one plan only")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [1, 8])
def test_live_mode_tells_the_plans_that_were_measured(groups, layout):
    """On planes this small, direct kernels beat the vendor even where nothing is dead in the small convolution."""
    layer = pk.MaskedConv2d(8, 8, 3, padding=1, groups=groups)
    layer.set_masks(filter=torch.arange(8) < 5)
    pk.plan.clear()
    model = pk.flow(nn.Sequential(nn.Conv2d(3, 8, 1), layer)).to(memory_format=layout)
    row = explain(model, torch.randn(2, 3, 16, 16).to(memory_format=layout)).rows[1]
    measured = {row["direction"]: row["plan"] for row in pk.plan.table()}
    assert bool(measured) == (layout == torch.contiguous_format or groups == 8)
    told = {direction: measured.get(direction, "dense") for direction in pk.plan.DIRECTIONS}
    assert row["mode"] == "live"
    assert {d: row[d] for d in told} == {d: "small" if plan == "dense" else plan for d, plan in told.items()}


@pytest.mark.parametrize("padding", [0, 1, "same"])
@pytest.mark.parametrize("groups", [1, 4])
def test_single_dead_kernels_in_live_mode(groups, padding):
    model = Gated(groups=groups, padding=padding)
    kernels = torch.ones(4, 4 // groups, dtype=torch.bool)
    kernels[0, 0] = False
    model.second.set_masks(kernel=kernels)
    with pk.plan.force("compact"):
        row = explain(pk.flow(model), torch.randn(2, 3, 5, 5)).rows[1]
    assert (row["mode"], row["live_kernels"]) == ("live", 5 if groups == 1 else 1)
    assert {row[direction] for direction in pk.plan.DIRECTIONS} == {"compact" if pk.has_extension() else "dense"}


def test_what_live_mode_leaves_to_masked_mode():
    model = Gated()
    model.second.weight_grad = "dense"
    explanation = explain(pk.flow(model), torch.randn(2, 3, 5, 5))
    assert told(explanation, "mode", "live_inputs")[1] == ("masked", 4)
    assert any(b["module"] == "second" and 'weight_grad="dense"' in b["op"] for b in explanation.fallbacks)


def test_a_plain_convolution_reads_what_arrives_live():
    model = nn.Sequential(pk.MaskedConv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 1, groups=2))
    model[0].set_masks(filter=torch.arange(4) < 3)
    explanation = explain(pk.flow(model), torch.randn(2, 3, 5, 5))
    rows = told(explanation, "mode", "live_filters", "live_inputs", "live_kernels")
    assert rows == [("live", 3, 3, 9), ("plain", 6, 3, 18), ("plain", 6, 6, 18)]
    assert explanation.fallbacks == []


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = pk.MaskedConv2d(2, 2, 3)

    def forward(self, x):
        return self.conv(self.conv(x)) + self.conv(input=x[..., 2:, 2:])


def test_calls_add_up():
    rows = explain(Twice(), torch.randn(1, 2, 8, 8)).rows
    assert [(row["layer"], row["calls"]) for row in rows] == [("conv", 3)]


def test_the_model_and_the_random_state_are_left_alone():
    model = build("resnet20", width=0.2)
    pk.convert(model)
    model.train()
    model.stem.conv.set_masks(filter=torch.arange(3) < 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    explain(model, torch.zeros(2, 3, 8, 8))
    assert torch.equal(random, torch.get_rng_state())
    assert all(m.training for m in model.modules()) and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_under_no_grad_too():
    with torch.no_grad():
        rows = explain(make(), torch.randn(2, 3, 9, 9)).rows
        assert not torch.is_grad_enabled()
    assert rows[1]["grad_input"] is not None


def test_autocast_is_the_callers():
    with torch.autocast("cpu", torch.bfloat16):
        assert len(explain(make(), torch.randn(2, 3, 9, 9)).rows) == 3


def test_text(monkeypatch):
    monkeypatch.setattr(module, "_medians", lambda runs, device: {name: 0.5 * len(name) for name in runs})
    with pk.plan.measure(False), pk.plan.force("dense"):
        assert str(explain(make(), torch.randn(2, 3, 9, 9))).splitlines() == [
            "layer  mode    filters  inputs  kernels  forward  grad_input  grad_weight     ms  dense ms  speed-up",
            "0      masked      4/4     3/3    12/12  dense                dense        1.000     4.000      4.00",
            "2      masked      4/6     3/4     8/24  dense    dense       dense        1.000     4.000      4.00",
            "3      plain       2/2     6/6    12/12  dense    dense       dense        4.000     4.000      1.00",
            "all                                                                        6.000    12.000      2.00",
        ]


def test_fallbacks_are_told():
    explanation = module.Explanation(
        [], [{"op": "sigmoid", "module": "gate", "count": 3}, {"op": "add", "module": "", "count": 1}]
    )
    assert str(explanation).splitlines()[-2:] == [
        "full width: sigmoid in gate, 3 x",
        "full width: add in the model, 1 x",
    ]


def test_the_old_name_of_fallbacks():
    explanation = module.Explanation([], [{"op": "sigmoid", "module": "gate", "count": 3}])
    with pytest.warns(DeprecationWarning, match="Explanation.breaks is now called Explanation.fallbacks"):
        assert explanation.breaks is explanation.fallbacks


def test_nothing_to_explain():
    assert explain(nn.ReLU(), torch.ones(1)).rows == []


def test_a_failure_names_the_layer():
    with pytest.raises(ValueError, match="explain: example_input: expected an input .* got RuntimeError in 0: "):
        explain(make(), torch.randn(2, 5, 9, 9))


def live_network():
    model = nn.Sequential(pk.MaskedConv2d(3, 4, 3), nn.ReLU(), nn.Sequential(pk.MaskedConv2d(4, 6, 3), nn.ReLU()))
    model.append(pk.MaskedConv2d(6, 2, 1))
    model[0].set_masks(filter=torch.tensor([True, False, True, True]))
    model[2][0].set_masks(filter=FILTERS)
    return pk.flow(model)


def compile_whole(model):
    return torch.compile(model, backend="eager"), ["masked"] * 3, [""]


def compile_whole_in_place(model):
    model.compile(backend="eager")
    return model, ["masked"] * 3, [""]


def compile_part(model):
    model[2] = torch.compile(model[2], backend="eager")
    return pk.flow(model), ["live", "masked", "live"], ["2"]


def compile_part_after_flow(model):
    model[2] = torch.compile(model[2], backend="eager")
    return model, ["live", "masked", "live"], ["2"]


def compile_part_in_place(model):
    model[2].compile(backend="eager")
    return pk.flow(model), ["live", "masked", "live"], ["2"]


def compile_parts_of_parts(model):
    model[2][0].compile(backend="eager")
    model[2].compile(backend="eager")
    return pk.flow(model), ["live", "masked", "live"], ["2"]


def compile_what_has_no_masks(model):
    model[1].compile(backend="eager")
    return pk.flow(model), ["live"] * 3, []


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
@pytest.mark.parametrize("how", [
    compile_whole, compile_whole_in_place, compile_part, compile_part_after_flow, compile_part_in_place,
    compile_parts_of_parts, compile_what_has_no_masks,
])  # fmt: skip
def test_explain_says_that_what_compile_runs_is_in_masked_mode(how):
    model, modes, parts = how(live_network())
    x = torch.randn(2, 3, 9, 9)
    found = explain(model, x)
    assert [row["mode"] for row in found.rows] == modes
    assert [row["live_filters"] for row in found.rows] == [3, 4, 2] and found.compiled == parts
    for name in parts:
        assert f"masked mode: {name or 'the model'}, which torch.compile runs" in str(found)
    assert "torch.compile" in str(found)
    again = explain(model, x)
    assert without_times(again.rows) == without_times(found.rows) and again.fallbacks == found.fallbacks
    layers = [m for m in model.modules() if isinstance(m, pk.MaskedConv2d)]
    assert all(layer._flow and not layer._forward_hooks for layer in layers)


def test_explain_of_a_compiled_network_in_masked_mode_needs_no_words():
    model = pk.flow(live_network(), False)
    model.compile(backend="eager")
    found = explain(model, torch.randn(2, 3, 9, 9))
    assert found.compiled == [] and "torch.compile" not in str(found)
