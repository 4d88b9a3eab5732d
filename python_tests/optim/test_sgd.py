"""MaskedSGD beside torch.optim.SGD, and what it leaves alone."""

import contextlib
import copy
import io

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.conv import capped, isas
from cases.steps import OPS, chosen, give_grads, parameters, table
from prunekernels import optim
from prunekernels.ops.fallback_steps import live_elements

SETTINGS = {
    "plain": {},
    "decay": {"weight_decay": 1e-2},
    "momentum": {"momentum": 0.9},
    "momentum, decay": {"momentum": 0.9, "weight_decay": 5e-4},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
    "dampening": {"momentum": 0.9, "dampening": 0.3},
    "maximize": {"momentum": 0.9, "maximize": True, "weight_decay": 0.1},
}
same_bits = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="this torch has no fused multiply-add"
)


def assert_alike(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b), (a.shape, (a - b).abs().max())


def momenta(optimizer, params):
    return [optimizer.state[p]["momentum_buffer"] for p in params if "momentum_buffer" in optimizer.state[p]]


@same_bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
def test_same_bits_as_torch(setting, dtype):
    ours, arguments = parameters(dtype), {"lr": 0.0123} | SETTINGS[setting]
    theirs = copy.deepcopy(ours)
    mine, reference = optim.MaskedSGD(ours, **arguments), torch.optim.SGD(theirs, foreach=True, **arguments)
    for _ in range(4):
        give_grads(ours, theirs)
        mine.step()
        reference.step()
    assert_alike(ours, theirs)
    assert_alike(momenta(mine, ours), momenta(reference, theirs))


@same_bits
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("size", [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65])
def test_every_instruction_set(isa, size):
    ours = parameters(shapes=((size,), (3, size)))
    theirs = copy.deepcopy(ours)
    mine = optim.MaskedSGD(ours, 0.1, 0.9, weight_decay=0.01, nesterov=True)
    reference = torch.optim.SGD(theirs, 0.1, 0.9, weight_decay=0.01, nesterov=True)
    with capped(isa):
        for _ in range(2):
            give_grads(ours, theirs)
            mine.step()
            reference.step()
    assert_alike(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_within_a_rounding(dtype):
    ours = parameters(dtype)
    theirs = copy.deepcopy(ours)
    mine, reference = optim.MaskedSGD(ours, 0.1, 0.9), torch.optim.SGD(theirs, 0.1, 0.9)
    for _ in range(3):
        give_grads(ours, theirs)
        mine.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=3 * torch.finfo(dtype).eps, atol=3 * torch.finfo(dtype).eps)


def test_one_thread_and_two_agree():
    one = parameters(shapes=((300, 70, 3, 3), (300,)))
    two = copy.deepcopy(one)
    give_grads(one, two)
    for params, threads in ((one, 1), (two, 2)):
        torch.set_num_threads(threads)
        optimizer = optim.MaskedSGD(params, 0.1, 0.9)
        optimizer.track_updates()
        optimizer.step()
        params.extend(sums for pair in optimizer.updates.values() for sums in pair)
    assert_alike(one, two)


# ---- what is dead ----------------------------------------------------------------------------------------------------


def frozen(mask, parameter):
    return ~live_elements("test", mask, parameter).expand_as(parameter)


MASKS = {
    "rows": lambda K, C: table(chosen(K), channels=C),
    "columns": lambda K, C: table(None, torch.ones(K, C, dtype=torch.bool), chosen(C)),
    "rows and columns": lambda K, C: table(chosen(K), None, chosen(C)),
    "kernels": lambda K, C: table(None, chosen(K, C)),
    "groups": lambda K, C: table(chosen(K), chosen(K, C), chosen(2 * C), groups=2),
    "all": lambda K, C: table(torch.zeros(K, dtype=torch.bool), channels=C),
    "none": lambda K, C: table(torch.ones(K, dtype=torch.bool), channels=C),
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "mixed", "sliced"])
@pytest.mark.parametrize(
    "size", [(6, 5, 3, 3), (8, 33, 3, 3), (40, 64, 1, 1), (10, 130, 1, 3), (130, 100, 3, 3)], ids=str
)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dead_elements_are_left_alone(dtype, mask, size, layout):
    """Dead gradients and momenta are NaN, so a result that read them would be NaN."""
    weight, grad, momentum = (torch.randint(-4, 5, size).to(dtype) for _ in range(3))
    mask = MASKS[mask](*size[:2])
    dead = frozen(mask, weight)
    v = momentum * 0.5 + grad + 0.25 * weight
    expected = torch.where(dead, weight, weight - 0.5 * v), torch.where(dead, torch.nan, v)
    grad, momentum = torch.where(dead, torch.nan, grad), torch.where(dead, torch.nan, momentum)
    if layout in ("channels_last", "mixed"):
        weight = weight.contiguous(memory_format=torch.channels_last)
    if layout == "channels_last":
        grad, momentum = (t.contiguous(memory_format=torch.channels_last) for t in (grad, momentum))
    if layout == "sliced":
        weight, momentum = (torch.cat([t, t], 1)[:, : size[1]] for t in (weight, momentum))
    OPS.masked_sgd_([weight], [grad], [momentum], [mask], [], [], 0.5, 0.5, 0.0, 0.25, False, False)
    assert torch.equal(weight, expected[0])
    assert torch.equal(momentum.nan_to_num(99), expected[1].nan_to_num(99))


