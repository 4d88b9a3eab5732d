"""Training in masked mode and in compacted mode side by side, and what has to be equal afterwards."""

import copy

import torch
from torch import nn

import prunekernels as pk
from cases.networks import conv_norm

CLOSE = {"rtol": 1e-9, "atol": 1e-10}  # float64


class Small(nn.Module):
    """Convolutions with a norm and with a bias, and linear layers, one of which masks leave alone."""

    def __init__(self):
        super().__init__()
        self.first, self.second = conv_norm(3, 6), nn.Conv2d(6, 5, 3)
        self.hidden, self.last = nn.Linear(20, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = torch.relu(self.second(self.first(x)))
        return self.last(torch.relu(self.hidden(x.flatten(1))))


def small(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    net = Small().to(dtype)
    nn.init.normal_(net.first[1].bias, std=0.5)
    nn.init.uniform_(net.first[1].weight, 0.5, 1.5)
    pk.convert(net)
    return net


def small_images(n=3, dtype=torch.float64, seed=0):
    return torch.randn(n, 3, 4, 4, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def mask_small(net, seed=0, hard=False):
    """Two of six and two of five filters die, others for each seed; hard: one of them for good."""
    generator = torch.Generator().manual_seed(seed)
    for conv, norm in ((net.first[0], net.first[1]), (net.second, None)):
        alive = torch.ones(conv.out_channels, dtype=torch.bool)
        alive[torch.randperm(len(alive), generator=generator)[:2]] = False
        never = torch.ones_like(alive)
        never[-1] = not hard
        conv.set_masks(filter=alive & never, hard=never)
        if norm is not None:
            norm.set_mask(alive & never)
    return net


def loss_of(out):
    """A scalar from whatever a network returns."""
    if isinstance(out, torch.Tensor):
        return out.square().mean()
    parts = out.values() if isinstance(out, dict) else out
    return sum(loss_of(part) for part in parts if part is not None)


def train(net, opt, batches):
    """A plain loop; returns the losses."""
    losses = []
    for x in batches:
        opt.zero_grad()
        loss = loss_of(net(x.clone()))
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


def batches(shape=(3, 3, 4, 4), steps=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(100 + seed)
    return [torch.randn(*shape, dtype=dtype, generator=generator) for _ in range(steps)]


def bind(net, optimizer, freeze):
    """freeze: "dead", "hard" or None, for an optimizer that is not bound."""
    if freeze is None:
        return
    if isinstance(optimizer, (pk.optim.MaskedSGD, pk.optim.MaskedAdamW)):
        for group in optimizer.param_groups:
            group["freeze"] = freeze
        pk.optim.bind(optimizer, net)
    else:
        pk.optim.bind(optimizer, net, freeze=freeze)


def both_modes(net, make_optimizer, x, rounds, *, freeze="dead", loop=train, close=None, **options):
    """Trains two copies of net, one in masked and one in compacted mode.

    rounds: for each, a function that sets masks of a network, and the batches to train on.

    Returns:
        Masked network and optimizer, compacted network and optimizer.
    """
    masked, other = net, copy.deepcopy(net)
    optimizer, its = make_optimizer(masked), make_optimizer(other)
    bind(masked, optimizer, freeze)
    bind(other, its, freeze)
    for set_masks, data in rounds:
        set_masks(masked)
        set_masks(other)
        want = loop(masked, optimizer, data)
        with pk.compacted(other, x, its, **options) as (small_net, opt):
            got = loop(small_net, opt, data)
        torch.testing.assert_close(got, want, **(close or {"rtol": 1e-7, "atol": 1e-9}))
    return masked, optimizer, other, its


def tensors_of(net, optimizer=None):
    """Every parameter, as it is stored, every buffer, and every number and tensor of the optimizer's state."""
    found = dict(net.named_parameters()) | dict(net.named_buffers())
    found = {name: tensor.detach() for name, tensor in found.items()}
    if optimizer is not None:
        for name, p in net.named_parameters():
            for key, value in optimizer.state.get(p, {}).items():
                found[f"{name}: {key}"] = value.detach() if isinstance(value, torch.Tensor) else torch.tensor(value)
    return found


def options_of(optimizer):
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def assert_same_training(masked, optimizer, other, its, exact=False, close=None):
    """Networks and optimizers agree in everything, dead entries included."""
    want, got = tensors_of(masked, optimizer), tensors_of(other, its)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        if exact:
            assert torch.equal(got[name], tensor), name
        else:
            torch.testing.assert_close(got[name], tensor, msg=lambda m, n=name: f"{n}: {m}", **(close or CLOSE))
    if optimizer is not None:
        assert str(options_of(its)) == str(options_of(optimizer))


def assert_same_live(masked, other, exact=False, close=None):
    """The networks agree in what state dicts show: dead entries are zero there."""
    want, got = masked.state_dict(), other.state_dict()
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        if exact:
            assert torch.equal(got[name], tensor), name
        else:
            torch.testing.assert_close(got[name], tensor, msg=lambda m, n=name: f"{n}: {m}", **(close or CLOSE))


def dead_entries(net):
    """By name of a parameter of a masked layer, its dead entries as they are stored."""
    found = {}
    for prefix, layer in net.named_modules():
        if isinstance(layer, (pk.MaskedConv2d, pk.MaskedBatchNorm2d)):
            for name, dead in layer._dead_entries().items():
                p = getattr(layer, name)
                if p is not None:
                    found[f"{prefix}.{name}"] = p.detach()[dead.expand_as(p)].clone()
    return found


def sgd(net, **options):
    return torch.optim.SGD(net.parameters(), **({"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1} | options))


def pair():
    """The same masked network twice, with bound optimizers."""
    made = []
    for _ in range(2):
        net = mask_small(small(), 1)
        optimizer = sgd(net)
        bind(net, optimizer, "dead")
        made += [net, optimizer]
    return made


def outputs(net, x):
    with torch.no_grad():
        return copy.deepcopy(net).eval()(x)
