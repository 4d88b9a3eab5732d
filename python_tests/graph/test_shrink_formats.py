"""The small network outside this package: exporters, optimizers, networks of other libraries."""

import copy
import io

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.networks import NETWORKS, assert_same_function, images, mask_at_random, trained
from prunekernels.graph import coupled_groups, tidy_masks
from prunekernels.graph.shrink import shrink
from prunekernels.train import models

SHOWN = ["plain", "type_a", "inverted", "dense", "excite"]


def float_network(name, **args):
    net = mask_at_random(trained(name), 1, **args).float()
    return net, shrink(net, images().float(), form="graph").eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_onnx(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net, small = float_network(name, norms=0.5)
    path, x = tmp_path / "small.onnx", images(2).float()
    batch = torch.export.Dim.DYNAMIC
    torch.onnx.export(small, (x,), path, dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    session = onnxruntime.InferenceSession(path)
    for size in (2, 5):
        x = images(size).float()
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SHOWN)
def test_export_and_trace(name):
    net, small = float_network(name)
    x = images(2).float()
    exported = torch.export.export(small, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    traced = torch.jit.trace(small, (x,))
    for batch in (2, 5):
        y = images(batch).float()
        torch.testing.assert_close(exported(y), small(y))
        torch.testing.assert_close(traced(y), small(y))


def test_saved_without_the_package():
    _, small = float_network("type_a")
    buffer = io.BytesIO()
    torch.save(small, buffer)
    assert b"prunekernels" not in buffer.getvalue()
    buffer.seek(0)
    x = images().float()
    assert torch.equal(torch.load(buffer, weights_only=False)(x), small(x))
    assert torch.equal(copy.deepcopy(small)(x), small(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_small_network_trains(name):
    net, small = float_network(name)
    small.train()
    before = {key: value.clone() for key, value in small.state_dict().items()}
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small(images(4).float()).square().sum().backward()
    optimizer.step()
    after = small.state_dict()
    norms = [key for key in after if key.endswith("running_mean")]
    assert all(not torch.equal(before[key], after[key]) for key in norms)
    assert all(p.grad is not None for p in small.parameters())


def test_dropout_drops_again():
    small = shrink(trained("plain"), images(), form="graph").train()
    assert isinstance(small.get_submodule("4.drop"), nn.Dropout) and small.get_submodule("4.drop").training
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Dropout2d(0.5))  # behind an unknown operator
    small = shrink(net, images().float(), form="graph")
    assert isinstance(small.get_submodule("2"), nn.Dropout2d)


# Optimizers


OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.5, centered=True),
}


def trained_with(make, masks=True):
    net = trained("basic")
    if masks:
        for group in coupled_groups(net, images()):
            group.set_masks(net, torch.arange(group.width) % 4 != 1)
    norms = [p for p in net.parameters() if p.dim() == 1]
    optimizer = make([{"params": [p for p in net.parameters() if p.dim() > 1]},
                      {"params": norms, "weight_decay": 0.0, "lr": 0.05}])  # fmt: skip
    net.train()
    for _ in range(3):
        step(net, optimizer)
    return net, optimizer


def step(net, optimizer):
    optimizer.zero_grad()
    torch.manual_seed(7)
    net.eval()(images(4)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("form", ["module", "graph"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_goes_on_as_before(name, form):
    net, optimizer = trained_with(OPTIMIZERS[name])
    small, small_optimizer = shrink(net, images(), optimizer=optimizer, form=form)
    assert type(small_optimizer) is type(optimizer)
    assert small_optimizer.param_groups[1]["lr"] == 0.05
    held = [p for group in small_optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in small.parameters()}
    for _ in range(2):
        step(net, optimizer)
        step(small, small_optimizer)
    assert_same_function(net, small, images(3))


def test_optimizer_without_steps_and_with_strangers():
    net = trained("plain")
    small, small_optimizer = shrink(net, images(), optimizer=torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
    assert not small_optimizer.state
    strangers = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    with pytest.raises(
        ValueError, match=r"shrink: optimizer: expected parameters of the model, got \[\(2,\)\] in group 0"
    ):
        shrink(net, images(), optimizer=strangers)


def test_optimizer_gets_the_new_bias():
    net = trained("biases")
    net[0].set_masks(filter=torch.arange(8) > 2)
    conv = nn.Conv2d(8, 6, 1, bias=False)
    plain = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), conv)
    pk.convert(plain, norms=False)
    nn.init.ones_(plain[1].bias)
    plain[0].set_masks(filter=torch.arange(8) > 2)
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.1)
    step(plain.double(), optimizer)
    small, small_optimizer = shrink(plain, images(), optimizer=optimizer, fold_constants=True)
    bias = small.get_submodule("2").bias
    assert any(p is bias for p in small_optimizer.param_groups[0]["params"]) and bias not in small_optimizer.state
    step(small, small_optimizer)


# Networks of other libraries, and the reference networks


def keep_most(model, x):
    """A third of every group dead, and some single filters more."""
    pk.convert(model)
    for i, group in enumerate(coupled_groups(model, x)):
        group.set_masks(model, (torch.arange(group.width) + i) % 3 != 0)
    for i, module in enumerate(model.modules()):
        if isinstance(module, pk.MaskedConv2d) and i % 4 == 0:
            module.set_masks(filter=module.filter_mask & (torch.arange(module.out_channels) % 5 != 0))
    return model.eval()


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def library_model(name):
    transformers = pytest.importorskip("transformers")
    if name == "resnet":
        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 2])
        return transformers.ResNetForImageClassification(config)
    if name == "mobilenet":
        config = transformers.MobileNetV2Config(depth_multiplier=0.1, min_depth=4, num_labels=5)
        return transformers.MobileNetV2ForImageClassification(config)
    return transformers.ConvNextModel(transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet", "mobilenet", "convnext"])
def test_transformers(name):
    torch.manual_seed(0)
    model, x = library_model(name).eval(), torch.randn(2, 3, 32, 32)
    keep_most(model, x)
    want = model(x)
    tidy_masks(model, x)
    torch.testing.assert_close(model(x)[0], want[0])
    small = shrink(model, x, form="graph").eval()
    buffer = io.BytesIO()
    torch.save(small, buffer)
    buffer.seek(0)
    for got in (small(x), torch.load(buffer, weights_only=False)(x)):
        assert type(got) is type(want) and got.keys() == want.keys()
        torch.testing.assert_close(got[0], want[0])
    # ConvNeXt's norms are masked apart from the stream that they read, so all of it stays.
    assert parameters(small) < parameters(model) or name == "convnext"


REFERENCE = {
    "vgg16_bn": (0.125, 32, 13), "resnet20": (0.5, 32, 19), "resnet18": (0.125, 64, 20), "resnet50": (0.125, 64, 53),
    "mobilenet_v2": (0.25, 32, 52), "densenet40": (0.5, 16, 39),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", REFERENCE)
def test_reference_networks(name):
    width, size, convs = REFERENCE[name]
    torch.manual_seed(0)
    model, x = models.build(name, width=width).double().eval(), torch.randn(2, 3, size, size).double()
    keep_most(model, x)
    small = shrink(model, x)
    assert sum(isinstance(m, nn.Conv2d) for m in small.modules()) == convs
    assert parameters(small) < 0.65 * parameters(model)
    assert_same_function(model, small, torch.randn(3, 3, size, size).double())
