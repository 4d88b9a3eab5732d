"""The CUDA operators over CPU tensors, with emulated kernels: which kernels run, what the host knows of masks
and when, padding, capturing, layers. The tests of the operators run on them too:
pytest -p cases.emulated.operators_plugin.
"""
# ruff: noqa: F811 (fixtures)

import pytest
import torch

import prunekernels as pk
from cases.conv import FORCED, GROUPED, PLAIN, ConvCase, assert_near, assert_same, expected, inputs, masks, only, run
from cases.emulated_ops import GATHER, PACK, SCATTER, UNPACK, copies, events, launched, library  # noqa: F401
from prunekernels import functional, reference
from prunekernels.ops import autograd, fallback

pytestmark = pytest.mark.slow  # compiles csrc/cuda

WIDE = ConvCase(n=2, c=24, k=40, h=5, w=6)
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16

BIAS = GATHER
LAUNCHED = {  # (plan, layout): forward, input gradient, weight gradient; then always the bias's gradient
    ("dense", "nchw"): (
        [PACK, BIAS, "launch_repair_fwd"],
        [PACK, "launch_repair_grad_input"],
        ["launch_mask_grad"],
    ),
    ("compact", "channels_last"): (
        [BIAS, GATHER, PACK, SCATTER],
        [GATHER, PACK, SCATTER],
        [GATHER, GATHER, UNPACK],
    ),
    ("direct", "channels_last"): (
        [PACK, "igemm_fwd"],
        [PACK, "igemm_grad_input"],
        ["igemm_grad_weight", UNPACK],
    ),
    ("sparse", "channels_last"): (
        [PACK, "block_sparse_fwd"],
        [PACK, "block_sparse_grad_input"],
        ["block_sparse_grad_weight", UNPACK],
    ),
    ("sparse", "nchw"): (["launch_sparse_fwd"], ["launch_sparse_grad_input"], ["launch_sparse_grad_weight"]),
}


@pytest.mark.parametrize(("plan", "layout"), LAUNCHED)
def test_what_is_launched(plan, layout, events):
    """A forced plan that did not serve would run as another one, and no test of numbers would tell."""
    case, made = WIDE, masks(WIDE, "all")
    assert_same(run(inputs(case, layout=layout), case, plan, **made), expected(case, "all"))
    forward, grad_input, grad_weight = LAUNCHED[plan, layout]
    assert sorted(launched(events)) == sorted([*forward, *grad_input, *grad_weight, BIAS])


PACKED_AGAIN = {  # by the plans of the forward and of the backward pass
    ("dense", "dense"): 0,  # takes the masked weight
    ("compact", "compact"): 0,  # takes the packed one
    ("direct", "direct"): 0,  # packed for both
    ("sparse", "direct"): 0,
    ("dense", "compact"): 1,
    ("compact", "dense"): 1,
    ("direct", "compact"): 1,
    ("compact", "direct"): 1,
    ("dense", "direct"): 1,
}


@pytest.mark.parametrize(("plan", "backward_plan"), PACKED_AGAIN)
@pytest.mark.parametrize(("dtype", "weight_dtype"), [(F32, F32), (BF16, BF16), (BF16, F32)], ids=str)
@pytest.mark.parametrize("grouped", [False, True])
def test_the_backward_pass_takes_what_the_forward_pass_packed(
    grouped, dtype, weight_dtype, plan, backward_plan, events
):
    case = GROUPED if grouped else WIDE
    own = {"direct", "sparse"} & {plan, backward_plan}
    if grouped and own:
        pytest.skip("these plans serve one group")
    again = PACKED_AGAIN[plan, backward_plan]
    x, weight, _, grad = inputs(case, dtype, "channels_last")
    mask = pk.ConvMask(**masks(case, "all"), out_channels=case.k, in_channels=case.c, groups=case.groups)
    wide, table = weight.to(weight_dtype), mask.table(case.k, case.c, case.groups)
    ops = torch.ops.prunekernels_emulated
    sizes = (list(x.shape), True, [1, 1], [1, 1], [1, 1], case.groups)
    y = ops.masked_conv2d(x, wide, None, table, table, None, *sizes[2:], plan)
    grad_x = ops.masked_conv2d_grad_input(grad, wide, table, *sizes, backward_plan)
    alone = launched(events).count(PACK)
    both = ops.both_passes(x, wide, table, grad, [1, 1], case.groups, plan, backward_plan)
    assert torch.equal(both[0], y) and torch.equal(both[1], grad_x)
    assert alone == 2 and launched(events).count(PACK) == 1 + again


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("plan", ["direct", "sparse"])
def test_floats_are_packed_again_where_tf32_is_allowed_in_one_pass_alone(plan, forward, backward, events):
    case = WIDE
    x, weight, _, grad = inputs(case, F32, "channels_last", integers=False)
    mask = pk.ConvMask(**masks(case, "all"), out_channels=case.k, in_channels=case.c)
    table, ops = mask.table(case.k, case.c, 1), torch.ops.prunekernels_emulated
    with torch.backends.cudnn.flags(allow_tf32=backward):
        want = ops.masked_conv2d_grad_input(grad, weight, table, list(x.shape), True, [1, 1], [1, 1], [1, 1], 1, plan)
    events()
    with torch.backends.cudnn.flags(allow_tf32=forward):
        grad_x = ops.both_passes(x, weight, table, grad, [1, 1], 1, plan, plan, backward)[1]
    assert launched(events).count(PACK) == 1 + (forward != backward)
    assert torch.equal(grad_x, want)


