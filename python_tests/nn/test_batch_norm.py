"""MaskedBatchNorm2d: a dead channel is exactly 0 and keeps its statistics; live ones are as in nn.BatchNorm2d."""

import copy
import pickle

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.conv import assert_zero

LIVE = torch.tensor([True, False, True, True, False])
KINDS = {
    "plain": {},
    "no affine": {"affine": False},
    "no running stats": {"track_running_stats": False},
    "cumulative": {"momentum": None},
    "momentum": {"momentum": 0.3, "eps": 1e-2},
    "neither": {"affine": False, "track_running_stats": False},
}
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def fill(norm, seed=0):
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in [*norm.named_parameters(), *norm.named_buffers()]:
            if t.is_floating_point() and name != "channel_mask":
                t.copy_(torch.rand(t.shape, generator=gen) + 0.5)
    return norm


def pair(training, **args):
    """(masked norm of 5 channels with 2 dead, plain norm of its 3 live ones)."""
    norm, small = fill(pk.MaskedBatchNorm2d(5, **args)), nn.BatchNorm2d(3, **args)
    norm.set_mask(LIVE)
    with torch.no_grad():
        sources = dict([*norm.named_parameters(), *norm.named_buffers()])
        for name, t in [*small.named_parameters(), *small.named_buffers()]:
            t.copy_(sources[name][LIVE] if t.dim() else sources[name])
    return norm.train(training), small.train(training)


