"""Masked layers in what torch records of a network: exporters, TorchScript, torch.fx."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from torch import fx, nn

import prunekernels as pk

X = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))
ALIVE = torch.arange(8) % 3 != 0
both_modes = pytest.mark.parametrize("live", [False, True])


class Net(nn.Module):
    """Every form of padding, groups, a residual add, a norm without factors, an unmasked tail."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.same = nn.Sequential(nn.Conv2d(8, 8, (2, 3), padding="same", bias=False), nn.BatchNorm2d(8, affine=False))
        self.reflect = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect", groups=4)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(self.same(x) + x)
        return self.head(self.depthwise(self.reflect(x)))


def masked(live=False, dead=True, training=False):
    torch.manual_seed(1)
    net = Net()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    pk.convert(net)
    if dead:
        net.stem[0].set_masks(filter=ALIVE)
        net.stem[1].set_mask(ALIVE)
        net.same[0].set_masks(kernel=torch.rand(8, 8) < 0.7, hard=torch.arange(8) != 1)
        net.same[1].set_mask(torch.arange(8) != 1)
        net.reflect.set_masks(input=torch.arange(8) != 2, filter=torch.arange(8) > 0)
        net.depthwise.set_masks(filter=torch.arange(8) != 5)
        net.head.set_masks(filter=torch.arange(5) != 4, input=ALIVE)
    return pk.flow(net.train(training), live)


def ours(targets):
    return [str(target) for target in targets if "prunekernels" in str(target)]


# ---- torch.export


@pytest.mark.thinned(2)
@both_modes
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dead", [False, True])
def test_export(dead, strict, live):
    net = masked(live, dead)
    batch = torch.export.Dim.DYNAMIC
    exported = torch.export.export(net, (X,), dynamic_shapes=({0: batch},), strict=strict)
    for program in (exported, exported.run_decompositions()):
        assert not ours(node.target for node in program.graph.nodes)
        for x in (X, torch.cat([X, X, X])):
            torch.testing.assert_close(program.module()(x), net(x))


def test_export_follows_a_mask_that_was_edited_in_place():
    net = masked(dead=False)
    net.head.filter_mask[2] = False
    y = torch.export.export(net, (X,)).module()(X)
    assert not y[:, 2].any()
    torch.testing.assert_close(y, net(X))


@both_modes
@pytest.mark.parametrize("momentum", [0.1, None])
def test_export_of_a_network_in_training(momentum, live):
    """Dead channels keep their statistics, and dead weights get no gradient."""
    net = masked(live, training=True)
    net.stem[1].momentum = momentum
    exported = torch.export.export(copy.deepcopy(net), (X,)).module()
    for network in (net, exported):
        network(X).square().sum().backward()
    expected, got = net.state_dict(keep_vars=True), exported.state_dict()  # what dead entries hold as well
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], msg=name)
    gradients = {name: p.grad for name, p in exported.named_parameters()}
    for name, p in net.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, msg=name, rtol=1e-4, atol=1e-4)