@pytest.mark.parametrize("plan", FORCED)
def test_plans_that_no_kernel_of_the_build_serves(plan, library, events):
    """What a forced plan falls back to on a GPU that this build was not compiled for."""
    library.pk_pretend_another_gpu(True)
    try:
        run(inputs(WIDE, layout="channels_last"), WIDE, plan, **masks(WIDE, "all"))
    finally:
        library.pk_pretend_another_gpu(False)
    assert not any(
        "igemm" in each or "sparse" in each or each in (GATHER, SCATTER) for each in set(launched(events)) - {BIAS}
    )


@pytest.mark.parametrize("plan", FORCED)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_double_goes_through_torch(layout, plan, events):
    case = GROUPED
    assert_same(run(inputs(case, F64, layout), case, plan, **masks(case, "all")), expected(case, "all", F64))
    assert launched(events) == [BIAS]  # the zeros of the bias's gradient


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_only_where_torch_allows_it(allowed, events):
    case, made = WIDE, masks(WIDE, "filter")
    problem, want = inputs(case, layout="channels_last", integers=False), expected(case, "filter", integers=False)
    with torch.backends.cudnn.flags(allow_tf32=allowed):
        got = run(problem, case, "direct", **made)
    errors = [(a.double() - b).abs().max() for a, b in zip(got[:3], want, strict=False)]
    assert all((e > 1e-4) == allowed for e in errors) and all(e < 0.1 for e in errors), errors


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("plan", FORCED)
def test_random_numbers(plan, layout, dtype, events):
    case = WIDE
    with torch.backends.cudnn.flags(allow_tf32=False):
        got = run(inputs(case, dtype, layout, integers=False), case, plan, **masks(case, "all"))
    assert_near(got, expected(case, "all", dtype, integers=False))