@pytest.mark.parametrize("length", [1, 31, 32, 33, 100])
def test_dead_elements_of_a_vector(length):
    live = chosen(length)
    weight, grad = torch.ones(length), torch.where(live, 2.0, torch.nan)
    OPS.masked_sgd_([weight], [grad], [], [table(live, channels=1)], [], [], 0.5, 0.0, 0.0, 0.0, False, False)
    assert torch.equal(weight, torch.where(live, 0.0, 1.0))


@pytest.mark.parametrize("isa", [None, *isas()])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_update_norms(dtype, masked, isa):
    weight, grad = torch.randint(-4, 5, (2, 9, 21, 3, 3)).to(dtype)
    mask = table(chosen(9), chosen(9, 21)) if masked else None
    before, change, square = weight.clone(), torch.full((9,), 7.0), torch.full((9,), 7.0)
    with capped(isa) if isa else contextlib.nullcontext():
        OPS.masked_sgd_([weight], [grad], [], [mask], [change], [square], 0.5, 0.0, 0.0, 0.0, False, False)
    moved = (weight - before).float().flatten(1)
    assert moved.any() and torch.equal(change, moved.abs().sum(1)) and torch.equal(square, moved.square().sum(1))


# ---- as an optimizer -------------------------------------------------------------------------------------------------


def test_tracked_updates():
    params = parameters(shapes=((4, 3), (4,)))
    optimizer = optim.MaskedSGD(params, lr=1.0)
    optimizer.track_updates()
    give_grads(params, integers=True)
    optimizer.step()
    (change, square), grad = optimizer.updates[params[0]], params[0].grad
    assert list(optimizer.updates) == params[:1]
    torch.testing.assert_close(change, grad.abs().sum(1))
    torch.testing.assert_close(square, grad.square().sum(1))
    optimizer.track_updates([])
    optimizer.step()
    assert not optimizer.updates
    with pytest.raises(ValueError, match=r"MaskedSGD: parameters: expected two or more dimensions, got \[4\]"):
        optimizer.track_updates(params)


