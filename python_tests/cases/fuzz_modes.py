"""A random convolution in one of the modes, written as one line of text that gives it back."""

import dataclasses
import json
import random

import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from cases.conv import LARGEST, LAYOUTS, PLANS, TOLERANCE, ConvCase, assert_near, assert_same, lay_out, run
from cases.fuzz import MASKS, beyond_vendor, draw_case, poisoned
from prunekernels import reference
from prunekernels.live import LiveList, LiveTensor
from prunekernels.live.tensor import wrap

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}
PADDING_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}
SHARES = (None, None, 0, 0.1, 0.3, 0.5, 0.5, 0.7, 0.9, 0.95, 1)  # of live entries; None: no mask


@dataclasses.dataclass(frozen=True)
class Problem:
    mode: str  # functional, masked or live
    case: ConvCase
    dtype: str
    plan: str
    layouts: tuple  # of x, weight and grad_out
    live: dict  # by mask, hard and channels (those of a live tensor) too: the share that is live, or None
    weight_grad: str
    scaled: bool  # has grad_scale
    bias: bool
    integers: bool
    poisoned: bool
    unbatched: bool
    prepared: bool  # as a ConvMask
    padding_mode: str
    seed: int  # of the numbers

    def __str__(self):
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def parse(cls, text):
        fields = json.loads(text)
        case = {name: tuple(v) if isinstance(v, list) else v for name, v in fields["case"].items()}
        return cls(**fields | {"case": ConvCase(**case), "layouts": tuple(fields["layouts"])})


def draw(rng, mode):
    """A problem. rng: as random.Random, such as hypothesis' own."""
    case, is_layer = draw_case(rng), mode != "functional"
    flags = {name: rng.random() < 0.5 for name in ("integers", "poisoned", "bias")}
    dtype = rng.choice(["float32"] * 3 + ["float64", "bfloat16", "float16"])
    names = (*MASKS, "hard", "channels") if mode == "live" else (*MASKS, "hard") if is_layer else MASKS
    padding_mode = rng.choice(["zeros"] * 5 + list(PADDING_MODES)) if is_layer else "zeros"
    padding_mode = padding_mode if can_pad(case, padding_mode) else "zeros"
    if padding_mode != "zeros" and dtype in ("bfloat16", "float16"):
        dtype = "float32"  # the backward passes of torch's own pads round at every sum
    plan, dtype = rng.choice(PLANS), "float64" if beyond_vendor(case) else dtype
    if dtype == "float16" or (dtype == "bfloat16" and plan not in ("direct", "sparse")):
        flags["integers"] = True  # torch's own convolution, the only one of float16, rounds partial sums to 16 bits
    return Problem(
        mode=mode,
        case=case,
        dtype=dtype,
        plan=plan,
        layouts=tuple(rng.choices(LAYOUTS, k=3)),
        live={name: rng.choice(SHARES) for name in names},
        weight_grad=rng.choice(["masked", "dense"]),
        scaled=rng.random() < 0.3,
        unbatched=case.n == 1 and mode != "live" and rng.random() < 0.3,
        prepared=not is_layer and rng.random() < 0.5,
        padding_mode=padding_mode,
        seed=rng.randrange(2**32),
        **flags,
    )


def pads(case):
    """(left, right, top, bottom), as nn.Conv2d pads; "same" with an odd total has the larger part behind."""
    if case.padding == "valid":
        return 0, 0, 0, 0
    dilation = case.dilation if isinstance(case.dilation, tuple) else (case.dilation,) * 2
    if case.padding == "same":
        totals = [d * (t - 1) for d, t in zip(dilation, (case.r, case.s), strict=True)]
        (top, bottom), (left, right) = ((total // 2, total - total // 2) for total in totals)
        return left, right, top, bottom
    height, width = case.padding if isinstance(case.padding, tuple) else (case.padding,) * 2
    return width, width, height, height


def can_pad(case, padding_mode):
    """Whether torch pads images of this size so: reflections are shorter than the image, circles no longer."""
    left, right, top, bottom = pads(case)
    room = min(case.w - max(left, right), case.h - max(top, bottom))
    return case.n > 0 and (padding_mode in ("zeros", "replicate") or room >= (padding_mode == "reflect"))


class Operands:
    """The numbers of a problem, and its masks by the names of the reference."""

    def __init__(self, problem):
        self.generator, case = torch.Generator().manual_seed(problem.seed), problem.case
        self.dtype, self.integers = DTYPES[problem.dtype], problem.integers
        sizes = {"filter_mask": (case.k,), "kernel_mask": (case.k, case.c // case.groups), "input_mask": (case.c,)}
        sizes |= {"hard": (case.k,), "channels": (case.c,)}
        self.masks = {
            name: torch.rand(sizes[name], generator=self.generator) < share
            for name, share in problem.live.items()
            if share is not None
        }
        self.hard = self.masks.pop("hard", torch.ones(case.k, dtype=torch.bool))
        self.channels = self.masks.pop("channels", torch.ones(case.c, dtype=torch.bool))
        if not self.hard.all():
            self.masks["filter_mask"] = self.hard & self.masks.get("filter_mask", self.hard)
        self.scale = torch.randint(0, 3, (case.k,), generator=self.generator).float() if problem.scaled else None
        x, weight = self.numbers(case.n, case.c, case.h, case.w), self.numbers(*sizes["kernel_mask"], case.r, case.s)
        x[:, ~self.channels] = 0
        bias = self.numbers(case.k) if problem.bias else None
        grad_out = self.numbers(*self.reference(problem, x, weight, bias)[0].shape)
        layouts = problem.layouts
        self.clean = lay_out(x, layouts[0]), lay_out(weight, layouts[1]), bias, lay_out(grad_out, layouts[2])
        given = self.masks | {"weight_grad": problem.weight_grad}
        rng = random.Random(problem.seed)
        self.given = poisoned(rng, self.clean, layouts, case, given) if problem.poisoned else self.clean

    def numbers(self, *size):
        top = LARGEST[self.dtype]
        if self.integers:
            return torch.randint(-top, top + 1, size, generator=self.generator).to(self.dtype)
        return torch.randn(size, generator=self.generator).to(self.dtype)

    def reference(self, problem, x, weight, bias):
        """The reference's result, and the leaves that it was computed from."""
        leaves = [None if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias)]
        args, x = problem.case.conv_args, leaves[0]
        if problem.padding_mode != "zeros":
            x, args = F.pad(x, pads(problem.case), PADDING_MODES[problem.padding_mode]), args | {"padding": 0}
        scale = self.scale
        if not self.hard.all():  # hard-dead filters do not learn, whatever weight_grad says
            scale = (torch.ones(len(self.hard)) if scale is None else scale) * self.hard
        args |= self.masks | {"weight_grad": problem.weight_grad, "grad_scale": scale}
        return reference.masked_conv2d(x, leaves[1], leaves[2], **args), leaves

    def expected(self, problem):
        y, leaves = self.reference(problem, *self.clean[:3])
        grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], self.clean[3].double()))
        return (y.detach(), *(None if t is None else next(grads) for t in leaves))


