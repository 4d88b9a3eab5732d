"""Copies of networks in training, by each way that torch has, before and after a method changes the masks."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import prunekernels as pk
from cases.judged import MODES, assert_same_network, batches, pair, pruned_by_a_method, take
from prunekernels.nn.mask_buffers import MaskBuffers

modes = pytest.mark.parametrize("mode", MODES)


def through_a_file(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def replicated(net):
    """As DataParallel does on each device: modules without parameters of their own, which get the same tensors."""
    replicas = {module: module._replicate_for_data_parallel() for module in net.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = replicas[child]
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.view_as(parameter))
        for name, buffer in module._buffers.items():
            replica._buffers[name] = buffer
    return replicas[net]


COPIES = {"deepcopy": copy.deepcopy, "torch.save": through_a_file}


def trained(mode):
    """A network that a method has pruned, its optimizer, method and judge; it has run backward since."""
    net, judge = pair(mode)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    method = pruned_by_a_method(net, optimizer)
    for epoch in range(2):
        for x, labels in batches(seed=epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), labels).backward()
            optimizer.step()
            method.step()
        method.end_epoch()
    assert not net[1].channel_mask.all() and not net[3].filter_mask.all()
    take(judge, net)
    return net, method, judge


def masks_of(net):
    return [m.clone() for layer in net.modules() if isinstance(layer, MaskBuffers) for m in layer._masks.values()]


@modes
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_independent(how, mode):
    """It computes and trains as the original did, whose masks then change, and is still in its mode."""
    net, method, judge = trained(mode)
    other, masks = COPIES[how](net), masks_of(net)
    (x, labels), *_ = batches(seed=9)
    for part in net.modules():
        if isinstance(part, pk.MaskedConv2d):
            part.set_masks(filter="all", hard="all")
    net(x).sum().backward()
    for each in (other, judge):
        each.zero_grad()
    for layer, mine in zip(judge, other, strict=True):
        if hasattr(layer, "masked"):
            layer.masked = [mine]
    got, want = other(x), judge(x)
    torch.testing.assert_close(got, want)
    for y in (got, want):
        nn.functional.cross_entropy(y, labels).backward()
    assert_same_network(other, judge)
    assert all(map(torch.equal, masks_of(other), masks)) and type(got) is torch.Tensor
    assert other[0]._flow == (mode == "live")


@modes
def test_replicas(mode):
    """Each step makes them anew; gradients arrive at the network's parameters, also after masks have changed."""
    net, method, judge = trained(mode)
    for keep in (None, torch.arange(8) < 3, torch.arange(8) > 4):
        if keep is not None:
            net[0].set_masks(filter=keep, hard="all"), net[1].set_mask(keep)
            take(judge, net)
        for each in (net, judge):
            each.zero_grad()
        (x, labels), *_ = batches(seed=3)
        parts = zip(x.split(2), labels.split(2), strict=True)
        for part, labels_of_part in parts:
            got, want = replicated(net)(part), judge(part)
            torch.testing.assert_close(got, want)
            for y in (got, want):
                nn.functional.cross_entropy(y, labels_of_part).backward()
        assert_same_network(net, judge)


def by_state(library, net, path):
    library.save_file(net.state_dict(), path)
    return lambda other: other.load_state_dict(library.load_file(path))


def by_model(library, net, path):
    library.save_model(net, str(path))
    return lambda other: library.load_model(other, str(path))


@modes
@pytest.mark.parametrize("save", [by_state, by_model])
def test_safetensors(save, mode, tmp_path):
    """What was saved of a network that a method has pruned comes back into it after its masks have changed, and into a
    new one; both then train as the judge does.
    """
    library = pytest.importorskip("safetensors.torch")
    net, method, judge = trained(mode)
    net[0].set_masks(filter=torch.arange(8) < 3, hard="all"), net[1].set_mask(torch.arange(8) < 3)
    take(judge, net)
    with torch.no_grad():  # files have zeros for what soft-dead filters keep
        for layer in net:
            if isinstance(layer, MaskBuffers):
                layer.zero_dead()
    take(judge, net)
    masks, load = masks_of(net), save(library, net, tmp_path / "net.safetensors")
    (x, labels), *_ = batches(seed=9)
    want = judge(x)
    nn.functional.cross_entropy(want, labels).backward()
    for part in net.modules():
        if isinstance(part, MaskBuffers):
            part.set_masks(filter="all", hard="all") if hasattr(part, "filter_mask") else part.set_mask("all")
    net(x).sum().backward()
    for each in (net, pair(mode, seed=5)[0]):
        load(each)
        assert all(map(torch.equal, masks_of(each), masks))
        each.zero_grad()
        got = each(x)
        torch.testing.assert_close(got, want)
        nn.functional.cross_entropy(got, labels).backward()
        assert_same_network(each, judge)


class Features(Dataset):
    """Images that a masked network has preprocessed, in the workers."""

    def __init__(self, net):
        self.net, self.images = net, torch.cat([x for x, _ in batches(seed=5)])

    def __len__(self):
        return len(self.images)

    @torch.no_grad()
    def __getitem__(self, i):
        return self.net(self.images[i : i + 1])[0]


@modes
@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_loader(start, mode):
    """Workers have the masks of the moment in which they start."""
    torch.set_num_threads(1)
    net, method, _ = trained(mode)
    net.eval()
    features = Features(net)
    for keep in (None, torch.arange(8) < 3):
        if keep is not None:
            net[0].set_masks(filter=keep, hard="all"), net[1].set_mask(keep)
        with torch.no_grad():
            want = net(features.images)
        loader = DataLoader(features, batch_size=4, num_workers=1, multiprocessing_context=start, timeout=60)
        torch.testing.assert_close(torch.cat(list(loader)), want)


@modes
@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_pinned_batches_of_a_loader(mode):
    """Images that a loader pins, where there is a device to pin them for."""
    net, _, _ = trained(mode)
    net.eval()
    images = Features(net).images
    for keep in (None, torch.arange(8) < 3):
        if keep is not None:
            net[0].set_masks(filter=keep, hard="all"), net[1].set_mask(keep)
        with torch.no_grad():
            parts = [net(x) for (x,) in DataLoader(TensorDataset(images), batch_size=3, pin_memory=True)]
            torch.testing.assert_close(torch.cat(parts), net(images))