@same_bits
@pytest.mark.parametrize("to_ours", [True, False])
def test_state_dicts_interchange(to_ours):
    ours, arguments = parameters(), {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
    theirs = copy.deepcopy(ours)
    mine, reference = optim.MaskedSGD(ours, freeze="dead", **arguments), torch.optim.SGD(theirs, **arguments)
    give_grads(ours, theirs)
    mine.step()
    reference.step()
    target, source = (mine, reference) if to_ours else (reference, mine)
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    give_grads(ours, theirs)
    mine.step()
    reference.step()
    assert_alike(ours, theirs)
    assert mine.param_groups[0]["freeze"] == "dead"


@same_bits
def test_groups_schedules_and_parameters_without_gradient():
    ours = parameters()
    theirs = copy.deepcopy(ours)

    def make(cls, params):
        optimizer = cls([{"params": params[:4], "weight_decay": 0.1}, {"params": params[4:], "lr": 0.5}], 0.1, 0.9)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    pairs = make(optim.MaskedSGD, ours), make(torch.optim.SGD, theirs)
    for step in range(3):
        give_grads(ours, theirs)
        for params in (ours, theirs):
            params[0].grad = None if step < 2 else params[0].grad  # its momentum starts later
        for optimizer, scheduler in pairs:
            optimizer.step()
            scheduler.step()
    assert_alike(ours, theirs)
    assert pairs[0][0].param_groups[1]["lr"] == 0.5 * 0.125


def test_closure():
    p = nn.Parameter(torch.tensor([3.0]))
    optimizer = optim.MaskedSGD([p], lr=0.5)

    def closure():
        optimizer.zero_grad()
        loss = (p * 2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 6 and p.item() == 2


def test_copies_and_pickles_keep_the_numbers():
    p = nn.Parameter(torch.ones(3))
    optimizer = optim.MaskedSGD([p], 0.1, 0.9, freeze="dead")
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded.param_groups[0]["freeze"] == "dead" and loaded.updates == {}
    loaded.param_groups[0]["params"][0].grad = torch.ones(3)
    loaded.step()


def test_a_step_invalidates_saved_weights():
    p, x = nn.Parameter(torch.ones(3)), torch.ones(3, requires_grad=True)
    loss = (p * p * x).sum()
    p.grad = torch.ones(3)
    optim.MaskedSGD([p], 0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_subnormals_are_left():
    p = nn.Parameter(torch.zeros(64))
    optimizer = optim.MaskedSGD([p], 0.1, 0.9)
    optimizer.state[p]["momentum_buffer"] = torch.full((64,), 1.2e-38)
    p.grad = torch.zeros(64)
    optimizer.step()
    if pk.has_extension():
        assert not optimizer.state[p]["momentum_buffer"].any()


def test_repr_names_it():
    assert repr(optim.MaskedSGD([nn.Parameter(torch.ones(1))], 0.1)).startswith("MaskedSGD (")


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"freeze": "soft"}, "MaskedSGD: freeze: expected one of hard, dead, got 'soft'"),
        ({"lr": -1}, "MaskedSGD: lr: expected a number, at least 0, got -1"),
        ({"lr": torch.tensor(0.1)}, "MaskedSGD: lr: expected a number, at least 0, got a tensor"),
        ({"momentum": -1}, "MaskedSGD: momentum: expected a number, at least 0, got -1"),
        ({"weight_decay": -1}, "MaskedSGD: weight_decay: expected a number, at least 0, got -1"),
        ({"nesterov": True}, "MaskedSGD: nesterov: expected a momentum and no dampening with it, got 0.0 and 0.0"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        optim.MaskedSGD([nn.Parameter(torch.ones(2))], **{"lr": 0.1} | arguments)


def test_bad_group():
    with pytest.raises(ValueError, match="MaskedSGD: freeze: expected one of hard, dead, got 3"):
        optim.MaskedSGD([{"params": [nn.Parameter(torch.ones(2))], "freeze": 3}], 0.1)


def test_sparse_gradients_are_refused():
    p = nn.Parameter(torch.ones(4, 2))
    p.grad = torch.ones(4, 2).to_sparse()
    with pytest.raises(
        ValueError,
        match="(MaskedSGD: params: expected dense gradients|masked_sgd_: grads: expected dense tensors), got",
    ):
        optim.MaskedSGD([p], 0.1).step()


@pytest.mark.parametrize(("name", "value"), [("differentiable", True), ("lr", torch.tensor(0.1))])
def test_what_a_loaded_group_may_ask_for(name, value):
    p = nn.Parameter(torch.ones(2))
    optimizer = optim.MaskedSGD([p], 0.1)
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"MaskedSGD: {name}: expected"):
        optimizer.step()


W, MASK = torch.ones(4, 3, 1, 1), table(torch.arange(4) > 1, channels=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": []}, "grads: expected 1 tensors, one per weight, got 0"),
        ({"grads": [W[:2]]}, r"grads: expected \[4, 3, 1, 1\] as its weight, got \[2, 3, 1, 1\]"),
        ({"grads": [W.double()]}, "grads: expected float, got double|grads: expected torch.float32, got torch.float64"),
        ({"momenta": []}, "momenta: expected 1 tensors, one per weight, got 0"),
        ({"masks": []}, "masks: expected 1 tensors, one per weight, got 0"),
        ({"masks": [table(torch.ones(4, dtype=torch.bool), channels=5)]}, "masks: expected a table for a parameter"),
        ({"weights": [W.int()], "grads": [W.int()]}, "weights: expected float32, float64, bfloat16 or float16, got"),
        ({"abs_updates": [torch.zeros(4)] * 2}, "abs_updates: expected 1 tensors, one per weight, got 2"),
    ],
)
def test_bad_lists(change, message):
    lists = {"weights": [W.clone()], "grads": [W], "momenta": [W.clone()], "masks": [MASK]}
    lists = lists | {"abs_updates": [], "square_updates": []} | change
    with pytest.raises(ValueError, match=f"masked_sgd_: ({message})"):
        OPS.masked_sgd_(*lists.values(), 0.1, 0.9, 0.0, 0.0, False, False)
