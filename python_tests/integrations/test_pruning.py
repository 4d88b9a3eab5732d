"""What the callbacks share."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.pages import ROOT
from cases.trainers import BATCH, Net, data, sgd
from prunekernels.integrations.pruning import Pruning

LIBRARIES = ("lightning", "pytorch_lightning", "transformers", "ultralytics", "accelerate", "timm")


def test_no_library_is_imported():
    code = f"import sys, prunekernels.integrations.pruning; print([n for n in {LIBRARIES} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"method": "lasso"}, "method: expected one of .*sfp.*got 'lasso'"),
        ({"mode": "compacted"}, "mode: expected one of auto, masked, live, got 'compacted'"),
        ({"duties": 0.5}, "options: expected some of .*duty.*got 'duties'"),
        ({"state": {}}, "options: expected some of .*got 'state'"),
    ],
)
def test_errors_come_at_once(arguments, text):
    with pytest.raises(ValueError, match=f"PruningCallback: {text}"):
        Pruning(**arguments)


def test_takes_a_class():
    assert Pruning(pk.methods.ASFP).cls is Pruning("asfp").cls is pk.methods.ASFP


def test_is_sent_to_other_processes():
    """ultralytics and Lightning's spawn pickle callbacks before training begins."""
    again = pickle.loads(pickle.dumps(Pruning("pgp", rate=0.25, duty=0.5)))
    assert again.cls is pk.methods.PGP and (again.rate, again.options) == (0.25, {"duty": 0.5})


def begun(net, **options):
    pruning = Pruning("ghfp", duty=0.0, **options)
    pruning.convert(net)
    optimizer = sgd(net)
    pruning.begin(net, optimizer, 3)
    return pruning, optimizer


def step(net, pruning, optimizer):
    x, y = (part[:BATCH] for part in data())
    net(x, y)["loss"].backward()
    optimizer.step()
    pruning.step()


def test_auto_measures_once_for_about_as_many_filters(monkeypatch):
    from prunekernels.integrations import pruning as module

    timed = []

    def time_modes(*args, **options):
        timed.append(args)
        return pk.ModeTimes({"masked": 2.0, "live": 1.0})

    monkeypatch.setattr(module, "time_modes", time_modes)
    net = Net()
    pruning, optimizer = begun(net, warm_up=1, fine_tune=0)
    step(net, pruning, optimizer)
    assert not timed and pruning.now == "masked"  # nothing is dead
    for _ in range(3):
        pruning.end_epoch()
        step(net, pruning, optimizer)
        step(net, pruning, optimizer)
    assert len(timed) == len(pruning.chosen) and pruning.now == "live"
    before = len(timed)
    again, optimizer = begun(Net(), warm_up=1, fine_tune=0)
    again.load_state_dict(pruning.state_dict())
    step(again.method.model, again, optimizer)
    assert len(timed) == before and again.now == "live"


def test_auto_does_not_measure_where_runs_are_to_repeat():
    torch.use_deterministic_algorithms(True)
    net = Net()
    pruning, optimizer = begun(net)
    pruning.end_epoch()
    step(net, pruning, optimizer)
    assert pruning.now == "live" and not pruning.chosen


def test_what_waits_for_a_call_is_not_copied():
    net = Net()
    pruning, optimizer = begun(net)
    pruning.end_epoch()
    twin = copy.deepcopy(net)
    twin(*data())
    assert pruning._caught.example is None
    step(net, pruning, optimizer)
    assert pruning._caught is None and pruning.chosen


def test_soft_gradients_are_clipped_before_all_are():
    """clip_soft, then a norm, then the step: the filters of zeros have no part in the norm."""
    torch.manual_seed(0)
    net = Net()
    pk.convert(net)
    optimizer = sgd(net)
    method = pk.methods.SFP(
        net, optimizer, 0.5, 4, duty=0.5, wake="together", clip=True, alpha=0.0, warm_up=0, fine_tune=1,
        steps_per_epoch=2,
    )  # fmt: skip
    nn.init.constant_(net.body[1].bias, 0.5)  # zeros pass the relu
    x, y = (part[:BATCH] for part in data())
    for _ in range(2):
        net(x, y)["loss"].backward()
        optimizer.step()
        method.step()
    method.end_epoch()
    method.step()  # the dense phase
    optimizer.zero_grad()
    net(x, y)["loss"].backward()
    soft = method.states["body.0"] == 1
    lengths = net.body[0].weight.grad.flatten(1).norm(dim=1)
    assert soft.any() and lengths[soft].max() > lengths[~soft].max()
    method.clip_soft()
    clipped = net.body[0].weight.grad.flatten(1).norm(dim=1)
    assert clipped[soft].max() <= lengths[~soft].mean() * 1.001
    assert torch.equal(clipped[~soft], lengths[~soft])
    grads = [p.grad.clone() for p in net.parameters()]
    method.clip_soft()
    torch.testing.assert_close([p.grad for p in net.parameters()], grads)
