"""The arguments that all methods share: their checks, and signatures that name them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import nn

from ..nn.copy_masks import matched_layers
from ..nn.masked_filters import MaskedFilters
from ..nn.reparametrized import is_reparametrized
from ..nn.sharding import check_whole
from .phases import WAKES
from .ranking import BUDGETS

COUPLINGS = ("independent", "joint")
FUNCTION = "a function (final, epoch, epochs), as those of schedules"


def is_share(value: object) -> bool:
    """Whether value is a number in [0, 1]."""
    return isinstance(value, Real) and 0 <= float(value) <= 1


def expect(op: str, holds: bool, argument: str, expected: str, got: object) -> None:
    """Raises ValueError("op: argument: expected ..., got ...") unless it holds."""
    if not holds:
        raise ValueError(f"{op}: {argument}: expected {expected}, got {got}")


def check_options(
    op: str,
    *,
    rate: object,
    duty: object,
    coupling: object,
    budget: object,
    floor: object,
    round_to: object,
    steps_per_epoch: object,
    norms: object,
    wake: object,
    clip: object,
    seed: object,
    example_input: object,
) -> None:
    """Checks every argument of Method that can be judged by itself; epochs and fine_tune are counted elsewhere."""
    expect(op, is_share(rate) and rate != 1, "rate", "a number in [0, 1)", rate)
    expect(op, is_share(duty), "duty", "a number in [0, 1]", duty)
    expect(op, coupling in COUPLINGS, "coupling", f"one of {', '.join(COUPLINGS)}", repr(coupling))
    is_left = isinstance(budget, Mapping)  # of what is to be left: see uniform_rate.Left
    expect(op, is_left or budget in BUDGETS, "budget", f"one of {', '.join(BUDGETS)}, or a dict", repr(budget))
    is_floor = floor is None or (is_share(floor) and budget in ("global", "flops"))
    expect(op, is_floor, "floor", "a share in [0, 1] with budget='global' or 'flops'; 'layer' has rates", floor)
    for name, value in (("round_to", round_to), ("steps_per_epoch", steps_per_epoch)):
        expect(op, value is None or (isinstance(value, int) and value >= 1), name, "an integer from 1", value)
    expect(op, isinstance(norms, bool), "norms", "True or False", repr(norms))
    expect(op, wake is None or wake in WAKES, "wake", f"one of {', '.join(WAKES)}", repr(wake))
    expect(op, clip is None or isinstance(clip, bool), "clip", "True, False or None", repr(clip))
    expect(op, isinstance(seed, int), "seed", "an integer", repr(seed))
    needs_graph = budget == "flops" or is_left
    expected = f"True with budget={budget!r}: else norms keep dead channels"
    expect(op, not needs_graph or norms is True, "norms", expected, norms)
    expected = f"an input, from which budget={budget!r} counts {'what is left' if is_left else 'multiply-adds'}"
    expect(op, not needs_graph or example_input is not None, "example_input", expected, None)
    is_known = coupling == "independent" or example_input is not None
    expect(op, is_known, "example_input", "an input, which joint coupling needs", None)


def epochs_that_prune(op: str, epochs: int, fine_tune: int | None, default: Callable[[int], int]) -> int:
    """The epochs before the last fine_tune ones, which only train. fine_tune None: default(epochs)."""
    expect(op, isinstance(epochs, int) and epochs >= 1, "epochs", "an integer from 1", epochs)
    fine_tune = default(epochs) if fine_tune is None else fine_tune
    is_less = isinstance(fine_tune, int) and 0 <= fine_tune < epochs
    expect(op, is_less, "fine_tune", f"fewer than the {epochs} epochs", fine_tune)
    return epochs - fine_tune


def warm_up_epochs(op: str, warm_up: int | None, epochs: int, has_warm_up: bool) -> int:
    """The epochs before the first pruning, fewer than those that prune. None: 0, as it is without has_warm_up."""
    warm_up = 0 if warm_up is None else warm_up
    expect(op, has_warm_up or warm_up == 0, "warm_up", "None or 0, as start says when filters go", warm_up)
    is_less = isinstance(warm_up, int) and 0 <= warm_up < epochs
    expect(op, is_less, "warm_up", f"fewer than the {epochs} epochs before fine tuning", warm_up)
    return warm_up


def unwrapped(model: nn.Module) -> nn.Module:
    """The network itself, where it is in DistributedDataParallel or DataParallel: layers keep their names."""
    while isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        model = model.module
    return model


def masked_layers(op: str, model: nn.Module, skip: Iterable[str]) -> dict[str, MaskedFilters]:
    """The network's masked layers with filters by name, among which all of skip must be."""
    masked = {name: m for name, m in model.named_modules() if isinstance(m, MaskedFilters)}
    expect(op, bool(masked), "model", "MaskedConv2d layers (see pk.convert)", "none")
    expect(op, not isinstance(skip, str), "skip", "a list of names", repr(skip))
    for name in skip:
        expect(op, name in masked, "skip", "names of MaskedConv2d layers", repr(name))
    for name, layer in masked.items():
        check_whole(op, name, layer)
    return masked


def check_prune_outputs(op: str, prune_outputs: object, layers: Collection[str]) -> None:
    """It is True, False or names among the layers."""
    if not isinstance(prune_outputs, bool):
        is_list = isinstance(prune_outputs, Iterable) and not isinstance(prune_outputs, str)
        expect(op, is_list, "prune_outputs", "True, False or a list of names", repr(prune_outputs))
        for name in prune_outputs:  # type: ignore[attr-defined]
            expect(op, name in layers, "prune_outputs", "names of MaskedConv2d layers", repr(name))


def checked_followers(op: str, model: nn.Module, followers: Any) -> list[Any]:
    """The followers as a list, all of which have the masked layers of the model."""
    expect(op, isinstance(followers, (list, tuple)), "followers", "a list", type(followers).__name__)
    for follower in followers:
        matched_layers(f"{op}: followers", model, follower)
    return list(followers)


def check_optimizer(
    op: str, optimizer: torch.optim.Optimizer, layers: dict[str, MaskedFilters], left_out: Mapping[str, str]
) -> None:
    """There are layers to prune, and the optimizer trains all their weights."""
    held = {p for group in optimizer.param_groups for p in group["params"]}
    for name, layer in layers.items():
        stored = not is_reparametrized(layer)
        expected = "weights that are parameters, others in skip"
        expect(op, stored, "model", expected, f"one that is computed, or flattened by FSDP, in {name}")
        expected, got = "one over the model's parameters", f"one without {name}.weight"
        expect(op, layer.weight in held, "optimizer", expected, got)
    if set(left_out.values()) <= {"skip"}:
        expect(op, bool(layers), "skip", "some layers left to prune", "none")
    reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
    expect(op, bool(layers), "model", "some layers left to prune", f"none: {reasons}")


def full_signature(cls: type, parent: type | None) -> inspect.Signature:
    """The constructor's signature, with **options replaced by the keywords that the parent class takes."""
    own = list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]
    named = [p for p in own if p.kind is not p.VAR_KEYWORD]
    if len(named) == len(own) or parent is None:
        return inspect.Signature(own)
    known = {p.name for p in named}
    more = [p for p in inspect.signature(parent).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return inspect.Signature(named + [p for p in more if p.name not in known])


def keyword_options(cls: Any) -> list[str]:
    """Names of the keyword-only arguments of a method's constructor, its own before its parent's."""
    return [p.name for p in inspect.signature(cls).parameters.values() if p.kind is p.KEYWORD_ONLY]
