"""Small networks to save, and what a loaded one has to be equal in: outputs, gradients, statistics, one more step."""

import copy

import torch

import prunekernels as pk
from cases.networks import images, mask_at_random, trained
from prunekernels.train import models

REFERENCE = {  # by name of models.MODELS: width, images
    "resnet20": (0.5, (2, 3, 16, 16)),
    "resnet18": (0.1, (2, 3, 32, 32)),
    "resnet50": (0.05, (2, 3, 32, 32)),
    "mobilenet_v2": (0.2, (2, 3, 32, 32)),
    "vgg_small": (0.3, (2, 3, 16, 16)),
    "vgg16_bn": (0.1, (2, 3, 32, 32)),
    "densenet40": (0.3, (2, 3, 16, 16)),
}


def small_network(name, form="module", dtype=torch.float32):
    """(small network, images) of one of NETWORKS."""
    x = images(3).to(dtype)
    return pk.shrink(mask_at_random(trained(name), 1).to(dtype), x, form=form), x


def small_reference(name, form="auto"):
    width, size = REFERENCE[name]
    torch.manual_seed(0)
    net, x = models.build(name, 5, width=width), torch.randn(size)
    pk.convert(net)
    for group in pk.coupled_groups(net, x):
        group.set_masks(net, torch.arange(group.width) % 3 != 1)
    return pk.shrink(net.eval(), x, form=form), x


def round_trip(small, folder, *args, **options):
    pk.save_small(small, folder, *args, formats=["safetensors"], **options)
    return pk.load_small(folder)


def outputs_of(net, x):
    torch.manual_seed(5)
    out = net(x.clone())
    return [out] if isinstance(out, torch.Tensor) else list(out.values() if isinstance(out, dict) else out)


def step(net, x):
    """One step of SGD; the gradients, by name."""
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    sum(out.square().sum() for out in outputs_of(net, x)).backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    optimizer.step()
    return gradients


def assert_same_network(small, loaded, x, sizes=True):
    """To the bit: outputs in eval mode (at other sizes, too), gradients in training, and everything after a step."""
    small, loaded = copy.deepcopy(small).eval(), copy.deepcopy(loaded).eval()
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in small.named_parameters()]
    others = [x[:1], torch.cat([x, x])] + ([torch.randn(2, *x.shape[1:2], 32, 48, dtype=x.dtype)] if sizes else [])
    for given in (x, *others):
        for got, want in zip(outputs_of(loaded, given), outputs_of(small, given), strict=True):
            assert torch.equal(got, want)
    got, want = step(loaded, x), step(small, x)
    for name, gradient in want.items():
        assert (got[name] is None) if gradient is None else torch.equal(got[name], gradient), name
    state = loaded.state_dict()
    assert all(torch.equal(state[name], value) for name, value in small.state_dict().items())
    for got, want in zip(outputs_of(loaded, x), outputs_of(small, x), strict=True):
        assert torch.equal(got, want)
