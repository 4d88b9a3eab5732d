"""count_flops: the literature's savings with real masks on real models, every kind of layer, the model left alone."""

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.layers import FILTERS, HARD, INPUTS, KERNELS
from prunekernels.inspect.flops import count_flops
from prunekernels.train.models import build


def prune_cifar_resnet(model, kept):
    """SFP's networks: all convolutions but the shortcuts keep int(K * kept) filters; what reads one's output alone (a
    block's second convolution, the first block behind the stem) does not read its dead channels."""
    pk.convert(model)
    convs = [(name, m) for name, m in model.named_modules() if isinstance(m, pk.MaskedConv2d)]
    previous = None
    for name, conv in convs:
        K = conv.out_channels
        alive = torch.zeros(K, dtype=torch.bool)
        alive[torch.randperm(K)[: int(K * kept)]] = True
        reads = previous if name.endswith("conv2") or name == "stage1.0.body.conv1" else None
        conv.set_masks(filter=alive, input=reads)
        previous = alive


@pytest.mark.parametrize(
    ("name", "kept", "saved"),
    [("resnet20", 0.7, 42.2), ("resnet32", 0.7, 41.5), ("resnet56", 0.6, 52.6), ("resnet110", 0.7, 40.8)],
)
def test_the_literatures_savings(name, kept, saved):
    """Five times as wide the shares are whole numbers of filters; at 4x4 pixels the layers relate as at 32x32."""
    model = build(name, width=5, in_channels=15)
    prune_cifar_resnet(model, kept)
    flops = count_flops(model, torch.randn(1, 15, 4, 4))
    assert round(100 * flops.saved, 1) == saved


@pytest.mark.parametrize(
    ("name", "kept", "dense", "live"),
    [("resnet20", 0.7, 40_551_040, 22_810_240), ("resnet56", 0.6, 125_485_696, 57_116_800)],
)
def test_whole_filters_of_the_real_networks(name, kept, dense, live):
    """11 of 16, 22 of 32 and 44 of 64; 9, 19 and 38: they save 43.7 % and 54.5 %."""
    model = build(name)
    prune_cifar_resnet(model, kept)
    flops = count_flops(model, torch.randn(1, 3, 32, 32))
    assert (flops.dense, flops.live) == (dense, live)


def test_a_narrow_network_is_what_joint_masks_leave():
    model = build("vgg16_bn")
    pk.convert(model)
    reads = None
    for conv in (m for m in model.modules() if isinstance(m, pk.MaskedConv2d)):
        alive = torch.arange(conv.out_channels) < round(conv.out_channels * 0.3)
        conv.set_masks(filter=alive, input=reads)
        reads = alive
    x = torch.randn(1, 3, 8, 8)
    masked, narrow = count_flops(model, x), count_flops(build("vgg16_bn", width=0.3), x)
    assert [row["live"] for row in masked.rows[:-1]] == [row["dense"] for row in narrow.rows[:-1]]
    assert masked.rows[-1]["live"] == masked.rows[-1]["dense"] == 5120  # the classifier, which has no mask


@pytest.mark.parametrize(
    ("masks", "kernels"),
    [
        ({}, 24),
        ({"filter": FILTERS}, 16),
        ({"input": INPUTS}, 18),
        ({"kernel": KERNELS}, int(KERNELS.sum())),
        ({"hard": HARD}, 20),
        ({"filter": FILTERS & HARD, "kernel": KERNELS, "input": INPUTS, "hard": HARD},
         int((KERNELS & (FILTERS & HARD)[:, None] & INPUTS).sum())),
        ({"filter": torch.zeros(6, dtype=torch.bool)}, 0),
    ],
)  # fmt: skip
def test_live_kernels(masks, kernels):
    layer = pk.MaskedConv2d(4, 6, (3, 2), stride=2)
    layer.set_masks(**masks)
    row = count_flops(layer, torch.randn(5, 4, 9, 9)).rows[0]
    positions = 5 * 4 * 4
    assert row == {
        "layer": "", "kind": "MaskedConv2d", "calls": 1, "dense": 24 * 6 * positions, "live": kernels * 6 * positions,
    }  # fmt: skip


def test_groups():
    layer = pk.MaskedConv2d(4, 6, 3, groups=2)
    layer.set_masks(filter=FILTERS, input=INPUTS)  # filters 0, 2 read channels 0, 1; filters 3, 5 read 2, 3
    row = count_flops(layer, torch.randn(1, 4, 3, 3)).rows[0]
    assert (row["dense"], row["live"]) == (12 * 9, 6 * 9)


@pytest.mark.parametrize(
    ("layer", "shape", "count"),
    [
        (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 6), 6 * 2 * 9 * 2 * 3 * 4),
        (nn.Conv2d(4, 6, 3), (4, 5, 6), 6 * 4 * 9 * 3 * 4),
        (nn.Conv1d(3, 5, 2), (2, 3, 7), 5 * 3 * 2 * 2 * 6),
        (nn.Conv3d(2, 3, 2), (1, 2, 3, 3, 3), 3 * 2 * 8 * 8),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 6), 4 * 6 * 9 * 2 * 5 * 6),
        (nn.Linear(4, 6), (2, 3, 4), 2 * 3 * 4 * 6),
        (nn.ReLU(), (2, 3), 0),
    ],
)
def test_plain_layers(layer, shape, count):
    flops = count_flops(layer, torch.randn(shape))
    assert (flops.dense, flops.live, flops.saved) == (count, count, 0)


