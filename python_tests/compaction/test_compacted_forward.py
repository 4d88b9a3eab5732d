"""What a user's forward may do: any image size and batch, checkpoints, dropout, keywords, branches, hooks, casts."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import prunekernels as pk
from cases.blocks import Between, conv
from cases.compacted import CLOSE, assert_same_training, batches, bind, both_modes, loss_of, train
from cases.networks import Basic, Head, conv_norm, images, mask_at_random, trained
from prunekernels.compaction.compaction import Compaction

KEEP = torch.tensor([1, 0, 1, 1, 0, 1, 0, 0]).bool()
X = images(2)


def sgd(net):
    return torch.optim.SGD(net.parameters(), 0.02, momentum=0.9, weight_decay=0.05)


def masked(net, keep=KEEP):
    pk.convert(net.double())
    return mask_first(net, keep)


def mask_first(net, keep=KEEP):
    """Of the first layer, and of the branch that is added to it where there is one."""
    for layer in (net.first, *(m for name, m in net.named_children() if name == "body")):
        layer[0].set_masks(filter=keep)
        layer[1].set_mask(keep)
    return net


def agree(net, x=X, data=None, **options):
    """Both modes train net alike under two sets of masks; x: the example."""
    data = batches((3, 3, 8, 8)) if data is None else data
    rounds = [(lambda net, keep=keep: mask_first(net, keep), data) for keep in (KEEP, ~KEEP)]
    trained_nets = both_modes(net, sgd, x, rounds, **options)
    assert_same_training(*trained_nets)
    return trained_nets


SHAPES = [(1, 3, 8, 8), (5, 3, 7, 11), (2, 3, 16, 9), (3, 3, 5, 5)]


@pytest.mark.parametrize("name", ["basic", "inverted", "excite", "halves"])
def test_any_size_and_batch_after_one_trace(name):
    net = mask_at_random(trained(name).eval(), 1)
    data = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    rounds = [(lambda net, seed=seed: mask_at_random(net, seed), data) for seed in (1, 2)]
    assert_same_training(*both_modes(net, sgd, images(2), rounds))


SIZED = {
    "pool": lambda m, x: x * F.avg_pool2d(x, x.shape[2:]),
    "upsample": lambda m, x: x + F.interpolate(F.max_pool2d(x, 2), size=x.shape[2:]),
    "tokens": lambda m, x: x.flatten(2).transpose(1, 2).transpose(1, 2).view(x.shape),
    "view": lambda m, x: x.view(x.shape[0], x.shape[1], -1).mean(2)[..., None, None] + x,
    "grid": lambda m, x: x * torch.linspace(0, 1, x.shape[3], dtype=x.dtype),
    "even": lambda m, x: x + 1 if x.shape[2] % 2 == 0 else m["other"](x),
}


@pytest.mark.parametrize("name", SIZED)
def test_sizes_in_the_forward(name):
    torch.manual_seed(0)
    net = masked(Between(SIZED[name], other=conv()))
    agree(net, data=[torch.randn(shape, dtype=torch.float64) for shape in SHAPES])


# ---- training


def draws(net, opt, data):
    """As train; masked and compacted mode draw the same numbers."""
    torch.manual_seed(7)
    return train(net, opt, data)


class DropPath(nn.Module):
    def forward(self, x):
        if not self.training:
            return x
        return x * torch.empty(x.shape[0], 1, 1, 1, dtype=x.dtype).bernoulli_(0.5) / 0.5


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.body, self.path = conv_norm(3, 8), conv_norm(8, 8, act=False), DropPath()
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(8, 6)
        self.last = nn.Linear(6, 2)

    def forward(self, x):
        x = self.first(x)
        x = x + self.path(self.body(x))
        return self.last(self.drop(self.fc(x.mean((2, 3)))))


class Literal(nn.Module):
    """Has the width of its second layer as a number in the forward."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = conv_norm(3, 8), nn.Conv2d(8, 8, 1, bias=False), nn.Linear(8, 3)

    def forward(self, x):
        x = self.second(self.first(x))
        return self.last(x.view(-1, 8, x.shape[2] * x.shape[3]).mean(2))


def test_a_number_in_the_forward_that_later_masks_meet():
    net = masked(Literal())  # the first masks do not reach the view
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    compaction = Compaction(net, x)
    small, _ = compaction.enter()
    assert small.first[0].out_channels == 4
    compaction.leave()
    net.second.set_masks(filter=KEEP)
    small, _ = compaction.enter()
    torch.testing.assert_close(small.eval()(x), net.eval()(x))
    assert small.second.out_channels == 8 and small.second.in_channels == 4
    compaction.leave()


def test_stochastic_depth_and_dropout():
    torch.manual_seed(0)
    agree(masked(Residual()), loop=draws)


