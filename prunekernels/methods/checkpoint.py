"""What a method needs to go on where it stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Method


def _identity(method: Method) -> dict[str, Any]:
    """What must be the same in the method that a state is loaded into."""
    layers = {name: layer.out_channels for name, layer in method.layers.items()}
    return {"method": type(method).__name__, "layers": layers, "units": [list(unit.layers) for unit in method.units]}


def save(method: Method) -> dict[str, Any]:
    """Plain values and tensors."""
    return _identity(method) | {
        "epoch": method.epoch,
        "steps": method.steps,
        "steps_per_epoch": method.steps_per_epoch,
        "dead": [dead.clone() for dead in method._dead],
        "hard": [hard.clone() for hard in method._hard],
        "history": [{name: list(counts) for name, counts in epoch.items()} for epoch in method.history],
        "norms": method.structure.norms,
        "generator": method.generator.get_state(),
        "criterion": method.criterion.state_dict(),
    }


def load(method: Method, state: dict[str, Any]) -> None:
    """The reverse; sets the masks."""
    from .base import Counts

    _check(method, state)
    method.epoch, method.steps = state["epoch"], state["steps"]
    if not method._fixed_steps:
        method.steps_per_epoch = state["steps_per_epoch"]
    method._dead = [dead.cpu().clone() for dead in state["dead"]]
    method._hard = [hard.cpu().clone() for hard in state["hard"]]
    method.history = [{name: Counts(*counts) for name, counts in epoch.items()} for epoch in state["history"]]
    if state["norms"] is not None and method.structure.norms is None:
        method._find_norms()
        method.structure.norms = {name: list(norms) for name, norms in state["norms"].items()}
    method.generator.set_state(state["generator"].cpu())
    method.criterion.begin_epoch()
    method.criterion.load_state_dict(state["criterion"])
    method._mask()


def _check(method: Method, state: dict[str, Any]) -> None:
    for key, value in _identity(method).items():
        got = state.get(key) if isinstance(state, dict) else None
        if got != value:
            expected, got = _first_difference(value, got)
            raise ValueError(f"{type(method).__name__}.load_state_dict: {key}: expected {expected}, got {got}")


def _first_difference(a: Any, b: Any) -> tuple[Any, Any]:
    """Of two lists or dictionaries, as short as an error should be."""
    if type(a) is not type(b) or isinstance(a, str):
        return a, b
    a, b = (list(value.items()) if isinstance(value, dict) else value for value in (a, b))
    where = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    first, second = (value[where] if where < len(value) else f"{len(value)} of them" for value in (a, b))
    return first, second