LOADED = """
import sys, torch
x, y = torch.load(sys.argv[1] + "/xy.pt")
if sys.argv[2] == "export":
    network = torch.export.load(sys.argv[1] + "/net.pt2").module()
else:
    network = torch.jit.load(sys.argv[1] + "/net.pt")
torch.testing.assert_close(network(x), y)
assert not any(name.startswith("prunekernels") for name in sys.modules)
print("the same")
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["export", "trace"])
def test_a_process_without_the_package_runs_it(form, tmp_path):
    net = masked()
    torch.save((X, net(X).detach()), tmp_path / "xy.pt")
    if form == "export":
        torch.export.save(torch.export.export(net, (X,)), tmp_path / "net.pt2")
    else:
        torch.jit.trace(net, (X,)).save(tmp_path / "net.pt")
    done = subprocess.run([sys.executable, "-c", LOADED, tmp_path, form], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "the same\n", done.stderr


# ---- ONNX


@pytest.mark.slow
@both_modes
@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx(dynamo, live, tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    if dynamo:
        pytest.importorskip("onnxscript")
    net, path = masked(live), tmp_path / "net.onnx"
    batch = {0: torch.export.Dim.DYNAMIC} if dynamo else {0: "batch"}
    shapes = {"dynamic_shapes": (batch,), "verbose": False} if dynamo else {"dynamic_axes": {"x": batch}}
    torch.onnx.export(net, (X,), path, dynamo=dynamo, input_names=["x"], **shapes)
    assert {node.domain for node in onnx.load(path).graph.node} <= {"", "ai.onnx"}
    session = onnxruntime.InferenceSession(path)
    for x in (X, torch.cat([X, X, X])):
        (got,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), net(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@both_modes
def test_yolo(live, tmp_path, monkeypatch):
    """Its exporter fuses convolutions and norms and traces the rest."""
    ultralytics, onnxruntime = pytest.importorskip("ultralytics"), pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    yolo = ultralytics.YOLO("yolov8n.yaml", verbose=False)
    pk.convert(yolo.model)
    for i, module in enumerate(m for m in yolo.model.modules() if isinstance(m, pk.MaskedConv2d)):
        if i % 2:
            module.set_masks(filter=torch.arange(module.out_channels) % 2 == 0)
    pk.flow(yolo.model, live)
    x = torch.rand(1, 3, 64, 64)
    expected = yolo.model.eval()(x)[0].detach()
    session = onnxruntime.InferenceSession(yolo.export(format="onnx", imgsz=64, simplify=False))
    (got,) = session.run(None, {"images": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-3, atol=1e-3)


# ---- TorchScript


@both_modes
@pytest.mark.parametrize("training", [False, True])
def test_jit_trace(live, training):
    net = masked(live, training=training)
    traced = torch.jit.trace(copy.deepcopy(net), (X,), check_trace=False)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    assert b"prunekernels::" not in buffer.getvalue()
    if not training:
        torch.testing.assert_close(traced(torch.cat([X, X])), net(torch.cat([X, X])))


def test_jit_script_is_refused_by_name():
    text = "torch.jit.script: MaskedConv2d: expected a layer of torch.nn, got a masked one: script what pk.shrink"
    net = masked()
    with pytest.raises(TypeError, match=text):
        torch.jit.script(net)
    with pytest.raises(TypeError, match="torch.jit.script: MaskedBatchNorm2d: "):
        torch.jit.script(net.stem[1])
    assert isinstance(net.head, pk.MaskedConv2d)
    net.same = nn.Identity()  # a plain norm without factors cannot give zeros
    pk.restore(net)
    torch.testing.assert_close(torch.jit.script(net)(X), net(X))


# ---- torch.fx


@both_modes
@pytest.mark.parametrize("training", [False, True])
def test_symbolic_trace(training, live):
    net = masked(live, training=training)
    traced = pk.flow(fx.symbolic_trace(copy.deepcopy(net)), live)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert calls == ["stem.0", "stem.1", "stem.2", "same.0", "same.1", "reflect", "depthwise", "head"]
    assert isinstance(traced.get_submodule("head"), pk.MaskedConv2d)
    for network in (net, traced):
        network(X).square().sum().backward()
    y = traced(X)
    assert type(y) is torch.Tensor and torch.equal(y, net(X))
    gradients = {name: p.grad for name, p in traced.named_parameters()}
    assert all(torch.equal(p.grad, gradients[name]) for name, p in net.named_parameters())


@both_modes
def test_a_traced_network_follows_its_masks(live):
    net = masked(live)
    traced = fx.symbolic_trace(net)
    net.head.set_masks(filter=torch.arange(5) != 0)
    assert torch.equal(traced(X), net(X)) and not traced(X)[:, 0].any()


def test_a_layer_is_traced_by_name_wherever_it_is():
    net = nn.Sequential(masked().stem, nn.Sequential(nn.Identity(), masked().same))
    assert [str(n.target) for n in fx.symbolic_trace(net).graph.nodes if n.op == "call_module"] == [
        "0.0", "0.1", "0.2", "1.0", "1.1.0", "1.1.1",
    ]  # fmt: skip


class PadConvScale(pk.MaskedConv2d):
    """A subclass of a user: what it does around the layer happens once."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1), value=1.0)) * 2


class NormScale(pk.MaskedBatchNorm2d):
    def forward(self, x):
        return super().forward(x + 1) * 2


def test_subclasses_are_traced_and_exported():
    net = nn.Sequential(PadConvScale(3, 8, 3), NormScale(8)).eval()
    net[0].set_masks(filter=ALIVE)
    net[1].set_mask(ALIVE)
    traced = fx.symbolic_trace(net)
    traced.graph.lint()
    assert torch.equal(traced(X), net(X))
    net[1].set_mask("all")
    for network in (traced, copy.deepcopy(traced)):
        assert torch.equal(network(X), net(X))
    torch.testing.assert_close(torch.export.export(net, (X,)).module()(X), net(X))


@pytest.mark.slow
@both_modes
def test_feature_extractor(live):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    models = pytest.importorskip("torchvision.models")
    net = models.resnet18(num_classes=4).eval()
    pk.convert(net)
    for module in net.modules():
        if isinstance(module, pk.MaskedConv2d):
            module.set_masks(filter=torch.arange(module.out_channels) % 2 == 0)
    x = torch.randn(2, 3, 32, 32)
    seen = {}
    for name in ("layer1", "layer2.0.bn1", "layer3.1.conv2"):
        net.get_submodule(name).register_forward_hook(lambda *args, name=name: seen.update({name: args[2]}))
    net(x)
    for name in seen:
        net.get_submodule(name)._forward_hooks.clear()
    pk.flow(net, live)
    features = extraction.create_feature_extractor(net, list(seen))(x)
    assert list(features) == list(seen)
    for name, feature in features.items():
        torch.testing.assert_close(feature + 0, seen[name], msg=name)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (pk.MaskedConv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
        (pk.MaskedConvTranspose2d(4, 6, 3), (2, 4, 5, 5)),
        (pk.MaskedLinear(4, 6), (2, 4)),
        (pk.MaskedBatchNorm2d(6), (2, 6, 5, 5)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_strict_export(layer, shape):
    layer, x, live = copy.deepcopy(layer).eval(), torch.randn(shape), torch.arange(6) % 3 == 0
    layer.set_mask(live) if isinstance(layer, pk.MaskedBatchNorm2d) else layer.set_masks(filter=live)
    exported = torch.export.export(layer, (x,), strict=True).module()
    torch.testing.assert_close(exported(x), layer(x))
