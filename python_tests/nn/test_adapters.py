"""Adapters: subclasses of convolutions and norms keep their class, their numbers and their masks in every mode."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.subclasses import (
    COMPUTED,
    KEEP,
    KNOWN,
    LAST,
    BatchNormAct2d,
    Conv2dSame,
    Initialised,
    NormSigmoid,
    ScaledStdConv2d,
    StdConv2d,
    StdConv2dSame,
    Unit,
    Unknown,
    X,
    all_convs,
    expected,
    make,
    masked,
)
from prunekernels.live.fallbacks import recording
from prunekernels.nn import adapters

computed = pytest.mark.parametrize("cls", COMPUTED, ids=lambda cls: cls.__name__)


@all_convs
def test_convert_keeps_class_objects_keys_and_numbers(cls):
    net = make(cls)
    plain, modules, parameters = copy.deepcopy(net), list(net.modules()), dict(net.named_parameters())
    report = pk.convert(net)
    assert report.converted == ["0", "2"] and report.norms == ["1", "3"] and not report.skipped
    assert isinstance(net[0], cls) and isinstance(net[0], pk.MaskedConv2d)
    assert isinstance(net[1], BatchNormAct2d) and isinstance(net[1], pk.MaskedBatchNorm2d)
    assert list(net.modules()) == modules and type(net[1].act) is nn.ReLU
    assert all(p is parameters[name] for name, p in net.named_parameters())
    assert set(plain.state_dict()) <= set(net.state_dict())
    net.load_state_dict(plain.state_dict(), strict=True)
    for training in (True, False):
        a, b = net.train(training)(X), plain.train(training)(X)
        assert torch.equal(a, b)
    a.sum().backward(), b.sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(net.parameters(), plain.parameters(), strict=True))


@all_convs
def test_masks_in_masked_and_live_mode(cls):
    net = masked(cls).eval()
    want = expected(net, X)
    torch.testing.assert_close(net(X), want)
    with recording(net) as fallbacks:
        torch.testing.assert_close(pk.flow(net)(X), want)
    assert {row["op"] for row in fallbacks} <= {"sigmoid"}  # of NormSigmoid, which keeps no zeros


@all_convs
def test_gradients_of_parameters_in_both_modes(cls):
    net = masked(cls).eval().double()
    live = pk.flow(copy.deepcopy(net))
    grads = []
    for model, run in ((net, net), (live, live), (net, lambda x: expected(net, x))):
        grads.append(torch.autograd.grad(run(X.double()).square().sum(), list(model.parameters())))
    for got in grads[:2]:
        for a, b in zip(got, grads[2], strict=True):
            torch.testing.assert_close(a, b)


def test_training_steps_in_both_modes_agree():
    net = masked(ScaledStdConv2d)
    live = pk.flow(copy.deepcopy(net))
    for model in (net, live):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            model(X).square().sum().backward()
            optimizer.step()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(live.state_dict()[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "act", [nn.ReLU(inplace=True), nn.SiLU(inplace=True), nn.Identity()], ids=lambda a: type(a).__name__
)
def test_a_norm_with_activation_passes_on_live_tensors(act):
    net = masked(Conv2dSame, act=act)
    seen = []
    net[1].act.register_forward_hook(lambda module, args, y: seen.append((type(args[0]), type(y))))
    with recording(net) as fallbacks:
        pk.flow(net)(X)
    assert seen == [(pk.LiveTensor, pk.LiveTensor)]
    assert not [row for row in fallbacks if row["module"].startswith("1")]


def test_a_dead_channel_becomes_what_the_activation_makes_of_zero():
    norm = NormSigmoid(4)
    pk.convert(norm)
    norm.set_mask(torch.arange(4) > 0)
    for mode in (False, True):
        y = pk.flow(norm, mode)(torch.randn(2, 4, 3, 3))
        assert torch.equal(y[:, 0], torch.full((2, 3, 3), 0.5))


def test_dropout_of_a_norm_in_both_modes():
    norm = BatchNormAct2d(4, drop=nn.Dropout2d(0.5))
    pk.convert(norm)
    norm.set_mask(torch.arange(4) > 1)
    y = pk.flow(norm)(torch.randn(2, 4, 3, 3))
    assert not y[:, :2].any() and (y >= 0).all()


@all_convs
def test_restore_goes_back_to_the_class(cls):
    net = make(cls)
    pk.convert(net)
    net[0].set_masks(filter=KEEP)  # whole filters: zeros in the stored weight do
    net[1].set_mask(KEEP)
    net.eval()
    want, parameters = net(X), dict(net.named_parameters())
    pk.restore(net)
    assert type(net[0]) is type(net[2]) is cls
    assert type(net[1]) is BatchNormAct2d and type(net[3]) is NormSigmoid
    assert all(p is parameters[name] for name, p in net.named_parameters())
    assert set(net.state_dict()) == set(make(cls).state_dict())
    torch.testing.assert_close(net(X), want)
    assert not net[0].weight[~KEEP].any()


@computed
@pytest.mark.parametrize(
    "masks", [{"input": KEEP}, {"kernel": torch.arange(48).view(6, 8) % 5 > 0}], ids=["input", "kernel"]
)
def test_restore_of_part_of_a_computed_weight_raises_or_bakes(cls, masks):
    net = make(cls)
    pk.convert(net)
    net[2].set_masks(**masks)
    net.eval()
    want, state, types = net(X), copy.deepcopy(net.state_dict()), [type(m) for m in net.modules()]
    with pytest.raises(
        ValueError, match=rf"restore: 2: expected .*{cls.__name__} computes: restore\(model, bake=True\)"
    ):
        pk.restore(net)
    assert [type(m) for m in net.modules()] == types
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    weight = net[2].weight
    pk.restore(net, bake=True)
    assert net[2].weight is weight and type(net[0]) is cls
    torch.testing.assert_close(net(X), want)
    has_more = cls in (StdConv2dSame, Unit)  # pads, or activates
    assert type(net[2]).__name__ == (f"Baked{cls.__name__}" if has_more else "Conv2d")
    report = pk.convert(net)
    assert not report.skipped and torch.allclose(net(X), want, atol=1e-6)
    again = pickle.loads(pickle.dumps(net))
    assert torch.equal(again(X), net(X)) and type(again[2]) is type(net[2])
    pk.restore(net)
    torch.testing.assert_close(net(X), want)


@all_convs
def test_to_conv_and_zero_dead(cls):
    net = masked(cls).eval()
    want = net[2](net[:2](X))
    conv = net[2].to_conv()
    assert not isinstance(conv, pk.MaskedConv2d)
    torch.testing.assert_close(conv(net[:2](X)), want)
    norm = net[3].to_norm()
    assert type(norm) is NormSigmoid
    torch.testing.assert_close(norm(want), net[3](want))
    if cls in COMPUTED:
        with pytest.raises(ValueError, match=r"zero_dead: weight: expected masks .*restore\(model, bake=True\)"):
            net[2].zero_dead()
    else:
        net[2].zero_dead()
    net[0].zero_dead()
    torch.testing.assert_close(net[2](net[:2](X)), want)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_copies_keep_class_and_masks(way):
    net = masked(Unit).eval()
    if way == "deepcopy":
        again = copy.deepcopy(net)
    elif way == "pickle":
        again = pickle.loads(pickle.dumps(net))
    else:
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    assert [type(m) for m in again.modules()] == [type(m) for m in net.modules()]
    assert torch.equal(again(X), net(X))
    again[0].set_masks(filter="all")
    assert torch.equal(net[0].filter_mask, KEEP)


def test_a_saved_layer_without_its_adapter_names_what_is_missing(monkeypatch):
    """As in another process, which has the class but did not register it."""
    saved = pickle.dumps(masked(Unit))
    monkeypatch.delitem(adapters._registered, Unit)
    with pytest.raises(
        ValueError, match="Unit: expected the adapter that the saved layer had: call pk.register_adapter"
    ):
        pickle.loads(saved)


def test_the_class_is_made_once_and_shown_by_its_name():
    a, b = masked(StdConv2d), masked(StdConv2d, seed=1)
    assert type(a[0]) is type(b[0]) is type(a[2])
    assert repr(a[0]).startswith("MaskedStdConv2d(3, 8, kernel_size=(3, 3)") and "filters=5/8" in repr(a[0])
    assert repr(a[1]).startswith("MaskedBatchNormAct2d(")


def test_a_subclass_that_changes_init_alone_needs_no_adapter():
    class OfOwnAct(BatchNormAct2d):
        def __init__(self, C):
            super().__init__(C, nn.SiLU())

    net = nn.Sequential(Initialised(3, 8, 3), OfOwnAct(8)).eval()
    want = net(X)
    assert not pk.convert(net).skipped and torch.equal(net(X), want)
    pk.restore(net)
    assert type(net[0]) is Initialised and type(net[1]) is OfOwnAct


def test_unregistered_classes_are_left_alone_with_a_hint():
    class Further(StdConv2d):
        def forward(self, x):
            return super().forward(x) + 1

    class OwnConvForward(nn.Conv2d):
        def _conv_forward(self, input, weight, bias):
            return super()._conv_forward(input, weight.abs(), bias)

    net = nn.Sequential(Unknown(3, 4, 1), Further(4, 4, 1), OwnConvForward(4, 4, 1))
    want = net(X)
    report = pk.convert(net)
    assert list(report.skipped) == ["0", "1", "2"] and not report.converted
    assert all("pk.register_adapter" in why for why in report.skipped.values())
    assert torch.equal(net(X), want)


@pytest.mark.parametrize("cls", [Conv2dSame, ScaledStdConv2d], ids=lambda cls: cls.__name__)
def test_compile_of_adapted_layers(cls):
    net = masked(cls)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), net(X))
    net[0].set_masks(filter=~KEEP)
    torch.testing.assert_close(compiled(X), net(X))


def test_weight_grad_and_grad_scale():
    layer = StdConv2d(4, 6, 3)
    pk.convert(layer)
    layer.set_masks(filter=LAST)
    x = torch.randn(2, 4, 5, 5)
    scale = torch.tensor([1.0, 1.0, 2.0, 1.0, 0.0, 1.0])
    plain = torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]
    layer.grad_scale = scale
    scaled = torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]
    torch.testing.assert_close(scaled, plain * scale.view(-1, 1, 1, 1))
    layer.grad_scale, layer.weight_grad = None, "dense"
    layer.set_masks(hard=torch.arange(6) != 1)
    up = torch.randn(2, 6, 3, 3)
    dense = torch.autograd.grad(layer(x), layer.weight, up)[0]
    plain = torch.nn.functional.conv2d(x, StdConv2d.computed(layer), layer.bias)
    want = torch.autograd.grad(plain, layer.weight, up)[0]
    torch.testing.assert_close(dense[[0, 2, 3, 4, 5]], want[[0, 2, 3, 4, 5]])
    assert not dense[1].any()


def test_a_new_adapter_serves_layers_that_are_converted_later():
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 3

    layer, x = Scaled(3, 4, 1), X
    want = layer(x)
    pk.register_adapter(Scaled, output=lambda m, y: y * 2)
    pk.register_adapter(Scaled, output=lambda m, y: y * 3)  # corrects the first one
    pk.convert(layer)
    assert torch.equal(layer(x), want)


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (nn.Conv2d, {}, "cls: expected a subclass of one of nn.Conv2d, nn.BatchNorm2d, .*, got <class"),
        (nn.Linear, {}, "cls: expected a subclass"),
        (Unknown(1, 1, 1), {}, "cls: expected a subclass"),
        (
            BatchNormAct2d,
            {"weight": lambda m: m.weight},
            "weight: expected None for a norm, got one for BatchNormAct2d",
        ),
        (Unknown, {"output": 2}, "output: expected a function or None, got 2"),
    ],
)
def test_wrong_arguments_of_register_adapter(cls, arguments, message):
    with pytest.raises(ValueError, match=f"register_adapter: {message}"):
        pk.register_adapter(cls, **arguments)


def test_timm_classes_are_found_by_name_without_timm():
    def forward(self, x):
        return self.act(self.drop(nn.BatchNorm2d.forward(self, x)))

    kind = type("BatchNormAct2d", (nn.BatchNorm2d,), {"forward": forward, "__module__": "timm.layers.norm_act"})
    norm = kind(4)
    norm.drop, norm.act = nn.Identity(), nn.ReLU()
    assert pk.convert(norm).norms == [""] and type(norm).__name__ == "MaskedBatchNormAct2d"


def test_from_conv_refuses_what_it_would_change():
    with pytest.raises(
        ValueError, match=r"from_conv: conv: expected Conv2d, got StdConv2d with a forward of its own: see"
    ):
        pk.MaskedConv2d.from_conv(StdConv2d(3, 4, 1))
    with pytest.raises(
        ValueError, match=r"from_norm: norm: expected BatchNorm2d, got NormSigmoid with a forward of its"
    ):
        pk.MaskedBatchNorm2d.from_norm(NormSigmoid(3))


def test_stand_ins_are_not_registered_under_other_names():
    """The adapters under test are those shipped for classes of libraries, not copies."""
    assert KNOWN.keys() == {
        *(f"timm.layers.norm.{name}" for name in ("GroupNorm", "GroupNorm1", "LayerNorm", "LayerNorm2d")),
        *(f"timm.layers.norm_act.{name}Act" for name in ("GroupNorm", "GroupNorm1", "LayerNorm")),
        "timm.layers.norm_act.LayerNormAct2d",
        "torchvision.models.convnext.LayerNorm2d",
        "transformers.models.convnext.modeling_convnext.ConvNextLayerNorm",
        "transformers.models.convnextv2.modeling_convnextv2.ConvNextV2LayerNorm",
        "timm.layers.norm_act.BatchNormAct2d",
        "timm.layers.norm_act.SyncBatchNormAct",
        "timm.layers.conv2d_same.Conv2dSame",
        "timm.layers.std_conv.StdConv2d",
        "timm.layers.std_conv.StdConv2dSame",
        "timm.layers.std_conv.ScaledStdConv2d",
        "timm.layers.std_conv.ScaledStdConv2dSame",
    }


class Sharded(torch.Tensor):
    """A tensor of another kind, as FSDP makes of the parameters of a subclass that it makes too."""


def test_a_subclass_with_parameters_of_another_kind_is_left_alone():
    layer = Initialised(3, 4, 1)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Sharded))
    report = pk.convert(nn.Sequential(layer))
    assert report.skipped == {"0": "Initialised holds parameters of type Sharded"} and type(layer) is Initialised


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_of_a_computed_weight(dtype):
    net = masked(ScaledStdConv2d).eval()
    with torch.autocast("cpu", dtype):
        y, live = net(X), pk.flow(copy.deepcopy(net))(X)
    torch.testing.assert_close(y, live, rtol=0.02, atol=0.02)
    torch.testing.assert_close(y.float(), expected(net, X), rtol=0.05, atol=0.05)


def test_an_average_of_an_adapted_network_is_one_too():
    net = masked(StdConv2d)
    average = torch.optim.swa_utils.AveragedModel(net)
    assert type(average.module[0]) is type(net[0])
    torch.testing.assert_close(average.eval()(X), net.eval()(X))
