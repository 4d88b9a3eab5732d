"""Example: what a network is called with, in its short forms and in full."""

from collections import UserDict

import pytest
import torch

import prunekernels as pk

Example = pk.Example
X, Y = torch.zeros(2, 3), torch.ones(4, dtype=torch.long)


class Batch(UserDict):
    """As transformers' BatchEncoding: a mapping that is no dict."""


@pytest.mark.parametrize(
    ("given", "args", "kwargs"),
    [
        (X, (X,), {}),
        ((X, 2, None), (X, 2, None), {}),
        ([X, Y], ([X, Y],), {}),
        (([X, Y],), ([X, Y],), {}),
        ({"x": X, "y": [Y, {"z": 3}]}, (), {"x": X, "y": [Y, {"z": 3}]}),
        (Batch(x=X), (), {"x": X}),
        (Example(X, y=Y), (X,), {"y": Y}),
        ((), (), {}),
    ],
    ids=["tensor", "tuple", "list", "list in a tuple", "dict", "mapping", "example", "nothing"],
)
def test_forms(given, args, kwargs):
    example = Example.of("op", given)
    assert example.args == args and example.kwargs == kwargs


@pytest.mark.parametrize(
    ("given", "got"), [(None, "NoneType"), ("cat.jpg", "str"), ({1: X}, "dict with keys that are no names")]
)
def test_what_is_no_example(given, got):
    with pytest.raises(
        TypeError, match=rf"op: example_input: expected a tensor, a tuple .* pk\.Example .*, got {got}$"
    ):
        Example.of("op", given)


def test_the_network_gets_copies():
    def spoil(images, *, more):
        images.pop()[:] = 5
        more["y"].zero_()
        return len(images)

    images, more = [X.clone(), X.clone()], {"y": Y.clone()}
    assert Example(images, more=more).call(spoil) == 1
    assert len(images) == 2 and torch.equal(images[1], X) and torch.equal(more["y"], Y)


def test_double_leaves_integers():
    example = Example(X, [Y, "a"], half=X.half()).double()
    assert example.args[0].dtype == example.kwargs["half"].dtype == torch.float64
    assert example.args[1][0] is Y and example.args[1][1] == "a"


def test_repr():
    assert repr(Example([X], y=Y, n=2)) == "Example([torch.float32[2, 3]], y=torch.int64[4], n=2)"
