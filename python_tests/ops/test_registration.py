"""The operators as torch sees them: schemas, fake kernels, autograd, torch.compile."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import prunekernels as pk
from cases.conv import ConvCase, inputs
from cases.parts import SAMPLES as PARTS_SAMPLES
from cases.steps import SAMPLES as STEP_SAMPLES
from prunekernels import reference

OPS = torch.ops.prunekernels
SIZES = ([1, 2], [1, 0], [1, 1], 2)
CASE = ConvCase(n=2, c=4, k=6, stride=(1, 2), padding=(1, 0), groups=2)
MASKS = {
    "filter_mask": torch.tensor([1, 0, 1, 1, 1, 0], dtype=torch.bool),
    "kernel_mask": torch.tensor([[1, 1], [1, 1], [0, 1], [1, 0], [0, 0], [1, 1]], dtype=torch.bool),
    "input_mask": torch.tensor([0, 1, 1, 1], dtype=torch.bool),
}
DEAD_TABLE = torch.ops.prunekernels.conv_mask(torch.zeros(6, dtype=torch.bool), None, None, 6, 4, 2)
TABLE = OPS.conv_mask(MASKS["filter_mask"], MASKS["kernel_mask"], MASKS["input_mask"], 6, 4, 2)
INPUT_TABLE = OPS.conv_mask(None, None, MASKS["input_mask"], 6, 4, 2)
SCALE = torch.tensor([0, 0.5, 1, 2, 1, 1])
INDEX = torch.tensor([0, 2, 3], dtype=torch.int32)


def tensors(layout="nchw", dtype=torch.float32, grad=True, case=CASE):
    return [t.detach().requires_grad_(grad) for t in inputs(case, dtype, layout, integers=False)]


def conv_samples():
    x, w, b, _ = tensors()
    yield x, w, b, TABLE, TABLE, None, *SIZES, "compact"
    yield x, w, None, None, None, SCALE, *SIZES, "auto"
    x, w, b, _ = tensors("channels_last", torch.float64)
    yield x, w, b, TABLE, INPUT_TABLE, SCALE, *SIZES, "dense"
    x, w, b, _ = tensors("sliced", grad=False)
    yield x, w, b, TABLE, None, None, *SIZES, "auto"
    x, w, b, _ = tensors(grad=False)
    yield x[:0], w.requires_grad_(), b, TABLE, TABLE, None, *SIZES, "compact"
    x, w, b, _ = tensors("channels_last")
    yield x, w, b, DEAD_TABLE, DEAD_TABLE, None, *SIZES, "compact"
    x, w, b, _ = tensors("channels_last")
    x, b = (t.detach().bfloat16().requires_grad_() for t in (x, b))
    yield x, w, b, TABLE, TABLE, None, *SIZES, "compact"  # the weight stays in float32


def grad_input_samples():
    for layout, table, plan in (
        ("nchw", TABLE, "compact"),
        ("channels_last", TABLE, "dense"),
        ("sliced", None, "auto"),
        ("channels_last", DEAD_TABLE, "auto"),
    ):
        _, w, _, g = tensors(layout)
        yield g, w, table, [2, 4, 6, 7], layout == "channels_last", *SIZES, plan
    yield g.detach().bfloat16().requires_grad_(), w, TABLE, [2, 4, 6, 7], True, *SIZES, "dense"


def grad_weight_samples():
    for layout, table, scale, plan in (
        ("nchw", TABLE, None, "compact"),
        ("channels_last", INPUT_TABLE, SCALE, "dense"),
        ("sliced", None, SCALE, "auto"),
        ("channels_last", DEAD_TABLE, None, "dense"),
    ):
        x, w, _, g = tensors(layout)
        yield g, x, w.detach(), table, scale, *SIZES, plan
    g, x = (t.detach().bfloat16().requires_grad_() for t in (g, x))
    yield g, x, w.detach(), TABLE, SCALE, *SIZES, "compact"


def leading(layout, channels):
    return tensors(layout)[0][:, :channels].detach().requires_grad_()


SAMPLES = {
    "conv_mask": lambda: [
        (None, None, None, 6, 4, 2),
        (MASKS["filter_mask"], None, MASKS["input_mask"], 6, 4, 2),
        (MASKS["filter_mask"], MASKS["kernel_mask"], MASKS["input_mask"], 6, 4, 2),
        (None, torch.ones(3, 65, dtype=torch.bool), None, 3, 65, 1),
    ],
    "masked_conv2d": conv_samples,
    "masked_conv2d_grad_input": grad_input_samples,
    "masked_conv2d_grad_weight": grad_weight_samples,
    "masked_conv2d_grad_bias": lambda: [
        (tensors(layout)[3], table) for layout, table in (("nchw", TABLE), ("channels_last", None), ("expanded", TABLE))
    ],
    "gather_channels": lambda: [(tensors(layout)[0], INDEX[:n]) for layout, n in LAYOUTS_AND_COUNTS],
    "scatter_channels": lambda: [(leading(layout, n), INDEX[:n], 9) for layout, n in LAYOUTS_AND_COUNTS],
    "regroup_channels": lambda: [(tensors(layout)[0], *MOVE) for layout, _ in LAYOUTS_AND_COUNTS],
    "join_channels": lambda: [
        (tensors(layout)[0], tensors(layout)[0], MOVE[0], BACK[0], MOVE[1], BACK[1], alpha)
        for layout, alpha in (("nchw", 1.0), ("channels_last", -0.5))
    ],
    "pack_weight": lambda: [
        (tensors()[1], WHOLE_TABLE, 4, 1),
        (tensors()[1].detach().to(memory_format=torch.channels_last).requires_grad_(), WHOLE_TABLE, 4, 1),
    ],
    "unpack_grad_weight": lambda: [
        (torch.randn(4, 1, 3, 3, requires_grad=True), WHOLE_TABLE, 6, 2, channels_last)
        for channels_last in (False, True)
    ],
    "masked_batch_norm": lambda: [norm_sample(*each) for each in NORMS],
    "masked_batch_norm_backward": lambda: [
        (
            *(norm_sample(t, *x)[0].detach() for _ in range(2)),
            torch.ones(5),
            torch.zeros(4),
            torch.ones(4),
            PLACES,
            5,
            t,
        )
        for t, *x in NORMS
    ],
    "deferred_batch_norm": lambda: [norm_sample(*each) for each in COMPACT_NORMS],
    "apply_batch_norm_": lambda: [
        (torch.zeros_like(x), x, TABLE_OF_NORM, PLACES, 5, add, relu)
        for x in [norm_sample(True)[0].detach()]
        for add, relu in ((None, True), (x * 2, False))
    ],
    "batch_norm_relu": lambda: [
        (x + 0, x.detach(), TABLE_OF_NORM, PLACES, 5, add, None)
        for x in [norm_sample(True)[0]]
        for add in (None, x.detach() * 2)
    ],
    "deferred_sum": lambda: [(norm_sample(*each)[0], norm_sample(*each)[0]) for each in COMPACT_NORMS],
    "attach_live": lambda: [],  # changes an object, not its values: live/test_tensor.py
}
# Four channels to six places and back, two of them filled; the same from the other end.
MOVE = [torch.tensor(x, dtype=torch.int32) for x in ([0, -1, 1, 2, -1, 3], [0, 2, 3, 5])]
BACK = [torch.tensor(x, dtype=torch.int32) for x in ([-1, 0, -1, 1, 2, 3], [1, 3, 4, 5])]
WHOLE_TABLE = OPS.conv_mask(
    torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool), None, torch.tensor([0, 1, 1, 0], dtype=torch.bool), 6, 4, 2
)
PLACES = torch.tensor([0, 1, 2, 4], dtype=torch.int32)


NORMS = [(True,), (False,), (True, 5), (True, 4, torch.bfloat16)]
COMPACT_NORMS = [each for each in NORMS if 5 not in each]
TABLE_OF_NORM = torch.rand(4, 4)
NOT_WRITTEN = ("deferred_batch_norm", "deferred_sum")  # their first result: there is nothing to compare


def norm_sample(training, channels=4, dtype=torch.float32):
    x = torch.randn(2, channels, 6, 7).to(dtype).requires_grad_()
    leaves = [x, *(torch.rand(5, requires_grad=True) for _ in range(2))]
    return *leaves, torch.zeros(5), torch.ones(5), PLACES, 5, training, 0.1, 1e-5


LAYOUTS_AND_COUNTS = [("nchw", 3), ("channels_last", 2), ("sliced", 1), ("nchw", 0)]
SAMPLES |= STEP_SAMPLES | PARTS_SAMPLES
COUNTS = {name: len(list(make())) for name, make in SAMPLES.items()}


@pytest.mark.skipif(not pk.has_extension(), reason="some operators are the extension's alone")
def test_every_registered_operator_is_sampled():
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("prunekernels::")}
    assert registered == {f"prunekernels::{name}" for name in SAMPLES}


@pytest.mark.parametrize(("name", "at"), [(name, at) for name, count in COUNTS.items() for at in range(count)])
def test_opcheck(name, at):
    utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if at < 2 and name not in NOT_WRITTEN:
        utils += ["test_aot_dispatch_dynamic"]  # takes most of the time
    torch.library.opcheck(getattr(OPS, name).default, list(SAMPLES[name]())[at], test_utils=utils)


CALLS = {
    "raw masks": lambda x, w, b: pk.masked_conv2d(x, w, b, **MASKS, **CASE.conv_args),
    "prepared mask": lambda x, w, b: pk.masked_conv2d(x, w, b, mask=PREPARED, **CASE.conv_args),
    "dense gradient": lambda x, w, b: pk.masked_conv2d(x, w, b, mask=PREPARED, weight_grad="dense", **CASE.conv_args),
    "scaled gradient": lambda x, w, b: pk.masked_conv2d(x, w, b, **MASKS, grad_scale=SCALE, **CASE.conv_args),
    "same padding": lambda x, w, b: pk.masked_conv2d(x, w, b, mask=PREPARED, padding="same", groups=2),
    "3-D": lambda x, w, b: pk.masked_conv2d(x[0], w, b, mask=PREPARED, groups=2),
    "no mask": lambda x, w, b: pk.masked_conv2d(x, w, b, groups=2),
    "in a larger graph": lambda x, w, b: pk.masked_conv2d(x.relu(), w, b, mask=PREPARED, groups=2).sigmoid() * 2,
}
PREPARED = pk.ConvMask(**MASKS, groups=2)


def outcome(call, leaves, grad=True):
    y = call(*leaves)
    return (y, *torch.autograd.grad(y.sin().sum(), leaves)) if grad else (y,)


@pytest.mark.parametrize("name", CALLS)
def test_compile(name):
    leaves = tensors()[:3]
    torch._dynamo.reset()
    compiled = torch.compile(CALLS[name], backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, outcome(compiled, leaves), outcome(CALLS[name], leaves)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_compile_without_autograd(mode):
    torch._dynamo.reset()
    leaves = tensors(grad=False)[:3]
    with mode():
        got = torch.compile(CALLS["prepared mask"], backend="aot_eager", fullgraph=True)(*leaves)
        assert torch.equal(got, CALLS["prepared mask"](*leaves))


def test_compile_channels_last_and_autocast():
    torch._dynamo.reset()
    leaves = tensors("channels_last")[:3]

    def call(*leaves):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return CALLS["prepared mask"](*leaves)

    got, want = outcome(torch.compile(call, backend="aot_eager", fullgraph=True), leaves), outcome(call, leaves)
    assert got[0].dtype == torch.bfloat16 and got[0].stride() == want[0].stride()
    assert all(map(torch.equal, got, want))


def test_compile_dynamic_batch():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(CALLS["prepared mask"], backend=counter, fullgraph=True, dynamic=True)
    for n in (8, 5, 11):  # the first is no other size of the problem, or dynamo takes the two for one
        leaves = [t.detach().requires_grad_() for t in tensors(case=ConvCase(n=n, c=4, k=6, groups=2))[:3]]
        assert all(map(torch.equal, outcome(compiled, leaves), outcome(CALLS["prepared mask"], leaves)))
    assert counter.frame_count == 1


def masked_layer():
    torch.manual_seed(0)
    layer = pk.MaskedConv2d(4, 6, 3, padding=1, groups=2)
    layer.set_masks(filter=MASKS["filter_mask"], kernel=MASKS["kernel_mask"], input=MASKS["input_mask"])
    return layer


def layer_outcome(call, layer, x):
    y = call(x)
    return (y, *torch.autograd.grad(y.sin().sum(), (x, *layer.parameters())))


@pytest.mark.parametrize("weight_grad", ["masked", "dense"])
@pytest.mark.parametrize("masked", [False, True], ids=["all live", "masked"])
def test_compile_layer(masked, weight_grad):
    torch._dynamo.reset()
    layer = masked_layer() if masked else pk.MaskedConv2d(4, 6, 3)
    layer.weight_grad = weight_grad
    x = tensors()[0]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for got, want in zip(layer_outcome(compiled, layer, x), layer_outcome(layer, layer, x), strict=True):
        torch.testing.assert_close(got, want)


def test_compiled_layer_follows_its_masks_without_recompiling():
    torch._dynamo.reset()
    layer, x, counter = masked_layer(), tensors()[0], CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    seen = []
    for shift in range(4):
        layer.set_masks(filter=torch.arange(6).roll(shift) % 3 != 0)
        got, want = layer_outcome(compiled, layer, x), layer_outcome(layer, layer, x)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want, strict=True))
        seen.append(got[0].detach())
    assert not torch.equal(seen[0], seen[1])
    assert counter.frame_count == 1


def test_compiled_layer_follows_its_masks_to_all_live_and_back():
    torch._dynamo.reset()
    layer, x = masked_layer(), tensors()[0]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for filters in (MASKS["filter_mask"], "all", ~MASKS["filter_mask"]):
        layer.set_masks(filter=filters, kernel="all", input="all")
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.slow
def test_compile_with_inductor():
    torch._dynamo.reset()
    layer = masked_layer()
    net = nn.Sequential(layer, nn.ReLU(), pk.MaskedConv2d(6, 4, 1))
    net[2].set_masks(input=MASKS["filter_mask"])
    x = tensors()[0]
    compiled = torch.compile(net, fullgraph=True)
    for got, want in zip(layer_outcome(compiled, net, x), layer_outcome(net, net, x), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compile_norm(training):
    torch._dynamo.reset()
    norm, x = pk.MaskedBatchNorm2d(4).train(training), tensors()[0]
    norm.set_mask(MASKS["input_mask"])
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    for got, want in zip(layer_outcome(compiled, norm, x), layer_outcome(norm, norm, x), strict=True):
        torch.testing.assert_close(got, want)


def test_export():
    layer, x = masked_layer().eval(), tensors(grad=False)[0]
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))


def squares(conv, x, w, b):
    return conv(x, w, b, **MASKS, **CASE.conv_args).square().sum()


def test_second_gradient():
    def penalty(conv, leaves):
        first = torch.autograd.grad(squares(conv, *leaves), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    leaves = tensors(dtype=torch.float64)[:3]
    torch.testing.assert_close(penalty(pk.masked_conv2d, leaves), penalty(reference.masked_conv2d, leaves))
