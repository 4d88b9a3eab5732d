"""Twin: an optimizer of the same class and options over the small network, which gives its state back."""

from __future__ import annotations

import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.mask_buffers import MaskBuffers
from ..optim.freezing import bind
from ..optim.hooks import before_step
from ..optim.step import MaskedStep
from .cut import Block, Cut

_NOT_SHARED = ("step", "_binding", "_opt_called")  # a scheduler's counter around step, a binding to masks
_MIXING: Any = tuple(
    getattr(torch.optim, name) for name in ("LBFGS", "Muon", "Adafactor", "SparseAdam") if hasattr(torch.optim, name)
)


class Twin:
    """The optimizer of the small network.

    Attributes:
        optimizer: The optimizer of the model.
        opt: The one of the small network. Options of their groups are kept in step, whichever of the two changes.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        if isinstance(optimizer, _MIXING):
            raise TypeError(
                "compacted: optimizer: expected one that steps each entry of a parameter by itself, got "
                f"{type(optimizer).__name__}: train in masked mode"
            )
        self.optimizer = optimizer
        self.opt = _same(optimizer)
        before_step(self.opt, _Before(self))
        self.opt.register_step_post_hook(_After(self))
        self._known: list[dict[str, Any]] = []
        self._carried: list[tuple[nn.Parameter, nn.Parameter, Tensor]] = []  # block, the small parameter, zeros
        self._expected: list[list[nn.Parameter]] = []  # of each group of opt
        self._given: list[list[Tensor]] = []  # of each group of optimizer
        self._names: dict[int, str] = {}

    @property
    def freeze(self) -> dict[int, str]:
        """By id of each parameter, what of it stands still: "dead", unless the optimizer was bound to less."""
        binding = self.optimizer.__dict__.get("_binding")
        found: dict[int, str] = {}
        for group in self.optimizer.param_groups:
            if binding is None:
                how = "dead"
            else:
                how = group["freeze"] if isinstance(self.optimizer, MaskedStep) else binding.freeze
            found.update((id(p), how) for p in group["params"])
        return found

    def enter(self, cut: Cut, names: Mapping[int, str]) -> None:
        """Makes the groups of opt those of optimizer, with small parameters."""
        self._names = dict(names) | {id(part.block.part): names.get(p, "") for p, part in cut.parts.items()}
        groups, self._carried = [], []
        for group in self.optimizer.param_groups:
            params, labels = [], []
            given_labels = group.get("param_names") or [""] * len(group["params"])
            for p, label in zip(group["params"], given_labels, strict=True):
                part = cut.parts.get(id(p))
                params.append(p if part is None else part.block.part)
                labels.append(label)
                for block in part.carried if part is not None and p.requires_grad else ():
                    params.append(block.part)
                    labels.append(f"{label} (carried)")
                    self._carried.append((block.part, part.block.part, torch.zeros_like(block.part)))  # type: ignore
            options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            groups.append(options | {"params": params} | ({"param_names": labels} if "param_names" in group else {}))
        if len(self.opt.param_groups) == len(groups):
            for own, made in zip(self.opt.param_groups, groups, strict=True):  # schedulers hold the groups themselves
                own.clear()
                own.update(made)
        else:
            self.opt.param_groups[:] = groups
        self.opt.__dict__.update(_numbers_of(self.optimizer))
        self._expected = [list(group["params"]) for group in groups]
        self._given = [list(group["params"]) for group in self.optimizer.param_groups]
        self._known = [dict(group) for group in groups]
        self.opt.state = defaultdict(dict)

    def bind(self, network: nn.Module) -> None:
        """Binds opt to the masked layers that network has left, as optimizer is bound."""
        layers = [m for m in network.modules() if isinstance(m, MaskBuffers)]
        held = {id(p) for group in self.opt.param_groups for p in group["params"]}
        if any(id(p) in held for layer in layers for p in layer.parameters(recurse=False)):
            how = None if isinstance(self.opt, MaskedStep) else next(iter(self.freeze.values()), "dead")
            bind(self.opt, network, freeze=how)

    def blocks(self, cut: Cut) -> Iterator[tuple[Tensor, Block]]:
        """Each parameter of the model that has parts, once for each part."""
        for group in self._given:
            for p in group:
                part = cut.parts.get(id(p))
                if part is not None:
                    yield p, part.block
                    for block in part.carried if p.requires_grad else ():
                        yield p, block

    def gather(self, cut: Cut) -> list[Block]:
        """Fills the state of opt; returns the blocks of it that are yet to be gathered."""
        found = []
        state = self.optimizer.state
        for p, block in self.blocks(cut):
            if p not in state:
                continue
            own: dict[str, Any] = {}
            for key, value in state[p].items():
                if not isinstance(value, Tensor):
                    own[key] = value
                elif value.shape == p.shape:
                    of_state = cut.state_of(block, key, value)
                    found.append(of_state)
                    own[key] = of_state.part
                elif value.numel() == 1:
                    own[key] = value.clone()
                else:
                    raise _uneven(self.optimizer, key, value, self._names.get(id(p), ""))
            self.opt.state[block.part] = own
        for group in self._given:
            for p in group:
                if id(p) not in cut.parts and p in state:
                    self.opt.state[p] = state[p]
        return found

    @torch.no_grad()
    def scatter(self, cut: Cut) -> list[Block]:
        """Gives numbers back to the state of optimizer; returns the blocks that are yet to be scattered."""
        found: list[Block] = []
        state = self.optimizer.state
        wrong: Exception | None = None
        for p, block in self.blocks(cut):
            for key, value in self.opt.state.get(block.part, {}).items():
                if not isinstance(value, Tensor):
                    state[p][key] = value
                elif value.shape == block.part.shape:
                    whole = state[p].get(key)
                    if whole is None:
                        whole = state[p][key] = torch.zeros_like(p, dtype=value.dtype)
                    of_state = cut.state_of(block, key, whole)
                    of_state.part = value
                    found.append(of_state)
                elif value.numel() == 1:
                    old = state[p].get(key)
                    if isinstance(old, Tensor) and old.shape == value.shape and old.device == value.device:
                        old.copy_(value)
                    else:
                        state[p][key] = value.clone()
                else:
                    wrong = _uneven(self.optimizer, key, value, self._names.get(id(p), ""))
        for group in self._given:
            for p in group:
                if id(p) not in cut.parts and self.opt.state.get(p):
                    state[p] = self.opt.state[p]
        self.sync()
        self.optimizer.__dict__.update(_numbers_of(self.opt))
        if wrong is not None:
            raise wrong
        return found

    def check(self) -> None:
        """Raises RuntimeError if a parameter left optimizer or opt, or came."""
        pairs = (("optimizer", self.optimizer, self._given), ("opt", self.opt, self._expected))
        for about, optimizer, expected in pairs:
            have = {id(p) for group in optimizer.param_groups for p in group["params"]}
            had = {id(p): p for group in expected for p in group}
            if gone := [p for identity, p in had.items() if identity not in have]:
                raise RuntimeError(
                    f"compacted: {about}: expected the parameters that it had on entering, got them without "
                    f"{self._names.get(id(gone[0]), f'one of shape {tuple(gone[0].shape)}')}"
                )
            if have - had.keys():
                raise RuntimeError(f"compacted: {about}: expected the parameters that it had on entering, got more")

    def sync(self) -> None:
        """Takes over options that changed since the last time, such as a learning rate, in either direction."""
        for theirs, ours, known in zip(self.optimizer.param_groups, self.opt.param_groups, self._known, strict=False):
            for key in {**theirs, **ours}:
                if key in ("params", "param_names"):
                    continue
                if key in theirs and not _same_value(theirs[key], known.get(key)):
                    ours[key] = theirs[key]
                elif key in ours and not _same_value(ours[key], known.get(key)):
                    theirs[key] = ours[key]
                known[key] = ours.get(key)

    def give_zeros(self) -> None:
        for block, small, zeros in self._carried:
            block.grad = None if small.grad is None else zeros


class _Before:
    """What opt does before each step, with the gradients there; holds the twin weakly, since opt is a part of it."""

    def __init__(self, twin: Twin) -> None:
        self.twin = weakref.ref(twin)

    def __call__(self, *_: Any) -> None:
        if (twin := self.twin()) is not None:
            twin.sync()
            twin.give_zeros()


class _After(_Before):
    """Tells schedulers over optimizer that it made a step."""

    def __call__(self, *_: Any) -> None:
        if (twin := self.twin()) is not None:
            twin.optimizer._opt_called = True  # type: ignore[attr-defined]


def _same(optimizer: torch.optim.Optimizer) -> Any:
    """An optimizer with the attributes of another, but with groups, state and hooks of its own."""
    made = type(optimizer).__new__(type(optimizer))
    own = {key: value for key, value in optimizer.__dict__.items() if key not in _NOT_SHARED}
    own |= {key: OrderedDict() for key, value in own.items() if key.startswith("_optimizer_") and "hooks" in key}
    own |= {"state": defaultdict(dict), "param_groups": []}
    if isinstance(optimizer, MaskedStep):
        own["updates"] = {}
    made.__dict__.update(own)
    return made


def _numbers_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Numbers that an optimizer of the user's keeps in attributes, such as a count of its steps."""
    return {key: value for key, value in optimizer.__dict__.items() if type(value) in (int, float) and key[0] != "_"}


def _same_value(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    return type(a) is type(b) and bool(a == b)


def _uneven(optimizer: torch.optim.Optimizer, key: str, value: Tensor, name: str) -> TypeError:
    return TypeError(
        f"compacted: optimizer: expected state that is a number or shaped like its parameter, got {key} of shape "
        f"{tuple(value.shape)} for {name} in {type(optimizer).__name__}: train in masked mode"
    )
