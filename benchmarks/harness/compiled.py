"""Functions by torch.compile, as the commands time them."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function, compiled by torch.compile when it is first called, and its backward pass at the first of these.

    It gets a code object of its own, since torch.compile counts recompilations by code object, and gives up after some.
    """
    code, name, defaults = function.__code__.replace(), function.__name__, function.__defaults__
    own = types.FunctionType(code, function.__globals__, name, defaults, function.__closure__)
    return torch.compile(own, dynamic=False)
