"""convert and restore: which layers change, what stays the same object, what the network computes afterwards."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import prunekernels as pk
from cases.conv import assert_zero


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=2, padding_mode="reflect"), nn.ReLU(), OwnForward(8, 8, 1), OwnNorm(8)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return self.head(self.body(x).mean((2, 3)))


FILTERS = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1], dtype=torch.bool)


def test_report_and_classes():
    net = Net()
    report = pk.convert(net)
    assert report.converted == ["stem", "body.0"] and report.norms == ["norm"]
    assert set(report.skipped) == {"body.2", "body.3"} and all(report.skipped.values())
    assert "OwnForward" in report.skipped["body.2"] or "forward" in report.skipped["body.2"]
    assert type(net.stem) is type(net.body[0]) is pk.MaskedConv2d and type(net.norm) is pk.MaskedBatchNorm2d
    assert type(net.body[2]) is OwnForward and type(net.body[3]) is OwnNorm and type(net.head) is nn.Linear


def test_same_modules_same_parameters_same_numbers():
    net = Net()
    want, x = copy.deepcopy(net), torch.randn(2, 3, 7, 7)
    modules, parameters = dict(net.named_modules()), dict(net.named_parameters())
    pk.convert(net)
    assert all(module is modules[name] for name, module in net.named_modules())
    assert all(p is parameters[name] for name, p in net.named_parameters())
    a, b = net(x), want(x)
    assert torch.equal(a, b)
    a.sum().backward(), b.sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(net.parameters(), want.parameters(), strict=True))


def test_the_optimizer_keeps_working():
    net, plain = Net(), Net()
    plain.load_state_dict(net.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (net, plain)]
    x = torch.randn(4, 3, 6, 6)
    for step in range(3):
        for model, optimizer in zip((net, plain), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        if step == 0:
            pk.convert(net)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), plain.parameters(), strict=True))


def test_loads_the_checkpoint_of_the_plain_model():
    plain, net = Net().eval(), Net().eval()
    pk.convert(net)
    net.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(net(x), plain(x))


def test_without_norms():
    net = Net()
    report = pk.convert(net, norms=False)
    assert report.norms == [] and type(net.norm) is nn.BatchNorm2d and type(net.stem) is pk.MaskedConv2d


def test_filter_fn():
    net = Net()
    report = pk.convert(net, filter_fn=lambda name, module: name != "stem")
    assert report.converted == ["body.0"] and type(net.stem) is nn.Conv2d
    assert type(net.norm) is pk.MaskedBatchNorm2d


def test_filter_fn_sees_the_module():
    net = Net()
    pk.convert(net, filter_fn=lambda name, module: not (isinstance(module, nn.Conv2d) and module.groups == 2))
    assert type(net.body[0]) is nn.Conv2d and type(net.stem) is pk.MaskedConv2d


def test_twice_changes_nothing_more():
    net = Net()
    pk.convert(net)
    net.stem.set_masks(filter=FILTERS)
    report = pk.convert(net)
    assert report.converted == [] and report.norms == []
    assert torch.equal(net.stem.filter_mask, FILTERS)


def test_root_conv():
    conv = nn.Conv2d(3, 8, 3)
    report = pk.convert(conv)
    assert type(conv) is pk.MaskedConv2d and report.converted == [""]
    conv.set_masks(filter=FILTERS)
    assert_zero(conv(torch.randn(2, 3, 5, 5))[:, ~FILTERS])
    assert pk.restore(conv).converted == [""] and type(conv) is nn.Conv2d


def test_shared_module_stays_shared():
    conv = nn.Conv2d(8, 8, 3, padding=1)
    net = nn.Sequential(conv, nn.ReLU(), conv)
    report = pk.convert(net)
    assert net[0] is net[2] is conv and type(conv) is pk.MaskedConv2d
    assert report.converted == ["0"]


def test_shared_parameters_stay_shared():
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    net[1].weight = net[0].weight
    pk.convert(net)
    assert net[0].weight is net[1].weight


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.BatchNorm1d], ids=lambda k: k.__name__)
def test_other_layers_are_left_alone(kind):
    layer = kind(4) if kind is nn.BatchNorm1d else kind(4, 4, 3)
    report = pk.convert(nn.Sequential(layer))
    assert type(layer) is kind and report.converted == [] and report.norms == []


def test_lazy_layers_are_named_not_broken():
    net = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    report = pk.convert(net)
    assert set(report.skipped) == {"0"}
    assert net(torch.randn(2, 3, 5, 5)).shape == (2, 4, 3, 3)


def test_hooks_survive():
    net, seen = Net(), []
    net.stem.register_forward_hook(lambda module, args, out: seen.append("forward"))
    net.stem.register_forward_pre_hook(lambda module, args: seen.append("before"))
    net.stem.register_full_backward_hook(lambda module, gi, go: seen.append("backward"))
    net.stem.weight.register_hook(lambda grad: seen.append("weight"))
    pk.convert(net)
    net(torch.randn(2, 3, 6, 6)).sum().backward()
    pk.restore(net)
    net(torch.randn(2, 3, 6, 6))
    assert seen[:2] == seen[-2:] == ["before", "forward"] and set(seen[2:-2]) == {"backward", "weight"}


def test_mode_device_and_dtype_are_kept():
    net = Net().double().eval()
    pk.convert(net)
    assert not any(module.training for module in net.modules())
    assert net.stem.weight.dtype == torch.float64 and net.stem.filter_mask.dtype == torch.bool
    assert net(torch.zeros(1, 3, 6, 6, dtype=torch.float64)).dtype == torch.float64


def masked_net():
    net = Net()
    pk.convert(net)
    net.stem.set_masks(filter=FILTERS)
    net.norm.set_mask(FILTERS)
    kernels = torch.rand(8, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    net.body[0].set_masks(filter=~FILTERS, kernel=kernels, input=FILTERS)
    return net


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_restore_gives_the_same_outputs(training):
    net = masked_net()
    net(torch.randn(4, 3, 7, 7))  # running statistics
    net.train(training)
    x = torch.randn(4, 3, 7, 7)
    want = copy.deepcopy(net)(x)
    modules, parameters = dict(net.named_modules()), dict(net.named_parameters())
    report = pk.restore(net)
    assert (report.converted, report.norms) == (["stem", "body.0"], ["norm"])
    assert type(net.stem) is type(net.body[0]) is nn.Conv2d and type(net.norm) is nn.BatchNorm2d
    assert all(module is modules[name] for name, module in net.named_modules())
    assert all(p is parameters[name] for name, p in net.named_parameters())
    assert set(net.state_dict()) == set(Net().state_dict())
    torch.testing.assert_close(net(x), want)


def test_restore_writes_zeros():
    net = masked_net()
    conv, by_kernel = net.body[0], FILTERS.view(2, 4).repeat_interleave(4, dim=0)
    live = conv.filter_mask[:, None] & conv.kernel_mask & by_kernel
    with torch.no_grad():
        net.stem.weight[1] = float("nan")
    pk.restore(net)
    assert_zero(net.stem.weight[~FILTERS])
    assert_zero(net.body[0].weight[~live])
    assert_zero(net.body[0].bias[FILTERS])
    assert net.body[0].weight[live].count_nonzero() == live.sum() * 9
    assert net(torch.randn(2, 3, 6, 6)).isfinite().all()


def test_restore_then_convert_again():
    net = masked_net()
    pk.restore(net)
    report = pk.convert(net)
    assert report.converted == ["stem", "body.0"] and net.stem.density == 1


def test_pruned_by_torch_keeps_its_numbers():
    net, x = Net().eval(), torch.randn(2, 3, 6, 6)
    prune.l1_unstructured(net.stem, "weight", 0.5)
    want = net(x)
    pk.convert(net)
    assert torch.equal(net(x), want)


def test_trains_with_masks():
    net = masked_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    before, x = net.stem.weight.detach().clone(), torch.randn(4, 3, 6, 6)
    for _ in range(2):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(net.stem.weight[~FILTERS], before[~FILTERS])
    assert (net.stem.weight[FILTERS] != before[FILTERS]).any()


# ---- linear layers, and layers without a masked form


class Sized(nn.Linear):
    def __init__(self, width):
        super().__init__(width, 2 * width)


class OwnLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.up, self.out = nn.Conv2d(3, 4, 1), Sized(4), nn.Linear(8, 4)
        self.own, self.tied = OwnLinear(4, 4), nn.Linear(4, 6, bias=False)
        self.embedding, self.attention = nn.Embedding(6, 4), nn.MultiheadAttention(4, 2)
        self.tied.weight = self.embedding.weight

    def forward(self, x):
        return self.tied(self.own(self.out(self.up(self.conv(x).mean((2, 3))).relu())))


def test_linear_layers_stay_plain_unless_asked_for():
    model = Mixed()
    report = pk.convert(model)
    assert report.linears == [] and not report.skipped and type(model.up) is Sized
    assert str(report) == "1 convolutions, 0 norms"


def test_linear_layers():
    model, x = Mixed(), torch.randn(2, 3, 5, 5)
    want = model(x)
    report = pk.convert(model, linears=True)
    assert report.converted == ["conv"] and report.linears == ["up", "out"]
    assert str(report).startswith("1 convolutions, 0 norms, 2 linear layers\n")
    assert set(report.skipped) == {"own", "tied", "attention.out_proj"}
    assert "embedding has the same weight" in report.skipped["tied"]
    assert "MultiheadAttention" in report.skipped["attention.out_proj"]
    assert "forward of its own" in report.skipped["own"] and "register_adapter" not in report.skipped["own"]
    assert isinstance(model.up, Sized) and isinstance(model.up, pk.MaskedLinear) and type(model.out) is pk.MaskedLinear
    assert torch.equal(model(x), want)
    other = copy.deepcopy(model)
    other.up.set_masks(filter=FILTERS)
    assert type(other.up) is type(model.up) and model.up.density == 1 and not other(x).equal(want)
    assert pk.convert(model, linears=True).linears == []  # it is there already
    report = pk.restore(model)
    assert report.linears == ["up", "out"] and report.converted == ["conv"]
    assert type(model.up) is Sized and type(model.out) is nn.Linear and torch.equal(model(x), want)


def test_restored_linear_layers_have_zeros():
    model, x = Mixed(), torch.randn(2, 3, 5, 5)
    pk.convert(model, linears=True)
    model.up.set_masks(filter=FILTERS)
    model.out.set_masks(input=FILTERS)
    want = model(x)
    pk.restore(model)
    (
        assert_zero(model.up.weight[~FILTERS]),
        assert_zero(model.up.bias[~FILTERS]),
        assert_zero(model.out.weight[:, ~FILTERS]),
    )
    torch.testing.assert_close(model(x), want)


def test_filter_fn_is_asked_about_linear_layers():
    model = Mixed()
    report = pk.convert(model, linears=True, filter_fn=lambda name, module: name != "out")
    assert report.linears == ["up"] and report.skipped["out"] == "filter_fn"


def test_a_linear_layer_that_torch_pruned():
    model = nn.Sequential(nn.Linear(4, 8))
    prune.ln_structured(model[0], "weight", 0.5, n=2, dim=1)
    prune.custom_from_mask(model[0], "bias", torch.ones(8))
    x = torch.randn(3, 4)
    want = model(x)
    report = pk.convert(model, linears=True)
    assert report.pruned["0"] == "dead: 2 input channels" and int(model[0].input_mask.sum()) == 2
    torch.testing.assert_close(model(x), want)


def test_a_reparametrized_linear_layer():
    model = nn.Sequential(nn.Linear(4, 8))
    nn.utils.parametrizations.weight_norm(model[0])
    x = torch.randn(3, 4)
    want = model(x)
    assert pk.convert(model, linears=True).linears == ["0"]
    torch.testing.assert_close(model(x), want)
    model[0].set_masks(filter=FILTERS)
    want = model(x)
    assert_zero(want[:, ~FILTERS])
    with pytest.raises(ValueError, match="bake=True"):
        pk.restore(model)
    pk.restore(model, bake=True)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize(
    ("layer", "advice"),
    [
        (nn.Conv1d(2, 2, 3), r"nn\.Conv2d with kernel_size \(1, k\)"),
        (nn.ConvTranspose1d(2, 2, 3), r"nn\.ConvTranspose2d with kernel_size \(1, k\)"),
        (nn.Conv3d(2, 2, 3), "stays dense"),
        (nn.ConvTranspose3d(2, 2, 3), "stays dense"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_other_convolutions_are_refused_by_name(layer, advice):
    model = nn.Sequential(layer)
    report = pk.convert(model)
    assert not report.converted and type(model[0]) is type(layer)
    kind = type(layer).__name__
    assert report.skipped["0"].startswith(f"{kind} has no masked form: ")
    assert re.search(advice, report.skipped["0"])
    with pytest.raises(ValueError, match=rf"MaskedConv2d.from_conv: conv: expected Conv2d, got {kind}.*{advice}"):
        pk.MaskedConv2d.from_conv(layer)