def of_function(problem, operands):
    args = operands.masks
    if problem.prepared:
        sizes = {"out_channels": problem.case.k, "in_channels": problem.case.c, "groups": problem.case.groups}
        args = {"mask": pk.ConvMask(**args, **sizes)}
    x, weight, bias, grad_out = operands.given
    if problem.unbatched:
        x, grad_out = x[0], grad_out[0]
    args |= {"weight_grad": problem.weight_grad, "grad_scale": operands.scale}
    y, grad_x, *grads = run((x, weight, bias, grad_out), problem.case, problem.plan, **args)
    return (y[None], grad_x[None], *grads) if problem.unbatched else (y, grad_x, *grads)


def layer_of(problem, operands):
    case, (_, weight, bias, _) = problem.case, operands.given
    args = case.conv_args | {"bias": bias is not None, "padding_mode": problem.padding_mode}
    layer = pk.MaskedConv2d(case.c, case.k, (case.r, case.s), dtype=weight.dtype, **args)
    layer.weight = nn.Parameter(weight)
    layer.bias = None if bias is None else nn.Parameter(bias)
    layer.set_masks(hard=operands.hard, **{name.removesuffix("_mask"): mask for name, mask in operands.masks.items()})
    layer.weight_grad, layer.grad_scale = problem.weight_grad, operands.scale
    return layer


def of_layer(problem, operands):
    layer, (x, *_, grad_out) = layer_of(problem, operands), operands.given
    if problem.mode == "live":
        pk.flow(nn.Sequential(layer))
        leaf = lay_out(x[:, operands.channels], problem.layouts[0]).requires_grad_()
        read = wrap(leaf * 1, LiveList.of(operands.channels.nonzero().flatten().numpy(), problem.case.c))
    else:
        leaf = x.detach().requires_grad_()
        read = leaf[0] if problem.unbatched else leaf
    parameters = [p for p in (layer.weight, layer.bias) if p is not None]
    with pk.plan.force(problem.plan):
        y = layer(read)
        y = y.to_dense() if isinstance(y, LiveTensor) else y[None] if problem.unbatched else y
        grad_x, *grads = torch.autograd.grad(y, [leaf, *parameters], grad_out)
    return y.detach(), grad_x, grads[0], grads[1] if layer.bias is not None else None


def check(problem):
    """The problem computes what the reference does, exact zeros included."""
    operands = Operands(problem)
    got = (of_function if problem.mode == "functional" else of_layer)(problem, operands)
    y, grad_x, *grads = operands.expected(problem)
    want = (y, grad_x[:, operands.channels], *grads)
    if problem.integers:
        assert_same(got, [None if t is None else t.to(got[0].dtype).double() for t in want])
    else:
        assert_near(got, want)
    assert_dead(problem, operands, got)


def assert_dead(problem, operands, got):
    """Exact zeros wherever the masks say that nothing is computed."""
    y, grad_x, grad_w, grad_b = got
    filters, inputs, live = reference.live_masks(grad_w, *map(operands.masks.get, MASKS), problem.case.groups)
    learns = (
        live
        if problem.weight_grad == "masked"
        else reference.live_masks(grad_w, None, None, inputs, problem.case.groups)[2]
    )
    dead = {"y": y[:, ~filters], "grad_x": grad_x[:, ~inputs[operands.channels]], "grad_w": grad_w[~learns]}
    if grad_b is not None:
        dead["grad_b"] = grad_b[~filters]
    for name, numbers in dead.items():
        assert not numbers.count_nonzero(), f"{name}: {numbers.count_nonzero()} numbers in dead places"
