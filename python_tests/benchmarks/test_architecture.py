"""benchmarks/trainings/architecture.py: a small network from the masks of the one that left it."""

import pytest
import torch

import prunekernels as pk
from cases.train import tiny_config, tiny_data
from prunekernels.train import setup
from prunekernels.train.models import with_new_weights
from trainings.architecture import key_of, live_counts, masks_of, set_masks, shrunk_to

CONFIG, DATA = tiny_config("unused", arch="resnet20"), tiny_data()


def network(masks=None):
    model = setup.network(CONFIG, DATA)
    pk.convert(model)
    set_masks(model, masks or {})
    return model


def with_dead(every, kernels=False, first=0):
    """A network in which, inside the blocks, one filter in `every` is dead, or as many kernels."""
    model = network()
    for name, layer in model.named_modules():
        if name.endswith("body.conv1"):
            if kernels:
                layer.kernel_mask.view(-1)[first::every] = False
            else:
                layer.filter_mask[first::every] = False
        if name.endswith("body.norm1") and not kernels:
            layer.channel_mask[first::every] = False
    return model


def test_masks_as_text_and_back():
    assert masks_of(network()) == {}
    model = with_dead(2)
    model.stem.conv.kernel_mask[1] = False
    masks = masks_of(model)
    assert set(masks) == {"filter_mask", "kernel_mask", "channel_mask"}
    again = network(masks)
    assert masks_of(again) == masks and live_counts(again) == live_counts(model)
    for (name, mask), (_, other) in zip(model.named_buffers(), again.named_buffers(), strict=True):
        assert not name.endswith("_mask") or torch.equal(mask, other), name


def test_the_network_of_masks_is_that_which_shrink_makes():
    model = with_dead(2)
    small = pk.shrink(model, DATA.normalised(DATA.test.images[:2]), form="graph")
    rebuilt = shrunk_to(CONFIG, DATA, masks_of(model))
    assert key_of(rebuilt) == key_of(small)
    assert [p.shape for p in rebuilt.parameters()] == [p.shape for p in small.parameters()]
    assert not any(
        torch.equal(p, q) for p, q in zip(rebuilt.parameters(), small.parameters(), strict=True) if p.dim() == 4
    )


def test_keys_tell_sizes_not_places():
    example = DATA.normalised(DATA.test.images[:2])
    models = [with_dead(2), with_dead(2, first=1), with_dead(4), with_dead(2, kernels=True), network()]
    keys = [key_of(pk.shrink(model, example, form="graph")) for model in models]
    assert keys[0] == keys[1] and len(set(keys)) == 4


@pytest.mark.parametrize("kernels", [False, True])
def test_new_weights(kernels):
    model = with_dead(2, kernels=kernels)
    torch.manual_seed(1)
    small = shrunk_to(CONFIG, DATA, masks_of(model))
    dead = {n: (p == 0).flatten(2).all(2) for n, p in small.named_parameters() if p.dim() == 4}
    assert any(zeros.any() for zeros in dead.values()) is kernels
    optimizer = torch.optim.SGD(small.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        small(DATA.normalised(DATA.train.images[:8])).square().sum().backward()
        optimizer.step()
    for name, p in small.named_parameters():
        assert not torch.equal(p, before[name]), name
        assert p.dim() != 4 or torch.equal((p == 0).flatten(2).all(2), dead[name]), name


def test_new_weights_are_drawn_as_the_builders_do():
    torch.manual_seed(0)
    small = with_new_weights(shrunk_to(CONFIG, DATA, masks_of(with_dead(4))))
    for module in small.modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 500:
            expected = (2 / (module.out_channels * 9)) ** 0.5
            assert float(module.weight.detach().std()) == pytest.approx(expected, rel=0.15)
        if isinstance(module, torch.nn.BatchNorm2d):
            assert bool((module.weight == 1).all()) and bool((module.running_mean == 0).all())
