"""The one problem list, the masks and the inputs of all convolution tests."""

import contextlib
import dataclasses
import functools
import math
import zlib

import torch

import prunekernels as pk
from prunekernels import reference

# Largest relative and absolute error of random (standard normal) inputs, per dtype.
TOLERANCE = {
    torch.float64: {"rtol": 1e-11, "atol": 1e-11},
    torch.float32: {"rtol": 1e-4, "atol": 2e-4},
    torch.bfloat16: {"rtol": 2e-2, "atol": 8e-2},
    torch.float16: {"rtol": 2e-3, "atol": 1e-2},
}
# Integers of this size keep every sum exactly representable in the dtype.
LARGEST = {torch.float64: 4, torch.float32: 4, torch.bfloat16: 1, torch.float16: 1}

FORCED = ("dense", "compact", "direct", "sparse")
PLANS = (*FORCED, "auto")
LAYOUTS = ("nchw", "channels_last", "sliced", "expanded")


@dataclasses.dataclass(frozen=True)
class ConvCase:
    n: int = 2
    c: int = 4
    k: int = 6
    h: int = 6
    w: int = 7
    r: int = 3
    s: int = 3
    stride: int | tuple = 1
    padding: int | tuple | str = 1
    dilation: int | tuple = 1
    groups: int = 1

    def __str__(self):
        text = lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else str(v)  # noqa: E731
        sizes = f"n{self.n}c{self.c}h{self.h}w{self.w}k{self.k}r{self.r}s{self.s}"
        return sizes + f"t{text(self.stride)}p{text(self.padding)}d{text(self.dilation)}g{self.groups}"

    @property
    def conv_args(self):
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}


CASES = [
    ConvCase(),
    ConvCase(padding=0),
    ConvCase(padding=2),
    ConvCase(padding="same"),
    ConvCase(padding="valid"),
    ConvCase(padding=(1, 0)),
    ConvCase(r=1, s=1, padding=2),  # padding >= kernel
    ConvCase(n=1, padding=4, h=3, w=2),
    ConvCase(stride=2),
    ConvCase(stride=2, padding=0, h=7, w=9),
    ConvCase(stride=(2, 1), w=8),
    ConvCase(stride=3, h=8, w=8, padding=0),  # leaves input pixels that no output reads
    ConvCase(dilation=2, padding=2),
    ConvCase(dilation=2, padding="same", r=2, s=3),  # uneven pads
    ConvCase(dilation=(1, 2), stride=2, padding=(1, 2), h=9, w=9),
    ConvCase(r=1, s=1, padding=0),
    ConvCase(r=1, s=1, padding=0, stride=2),
    ConvCase(r=5, s=5, padding=2),
    ConvCase(r=1, s=3, padding=(0, 1)),
    ConvCase(r=2, s=4, padding="same"),
    ConvCase(h=3, w=3, padding=0),  # one output pixel
    ConvCase(h=1, w=1, r=1, s=1, padding=0),
    ConvCase(h=1, w=9),
    ConvCase(groups=2),
    ConvCase(c=8, k=12, groups=4, stride=2),
    ConvCase(c=6, k=6, groups=6),  # depthwise
    ConvCase(c=5, k=10, groups=5, padding="same"),  # depthwise, multiplier 2
    ConvCase(c=8, k=4, r=1, s=1, padding=0, groups=4),
    ConvCase(c=16, k=16, groups=16, stride=2, h=5, w=5),
    ConvCase(n=0),
    ConvCase(n=1, c=1, k=1),
    ConvCase(n=3, c=1, k=33, h=5, w=5),
    ConvCase(n=3, c=33, k=1, h=5, w=5),
    # vector tiles of 8, 16, 32 and 64 channels, pixels and filters: one less, exact, one more
    ConvCase(n=1, c=3, k=15, h=3, w=5),
    ConvCase(n=9, c=15, k=16, h=4, w=4),
    ConvCase(n=1, c=16, k=17, h=7, w=9, r=1, s=1, padding=0),
    ConvCase(n=3, c=17, k=31, h=5, w=3),
    ConvCase(n=2, c=31, k=32, h=4, w=8, r=1, s=1, padding=0),
    ConvCase(n=2, c=32, k=33, h=3, w=11),
    ConvCase(n=1, c=33, k=64, h=5, w=5, r=1, s=1, padding=0),
    ConvCase(n=1, c=64, k=65, h=5, w=13, r=1, s=1, padding=0),
    ConvCase(n=2, c=65, k=15, h=4, w=4),
    ConvCase(n=1, c=66, k=34, h=4, w=4, groups=2),
    ConvCase(n=131, c=6, k=8, h=7, w=7, groups=2),
    # more than one chunk of the batch, and a smaller last one
    ConvCase(n=37, c=17, k=17, h=9, w=9),
    ConvCase(n=7, c=64, k=64, h=56, w=56, r=1, s=1, padding=0),
    ConvCase(n=15, c=48, k=40, h=56, w=56, stride=2),
    ConvCase(n=3, c=80, k=64, h=129, w=128, r=1, s=1, padding=0),  # one image is more than a chunk
]
FEW_CASES = [CASES[i] for i in (0, 3, 8, 12, 15, 16, 19, 23, 24, 26, 36, 41, 43)]
BIG_CASES = CASES[-4:]