@pytest.mark.parametrize("format", LAYOUTS, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_live_channels_equal_the_small_norm(kind, training, format):
    norm, small = pair(training, **KINDS[kind])
    x = torch.randn(4, 5, 3, 6).contiguous(memory_format=format)
    x[:, 1] = float("nan")
    x.requires_grad_()
    live = x.detach()[:, LIVE].contiguous(memory_format=format).requires_grad_()
    grad_out = torch.randn(4, 5, 3, 6).contiguous(memory_format=format)
    grad_out[:, 4] = float("nan")
    before = {name: t.clone() for name, t in norm.named_buffers()}

    y, want = norm(x), small(live)
    y.backward(grad_out)
    want.backward(grad_out[:, LIVE])
    torch.testing.assert_close(y[:, LIVE], want)
    torch.testing.assert_close(x.grad[:, LIVE], live.grad)
    assert_zero(y[:, ~LIVE])
    assert_zero(x.grad[:, ~LIVE])
    assert y.is_contiguous(memory_format=format) and x.grad.is_contiguous(memory_format=format)
    for name, t in small.named_parameters():
        torch.testing.assert_close(getattr(norm, name).grad[LIVE], t.grad)
        assert_zero(getattr(norm, name).grad[~LIVE])
    for name, t in small.named_buffers():
        got = getattr(norm, name)
        torch.testing.assert_close(got[LIVE] if t.dim() else got, t)
        assert t.dim() == 0 or torch.equal(got[~LIVE], before[name][~LIVE])


@pytest.mark.parametrize("kind", KINDS)
def test_cumulative_statistics_over_several_steps(kind):
    norm, small = pair(True, **KINDS[kind])
    xs = torch.randn(3, 4, 5, 3, 3)
    for x in xs:
        norm(x), small(x[:, LIVE])
    x = xs[0]
    torch.testing.assert_close(norm.eval()(x)[:, LIVE], small.eval()(x[:, LIVE]))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_live_equals_batch_norm_bit_for_bit(kind, training):
    norm, plain = fill(pk.MaskedBatchNorm2d(5, **KINDS[kind])), fill(nn.BatchNorm2d(5, **KINDS[kind]))
    a = torch.randn(4, 5, 3, 6).requires_grad_()
    b = a.detach().clone().requires_grad_()
    y, want = norm.train(training)(a), plain.train(training)(b)
    y.square().sum().backward()
    want.square().sum().backward()
    assert torch.equal(y, want) and torch.equal(a.grad, b.grad)
    buffers = dict(norm.named_buffers())
    assert all(torch.equal(buffers[name], t) for name, t in plain.named_buffers())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("affine", [True, False])
def test_everything_dead(affine, training):
    norm = fill(pk.MaskedBatchNorm2d(5, affine=affine)).train(training)
    norm.set_mask(torch.zeros(5, dtype=torch.bool))
    x = torch.randn(4, 5, 3, 6).requires_grad_()
    before = norm.running_mean.clone()
    y = norm(x)
    assert_zero(y)
    if y.requires_grad:
        y.sum().backward()
        assert x.grad is None or not x.grad.count_nonzero()
    assert torch.equal(norm.running_mean, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_dtypes(training, dtype):
    norm, small = pair(training)
    x = torch.randn(4, 5, 3, 6).to(dtype)
    y, want = norm.to(dtype)(x), small.to(dtype)(x[:, LIVE])
    assert y.dtype == want.dtype and norm.channel_mask.dtype == torch.bool
    torch.testing.assert_close(y[:, LIVE], want)


@pytest.mark.parametrize("format", LAYOUTS, ids=str)
@pytest.mark.parametrize("size", [(3, 6), (17, 32)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_bfloat16_activations(training, size, format):
    """As under autocast: parameters and statistics stay in float32."""
    norm, small = pair(training)
    x, grad_out = (torch.randn(4, 5, *size).bfloat16().contiguous(memory_format=format) for _ in range(2))
    x[:, 1], grad_out[:, 4] = float("nan"), float("nan")
    x.requires_grad_()
    live = x.detach()[:, LIVE].float().requires_grad_()
    y, want = norm(x), small(live)
    y.backward(grad_out)
    want.backward(grad_out[:, LIVE].float())
    assert y.dtype == x.grad.dtype == torch.bfloat16 and y.stride() == x.stride()
    torch.testing.assert_close(y[:, LIVE].float(), want, rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(x.grad[:, LIVE].float(), live.grad, rtol=2**-8, atol=1e-5)
    for name, t in small.named_parameters():
        torch.testing.assert_close(getattr(norm, name).grad[LIVE], t.grad, rtol=1e-4, atol=1e-4)
        assert_zero(getattr(norm, name).grad[~LIVE])
    torch.testing.assert_close(norm.running_var[LIVE], small.running_var)
    assert_zero(y[:, ~LIVE])
    assert_zero(x.grad[:, ~LIVE])


def test_gradcheck():
    norm, _ = pair(True)
    norm.double()
    x = torch.randn(3, 5, 2, 2, dtype=torch.float64).requires_grad_()
    leaves = (x, norm.weight.detach().requires_grad_(), norm.bias.detach().requires_grad_())
    call = lambda x, w, b: torch.func.functional_call(norm, {"weight": w, "bias": b}, x)  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves)


def test_mask_and_state():
    norm = pk.MaskedBatchNorm2d(5)
    assert isinstance(norm, nn.BatchNorm2d) and norm.channel_mask.all()
    assert set(norm.state_dict()) == {*nn.BatchNorm2d(5).state_dict(), "channel_mask"}
    buffer = norm.channel_mask
    norm.set_mask(LIVE)
    assert norm.channel_mask is buffer and torch.equal(buffer, LIVE)
    norm.set_mask("all")
    assert norm.channel_mask.all()


@pytest.mark.parametrize("bad", [LIVE[:4], LIVE.float(), LIVE[None], "none", LIVE.to("meta")], ids=str)
def test_bad_mask(bad):
    norm, _ = pair(True)
    with pytest.raises(ValueError, match="(?s)set_mask.*expected.*got"):
        norm.set_mask(bad)
    assert torch.equal(norm.channel_mask, LIVE)


def test_in_place_edit_is_noticed():
    norm = pk.MaskedBatchNorm2d(5)
    norm(torch.randn(2, 5, 3, 3))
    norm.channel_mask.copy_(LIVE)
    y = norm(torch.randn(2, 5, 3, 3))
    assert_zero(y[:, ~LIVE])
    assert y[:, LIVE].count_nonzero()


def test_checkpoints():
    plain, norm = fill(nn.BatchNorm2d(5)), pk.MaskedBatchNorm2d(5)
    norm.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(2, 5, 3, 3)
    assert torch.equal(norm.eval()(x), plain.eval()(x))
    norm.set_mask(LIVE)
    other = pk.MaskedBatchNorm2d(5).eval()
    other(x)
    other.load_state_dict(norm.state_dict(), strict=True)
    assert torch.equal(other(x), norm(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied):
    norm = pair(False)[0]
    x = torch.randn(2, 5, 3, 3)
    norm(x)
    other = copied(norm)
    assert type(other) is pk.MaskedBatchNorm2d and torch.equal(other(x), norm(x))
    other.set_mask("all")
    assert torch.equal(norm.channel_mask, LIVE)
    assert_zero(norm(x)[:, ~LIVE])


def test_from_norm_and_to_norm():
    plain = fill(nn.BatchNorm2d(5, momentum=0.2, eps=1e-3)).eval()
    norm = pk.MaskedBatchNorm2d.from_norm(plain)
    assert type(norm) is pk.MaskedBatchNorm2d and norm.weight is plain.weight and not norm.training
    assert (norm.momentum, norm.eps) == (0.2, 1e-3)
    norm.set_mask(LIVE)
    x = torch.randn(2, 5, 3, 3)
    back = norm.to_norm()
    assert type(back) is nn.BatchNorm2d and set(back.state_dict()) == set(plain.state_dict())
    torch.testing.assert_close(back(x), norm(x))
    with torch.no_grad():
        back.weight.zero_()
    assert plain.weight.count_nonzero() == 5


def test_dead_channel_after_unmasked_norm_is_a_constant_not_zero():
    """Behind a masked norm the channel of a dead filter is zero; behind a plain one it is not."""
    conv, norm = pk.MaskedConv2d(3, 5, 3), fill(pk.MaskedBatchNorm2d(5))
    conv.set_masks(filter=LIVE)
    y = norm(conv(torch.randn(2, 3, 6, 6)))
    torch.testing.assert_close(y[:, ~LIVE], norm.bias[~LIVE][:, None, None].expand(2, 2, 4, 4))
    norm.set_mask(LIVE)
    assert_zero(norm(conv(torch.randn(2, 3, 6, 6)))[:, ~LIVE])
