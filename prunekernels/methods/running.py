"""Running: whether a method's network trains as it is or as the small plain network, and work around its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..compaction.compaction import Compaction
from ..nn.mask_buffers import MaskBuffers
from ..nn.masked_filters import MaskedFilters
from ..optim.hooks import before_step
from . import arguments
from .step_work import IdleInCopies, Registered, StepWork, always

MODES = ("masked", "compacted")


class Running:
    """Base of Method: the network and the optimizer to train with, and hooks that serve either form of them.

    In compacted mode the small network takes the model's place (see Compaction) as long as masks kill anything. It is
    entered when `net` or `opt` is read, and left where masks change.
    """

    model: nn.Module
    optimizer: Optimizer
    layers: dict[str, MaskedFilters]
    compaction: Compaction | None  # None: compacted mode was never asked for

    def _start_running(self, mode: str, example_input: Any) -> None:
        self.compaction = None
        self._example_input, self._mode = example_input, "masked"
        self._net, self._opt = self.model, self.optimizer
        self._works: dict[str, list[StepWork]] = {"before": [], "after": []}
        self._forward_hooks: dict[int, tuple[str, Callable[..., None], list[Any]]] = {}  # by key: module's name, hook
        self._guards: list[Any] = []
        self._narrowed: list[tuple[str, nn.Parameter, nn.Parameter]] = []  # name, the model's, the small network's
        self._wide: dict[str, Tensor] = {}  # by parameter's name, its gradient at full width
        self._training: dict[str, bool] = {}  # by module's name, as of entering
        self._stays_whole: bool | None = None  # None: masks may have changed
        self._may_reuse = False
        self.mode = mode

    # ---- the mode

    @property
    def mode(self) -> str:
        """How the network runs: "masked" as it is, in masked or live mode, "compacted" as the small one. May be set."""
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        op = type(self).__name__
        arguments.expect(op, mode in MODES, "mode", f"one of {', '.join(MODES)}", repr(mode))
        is_known = mode == "masked" or self._example_input is not None
        arguments.expect(op, is_known, "example_input", "an input, which mode='compacted' needs", None)
        self.leave()
        if mode == "compacted" and self.compaction is None:
            self.compaction = Compaction(self.model, self._example_input, self.optimizer)
            self._watch()
        self._mode = mode

    @property
    def net(self) -> nn.Module:
        """The network to train with now: the model or, in compacted mode while anything is dead, the small one."""
        return self._net if self._entered() else self.model

    @property
    def opt(self) -> Optimizer:
        """The optimizer of `net`: that of the model or one of the same class over the small network."""
        return self._opt if self._entered() else self.optimizer

    @property
    def is_compacted(self) -> bool:
        """Whether the small network is what trains now; asking does not enter it."""
        return self.compaction is not None and self.compaction.entered

    def write_back(self) -> None:
        """Gives model and optimizer what `net` and `opt` have; training goes on. Nothing to do in masked mode."""
        if self.is_compacted:
            self._small.write_back()

    def leave(self) -> None:
        """Gives model and optimizer what was trained, to be read, changed or trained; reading `net` enters again."""
        self._leave()
        self._may_reuse = False

    def rows(self, name: str) -> Tensor | None:
        """Which filters of a layer (channels of a norm) `net` computes.

        Args:
            name: The layer or norm.

        Returns:
            int64 on the CPU, -1 for a filter that only fills up with zeros. None: all of them, in order.
        """
        return self._small.rows(name) if self.is_compacted else None

    def gradient(self, name: str) -> Tensor | None:
        """The gradient of a layer's weight in the network that trains now, filters first, those that `rows` tells."""
        network = self._net if self.is_compacted else self.model
        grad: Tensor | None = network.get_submodule(name).weight.grad  # type: ignore[union-attr, assignment]
        return None if grad is None else self.layers[name].filters_first(grad)

    def _serves(self) -> bool:
        """Whether the small network may take the model's place at this time, if masks kill anything."""
        return True

    # ---- in and out

    @property
    def _small(self) -> Compaction:
        assert self.compaction is not None
        return self.compaction

    def _entered(self) -> bool:
        """Whether the small network trains now; enters it where that is due."""
        if self.is_compacted:
            return True
        if self._stays_whole is None:
            self._stays_whole = self._mode == "masked" or not (self._serves() and _kills(self.model))
        if not self._stays_whole:
            self._enter()
        return not self._stays_whole

    def _enter(self) -> None:
        small = self._small
        try:
            net, opt = small.enter(reuse=self._may_reuse)
        except ValueError as error:
            op = type(self).__name__
            raise ValueError(f"{op}: mode: expected 'masked', as this network has no small form: {error}") from error
        assert opt is not None
        self._net, self._opt, self._may_reuse = net, opt, True
        parameters, modules = dict(net.named_parameters()), dict(net.named_modules())
        both = ((name, p, parameters.get(name)) for name, p in self.model.named_parameters())
        self._narrowed = [(name, p, other) for name, p, other in both if other is not None and other is not p]
        self._training = {name: module.training for name, module in modules.items()}
        for name, hook, handles in self._forward_hooks.values():
            if modules[name] is not self.model.get_submodule(name):
                handles.append(modules[name].register_forward_hook(hook))

    def _leave(self) -> None:
        """Leaves the small network, if it is entered: before masks, weights or optimizer state are read or change."""
        self._stays_whole = None
        if not self.is_compacted:
            return
        self._wide = {}
        modules = dict(self.model.named_modules())
        for name, module in self._net.named_modules():  # net.train() or net.eval() since entering
            before = self._training[name]
            if module.training != before and modules[name].training == before:
                modules[name].training = module.training
        for *_, handles in self._forward_hooks.values():
            while handles:
                handles.pop().remove()
        self._small.leave()

    def _watch(self) -> None:
        """Hooks that keep what is read, loaded or stepped at the wrong time from being stale."""
        opt, optimizer, model = self._small.opt, self.optimizer, self.model
        assert opt is not None
        write, leave, on_step = IdleInCopies(self.write_back), IdleInCopies(self.leave), IdleInCopies(self._on_step)
        self._guards = [
            before_step(opt, lambda: self._work_on_small("before")),
            opt.register_step_post_hook(lambda *_: self._work_on_small("after")),
            optimizer.register_step_pre_hook(on_step),
            optimizer.register_state_dict_pre_hook(write),
            optimizer.register_load_state_dict_pre_hook(leave),
            model.register_state_dict_pre_hook(write),
            model.register_load_state_dict_pre_hook(leave),
        ]

    def _on_step(self) -> None:
        """Before a step of the model's optimizer: that is wrong while the small network trains."""
        if self.is_compacted:
            raise RuntimeError(
                f"{type(self).__name__}: optimizer: expected steps of method.opt, over method.net, as the network is "
                "compacted, got one of the model's own optimizer: read both in each step, or call method.leave() first"
            )

    def _stop_running(self) -> None:
        self.mode = "masked"
        for guard in self._guards:
            guard.remove()
        if self.compaction is not None:
            self.compaction.release()
        self._guards, self.compaction = [], None

    # ---- hooks

    def before_step(
        self,
        work: Callable[[], None],
        *,
        when: Callable[[], bool] | None = None,
        full_width: bool = True,
        reads_weights: bool = True,
        changes_gradients: bool = True,
    ) -> Registered:
        """Registers work to run before each step of the optimizer, after its closure.

        In compacted mode it runs before a step of `opt`, and finds the gradients, at full width, in the model's own
        parameters: zero where the small network has nothing.

        Args:
            work: Takes and returns nothing.
            when: Whether the work is to be done at this step. None: always.
            full_width: Whether it needs the model's parameters; otherwise it asks for `gradient` and `rows`.
            reads_weights: Whether it reads the model's weights, so that they are written back before.
            changes_gradients: Whether it changes the gradients that it finds.

        Returns:
            A handle, whose `remove` ends it.
        """
        done = StepWork(work, when or always, full_width, reads_weights, changes_gradients)
        self._works["before"].append(done)
        handle = before_step(self.optimizer, done.run)
        return Registered(handle.remove, lambda: self._works["before"].remove(done))

    def after_step(
        self, work: Callable[[], None], *, when: Callable[[], bool] | None = None, reads_weights: bool = True
    ) -> Registered:
        """Registers work to run after each step of the optimizer. Arguments are those of `before_step`."""
        done = StepWork(work, when or always, True, reads_weights, False)
        self._works["after"].append(done)
        handle = self.optimizer.register_step_post_hook(done.run)
        return Registered(handle.remove, lambda: self._works["after"].remove(done))

    def forward_hook(self, name: str, hook: Callable[..., None]) -> Registered:
        """Registers a forward hook (module, args, output) on a module of the model and on its small counterpart.

        The small one's output has the channels that `rows` tells.
        """
        handle = self.model.get_submodule(name).register_forward_hook(hook)
        key, handles = handle.id, [handle]
        small: list[Any] = []
        self._forward_hooks[key] = (name, hook, small)

        def remove() -> None:
            for each in (*handles, *small):
                each.remove()
            self._forward_hooks.pop(key, None)

        return Registered(remove)

    def _work_on_small(self, time: str) -> None:
        for work in self._works[time] if self.is_compacted else ():
            if not work.when():
                continue
            if not work.full_width:
                work.work()
                continue
            if work.reads_weights:
                self._small.write_back()
            with self.full_gradients(changes=work.changes_gradients):
                work.work()

    @contextmanager
    def full_gradients(self, *, changes: bool = False, added: bool = False) -> Iterator[None]:
        """Within the block the model's parameters have the gradients of the small network, if that is entered.

        Args:
            changes: Whether the small network's gradients become what the model's are at the end. Otherwise they
                are only read.
            added: Whether gradients that the model's parameters have already are added to.
        """
        if not self.is_compacted:
            yield
            return
        before = [p.grad for _, p, _ in self._narrowed]
        into = {} if changes else self._wide
        grads = {name: small.grad for name, _, small in self._narrowed if small.grad is not None}
        whole = self._small.widened(grads, into)
        try:
            for name, p, _ in self._narrowed:
                grad = whole.get(name)
                if not added or p.grad is None:
                    p.grad = grad
                elif grad is not None:
                    p.grad = p.grad + grad
            yield
            if changes:
                new = self._small.narrowed({name: p.grad for name, p, _ in self._narrowed if p.grad is not None})
                for name, _, small in self._narrowed:
                    small.grad = new.get(name)
        finally:
            for (_, p, _), grad in zip(self._narrowed, before, strict=True):
                p.grad = grad


def _kills(model: nn.Module) -> bool:
    """Whether any mask of a network drops anything."""
    layers: Iterable[MaskBuffers] = (module for module in model.modules() if isinstance(module, MaskBuffers))
    for layer in layers:
        layer._refresh_if_edited()
        if not layer._all_live:
            return True
    return False
