"""Followers and stored dead values: what all methods share."""

import copy
import inspect

import pytest
import torch

import prunekernels as pk
from cases.averages import TorchEmaOfBuffers
from cases.methods import batches, chain, sgd, together
from prunekernels.nn.saved_state import DEAD_VALUES

METHODS = [m for name in pk.methods.__all__ if isinstance(m := getattr(pk.methods, name), type)]
METHODS = [cls for cls in METHODS if issubclass(cls, pk.methods.Method)]
X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def epoch_of(net, method, epoch, steps=4):
    net.train()
    for x, y in list(batches(epoch))[:steps]:
        method.optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        method.optimizer.step()
        method.step()


@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.__name__)
def test_every_method_takes_followers(cls):
    assert "followers" in inspect.signature(cls).parameters


def made(seed=0, **options):
    net = chain(seed)
    options = together(pk.methods.SRFP) | {"duty": 0.5, "steps_per_epoch": 4, "example_input": X} | options
    method = pk.methods.SRFP(net, sgd(net), rate=0.5, epochs=4, **options)
    return net, method


@pytest.mark.parametrize("plain", [False, True], ids=["state dict", "values alone"])
def test_a_run_goes_on_to_the_bit_from_a_checkpoint_in_the_sparse_phase(plain):
    """Soft-dead filters are masked there, with weights that the dense phase goes on from."""
    net, method = made()
    for epoch in range(2):
        epoch_of(net, method, epoch)
        method.end_epoch()
    epoch_of(net, method, 2, steps=1)
    assert net[0].weight[~net[0].filter_mask].any()
    state = copy.deepcopy(net.state_dict())
    assert any(DEAD_VALUES in entry for entry in state._metadata.values())
    if plain:  # as through safetensors
        state = dict(state)
    again, resumed = made(seed=3)
    again.load_state_dict(state)
    resumed.optimizer.load_state_dict(copy.deepcopy(method.optimizer.state_dict()))
    resumed.load_state_dict(copy.deepcopy(method.state_dict()))
    assert all(map(torch.equal, net.parameters(), again.parameters()))
    for run, each in ((method, net), (resumed, again)):
        epoch_of(each, run, 3)
        run.end_epoch()
    assert all(map(torch.equal, net.parameters(), again.parameters()))
    assert all(map(torch.equal, method.states.values(), resumed.states.values()))


def test_norms_behind_filters_of_zeros_get_their_values_back():
    """The filters are zeros in any file, so their weights do not tell whether the norms' values are missing."""
    net, again = chain(), chain(seed=3)
    options = {"duty": 0.5, "steps_per_epoch": 4, "wake": "together", "warm_up": 0, "fine_tune": 0, "alpha": 0.0}
    method = pk.methods.SFP(net, sgd(net), rate=0.5, epochs=4, criterion="l2", **options)
    epoch_of(net, method, 0)
    method.end_epoch()
    dead = ~net[0].filter_mask
    assert dead.any() and not net[0].weight[dead].any() and net[1].bias[dead].all()
    again.load_state_dict(dict(copy.deepcopy(net.state_dict())))  # as through safetensors
    resumed = pk.methods.SFP(
        again, sgd(again), rate=0.5, epochs=4, criterion="l2", state=copy.deepcopy(method.state_dict()), **options
    )
    assert resumed.epoch == 1 and all(map(torch.equal, net.parameters(), again.parameters()))


def test_states_from_before_have_no_dead_values():
    _, method = made()
    state = method.state_dict()
    del state["dead_values"]
    made(seed=1)[1].load_state_dict(state)


def test_a_follower_that_comes_later():
    average = None
    net, method = made(followers=[lambda: average])
    epoch_of(net, method, 0)
    average = TorchEmaOfBuffers(net).holder
    for epoch in range(4):
        method.end_epoch()
        epoch_of(net, method, epoch + 1)
        average.update_parameters(net)
        assert torch.equal(average.module[0].filter_mask, net[0].filter_mask)
    assert not net[0].filter_mask.all()