@pytest.mark.parametrize("block", [(8, 8), (32, 16), (40, 8)], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_masks_of_blocks(dtype, block, events):
    case = ConvCase(n=2, c=48, k=80, h=4, w=5)
    shape = [-(-size // b) for size, b in zip((case.k, case.c), block, strict=True)]
    live = torch.rand(shape) < 0.4
    live[0, 0] = True
    kernels = live.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: case.k, : case.c]
    problem = inputs(case, dtype, "channels_last")
    want = reference.gradients(*problem, kernel_mask=kernels, padding=1)
    got = run(problem, case, "sparse", kernel_mask=kernels)
    assert "block_sparse_fwd" in events()
    assert_same(got, [t.to(dtype).double() for t in want])


def test_counts_are_padded_to_eights_for_the_vendor(events):
    case = ConvCase(c=20, k=30)
    made = {"filter_mask": torch.arange(30) < 13, "input_mask": torch.arange(20) % 2 == 0}
    with torch.profiler.profile(record_shapes=True) as profile:
        run(inputs(case), case, "compact", **made)
    shapes = {e.name: e.input_shapes for e in profile.events() if e.name.startswith("aten::convolution")}
    assert [s[1] for s in shapes["aten::convolution"][:2]] == [16, 16]
    assert [s[1] for s in shapes["aten::convolution_backward"][:3]] == [16, 16, 16]


@pytest.mark.parametrize(
    "made",
    [{"filter_mask": torch.arange(6) != 2}, {"kernel_mask": (torch.arange(6)[:, None] + torch.arange(4)) % 2 == 0}],
)
def test_a_full_list_is_not_copied(made, events):
    """x as it is where every channel is read."""
    x, weight, _, _ = inputs(PLAIN)
    with pk.plan.force("compact"):
        pk.masked_conv2d(x, weight, padding=1, **made)
    assert GATHER not in launched(events)


# ---- what the host knows of masks


def layer(case=WIDE, seed=0):
    made = masks(case, "filter", seed) | masks(case, "input", seed)
    conv = pk.MaskedConv2d(case.c, case.k, case.r, padding=case.padding)
    conv.set_masks(filter=made["filter_mask"], input=made["input_mask"])
    return conv


def step(conv, case=WIDE, plan="compact"):
    x, _, _, grad_out = inputs(case, layout="channels_last")
    with pk.plan.force(plan):
        y = conv(x.requires_grad_())
        y.backward(grad_out)
    return y.detach()


@pytest.mark.parametrize("weight_grad", ["masked", "dense"])
@pytest.mark.parametrize("plan", FORCED)
def test_a_mask_is_read_once(plan, weight_grad, events):
    conv = layer()
    conv.weight_grad = weight_grad
    step(conv, plan=plan)
    assert events().count("download") == (1 if weight_grad == "masked" else 2)
    step(conv, plan=plan)
    assert copies(events) == []


def test_the_backward_pass_reads_nothing_that_the_forward_pass_has_not(events):
    conv = layer()
    conv.weight_grad = "dense"
    x, _, _, grad_out = inputs(WIDE)
    with pk.plan.force("compact"):
        y = conv(x.requires_grad_())
    events()
    y.backward(grad_out)
    assert copies(events) == []


@pytest.mark.parametrize("plan", FORCED)
def test_a_changed_mask_is_read_again(plan, events):
    conv = layer()
    step(conv, plan=plan)
    for seed in (1, 2):
        made = masks(WIDE, "filter", seed)
        conv.set_masks(filter=made["filter_mask"])
        events()
        y = step(conv, plan=plan)
        assert events().count("download") == 1
        want = reference.masked_conv2d(
            inputs(WIDE)[0], conv.weight, conv.bias, **made, input_mask=conv.input_mask, padding=1
        )
        torch.testing.assert_close(y.double(), want.detach(), rtol=1e-2, atol=1e-2)
        step(conv, plan=plan)
        assert copies(events) == []


def test_dead_tables_are_forgotten_and_their_addresses_mean_nothing(events):
    x, weight, _, _ = inputs(PLAIN)
    for i in range(40):  # each table may well lie where another one was
        live = only(6, i % 6, (i * 5 + 1) % 6)
        mask = pk.ConvMask(live, in_channels=4)
        with pk.plan.force("compact"):
            y = pk.masked_conv2d(x, weight, mask=mask, padding=1)
        assert torch.equal(y.double(), reference.masked_conv2d(x, weight, filter_mask=live, padding=1))
    assert events().count("download") == 40


def test_lists_that_share_memory(events):
    x, index = torch.randn(2, 9, 3, 4), torch.tensor([0, 2, 3, 5, 8], dtype=torch.int32)
    views = [index, index[:2], index[1:], index[::2], index[:2], index[::2]]
    for view in views:
        assert torch.equal(pk.gather_channels(x, view), x[:, view.long()])
        assert torch.equal(pk.scatter_channels(x[:, : len(view)], view, 9)[:, view.long()], x[:, : len(view)])
    assert events().count("download") == 4
    pk.scatter_channels(x[:, :5], index, 11)  # among more channels: another inverse
    assert events().count("download") == 1
    index += 1
    for _ in range(2):
        assert torch.equal(pk.scatter_channels(x[:, :5], index, 11)[:, index.long()], x[:, :5])
    assert events().count("download") == 1


def test_tensors_of_inference_mode_are_read_every_time(events):
    """They have no version to tell a change by."""
    x, weight, _, _ = inputs(PLAIN)
    with torch.inference_mode(), pk.plan.force("compact"):
        mask = pk.ConvMask(only(6, 1, 2), in_channels=4)
        for _ in range(2):
            y = pk.masked_conv2d(x, weight, mask=mask, padding=1)
            assert events().count("download") == 1
            assert torch.equal(y.double(), reference.masked_conv2d(x, weight, filter_mask=only(6, 1, 2), padding=1))


# ---- capturing


@pytest.mark.parametrize("plan", (*FORCED, "model", "auto"))
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_a_known_mask_may_be_captured(layout, plan, library, events):
    case, problem = WIDE, inputs(WIDE, layout=layout)
    prepared = pk.ConvMask(**masks(case, "all"), out_channels=case.k, in_channels=case.c)
    run(problem, case, plan, mask=prepared)
    events()
    library.pk_pretend_to_capture(True)
    assert_same(run(problem, case, plan, mask=prepared), expected(case, "all"))
    assert copies(events) == []


def test_an_unknown_mask_may_not(library, events):
    x, weight, _, _ = inputs(PLAIN)
    mask = pk.ConvMask(only(6, 1, 2), in_channels=4)
    library.pk_pretend_to_capture(True)
    with pytest.raises(ValueError, match="masked_conv2d: mask: expected .* before the capture .*run a step.*, got a"):
        pk.masked_conv2d(x, weight, mask=mask, padding=1)
    with pytest.raises(ValueError, match="gather_channels: index: expected .* before the capture .*, got a"):
        pk.gather_channels(x, torch.tensor([0, 1], dtype=torch.int32))


def test_nor_may_a_known_one_under_a_plan_that_needs_new_lists(library, events):
    case, made = WIDE, masks(WIDE, "kernel")
    mask = pk.ConvMask(**made, out_channels=case.k, in_channels=case.c)
    run(inputs(case), case, "dense", mask=mask)
    library.pk_pretend_to_capture(True)
    with pytest.raises(ValueError, match="masked_conv2d: mask: expected .* this plan .*run a step"):
        run(inputs(case), case, "sparse", mask=mask)


# ---- choosing

OWN = {"igemm_fwd", "block_sparse_fwd", "launch_sparse_fwd"}


def forward(case, made, layout="channels_last"):
    x, weight, _, _ = inputs(case, layout=layout)
    return pk.masked_conv2d(x, weight, padding=1, **made)


@pytest.mark.trials
def test_plans_are_tried_one_a_call(library, events):
    """A size of its own: what was found out of others lives as long as the process, and would leave plans out."""
    case = ConvCase(n=2, c=22, k=34, h=6, w=5)
    prepared = {"mask": pk.ConvMask(**masks(case, "filter"), out_channels=34, in_channels=22)}
    tried = []
    for _ in range(40):
        forward(case, prepared)
        tried.append(launched(events))
    assert all(len(call) <= 5 for call in tried)  # one plan's kernels
    everything = [kernel for call in tried for kernel in call]
    assert "launch_repair_fwd" in everything and "igemm_fwd" in everything
    assert tried[-1] == tried[-2] == tried[-3]  # settled


@pytest.mark.parametrize("why", ["deterministic", "measuring off", "capturing", "almost full"])
def test_not_measured(why, library, events):
    case = ConvCase(n=2, c=23, k=33, h=5, w=6)
    made = masks(case, "filter") if why != "almost full" else {"filter_mask": ~only(33, 1)}
    prepared = {"mask": pk.ConvMask(**made, out_channels=33, in_channels=23)}
    with pk.plan.force("direct"):
        forward(case, prepared)
    events()
    torch.use_deterministic_algorithms(why == "deterministic")
    library.pk_pretend_to_capture(why == "capturing")
    with pk.plan.measure(why != "measuring off"):
        forward(case, prepared)
    assert len(launched(events)) <= 4


# ---- layers


def test_training_with_masks_that_change(events, monkeypatch):
    """The same steps with the CPU's operators."""

    def train(ops):
        torch.manual_seed(3)
        with monkeypatch.context() as patch:
            patch.setattr(functional, "ops", ops)
            patch.setattr(autograd, "ops", ops)
            net = torch.nn.Sequential(
                torch.nn.Conv2d(3, 16, 3, padding=1),
                torch.nn.BatchNorm2d(16),
                torch.nn.ReLU(),
                torch.nn.Conv2d(16, 24, 3, padding=1, stride=2, groups=2),
                torch.nn.ReLU(),
                torch.nn.Conv2d(24, 8, 1),
            ).to(memory_format=torch.channels_last)
            pk.convert(net)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
            seen = []
            for seed in range(3):
                live = torch.rand(16, generator=torch.Generator().manual_seed(seed)) < 0.6
                net[0].set_masks(filter=live)
                net[1].set_mask(live)
                net[3].set_masks(input=live, filter=torch.arange(24) % 3 != seed)
                net[5].set_masks(input=torch.arange(24) % 3 != seed)
                for _ in range(2):
                    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
                    loss = net(x.contiguous(memory_format=torch.channels_last)).square().mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    seen.append(loss.item())
            return seen

    with torch.backends.cudnn.flags(allow_tf32=False):
        emulated = train(functional.ops)
        assert "igemm_fwd" in events()
        assert emulated == pytest.approx(train(torch.ops.prunekernels), rel=1e-4)


def test_every_schema_has_an_implementation(library):
    for schema in fallback.SCHEMAS:
        name = schema.partition("(")[0]
        if name != "conv_mask":
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"prunekernels_emulated::{name}", "CPU"), name
