"""MaskedAdamW beside torch.optim.AdamW; what both masked optimizers share is tested in test_sgd.py and test_bind.py."""

import copy

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.conv import capped, isas
from cases.steps import OPS, SHAPES, chosen, give_grads, parameters, table
from prunekernels import optim
from prunekernels.ops.fallback_steps import live_elements

SETTINGS = {
    "plain": {"weight_decay": 0.0},
    "decay": {"weight_decay": 0.3},
    "small beta1": {"betas": (0.4, 0.99)},
    "no momentum": {"betas": (0.0, 0.9)},
    "no eps": {"eps": 0.0},
    "maximize": {"maximize": True},
}
AVERAGES = ("exp_avg", "exp_avg_sq")
same_bits = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="this torch has no fused multiply-add"
)


def run(setting, dtype, shapes=SHAPES, steps=8, **theirs):
    ours, arguments = parameters(dtype, shapes), {"lr": 0.0123} | SETTINGS[setting]
    others = copy.deepcopy(ours)
    mine, reference = optim.MaskedAdamW(ours, **arguments), torch.optim.AdamW(others, **arguments, **theirs)
    for _ in range(steps):
        give_grads(ours, others)
        mine.step()
        reference.step()
    return list(zip(ours, others, strict=True)), mine.state, reference.state


@same_bits
@pytest.mark.skipif(not pk.has_extension(), reason="pure torch takes torch's square root")
@pytest.mark.parametrize("setting", SETTINGS)
def test_same_bits_as_torchs_fused(setting):
    """Sizes are whole vectors: torch rounds the rest of a parameter differently."""
    shapes = ((64, 3, 3, 3), (64,), (32, 64, 1, 1))
    pairs, ours, theirs = run(setting, torch.float32, shapes, fused=True)
    for a, b in pairs:
        assert torch.equal(a, b)
        assert all(torch.equal(ours[a][name], theirs[b][name]) for name in AVERAGES)


@same_bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("foreach", [False, True])
def test_averages_have_the_bits_of_torchs_others(foreach, setting, dtype):
    """Weights may differ where torch takes its square root from a library that rounds some results differently."""
    pairs, ours, theirs = run(setting, dtype, foreach=foreach)
    for a, b in pairs:
        assert all(torch.equal(ours[a][name], theirs[b][name]) for name in AVERAGES)
        assert torch.equal(ours[a]["step"], theirs[b]["step"])
        torch.testing.assert_close(a, b, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("size", [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65])
def test_every_instruction_set(isa, size):
    ours = parameters(shapes=((size,), (3, size)))
    others = copy.deepcopy(ours)
    mine, reference = optim.MaskedAdamW(ours, 0.1), optim.MaskedAdamW(others, 0.1)
    for _ in range(2):
        give_grads(ours, others)
        with capped(isa):
            mine.step()
        reference.step()
    for a, b in zip(ours, others, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_dead_elements_are_left_alone(dtype, layout):
    """Dead gradients and averages are NaN, so a result that read them would be NaN."""
    plain = [torch.randn(9, 40, 3, 3).abs().to(dtype) for _ in range(4)]
    mask = table(chosen(9), chosen(9, 40))
    live = live_elements("test", mask, plain[0]).expand_as(plain[0])
    holes = [plain[0], *(torch.where(live, t, torch.nan) for t in plain[1:])]
    before = plain[0].clone()
    plain, holes = ([t.clone(memory_format=layout) for t in tensors] for tensors in (plain, holes))
    for tensors, masks in ((plain, None), (holes, mask)):
        steps = torch.tensor(3.0)
        OPS.masked_adamw_(*([t] for t in tensors), [steps], [masks], [], [], 0.1, 0.9, 0.99, 1e-8, 0.1)
        assert steps == 4
    assert torch.equal(holes[0], torch.where(live, plain[0], before))
    for a, b in zip(holes[2:], plain[2:], strict=True):
        assert torch.equal(a.nan_to_num(99), torch.where(live, b, 99))


@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_update_norms(eps):
    weight, grad, zeros = torch.randn(5, 7, 3, 3), torch.randn(5, 7, 3, 3), torch.zeros(2, 5, 7, 3, 3)
    before, change = weight.clone(), torch.full((5,), 9.0)
    lists = ([weight], [grad], [zeros[0]], [zeros[1]], [torch.tensor(0.0)], [table(chosen(5), chosen(5, 7))])
    OPS.masked_adamw_(*lists, [change], [], 0.1, 0.9, 0.99, eps, 0.0)
    torch.testing.assert_close(change, (weight - before).abs().flatten(1).sum(1))


@pytest.mark.parametrize("to_ours", [True, False])
def test_state_dicts_interchange(to_ours):
    ours = parameters()
    others = copy.deepcopy(ours)
    mine, reference = optim.MaskedAdamW(ours, 0.1, freeze="dead"), torch.optim.AdamW(others, 0.1, fused=True)
    for _ in range(2):
        give_grads(ours, others)
        mine.step()
        reference.step()
        target, source = (mine, reference) if to_ours else (reference, mine)
        target.load_state_dict(copy.deepcopy(source.state_dict()))
    for a, b in zip(ours, others, strict=True):
        torch.testing.assert_close(a, b)
    assert mine.param_groups[0]["freeze"] == "dead"


def test_double_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        optimizer = optim.MaskedAdamW([p])
        optimizer.step()
        assert optimizer.state[p]["step"].dtype == torch.float64 and optimizer.state[p]["step"] == 1
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"freeze": None}, "MaskedAdamW: freeze: expected one of hard, dead, got None"),
        ({"lr": -1}, "MaskedAdamW: lr: expected a number, at least 0, got -1"),
        ({"eps": -1}, "MaskedAdamW: eps: expected a number, at least 0, got -1"),
        ({"betas": (0.9, 1.0)}, r"MaskedAdamW: betas: expected two numbers in \[0, 1\), got \(0.9, 1.0\)"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        optim.MaskedAdamW([nn.Parameter(torch.ones(2))], **arguments)


@pytest.mark.parametrize("name", ["amsgrad", "capturable", "differentiable"])
def test_what_a_loaded_group_may_ask_for(name):
    optimizer = optim.MaskedAdamW([nn.Parameter(torch.ones(2))])
    optimizer.param_groups[0][name] = True
    with pytest.raises(ValueError, match=f"MaskedAdamW: {name}: expected False, got True"):
        optimizer.step()
