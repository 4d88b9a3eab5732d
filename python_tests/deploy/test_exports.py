"""What other runtimes make of a saved network: the same outputs as the small network."""

import io
import os
import zipfile

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from cases.deploy import small_reference

NAMES = ["resnet20", "mobilenet_v2", "vgg_small", "densenet40"]
FOLDERS = ("sample_inputs", "weights", "constants")  # of a program, that may hold pickles
SIZES = [(1, 64, 64), (3, 64, 64), (2, 64, 96)]


@pytest.fixture(scope="module", params=NAMES)
def saved(request, tmp_path_factory):
    """(small network in eval mode, folder with model.pt2, images of a size)."""
    small, _ = small_reference(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    pk.save_small(small, folder, torch.randn(2, 3, 64, 64))
    return small.eval(), folder, lambda n, h, w: torch.randn(n, 3, h, w)


def program(folder):
    return torch.export.load(folder / "model.pt2")


def assert_close(got, want):
    torch.testing.assert_close(torch.as_tensor(got), want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_any_batch_and_size(saved):
    small, folder, images = saved
    module = program(folder).module()
    for size in SIZES:
        x = images(*size)
        assert_close(module(x), small(x))


def pickled(path):
    """Files of a program that are pickles, read without running code, by the names of their folders."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    found = {name: data for name, data in files.items() if data[:2] in (b"PK", b"\x80\x02")}
    return {name.split("/")[-2]: torch.load(io.BytesIO(data), weights_only=True) for name, data in found.items()}


def test_program_has_no_pickled_code_and_no_images(saved, tmp_path):
    """Weights are bytes, unless torch pickles them, as 2.8 does; the example inputs, which AOTInductor asks for, load
    without running code."""
    _, folder, _ = saved
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), tmp_path / "plain.pt2")
    found = pickled(folder / "model.pt2")
    assert found.keys() == pickled(tmp_path / "plain.pt2").keys() and found.keys() <= {*FOLDERS}
    (x,), _ = found["sample_inputs"]
    assert 0 <= x.min() and x.max() <= 1


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Likewise, of a network that compiles in seconds."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Hardswish(), Gate(8))
    folder = tmp_path_factory.mktemp("tiny")
    pk.save_small(net, folder, torch.randn(2, 3, 8, 8))
    return net.eval(), folder, lambda n, h, w: torch.randn(n, 3, h, w)


class Gate(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x):
        gate = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()
        return (x + x * gate).amax((2, 3))


@pytest.mark.slow
@torch.no_grad()
def test_compiled(tiny):
    small, folder, images = tiny
    compiled = torch.compile(pk.load_small(folder), fullgraph=True, dynamic=True)
    for size in SIZES:
        x = images(*size)
        assert_close(compiled(x), small(x))


@pytest.mark.slow
def test_compiled_training(tiny):
    _, folder, images = tiny
    loaded, plain = pk.load_small(folder).train(), pk.load_small(folder).train()
    x = images(2, 8, 8)
    for net in (torch.compile(loaded, fullgraph=True), plain):
        net(x).square().sum().backward()
    for a, b in zip(loaded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_ahead_of_time_package(tiny, tmp_path):
    small, folder, images = tiny
    path = torch._inductor.aoti_compile_and_package(program(folder), package_path=str(tmp_path / "net.pt2"))
    run = torch._inductor.aoti_load_package(path)
    for size in SIZES:
        x = images(*size)
        assert_close(run(x), small(x))


@pytest.fixture(scope="module")
def onnx_file(saved, tmp_path_factory):
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    small, folder, images = saved
    place = tmp_path_factory.mktemp("onnx")
    pk.save_small(pk.load_small(folder), place, formats=["onnx"])
    assert {path.name for path in place.iterdir()} == {"model.onnx", "README.md"}
    return small, place / "model.onnx", images


@pytest.mark.slow
@torch.no_grad()
def test_onnx_runtime(onnx_file):
    runtime = pytest.importorskip("onnxruntime")
    small, path, images = onnx_file
    session = runtime.InferenceSession(path)
    for size in SIZES:
        x = images(*size)
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert_close(got, small(x))


@pytest.mark.slow
@torch.no_grad()
def test_openvino(onnx_file):
    openvino = pytest.importorskip("openvino")
    small, path, images = onnx_file
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(path), "CPU", exact)
    for size in SIZES:
        x = images(*size)
        assert_close(compiled(x.numpy())[0], small(x))


@pytest.mark.slow
@torch.no_grad()
def test_int8(tiny):
    """Quantized after training (PT2E): the outputs differ by what eight bits make of them."""
    pytest.importorskip("torchao")
    quantize = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    small, folder, images = tiny
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    x = images(16, 16, 16)
    prepared = quantize.prepare_pt2e(program(folder).module(), quantizer)
    prepared(x)
    int8 = quantize.convert_pt2e(prepared)
    assert any("quantize_per_tensor" in str(node.target) for node in int8.graph.nodes)
    got, want = int8(x), small(x)
    assert (got - want).norm() < 0.1 * want.norm()


class Paths(nn.Module):
    """Computes something else in training."""

    def __init__(self):
        super().__init__()
        self.conv, self.path = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.conv(x)
        return x + self.path(x) if self.training else x


def test_graph_of_its_own_for_training(tmp_path):
    net, x = Paths(), torch.randn(2, 3, 8, 8)
    pk.save_small(net, tmp_path, x)
    loaded = pk.load_small(tmp_path)
    compiled = torch.compile(loaded, backend="eager", fullgraph=True)
    for training in (False, True):
        assert torch.equal(compiled.train(training)(x), net.train(training)(x))
    y = torch.randn(3, 3, 9, 12)
    assert_close(program(tmp_path).module()(y), net.eval()(y))
    moved = loaded.to(torch.float64).train()
    assert torch.equal(moved(x.double()), net.double().train()(x.double()))


def test_images_of_which_the_exporter_takes_the_size_for_a_constant(tmp_path):
    """The last map of the example has one pixel: any batch, but no other size."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.AdaptiveAvgPool2d(1)).eval()
    pk.save_small(net, tmp_path, torch.randn(2, 3, 4, 4), formats=["pt2"])
    for n in (1, 2, 5):
        x = torch.randn(n, 3, 4, 4)
        assert_close(program(tmp_path).module()(x), net(x))


def test_sizes_that_the_forward_fixes(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    x = torch.randn(2, 3, 8, 8)
    pk.save_small(net, tmp_path, x)
    module = program(tmp_path).module()
    for n in (1, 2, 5):
        x = torch.randn(n, 3, 8, 8)
        assert_close(module(x), net(x))
    with pytest.raises(Exception, match="8"):
        module(torch.randn(2, 3, 9, 9))
    assert "any x 3 x 8 x 8" in (tmp_path / "README.md").read_text()


def test_permissions(tmp_path):
    pk.save_small(nn.Conv2d(3, 4, 1), tmp_path / "net", torch.randn(2, 3, 4, 4), formats=["safetensors"])
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "net").stat().st_mode & 0o777 == 0o777 & ~mask