def test_dropout_of_channels_and_of_numbers_drops():
    """Over small layers it draws other numbers than over wide ones, but as many of them are zero."""
    torch.manual_seed(0)
    seen = []
    net = masked(Between(lambda m, x: seen.append(m["drop"](x)) or seen[-1], drop=nn.Dropout2d(0.5)))
    with pk.compacted(net, X) as (inside, _):
        assert inside.first[0].out_channels == 4
        seen.clear()
        inside(torch.randn(64, 3, 8, 8, dtype=torch.float64))
        gone = ~seen[0].flatten(2).any(2)
        assert 0.3 < gone.double().mean() < 0.7
        inside.eval()(X)
        assert torch.equal(seen[-1], inside.first(X))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_inside_blocks(reentrant):
    torch.manual_seed(0)

    def how(m, x):
        if m.training:
            return checkpoint(lambda x: F.relu(m["a"](x)) + x, x, use_reentrant=reentrant)
        return F.relu(m["a"](x)) + x

    agree(masked(Between(how, a=nn.Sequential(conv(), nn.BatchNorm2d(8)))))


def test_norms_that_begin_with_zero_are_not_dead():
    """A zero-initialised branch trains."""
    torch.manual_seed(0)
    net = nn.Sequential(conv_norm(3, 8), Basic(8, 8), Head(8)).double()
    nn.init.zeros_(net[1].second[1].weight)
    net[2].drop.p = 0.0
    pk.convert(net)

    def mask(net):
        net[1].first[0].set_masks(filter=KEEP)
        net[1].first[1].set_mask(KEEP)

    data = batches((3, 3, 8, 8), steps=3)
    masked, optimizer, other, its = both_modes(net, sgd, X, [(mask, data)], verify=True)
    assert_same_training(masked, optimizer, other, its)
    assert other[1].second[1].weight.all() and other[1].second[0].weight[:, KEEP].any()


@pytest.mark.parametrize("values", ["zero weights", "equal filters"])
def test_values_decide_nothing(values):
    net = masked(Residual(), torch.ones(8).bool())
    with torch.no_grad():
        net.body[0].weight[2] = 0 if values == "zero weights" else net.body[0].weight[3]
        net.fc.weight[:, 1] = 0
    with pk.compacted(net, X) as (inside, _):
        assert all(a is b for a, b in zip(inside.parameters(), net.parameters(), strict=True))


class Aux(nn.Module):
    """A head that only training runs, on a value that masks make small."""

    def __init__(self):
        super().__init__()
        self.first, self.aux, self.last = conv_norm(3, 8), nn.Conv2d(8, 2, 1), nn.Conv2d(8, 2, 3)

    def forward(self, x):
        x = self.first(x)
        out = self.last(x).mean((2, 3))
        return (out, self.aux(x).mean((2, 3))) if self.training else out


def test_heads_that_only_train():
    """What the example does not run in eval mode is either right or refused on entering."""
    torch.manual_seed(0)
    net = masked(Aux())
    try:
        agree(net)
    except ValueError as error:
        assert "compacted: model: expected a network whose forward serves small layers" in str(error)


class Momentum(nn.Module):
    """A buffer over channels that only training writes to."""

    def __init__(self):
        super().__init__()
        self.first, self.last = conv_norm(3, 8), nn.Linear(8, 2)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        x = self.first(x).mean((2, 3))
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return self.last(x - self.mean)


def test_a_buffer_over_channels():
    torch.manual_seed(0)
    agree(masked(Momentum()))


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_statistics(momentum):
    """Averages by count as well as by momentum, also of frozen norms."""
    torch.manual_seed(0)
    net = Between(lambda m, x: m["b"](m["a"](x)), a=nn.BatchNorm2d(8), b=nn.BatchNorm2d(8, track_running_stats=False))
    net.first[1].momentum = momentum
    net = masked(net)
    net.layers["a"].eval()
    _, _, other, _ = agree(net)
    assert other.first[1].num_batches_tracked == 4 and other.layers["a"].num_batches_tracked == 0


# ---- calls