PLAIN = ConvCase(n=3, c=4, k=6)
GROUPED = ConvCase(n=3, c=4, k=6, groups=2)
POINTWISE = ConvCase(n=3, c=4, k=6, r=1, s=1, padding=0)
DEPTHWISE = ConvCase(n=3, c=6, k=6, groups=6)
KINDS = [PLAIN, GROUPED, POINTWISE, DEPTHWISE]  # one small case of each kind

PATTERNS = ("none", "filter", "kernel", "input", "all")


def patterns(case):
    """Names of the mask patterns that make sense for a case."""
    return PATTERNS + (("ragged",) if case.groups > 1 else ())


def masks(case, pattern, seed=0):
    """Keyword masks of a pattern, about half dead; "ragged": groups differ in how many of theirs are live."""
    per_group, group = (case.k // case.groups, case.c // case.groups), torch.arange(case.groups)[:, None]
    if pattern == "ragged":
        filters = torch.arange(per_group[0]) < (group + 1) % (per_group[0] + 1)
        channels = torch.arange(per_group[1]) < per_group[1] - group % per_group[1]
        return {"filter_mask": filters.flatten(), "input_mask": channels.flatten()}
    sizes = {"filter_mask": (case.k,), "kernel_mask": (case.k, per_group[1]), "input_mask": (case.c,)}
    chosen = {name: size for name, size in sizes.items() if pattern == "all" or name.startswith(pattern)}
    gen, longest = generator(case, pattern, seed), max([1, *map(math.prod, chosen.values())])
    while True:  # something is live, and something dead unless the masks have one entry
        made = {name: torch.rand(size, generator=gen) < 0.5 for name, size in chosen.items()}
        live = reference.live_masks(torch.empty(sizes["kernel_mask"]), *map(made.get, sizes), case.groups)[2]
        if live.any() and (longest == 1 or not live.all()):
            return made


def only(size, *live):
    """The mask in which these entries are live."""
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(live)] = True
    return mask


def generator(*key):
    return torch.Generator().manual_seed(zlib.crc32("|".join(map(str, key)).encode()))


