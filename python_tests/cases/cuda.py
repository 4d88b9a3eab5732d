"""What the tests on a real GPU share: whether there is one, tensors there and back, which plan ran, what is right."""

import contextlib

import pytest
import torch

import prunekernels as pk
from cases.conv import TOLERANCE, ConvCase, assert_same, assert_zero
from cases.networks import IMAGE, NETWORKS
from prunekernels import reference
from prunekernels.functional import pad_string
from prunekernels.plan import DIRECTIONS

WHY_NOT = (
    "torch finds no CUDA device"
    if not torch.cuda.is_available()
    else "the extension is not in use"
    if not pk.has_extension()
    else "the extension is built without CUDA"
    if not pk.build_info()["cuda"]
    else ""
)

DEVICE = "cuda"
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# tf32 keeps 11 bits of a factor: integers exactly, other numbers to 1 in 2000.
TF32_TOLERANCE = {"rtol": 2e-3, "atol": 3e-2}
WIDE = ConvCase(n=3, c=48, k=72, h=9, w=11)  # several tiles of the tensor core kernels, with tails


@pytest.fixture(autouse=True)
def usual_settings():
    """Off unless a test says otherwise; choices follow the model unless a test measures."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), pk.plan.measure(False):
        yield


def there(value):
    """Tensors, in whatever holds them, on the GPU."""
    if isinstance(value, torch.Tensor):
        moved = value.to(DEVICE)
        return moved.as_strided(value.size(), value.stride()) if moved.stride() != value.stride() else moved
    if isinstance(value, dict):
        return {name: there(item) for name, item in value.items()}
    return tuple(map(there, value)) if isinstance(value, (tuple, list)) else value


def here(tensors):
    return [None if t is None else t.cpu() for t in tensors]


def chosen(case, dtype, layout, plan, made):
    """What each direction runs under this plan."""
    prepared = pk.ConvMask(**there(made), out_channels=case.k, in_channels=case.c, groups=case.groups)
    x, padding = torch.empty(case.n, case.c, case.h, case.w, device="meta"), case.padding
    stride, dilation = two(case.stride), two(case.dilation)
    if isinstance(padding, str):
        x, padding = pad_string("", x, padding, (case.r, case.s), stride, dilation)
    weight_size = (case.k, case.c // case.groups, case.r, case.s)
    args = {"stride": stride, "padding": two(padding), "dilation": dilation, "groups": case.groups, "dtype": dtype}
    with pk.plan.force(plan):
        return [
            pk.plan.choose(d, x.shape, weight_size, prepared, memory_format=FORMATS[layout], **args) for d in DIRECTIONS
        ]


def two(value):
    return list(value) if isinstance(value, (tuple, list)) else [value, value]


def assert_right(got, want, plans, dtype, case, made):
    """Of integers: the bits of the reference from our own kernels, near it from cuDNN, zeros where it has dead ones."""
    for name, a, b, plan in zip(("y", "grad_x", "grad_w", "grad_b"), here(got), want, [*plans, "dense"], strict=True):
        if a is None:
            continue
        assert a.dtype == dtype
        if plan in ("direct", "sparse"):
            assert_same([a] + [None] * 3, [b.to(dtype).double()] + [None] * 3)
        else:
            told = lambda text, name=name, plan=plan: f"{name} ({plan}): {text}"  # noqa: E731
            torch.testing.assert_close(a.double(), b.double(), **TOLERANCE[dtype], msg=told)
    assert_dead_is_zero(here(got), case, made)


def assert_dead_is_zero(got, case, made):
    filters = made.get("filter_mask", torch.ones(case.k, dtype=torch.bool))
    channels = made.get("input_mask", torch.ones(case.c, dtype=torch.bool))
    weight = torch.empty(case.k, case.c // case.groups, 1, 1)
    three = [made.get(name) for name in ("filter_mask", "kernel_mask", "input_mask")]
    live = reference.live_masks(weight, *three, case.groups)[2]
    y, grad_x, grad_w, grad_b = got
    assert_zero(y[:, ~filters])
    assert_zero(grad_x[:, ~channels])
    assert_zero(grad_w[~live])
    if grad_b is not None:
        assert_zero(grad_b[~filters])


# ---- whole networks


def flow_network(name, layout, device="cpu"):
    """One of cases/networks.py, masked, in training, and images for it."""
    torch.manual_seed(0)
    net, x = NETWORKS[name](), torch.randn(3, *IMAGE)
    pk.convert(net)
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # it draws other numbers for fewer channels
    return net.to(device, memory_format=FORMATS[layout]), x.to(device, memory_format=FORMATS[layout])


def flow_step(net, x):
    """Forward and backward: the output and all gradients."""
    for p in net.parameters():
        p.grad = None
    y = net(x)
    y.square().mean().backward()
    return [y.detach(), *(p.grad for p in net.parameters())]


def network(plan="model", dtype=F32, layout="channels_last"):
    """Two masked layers of integers, one after the other; ReLU between."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(pk.MaskedConv2d(16, 24, 3, padding=1), torch.nn.ReLU(), pk.MaskedConv2d(24, 40, 1))
    model.to(DEVICE, dtype, memory_format=FORMATS[layout])
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(-1, 2, p.shape))
    set_masks(model, 0)
    return model


def set_masks(model, seed):
    gen = torch.Generator().manual_seed(seed)
    live = torch.rand(24, generator=gen) < 0.6
    live[seed % 24] = True
    model[0].set_masks(filter=live.to(DEVICE))
    model[2].set_masks(input=live.to(DEVICE), filter=(torch.rand(40, generator=gen) < 0.5).to(DEVICE))


@contextlib.contextmanager
def no_waiting():
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