class Twice(nn.Module):
    """One layer, called twice with different inputs, by position and by name."""

    def __init__(self):
        super().__init__()
        self.conv = pk.MaskedConv2d(2, 2, 1)
        self.unused = nn.Linear(3, 3)

    def forward(self, x, factor=1, fail=False):
        y = self.conv(x) + self.conv(input=x * factor)
        return self.conv(y[..., :2]) if not fail else self.unused(y)


@pytest.mark.parametrize(
    "example", [torch.ones(1, 2, 4, 4), (torch.ones(1, 2, 4, 4), 2), {"x": torch.ones(1, 2, 4, 4)}]
)
def test_calls_add_up_and_every_form_of_example(example):
    flops = count_flops(Twice(), example)
    assert [(r["layer"], r["calls"], r["dense"]) for r in flops.rows] == [("conv", 3, 4 * (16 + 16 + 8))]


def state(model):
    modes = [m.training for m in model.modules()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    everywhere = torch.nn.modules.module
    return modes, hooks, len(everywhere._global_forward_hooks), len(everywhere._global_forward_pre_hooks), buffers


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = build("resnet20", width=0.2)
    pk.convert(model)
    model.train()
    model.stage2.eval()  # a part of it frozen
    before = state(model)
    if fails:
        with pytest.raises(ValueError):
            count_flops(model, torch.randn(1, 5, 8, 8))
    else:
        count_flops(model, torch.randn(1, 3, 8, 8))
    assert torch.is_grad_enabled()
    assert before[:-1] == state(model)[:-1]
    assert all(torch.equal(before[-1][name], value) for name, value in state(model)[-1].items())


def test_a_failure_names_the_innermost_module():
    expected = r"count_flops: example_input: expected an input that the model runs on, got RuntimeError in "
    with pytest.raises(ValueError, match=expected + r"stem\.conv: .*expected input\[1, 5, 8, 8\]"):
        count_flops(build("resnet20"), torch.randn(1, 5, 8, 8))
    with pytest.raises(ValueError, match=expected + "unused: mat1 and mat2"):
        count_flops(Twice(), (torch.ones(1, 2, 4, 4), 1, True))
    with pytest.raises(ValueError, match="got TypeError: .*'depth'"):
        count_flops(Twice(), {"x": torch.ones(1, 2, 4, 4), "depth": 3})


def test_an_example_of_no_use():
    with pytest.raises(TypeError, match="count_flops: example_input: expected a tensor, a tuple .* got str"):
        count_flops(Twice(), "cat.jpg")


def test_a_model_without_values_counts_as_dense():
    with torch.device("meta"):
        model = build("resnet50")
        pk.convert(model)
        flops = count_flops(model, torch.empty(1, 3, 224, 224))
    assert flops.live == flops.dense == 4_089_184_256


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_model_is_seen_through(whole):
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU())
    compiled = torch.compile(model, backend="eager") if whole else model
    if not whole:
        model[0].compile(backend="eager")
    compiled(torch.ones(1, 2, 2, 2))
    assert [(row["layer"], row["dense"]) for row in count_flops(compiled, torch.ones(1, 2, 2, 2)).rows] == [("0", 24)]


def halve(model):
    """Every second filter dies, and every second channel of the norms."""
    pk.convert(model)
    for layer in model.modules():
        if isinstance(layer, pk.MaskedConv2d):
            layer.set_masks(filter=torch.arange(layer.out_channels) % 2 == 0)
        elif isinstance(layer, pk.MaskedBatchNorm2d):
            layer.set_mask(torch.arange(layer.num_features) % 2 == 0)
    return pk.flow(model)


@pytest.mark.parametrize("name", ["vgg16_bn", "resnet20", "resnet50", "mobilenet_v2", "densenet40"])
def test_in_live_mode_dead_channels_are_not_counted(name):
    x = torch.randn(1, 3, 16, 16)
    masked, narrow = count_flops(halve(build(name)), x), count_flops(build(name, width=0.5), x)
    assert [(row["layer"], row["live"]) for row in masked.rows] == [(r["layer"], r["dense"]) for r in narrow.rows]


def test_what_live_mode_hands_to_masked_mode_counts_as_masked():
    masked = halve(nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 6, 1)))
    model = pk.flow(nn.Sequential(*masked, nn.Conv2d(6, 3, 1), nn.Conv2d(3, 3, 1)))
    x = torch.randn(1, 2, 1, 1)
    assert [row["live"] for row in count_flops(model, x).rows] == [4, 6, 9, 9]
    model[1].register_forward_hook(lambda *_: None)
    assert [row["live"] for row in count_flops(model, x).rows] == [4, 12, 18, 9]
    pk.flow(model, False)
    assert [row["live"] for row in count_flops(model, x).rows] == [4, 12, 18, 9]


def test_text():
    model = nn.Sequential(pk.MaskedConv2d(4, 6, 3), nn.Flatten(), nn.Linear(6, 10))
    model[0].set_masks(filter=FILTERS)
    assert str(count_flops(model, torch.randn(20, 4, 3, 3))).splitlines() == [
        "layer  kind          dense   live  live %",
        "0      MaskedConv2d  4,320  2,880    66.7",
        "2      Linear        1,200  1,200   100.0",
        "all                  5,520  4,080    73.9",
    ]


def test_nothing_to_count():
    assert str(count_flops(nn.ReLU(), torch.ones(1))).endswith("0     0   100.0")
