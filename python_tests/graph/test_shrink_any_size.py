"""The small network on other image sizes and batches than the example's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from cases.layers import bools
from cases.networks import NETWORKS, assert_same_function, conv_norm, images, mask_at_random, trained
from prunekernels.graph import coupled_groups, tidy_masks
from prunekernels.graph.analysis import ChannelAnalysis
from prunekernels.graph.guards import holds
from prunekernels.graph.layer_uses import any_weights
from prunekernels.graph.narrow import Narrowing, kept_in_forward
from prunekernels.graph.shrink import shrink
from prunekernels.graph.trace import trace
from prunekernels.train import models

X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
NEEDS_GUARDS = pytest.mark.skipif(
    "_guards_code" not in torch.export.ExportedProgram.__annotations__,
    reason="the exporter of this torch keeps no guards, so that a graph serves the image size of the example alone",
)
FORMS = ["module", pytest.param("graph", marks=NEEDS_GUARDS)]
SHAPES = [(1, 3, 8, 8), (3, 3, 12, 10), (2, 3, 16, 24), (5, 3, 9, 13)]


def random_images(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "biases"])  # a linear layer fixes its size
def test_any_size(name, form):
    net = mask_at_random(trained(name), 2)
    small = shrink(net, images(1), form=form)
    for shape in SHAPES:
        assert_same_function(net, small, random_images(*shape))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20", "resnet18", "mobilenet_v2", "densenet40"])
def test_reference_networks_any_size(name, capsys):
    torch.manual_seed(0)
    net = models.build(name, width=0.125).double().eval()
    pk.convert(net)
    for i, group in enumerate(coupled_groups(net, random_images(1, 3, 32, 32))):
        group.set_masks(net, (torch.arange(group.width) + i) % 2 == 0)
    small = shrink(net, random_images(2, 3, 32, 32), form="module")
    assert type(small) is type(net)
    for shape in ((1, 3, 32, 32), (3, 3, 48, 64)):
        assert_same_function(net, small, random_images(*shape))
    wider = "times the multiply-adds of the graph form" in capsys.readouterr().out
    chosen = shrink(net, random_images(2, 3, 32, 32))  # "auto"
    assert ("times the multiply-adds; form='module' gives it" in capsys.readouterr().out) == wider
    assert isinstance(chosen, torch.fx.GraphModule) == wider
    assert wider == (name == "resnet20")  # the channels that its shortcuts pad with zeros


@NEEDS_GUARDS
@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20", "vgg_small", "mobilenet_v2", "densenet40"])
def test_compacted_reference_networks_in_the_graph_form_any_size(name):
    net = models.build(name, width=0.125).double().eval()
    pk.convert(net)
    mask_at_random(net, 1)
    small = shrink(net, random_images(2, 3, 64, 64), form="graph")
    for shape in ((1, 3, 96, 75), (5, 3, 67, 64)):
        assert_same_function(net, small, random_images(*shape))


MULTI = ("basic", "bottleneck", "type_a", "inverted", "dense", "excite", "excite_linear", "halves")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MULTI)
def test_compacted_shrink_at_many_sizes(name, training):
    """Odd ones, a single image and five, in both modes; statistics as well."""
    net = mask_at_random(trained(name), 1)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    small = shrink(net, random_images(2, 3, 8, 8), form="module").train(training)
    net.train(training)
    for shape in ((1, 3, 8, 8), (5, 3, 9, 13), (1, 3, 17, 10), (5, 3, 32, 24)):
        x = random_images(*shape)
        torch.testing.assert_close(small(x), net(x), rtol=1e-9, atol=1e-9)
    traced = trace("test", net, random_images(2, 3, 8, 8))
    analysis = ChannelAnalysis(traced, any_weights(net, traced), constants=False)
    indices = Narrowing.of(analysis, kept_in_forward(analysis, literal=False)).indices
    for path, norm in net.named_modules():
        if isinstance(norm, nn.BatchNorm2d) and name != "halves":  # where an unread channel keeps the halves alike
            rows = indices[f"{path}.running_mean"][0]
            live = norm.channel_mask[rows]
            got = small.get_submodule(path).running_mean
            torch.testing.assert_close(got[live], norm.running_mean[rows[live]])


@pytest.mark.parametrize("name", MULTI)
def test_compacted_groups_and_tidied_masks_are_the_same_at_all_sizes(name):
    net = mask_at_random(trained(name), 1, norms=0.5)
    found = []
    for shape in ((2, 3, 8, 8), (1, 3, 9, 13), (5, 3, 32, 20)):
        x, tidied = random_images(*shape), copy.deepcopy(net)
        groups = [(g.layers, g.is_output, *[{k: v.tolist() for k, v in part.items()}
                                            for part in (g.filters, g.norms, g.readers)])
                  for g in coupled_groups(net, x)]  # fmt: skip
        found.append((groups, tidy_masks(tidied, x)))
    assert found[0] == found[1] == found[2]
    assert found[0][0] and found[0][1].found > 0


class Sized(nn.Module):
    """conv_norm, an operation that asks for sizes of the image, and a convolution."""

    def __init__(self, between):
        super().__init__()
        self.first, self.between, self.last = conv_norm(3, 8), between, nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x):
        return self.last(self.between(self.first(x)))


def pad_as_tensorflow_does(x):
    """Padding that is computed from the size, as in timm's Conv2dSame."""
    missing = [max((-(-size // 2) - 1) * 2 + 3 - size, 0) for size in x.shape[2:]]
    return F.pad(x, (missing[1] // 2, missing[1] - missing[1] // 2, missing[0] // 2, missing[0] - missing[0] // 2))


SIZED = {
    "pool": lambda x: x * F.avg_pool2d(x, x.shape[2:]),
    "pools": lambda x: F.max_pool2d(F.avg_pool2d(x, 2), 2),
    "upsample": lambda x: x + F.interpolate(F.max_pool2d(x, 2), size=x.shape[2:]),
    "double": lambda x: x + F.interpolate(x, scale_factor=2)[:, :, : x.shape[2], : x.shape[3]],
    "tokens": lambda x: x.flatten(2).transpose(1, 2).transpose(1, 2).view(x.shape),
    "view": lambda x: x.view(x.shape[0], x.shape[1], -1).mean(2)[..., None, None] + x,
    "pad": pad_as_tensorflow_does,
    "zeros": lambda x: x + x.new_zeros(x.shape),
    "grid": lambda x: x * torch.linspace(0, 1, x.shape[3], dtype=x.dtype),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SIZED)
def test_sizes_in_the_forward_any_size(name, form):
    net = Sized(SIZED[name]).double().eval()
    pk.convert(net)
    for layer, set_masks in ((net.first[0], "set_masks"), (net.first[1], "set_mask")):
        getattr(layer, set_masks)(bools(1, 0, 1, 1, 0, 1, 0, 0))
    small = shrink(net, X, form=form)
    if name != "zeros" or form == "graph":
        assert small.get_submodule("first.0").out_channels == 4
    if form == "graph" and name in ("pool", "grid"):  # torch.export takes these sizes for constants
        assert_same_function(net, small, random_images(1, 3, 8, 8))
        with pytest.raises(AssertionError, match="expected size.* 8.*, as in the example given to shrink; give it an"):
            small(random_images(3, 3, 12, 10))
        return
    for shape in SHAPES:
        assert_same_function(net, small, random_images(*shape))


@NEEDS_GUARDS
@pytest.mark.parametrize("even", [True, False])
def test_other_path_for_another_size(even):
    """The graph holds the path that the example took; a size with another path is an error, or right."""

    class Branches(Sized):
        def forward(self, x):
            x = self.first(x)
            return self.last(x + 1 if x.shape[2] % 2 == 0 else x)

    net = Branches(None).double().eval()
    pk.convert(net)
    x = random_images(2, 3, 8 if even else 9, 8)
    small = shrink(net, x, form="graph")
    assert_same_function(net, small, x)
    other = random_images(2, 3, 9 if even else 8, 8)
    with pytest.raises(AssertionError, match=r"expected sizes with .*x.shape\[2\] % 2\) .* 0, as in the example"):
        small(other)
    assert_same_function(net, small, random_images(1, 3, 12 if even else 13, 20))
    small = shrink(net, x)
    assert_same_function(net, small, other)


def test_an_exporter_that_keeps_no_guards(monkeypatch):
    """As that of torch 2.8: the graph serves any batch, and another image size is an error."""
    export = torch.export.export

    def without_guards(*args, **kwargs):
        exported = export(*args, **kwargs)
        vars(exported).pop("_guards_code", None)
        return exported

    monkeypatch.setattr(torch.export, "export", without_guards)
    net = mask_at_random(trained("basic"), 2)
    small = shrink(net, images(2), form="graph")
    assert_same_function(net, small, random_images(5, *images(2).shape[1:]))
    with pytest.raises(AssertionError, match="expected size .* in dimension 2, as in the example given to shrink"):
        small(random_images(2, 3, 24, 20))


GUARDS = ("H // 4 >= 1 and W // 4 >= 1", "H != 2 or W == 3", "not H == W", "1 < H <= W < 9", "not (H > 4 and W != 1)")


@pytest.mark.parametrize("guard", GUARDS)
def test_guards_hold_as_in_python(guard):
    text = guard.replace("H", "L['x'].shape[2]").replace("W", "L['x'].shape[3]")
    graph = torch.fx.Graph()
    graph.output(holds(text, {"x": torch.fx.Proxy(graph.placeholder("x"))}).node)
    recorded = torch.fx.GraphModule({}, graph)
    for H, W in ((1, 1), (2, 3), (2, 5), (5, 5), (7, 4), (8, 9)):
        want = eval(guard, {"H": H, "W": W})
        assert holds(text, {"x": torch.zeros(1, 1, H, W)}) == want
        assert recorded(torch.zeros(1, 1, H, W)) == want


class Detector(nn.Module):
    """As ultralytics' heads: levels are flattened, joined and decoded with views that name the batch."""

    def __init__(self, batch=None):
        super().__init__()
        self.stem, self.down, self.batch = conv_norm(3, 8), conv_norm(8, 8, stride=2), batch
        self.body, self.heads = conv_norm(8, 8), nn.ModuleList([nn.Conv2d(8, 12, 1), nn.Conv2d(8, 12, 1)])
        self.dfl, self.shape = nn.Conv2d(4, 1, 1, bias=False), None

    def forward(self, x):
        a, b = self.stem(x).chunk(2, 1)
        x = torch.cat([a, b, a + b][:2], 1)
        levels = [x, self.down(self.body(x))]
        outs = [head(level) for head, level in zip(self.heads, levels, strict=True)]
        batch = self.batch or x.shape[0]
        flat = torch.cat([out.view(batch, 12, -1) for out in outs], 2)
        if self.shape != x.shape:  # kept from call to call
            self.anchors, self.shape = torch.arange(flat.shape[2], dtype=x.dtype, device=x.device), x.shape
        box = self.dfl(flat[:, :8].view(batch, 2, 4, -1).transpose(2, 1).softmax(1)).view(batch, 2, -1)
        return torch.cat([box + self.anchors, flat[:, 8:].sigmoid()], 1), outs


def detector(**args):
    net = Detector(**args).double().eval()
    pk.convert(net)
    for layer in (net.stem, net.body, net.down):
        layer[0].set_masks(filter=bools(1, 1, 1, 0, 0, 1, 0, 0))
        layer[1].set_mask(bools(1, 1, 1, 0, 0, 1, 0, 0))
    return net


def assert_same_outputs(net, small, x):
    with torch.no_grad():
        (want, levels), (got, its_levels) = net(x), small(x)
    torch.testing.assert_close([got, *its_levels], [want, *levels])


def test_detector_any_size():
    net = detector()
    small = shrink(net, X)
    assert type(small) is Detector and small.stem[0].out_channels == 6 and small.body[0].out_channels == 4
    assert small.down[1].num_features == 4 and isinstance(small.heads[0], nn.Conv2d)
    for shape in SHAPES:
        assert_same_outputs(net, small, random_images(*shape))


@pytest.mark.parametrize("form", ["module", "graph"])
def test_batch_in_a_view_any_size(form):
    """A batch that the forward fixes is no failure: the network takes no other, so no other is tried."""
    net = detector(batch=2)
    small = shrink(net, X, form=form)
    assert_same_outputs(net, small, random_images(2, 3, 8, 8))
    if form == "graph":
        with pytest.raises(
            AssertionError, match="expected size 2 in dimension 0, as in the example given to shrink; give"
        ):
            small(random_images(3, 3, 8, 8))


# Networks of other libraries


def half_dead(net, x):
    pk.convert(net)
    for i, group in enumerate(coupled_groups(net, x)):
        group.set_masks(net, (torch.arange(group.width) + i) % 2 == 0)
    return net.eval()


def parameters(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolov8n", "yolo11n"])
def test_yolo_any_size(name):
    ultralytics = pytest.importorskip("ultralytics")
    net, x = ultralytics.YOLO(f"{name}.yaml").model.eval(), torch.randn(2, 3, 64, 64)
    small = shrink(half_dead(net, x), x, form="module")
    assert type(small) is type(net) and type(small.model[-1]) is type(net.model[-1])
    assert parameters(small) < 0.4 * parameters(net)
    for shape in ((1, 3, 64, 64), (3, 3, 96, 128)):
        x = torch.randn(shape)
        torch.testing.assert_close(small(x)[0], net(x)[0], rtol=1e-3, atol=1e-3)
    graph = shrink(net, torch.randn(2, 3, 64, 64), form="graph")
    torch.testing.assert_close(
        graph(torch.ones(2, 3, 64, 64))[0], net(torch.ones(2, 3, 64, 64))[0], rtol=1e-3, atol=1e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "regnetx_002"])
def test_timm_any_size(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net, x = timm.create_model(name, pretrained=False).double().eval(), random_images(1, 3, 64, 64)
    assert parameters(shrink(net, x)) == parameters(net)  # untrained, without masks: everything stays
    small = shrink(half_dead(net, x), x, form="module")
    assert type(small) is type(net) and small.get_classifier() is not None
    for shape in ((1, 3, 64, 64), (2, 3, 96, 128)):
        assert_same_function(net, small, random_images(*shape))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "googlenet", "shufflenet_v2_x0_5", "mnasnet0_5", "squeezenet1_1"])
def test_torchvision_any_size(name):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    args = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
    net, x = torchvision.models.get_model(name, weights=None, **args).double().eval(), random_images(1, 3, 64, 64)
    small = shrink(half_dead(net, x), x, form="module")
    assert type(small) is type(net) and parameters(small) < 0.8 * parameters(net)
    for shape in ((1, 3, 64, 64), (2, 3, 96, 128)):
        assert_same_function(net, small, random_images(*shape))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet", "convnext"])
def test_transformers_any_size(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "resnet":
        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 2], num_labels=5)
        net = transformers.ResNetForImageClassification(config)
    else:
        sizes = {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "patch_size": 2, "num_labels": 5}
        net = transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**sizes))
    net, x = net.double().eval(), random_images(2, 3, 32, 32)
    small = shrink(half_dead(net, x), x, form="module")
    assert type(small) is type(net) and small.config is not None
    other, labels = random_images(3, 3, 48, 64), torch.tensor([0, 1, 2])
    want, got = net(other, labels=labels), small(other, labels=labels)
    torch.testing.assert_close(got.logits, want.logits)
    torch.testing.assert_close(got.loss, want.loss)
    torch.save(small, tmp_path / "small.pt")
    loaded = torch.load(tmp_path / "small.pt", weights_only=False)
    assert torch.equal(loaded(other).logits, got.logits)
    small.save_pretrained(tmp_path)
    if name == "resnet":  # the configuration has the old widths: an error, never another network
        assert parameters(small) < parameters(net)
        with pytest.raises(RuntimeError):
            type(net).from_pretrained(tmp_path)