class Calls(nn.Module):
    """Keywords, defaults, branches and several outputs."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = conv_norm(3, 8), conv_norm(8, 8), nn.Linear(8, 2)

    def forward(self, image, *, scale=1.0, features=False, depth=2):
        found = [self.first(image * scale)]
        for _ in range(depth - 1):
            found.append(self.second(found[-1]))
        out = {"out": self.head(found[-1].mean((2, 3)))}
        return out | {"features": found} if features else out


def test_keywords_and_outputs():
    torch.manual_seed(0)
    masked_net = masked(Calls())
    other = copy.deepcopy(masked_net)
    optimizer, its = sgd(masked_net), sgd(other)
    bind(masked_net, optimizer, "dead"), bind(other, its, "dead")

    def steps(net, opt):
        for args in ({}, {"scale": 2.0}, {"features": True}):
            opt.zero_grad()
            net(image=X, **args)["out"].square().sum().backward()
            opt.step()

    steps(masked_net, optimizer)
    with pk.compacted(other, {"image": X}, its) as (net, opt):
        steps(net, opt)
        net.eval()
        assert [f.shape[1] for f in net(X, features=True)["features"]] == [4, 8]
    assert_same_training(masked_net, optimizer, other, its)


def test_an_example_with_keywords():
    torch.manual_seed(0)
    net = masked(Calls())
    with pk.compacted(net, pk.Example(X, scale=2.0, depth=3)) as (inside, _):
        torch.testing.assert_close(inside.eval()(X, depth=4), copy.deepcopy(net).eval()(X, depth=4), **CLOSE)


def test_a_module_that_runs_twice_a_step():
    torch.manual_seed(0)
    net = masked(Between(lambda m, x: m["a"](F.relu(m["a"](x))) + m["a"](x * 2), a=conv(r=3)))

    def loop(net, opt, data):
        for x in data:
            opt.zero_grad()
            (loss_of(net(x)) + loss_of(net(-x))).backward()
            opt.step()
        return []

    agree(net, loop=loop)


def test_hooks_of_the_user():
    torch.manual_seed(0)
    net = masked(Residual())
    seen = []
    net.first.register_forward_hook(lambda module, args, out: seen.append((module, out.shape[1])))
    net.body.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    net.fc.register_full_backward_hook(lambda module, grads, outs: seen.append((module, outs[0].shape[1])))
    handle = net.fc.register_forward_hook(lambda module, args, out: out + 1)
    with pk.compacted(net, X, sgd(net)) as (inside, opt):
        seen.clear()
        torch.manual_seed(3)
        got = inside(X)
        got.sum().backward()
        assert [(type(module).__name__, width) for module, width in seen] == [("Sequential", 4), ("Linear", 6)]
        assert seen[0][0] is inside.first and seen[1][0] is inside.fc
    torch.manual_seed(3)
    torch.testing.assert_close(net(X), got)
    handle.remove()
    with pk.compacted(net, X) as (inside, _):  # the hook is gone
        torch.testing.assert_close(inside.eval()(X), copy.deepcopy(net).eval()(X))


def test_hooks_on_the_small_network_end_with_it():
    net = masked(Residual())
    seen = []
    with pk.compacted(net, X) as (inside, _):
        inside.first.register_forward_hook(lambda *_: seen.append(1))
        inside(X)
    net(X)
    with pk.compacted(net, X) as (inside, _):
        inside(X)
    assert len(seen) == 1


# ---- forms of tensors


def test_channels_last():
    torch.manual_seed(0)
    net = masked(Residual()).to(memory_format=torch.channels_last)
    net.drop.p = 0.0
    net.path = nn.Identity()
    data = [x.contiguous(memory_format=torch.channels_last) for x in batches((3, 3, 8, 8))]
    _, _, other, _ = agree(net, data=data)
    assert other.body[0].weight.is_contiguous(memory_format=torch.channels_last)
    with pk.compacted(other, X) as (inside, _):
        assert inside.body[0].weight.is_contiguous(memory_format=torch.channels_last)
        assert inside.first[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_autocast():
    torch.manual_seed(0)
    net = masked(Residual()).float()
    net.drop.p = 0.0
    net.path = nn.Identity()

    def loop(net, opt, data):
        losses = []
        for x in data:
            opt.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(net(x))
            loss.backward()
            opt.step()
            losses.append(loss.item())
        return losses

    data = batches((3, 3, 8, 8), dtype=torch.float32)
    rounds = [(mask_first, data)]
    close = {"rtol": 2e-2, "atol": 2e-2}
    trained_nets = both_modes(net, sgd, X.float(), rounds, loop=loop, close=close)
    assert_same_training(*trained_nets, close=close)


# ---- align


@pytest.mark.parametrize("align", [4, 8])
def test_aligned_widths(align):
    """Filled up with zeros that stay zero, and nothing of them goes back."""
    torch.manual_seed(0)
    net = nn.Sequential(conv_norm(3, 24), conv_norm(24, 20), conv_norm(20, 16), Head(16)).double()
    net[3].drop.p = 0.0
    pk.convert(net)

    def mask(net, seed):
        generator = torch.Generator().manual_seed(seed)
        for layer in net[:3]:
            keep = torch.rand(layer[0].out_channels, generator=generator) < 0.5
            keep[0] = True
            layer[0].set_masks(filter=keep)
            layer[1].set_mask(keep)

    data = batches((3, 3, 8, 8))
    rounds = [(lambda net, seed=seed: mask(net, seed), data) for seed in (1, 2, 1)]
    trained_nets = both_modes(net, sgd, X, rounds, align=align)
    assert_same_training(*trained_nets)
    other, its = trained_nets[2:]
    c = Compaction(other, X, its, align=align)
    inside, opt = c.enter()
    train(inside, opt, data)
    for i, layer in enumerate(inside[:3]):
        live = int(other[i][0].filter_mask.sum())
        width = layer[0].out_channels
        full = -(-live // align) * align
        assert width == (full if full <= other[i][0].out_channels else live)
        rows = c.rows(f"{i}.0")
        padding = torch.zeros(width).bool() if rows is None else rows < 0
        assert int(padding.sum()) == width - live
        assert not layer[0].weight[padding].any() and not layer[1].weight[padding].any()
        assert not layer[1].bias[padding].any()
        assert not any(s[padding].any() for s in (opt.state[layer[0].weight]["momentum_buffer"],))
    c.leave()
