"""Random problems of a convolution: sizes, masks, and poison in dead places."""

import torch

from cases.conv import ConvCase, lay_out, out_size
from prunekernels import reference

MASKS = ("filter_mask", "kernel_mask", "input_mask")
CHANNELS = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 23, 31, 32, 33, 47, 48, 63, 64, 65]


def draw_case(rng):
    groups = rng.choice([1, 1, 1, 2, 3, 4, 8])
    per_group = [rng.choice(CHANNELS[: 19 if groups == 1 else 8]) for _ in range(2)]
    if rng.random() < 0.15:
        groups, per_group = rng.choice(CHANNELS), [1, rng.choice([1, 2])]
    r, s = rng.choice([(1, 1), (1, 1), (3, 3), (3, 3), (2, 2), (1, 3), (5, 3), (4, 1)])
    stride = rng.choice([1, 1, 1, 2, (1, 2), (2, 1), 3])
    padding = rng.choice([0, 1, 1, 2, (0, 1), (3, 1), "same" if stride == 1 else 0, "valid"])
    dilation = rng.choice([1, 1, 1, 2, (1, 2)])
    smallest = [d * (t - 1) + 1 for d, t in zip(pair(dilation), (r, s), strict=True)]
    h, w = (least + rng.choice([0, 1, 2, 3, 5, 8, 12]) for least in smallest)
    n = rng.choice([0, 1, 1, 2, 2, 3, 5, 8, 19])
    return ConvCase(n, groups * per_group[0], groups * per_group[1], h, w, r, s, stride, padding, dilation, groups)


def pair(value):
    return (value, value) if isinstance(value, int) else value


def draw_masks(rng, gen, case):
    sizes = dict(zip(MASKS, ((case.k,), (case.k, case.c // case.groups), (case.c,)), strict=True))
    chosen = {name: size for name, size in sizes.items() if rng.random() < 0.6}
    density = lambda: rng.choice([0, 0.1, 0.5, 0.5, 0.9, 1])  # noqa: E731
    return {name: torch.rand(size, generator=gen) < density() for name, size in chosen.items()}


def beyond_vendor(case):
    """Where torch 2.13's own conv2d crashes (pad >= kernel) or gives garbage (bfloat16, one strided output column)."""
    taps = (case.r, case.s)
    wide = not isinstance(case.padding, str) and any(p >= t for p, t in zip(pair(case.padding), taps, strict=True))
    return wide or (max(pair(case.stride)) > 1 and 1 in out_size(case)[2:])


def poisoned(rng, problem, layouts, case, args):
    """The problem with a NaN or an infinity in some numbers that must not be read."""
    x, weight, bias, grad_out = (None if t is None else t.clone() for t in problem)
    x, weight, grad_out = map(lay_out, (x, weight, grad_out), layouts)
    filters, channels, live = reference.live_masks(weight, *(args.get(name) for name in MASKS), case.groups)
    where = {"x": ~channels, "bias": ~filters, "grad_out": ~filters & (args["weight_grad"] == "masked")}
    poison = rng.choice([float("nan"), float("inf"), -float("inf")])
    for name, t in (("x", x), ("grad_out", grad_out)):
        dead = where[name].nonzero().flatten().tolist()
        if dead and t.numel() and rng.random() < 0.7:
            n, _, h, w = (rng.randrange(size) for size in t.shape)
            t[n, rng.choice(dead), h, w] = poison
    if rng.random() < 0.5:
        weight[~live] = poison
    if bias is not None and rng.random() < 0.5:
        bias[where["bias"]] = poison
    return x, weight, bias, grad_out
