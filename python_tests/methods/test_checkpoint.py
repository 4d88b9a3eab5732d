"""What a method needs to go on: state, order of loading, foreign states."""

import io

import pytest
import torch
import torch.nn.functional as F

import prunekernels as pk
from cases.methods import EVERY, assert_same, batches, chain, residual, run, sgd, snapshot, train
from prunekernels.methods import GHFP, SFP

IMAGES = torch.randn(1, 3, 6, 6)


def saved(*things):
    """Through a file that holds nothing but tensors and plain values."""
    buffer = io.BytesIO()
    torch.save([thing.state_dict() for thing in things], buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


OPTIONS = {
    "random": (SFP, {"criterion": "random", "duty": 0.5}),
    "activation": (EVERY["while_training"], {"criterion": "mean_activation"}),
    "joint": (GHFP, {"coupling": "joint", "duty": 0.5}),
} | {name: (cls, {"duty": 0.5}) for name, cls in EVERY.items()}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("in_epoch", [False, True])
@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_resumes_to_the_bit(name, flow, in_epoch):
    cls, options = OPTIONS[name]
    build = residual if "coupling" in options else chain
    options = options | ({"example_input": IMAGES} if "coupling" in options else {})

    def start():
        net = pk.flow(build(), flow)
        optimizer = sgd(net)
        return net, optimizer, cls(net, optimizer, 0.5, 5, **options)

    def go_on(net, optimizer, method):
        if in_epoch:
            steps(net, optimizer, method, range(2, 4))
            method.end_epoch()
        train(net, optimizer, method, 2, 3)

    first = start()
    train(*first, 2)
    if in_epoch:
        steps(*first, range(2))
    checkpoint = saved(*first)
    go_on(*first)
    second = start()
    for thing, state in zip(second, checkpoint, strict=True):
        thing.load_state_dict(state)
    go_on(*second)
    assert_same(snapshot(*first[:2]), snapshot(*second[:2]))
    assert first[2].history == second[2].history and str(first[2]) == str(second[2])
    masks = [{n: t for n, t in net.state_dict().items() if n.endswith("_mask")} for net in (first[0], second[0])]
    assert_same(*masks)


def steps(net, optimizer, method, which):
    """Some steps of the third epoch."""
    for i, (x, y) in enumerate(batches(2)):
        if i in which:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            method.step()


def test_order_of_loading_does_not_matter():
    net, optimizer, method = run(GHFP, 3)
    states = saved(net, optimizer, method)
    other = chain()
    made = sgd(other)
    fresh = GHFP(other, made, 0.5, 10)
    for thing, state in reversed(list(zip((other, made, fresh), states, strict=True))):
        thing.load_state_dict(state)
    assert_same(snapshot(net, optimizer), snapshot(other, made))
    assert torch.equal(other[3].hard_mask, net[3].hard_mask)


def test_going_back_revives_hard_filters():
    net, optimizer, method = run(GHFP, 1)
    state = saved(method)[0]
    train(net, optimizer, method, 5, 1)
    method.load_state_dict(state)
    assert torch.equal(net[3].hard_mask, method.states["3"] != 2) and method.epoch == len(method.history) == 1


FOREIGN = {
    "method": (lambda: run(SFP, 1), "GHFP.load_state_dict: method: expected GHFP, got SFP"),
    "architecture": (lambda: run(GHFP, 1, net=residual()), r"layers: expected \('0', 8\), got \('stem', 8\)"),
    "layers": (lambda: run(GHFP, 1, skip=["6"]), r"GHFP.load_state_dict: layers: expected \('6', 10\), got 2 of them"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_state(case):
    make, error = FOREIGN[case]
    net, _, method = run(GHFP, 1)
    before = str(method.state_dict())
    with pytest.raises(ValueError, match=error):
        method.load_state_dict(make()[2].state_dict())
    assert str(method.state_dict()) == before


@pytest.mark.parametrize("state", [None, {}, 3])
def test_no_state(state):
    net = chain()
    with pytest.raises(ValueError, match="SFP.load_state_dict: method: expected SFP, got None"):
        SFP(net, sgd(net)).load_state_dict(state)


DAMAGED = {
    "no generator": (
        lambda state: state.pop("generator"),
        "generator: expected it in a state of this method, got none",
    ),
    "no masks": (lambda state: state.pop("dead"), "dead: expected it in a state"),
    "a mask too few": (lambda state: state["hard"].pop(), "hard: expected masks of the sizes"),
    "another size": (
        lambda state: state["dead"].__setitem__(0, torch.ones(3)),
        r"dead: expected masks .* got \[\(3,\)",
    ),
}


@pytest.mark.hostile
@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_state_changes_nothing(case):
    damage, error = DAMAGED[case]
    _, _, method = run(GHFP, 1)
    state = saved(run(GHFP, 2)[2])[0]
    damage(state)
    before = str(method.state_dict())
    with pytest.raises(ValueError, match=f"GHFP.load_state_dict: {error}"):
        method.load_state_dict(state)
    assert str(method.state_dict()) == before
