import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from cases.layers import bools
from cases.networks import NETWORKS, images, mask_at_random, trained
from prunekernels.graph import tidy_masks


class Chain(nn.Module):
    """conv, norm, relu, conv, norm, relu, conv: a filter dies upstream when its readers do."""

    def __init__(self, bias=False):
        super().__init__()
        self.a, self.an = nn.Conv2d(3, 4, 3, padding=1, bias=bias), nn.BatchNorm2d(4)
        self.b, self.bn = nn.Conv2d(4, 4, 3, padding=1, bias=bias), nn.BatchNorm2d(4)
        self.c = nn.Conv2d(4, 2, 1, bias=bias)

    def forward(self, x):
        return self.c(F.relu(self.bn(self.b(F.relu(self.an(self.a(x)))))))


def chain(norms=True, **args):
    net = Chain(**args)
    pk.convert(net, norms=norms)
    return net


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
KEEP = bools(1, 0, 1, 1)


def outputs(net, x, training):
    net = copy.deepcopy(net).train(training)
    torch.manual_seed(0)  # dropout
    return net(x)


def test_outputs_stay(fuzz_seed):
    name = list(NETWORKS)[fuzz_seed % len(NETWORKS)]
    net, x = mask_at_random(trained(name, fuzz_seed), fuzz_seed), images(3)
    want = [outputs(net, x, training) for training in (False, True)]
    tidy_masks(net, x)
    for training in (False, True):
        torch.testing.assert_close(outputs(net, x, training), want[training])
    assert str(tidy_masks(net, x)) == "nothing to tidy"


def test_dead_filter_is_a_dead_input():
    net = chain()
    net.a.set_masks(filter=KEEP)
    net.an.set_mask(KEEP)
    report = tidy_masks(net, X)
    assert report.inputs == {"b": [1]} and not report.filters and not report.channels
    assert torch.equal(net.b.input_mask, KEEP)


def test_constant_of_an_unmasked_norm_is_read():
    net = chain(norms=False)
    net.a.set_masks(filter=KEEP)
    assert str(tidy_masks(net, X)) == "nothing to tidy"


def test_live_norm_channel_over_a_dead_filter_is_read():
    net = chain()
    net.a.set_masks(filter=KEEP)
    assert str(tidy_masks(net, X)) == "nothing to tidy"


def test_unread_filters_die_all_the_way_up():
    net = chain(bias=True)
    net.c.set_masks(input=bools(1, 1, 1, 0))
    kernels = torch.ones(4, 4, dtype=torch.bool)
    kernels[:3, 2] = False
    net.b.set_masks(kernel=kernels)
    report = tidy_masks(net, X)
    # No layer reads filter 3 of b, which alone reads channel 2.
    assert report.filters == {"a": [2], "b": [3]} and report.channels == {"an": [2], "bn": [3]}
    assert report.inputs == {"b": [2]}
    assert torch.equal(net.a.filter_mask, bools(1, 1, 0, 1))


@pytest.mark.parametrize("bias", [False, True])
def test_filter_without_kernels(bias):
    net = chain(bias=bias)
    net.b.set_masks(kernel=KEEP[:, None].expand(4, 4).clone())
    report = tidy_masks(net, X)
    assert report.filters == ({} if bias else {"b": [1]})
    assert not report.channels  # its norm makes a constant of it, and that is read


def test_zero_weights_are_no_masks():
    net = chain()
    with torch.no_grad():
        net.a.weight[1] = net.an.weight[1] = net.an.bias[1] = 0
        net.b.weight[:, 1] = 0
    assert str(tidy_masks(net, X)) == "nothing to tidy"


def test_nan_in_dead_weights_is_harmless():
    net = chain()
    net.a.set_masks(filter=KEEP)
    net.an.set_mask(KEEP)
    with torch.no_grad():
        net.a.weight[1] = torch.nan
    assert tidy_masks(net, X).inputs == {"b": [1]}


def test_hard_dead_stays_hard():
    net = chain()
    net.a.set_masks(hard=KEEP)
    net.c.set_masks(input=KEEP)
    assert tidy_masks(net, X).filters == {"b": [1]}
    assert torch.equal(net.a.hard_mask, KEEP) and torch.equal(net.a.filter_mask, KEEP)


def test_layer_used_twice_lives_in_either_use():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 1, 1)

        def forward(self, x):
            return self.c(self.b(F.relu(self.b(self.a(x)))))

    net, x = Twice(), torch.randn(2, 3, 4, 4)
    pk.convert(net)
    net.a.set_masks(filter=KEEP)  # dead in the first use alone
    net.c.set_masks(input=bools(1, 1, 0, 1))  # unread in the second use alone
    want = net(x)
    tidy_masks(net, x)
    assert net.b.density == 1
    assert torch.equal(net(x), want)


def test_plain_network_and_report():
    assert str(tidy_masks(Chain(), X)) == "nothing to tidy"
    net = chain()
    net.c.set_masks(input=bools(1, 0, 0, 1))
    assert str(tidy_masks(net, X)) == "b: filters 1, 2\nbn: channels 1, 2"


def test_weights_and_mode_stay():
    net = chain().train()
    net.a.set_masks(filter=KEEP)
    before = copy.deepcopy(net.state_dict())
    tidy_masks(net, X)
    assert net.training and net.a.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items() if "mask" not in key)


def test_shared_weight_with_different_masks():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    net[1].weight = net[0].weight
    pk.convert(net)
    net[0].set_masks(filter=bools(1, 0, 1))
    with pytest.raises(ValueError, match="tidy_masks: 0 and 1: expected the same masks on layers that share"):
        tidy_masks(net, X)