def inputs(case, dtype=torch.float32, layout="nchw", *, integers=True, seed=0):
    """(x, weight, bias, grad_out): integers in [-LARGEST, LARGEST], or standard normal numbers."""
    gen = generator(case, "inputs", seed)

    def draw(*size):
        if integers:
            top = LARGEST[dtype]
            return torch.randint(-top, top + 1, size, generator=gen).to(dtype)
        return torch.randn(size, generator=gen, dtype=torch.float64).to(dtype)

    x, weight = draw(case.n, case.c, case.h, case.w), draw(case.k, case.c // case.groups, case.r, case.s)
    grad_out = draw(*out_size(case))
    return lay_out(x, layout), lay_out(weight, layout), draw(case.k), lay_out(grad_out, layout, expand=True)


def out_size(case):
    x, weight = torch.empty(1, case.c, case.h, case.w), torch.empty(case.k, case.c // case.groups, case.r, case.s)
    return (case.n, *reference.masked_conv2d(x, weight, **case.conv_args).shape[1:])


def lay_out(tensor, layout, expand=False):
    """The same numbers with other strides; an "expanded" gradient is one number everywhere, as in sum().backward()."""
    if layout == "nchw":
        return tensor
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        n, c, h, w = tensor.shape
        big = torch.full((n + 1, c + 2, h + 1, 2 * w + 1), 77, dtype=tensor.dtype)
        view = big[1:, 1 : c + 1, :h, 1::2]
        return view.copy_(tensor)
    if layout == "expanded":
        if expand:
            return torch.full((), 2, dtype=tensor.dtype).expand(tensor.shape)
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    raise ValueError(layout)


@functools.lru_cache(maxsize=1024)
def expected(case, pattern, dtype=torch.float32, expanded=False, integers=True, **grad_args):
    """The reference's (y, grad_x, grad_w, grad_b) for a case and a pattern."""
    x, weight, bias, grad_out = inputs(case, dtype, integers=integers)
    grad_out = lay_out(grad_out, "expanded", expand=True) if expanded else grad_out
    return reference.gradients(x, weight, bias, grad_out, **masks(case, pattern), **case.conv_args, **grad_args)


def assert_same(got, want):
    """Equal numbers, tensor by tensor, in the dtype that was got; names the tensor and the first wrong place."""
    for name, a, b in zip(("y", "grad_x", "grad_w", "grad_b"), got, want, strict=True):
        assert (a is None) == (b is None), name
        if a is None:
            continue
        assert a.shape == b.shape, f"{name}: shape {tuple(a.shape)}, expected {tuple(b.shape)}"
        wrong = (a.double() != b).nonzero()
        if len(wrong):
            at = tuple(wrong[0].tolist())
            first = f"first {at}: {a[at].item()}, expected {b[at].item()}"
            raise AssertionError(f"{name}: {len(wrong)} of {a.numel()} differ, {first}")


def assert_near(got, want):
    for name, a, b in zip(("y", "grad_x", "grad_w", "grad_b"), got, want, strict=True):
        if a is not None:
            told = lambda text, name=name: f"{name}: {text}"  # noqa: E731
            torch.testing.assert_close(a.double(), b.double(), **TOLERANCE[a.dtype], msg=told)


def assert_zero(tensor):
    """Exactly +0 everywhere."""
    assert not tensor.count_nonzero() and not tensor.signbit().any(), tensor[(tensor != 0) | tensor.signbit()]


def isas():
    """The instruction sets this CPU has, of those the kernels know; none without the extension."""
    order, best = ["scalar", "avx2", "avx512", "avx512vbmi2", "avx512bf16", "amx"], pk.build_info().get("isa")
    return order[: order.index(best) + 1] if best in order else []


@contextlib.contextmanager
def capped(isa):
    """No better instruction set than this inside the with block; "amx_model": kernels for AMX, on its model."""
    from prunekernels import _C

    _C.cap_isa(isa)
    try:
        yield
    finally:
        _C.cap_isa("")


def run(inputs, case, plan="auto", **args):
    """(y, grad_x, grad_w, grad_b) of prunekernels.masked_conv2d; grad_b is None without a bias."""
    x, weight, bias, grad_out = inputs
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    with pk.plan.force(plan):
        y = pk.masked_conv2d(*leaves, **case.conv_args, **args)
        grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], grad_out))
    return (y.detach(), *(None if t is None else next(grads) for t in leaves))
