"""Compaction: a network's compacted form, kept from one mask change to the next."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.narrow import LITERALS
from ..graph.narrower import Narrower, read_masks
from ..graph.trace import trace
from ..graph.verify import Misfit, check_alike, check_training, only_trains
from ..nn.adapted import computed_layers
from ..nn.example import Example
from ..nn.mask_buffers import MaskBuffers
from ..nn.masked_filters import MaskedFilters
from ..nn.masked_norm import MaskedNorm
from ..ops.parts import gather_parts, scatter_parts
from ..optim.unwrap import unwrap
from .cut import Block, Cut, has_holes
from .tree import Restructured, Tree
from .twin import Twin

KEPT = 4  # sets of masks whose small tensors are kept


class Compaction:
    """The small plain network that trains in a masked one's stead between two mask changes.

    `compacted` is the short way to use it. The graph is traced once, when it is first needed; then a change of masks
    only changes lists of channels.

    Args:
        model: A network with masked layers.
        example_input: What model takes (see Example).
        optimizer: Trains model's parameters; a wrapper stands for the one inside.
        align: Widths are multiples of it where the network allows that, filled up with frozen zeros. None: 8 on CUDA,
            else 1.

    Attributes:
        net: The small network: the user's modules with small plain layers. The same object at each entering.
        opt: Its optimizer, None without one.
        cut: The set of masks that is or was entered last: the same object whenever the same masks come back.
        wide: By name of a layer that stays a masked layer of full width, why.
    """

    def __init__(
        self, model: nn.Module, example_input: Any, optimizer: Any = None, *, align: int | None = None
    ) -> None:
        if align is not None and (type(align) is not int or align < 1):
            raise ValueError(f"compacted: align: expected a positive number or None, got {align!r}")
        self._model = weakref.ref(model)
        self.example = Example.of("compacted", example_input)
        self.align = align
        self._twin = None if optimizer is None else Twin(unwrap("compacted", optimizer, model))
        if self._twin is not None:
            own = set(model.parameters())
            if not any(p in own for group in self._twin.optimizer.param_groups for p in group["params"]):
                raise ValueError("compacted: optimizer: expected parameters of the model, got only others")
            self._watch = self._twin.optimizer.register_step_post_hook(_Forget(self))
        self._tree: Tree | None = None
        self._cuts: OrderedDict[Any, Cut] = OrderedDict()
        self._versions: dict[int, tuple[Tensor, int]] = {}  # of what was written back: the tensor and its version
        self._checked: set[tuple[str, bool, bool]] = set()  # what was narrowed in a network that was compared
        self._gradients: list[tuple[nn.Parameter, Tensor | None]] = []  # of shared parameters, from before
        self.entered = False
        self.cut: Cut | None = None
        self.wide: dict[str, str] = {}

    @property
    def model(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise RuntimeError("compacted: model: expected the network that it was made for, which is gone")
        return model

    @property
    def net(self) -> nn.Module:
        self.prepare()
        assert self._tree is not None
        return self._tree.network

    @property
    def opt(self) -> torch.optim.Optimizer | None:
        return None if self._twin is None else self._twin.opt

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        return None if self._twin is None else self._twin.optimizer

    # ---- once for a network

    def prepare(self) -> None:
        """Traces the network, if that is still to be done; raises ValueError where it cannot be compacted."""
        model = self.model  # raises if it is gone
        if self._tree is not None:
            try:
                self._tree.check()
                if self._computed | self._stays(self._watched) == self.wide:
                    return
            except Restructured:
                pass
        self._build(model, literal=0)

    def _build(self, model: nn.Module, literal: int) -> None:
        watched = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, MaskBuffers)]
        self._computed = {name: "it computes its weight" for name in computed_layers(model)}
        stays = self._computed | self._stays([(name, layer) for name, layer in watched if name not in self._computed])
        traced = trace("compacted", model, self.example)
        self._traced = traced if only_trains(traced) else None  # layers that the trace did not come by
        self._narrower = Narrower.of(traced, model, stays=tuple(stays), literal=literal)
        self._tree = Tree(model, [name for name in stays if isinstance(model.get_submodule(name), MaskBuffers)])
        self._literal = literal
        self.wide = stays
        self._cuts.clear()
        self._versions.clear()
        self._checked.clear()
        self._trained: set[Cut] = set()  # for which the training forward was tried
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._masked_net = any(isinstance(m, MaskBuffers) for m in self._tree.network.modules())
        self._watched = watched
        self._seen: list[tuple[str, MaskBuffers, str, Tensor, int]] = []
        self._freeze: dict[int, str] = {}

    def _stays(self, layers: list[tuple[str, MaskBuffers]]) -> dict[str, str]:
        """By name of a masked layer that keeps its width under these masks, why."""
        found: dict[str, str] = {}
        freeze = {} if self._twin is None else self._twin.freeze
        for name, layer in layers:
            if name in self._computed:
                continue
            layer._refresh_if_edited()
            cls: Any = type(layer)
            owner: Any = next(base for base in cls.__mro__ if "plain_class" in vars(base))
            if cls.forward is not owner.forward:
                found[name] = f"{cls.__name__} has a forward of its own"
            elif isinstance(layer, MaskedFilters) and layer.grad_scale is not None:
                found[name] = "its gradients are scaled, by grad_scale"
            elif layer._all_live:
                continue
            elif isinstance(layer, MaskedNorm):
                if layer.weight is None:
                    found[name] = "it has no weight that could be zero"
            elif layer.weight_grad == "dense":
                found[name] = 'dead filters train, by weight_grad="dense"'
            elif freeze.get(id(layer.weight)) == "hard" and has_holes(layer):
                found[name] = 'single dead kernels move, by freeze="hard"'
        return found

    # ---- in and out

    @torch.inference_mode(False)  # what is made here is to train
    def enter(self, *, verify: bool = False, reuse: bool = False) -> tuple[nn.Module, torch.optim.Optimizer | None]:
        """Makes net small, by the masks that model has now, and gives it and opt the model's values.

        Args:
            verify: Whether to compare net with model, in eval mode on the example.
            reuse: Whether parameters and optimizer state that nothing has written to since they were written back,
                under the same masks, are taken for unchanged. Neither a write through .data nor a fused optimizer's
                step shows. Statistics are always read again: batch norm does not count its writes either.

        Returns:
            net and opt.
        """
        if self.entered:
            raise RuntimeError("compacted: expected a network that is not compacted already: leave the first `with` "
                               "block (or the method's compacted mode: method.leave()) before")  # fmt: skip
        self.prepare()
        self._enter(reuse)
        try:
            if not self._cut.narrowed <= self._checked:
                self._check_once()
            elif verify:
                self._verify()
            if self._traced is not None and self._cut not in self._trained:
                check_training(self.model, self.net, self._traced)
                self._trained.add(self._cut)
        except BaseException as error:
            self._close()
            if isinstance(error, Misfit):
                raise ValueError(
                    f"compacted: model: expected a network whose forward serves small layers, but {error}: train in "
                    "masked or live mode"
                ) from None
            raise
        return self.net, self.opt

    @property
    def _cut(self) -> Cut:
        assert self.cut is not None
        return self.cut

    def _enter(self, reuse: bool) -> None:
        assert self._tree is not None
        before, cut = self.cut, self._find_cut()
        self.cut = cut
        blocks = [part.block for part in cut.parts.values()]
        if self._twin is not None:
            self._twin.enter(cut, self._names)
            blocks += [block for part in cut.parts.values() for block in part.carried]
            blocks += self._twin.gather(cut)
        known = {id(b) for b in blocks if self._is_current(b.whole)} if reuse and before is cut else set()
        known -= {id(part.block) for part in cut.parts.values() if not isinstance(part.block.part, nn.Parameter)}
        stale = [b for b in blocks if id(b) not in known]
        _gather(stale)
        gathered = {id(block) for block in stale}
        for part in cut.parts.values():
            part.block.part.requires_grad_(part.block.whole.requires_grad)
            if id(part.block) in gathered:
                if part.name.endswith("running_var") and part.live is not None:
                    part.block.part.masked_fill_(~part.live.to(part.block.part.device), 1)
            part.block.part.grad = None
        self._tree.fill(cut)
        if self._twin is not None:
            self._twin.bind(self._tree.network)
        own = {id(part.block.part) for part in cut.parts.values()}
        self._gradients = [(p, p.grad) for p in self._tree.network.parameters() if id(p) not in own]
        for p, _ in self._gradients:
            p.grad = None
        self.entered = True

    def _close(self) -> None:
        """Ends compacted mode: gradients and modes of what both networks have are as before."""
        assert self._tree is not None
        self.entered = False
        for p, grad in self._gradients:
            p.grad = grad
        self._gradients = []
        self._tree.restore_modes()

    def _is_current(self, whole: Tensor) -> bool:
        known = self._versions.get(id(whole))
        return known is not None and known[0] is whole and known[1] == whole._version

    @torch.inference_mode(False)
    def write_back(self) -> None:
        """Gives model and optimizer what net and opt have; training goes on."""
        if not self.entered:
            raise RuntimeError("compacted: expected a network that is compacted, got one that is not: call enter()")
        assert self._tree is not None
        cut = self._cut
        wrong: Exception | None = None
        blocks = [part.block for part in cut.parts.values()]
        if self._twin is not None:
            blocks += [block for part in cut.parts.values() for block in part.carried]
            try:
                blocks += self._twin.scatter(cut)
            except TypeError as error:
                wrong = error
        _scatter(blocks)
        self._tree.give_back(cut.small())
        self._versions = {id(b.whole): (b.whole, b.whole._version) for b in blocks}
        if wrong is not None:
            raise wrong

    def leave(self) -> None:
        """Writes everything back and ends it; raises RuntimeError if masks or parameters changed meanwhile."""
        changed = self._changed_layer()
        try:
            self.write_back()
        finally:
            self._close()
        if changed is not None:
            raise RuntimeError(
                f"compacted: {changed}: expected masks that stay as they are as long as the network is compacted, got "
                "others: what was trained is written back; change masks between two `with` blocks"
            )
        try:
            assert self._tree is not None
            self._tree.check()
        except Restructured:
            raise RuntimeError("compacted: model: expected the modules and parameters that it had on entering, got "
                               "others: what was trained went to the former ones") from None  # fmt: skip
        if self._twin is not None:
            self._twin.check()

    def release(self) -> None:
        """Takes the hook off the model's optimizer; the compaction is not to be entered any more."""
        if self._twin is not None:
            self._watch.remove()

    # ---- masks

    def _changed_layer(self) -> str | None:
        for name, layer, which, mask, version in self._seen:
            layer._refresh_if_edited()
            if layer._masks[which] is not mask or mask._version != version:
                return name or type(layer).__name__
        return None

    def _find_cut(self) -> Cut:
        """The small tensors for the masks that the model has."""
        assert self._tree is not None
        freeze = {} if self._twin is None else self._twin.freeze
        is_known = self.cut is not None and self.cut in self._cuts.values() and freeze == self._freeze
        if is_known and self._seen and self._changed_layer() is None:
            return self._cut
        seen = [
            (name, layer, which, mask, mask._version) for name, layer in self._watched
            for which, mask in layer._masks.items()
        ]  # fmt: skip
        masks = read_masks(self.model, self._watched)
        arrays = [array for of in masks.values() for array in (of.rows, of.columns, of.kernels)]
        key = [b"" if array is None else array.tobytes() for array in arrays]
        if "hard" in freeze.values():  # then it matters which of the dead filters are hard-dead
            key += [layer._masks["hard_mask"].cpu().numpy().tobytes() for _, layer in self._watched
                    if "hard_mask" in layer._masks]  # fmt: skip
        found = (tuple(key), tuple(freeze.items()))
        if found not in self._cuts:
            on_cuda = any(layer._device_of_parameters().type == "cuda" for _, layer in self._watched)
            align = self.align or (8 if on_cuda else 1)
            try:
                narrowing = self._narrower.narrow(masks, align=align)
            except ValueError as error:  # layers that share a parameter have different masks
                raise ValueError(f"compacted: {error}") from None
            tensors = self._tree.named_tensors()
            layers = [layer for name, layer in self._watched if name not in self.wide]
            self._cuts[found] = Cut(narrowing, tensors, layers, freeze)
            while len(self._cuts) > KEPT:
                self._trained.discard(self._cuts.popitem(last=False)[1])
        self._cuts.move_to_end(found)
        self._seen, self._freeze = seen, freeze
        return self._cuts[found]

    # ---- what others ask

    def rows(self, name: str) -> Tensor | None:
        """Which filters of a layer net computes, int64, -1 for frozen zeros; None: all of them."""
        part = self._cut.by_name.get(f"{name}.weight" if name else "weight")
        layer = self.model.get_submodule(name)
        if part is None or not isinstance(layer, nn.ConvTranspose2d):
            return None if part is None else part.block.rows
        if layer.groups == 1:
            return part.block.columns
        if part.block.rows is None:
            return None
        inputs, filters = layer.in_channels // layer.groups, layer.out_channels // layer.groups
        groups = part.block.rows[::inputs] // inputs  # which stay as a whole
        return (groups[:, None] * filters + torch.arange(filters)).flatten()

    def widen(self, name: str, small: Tensor) -> Tensor:
        """A tensor shaped like a parameter of the model, from one shaped like net's: zero where net has nothing."""
        return self.widened({name: small})[name]

    def widened(self, small: Mapping[str, Tensor], into: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What `widen` returns, for several parameters by name.

        into: What earlier calls returned under the same masks: it is written to again, and gets what is missing.
        """
        found, blocks = dict(small), []
        into = {} if into is None else into
        for name, tensor in small.items():
            if (part := self._cut.by_name.get(name)) is not None:
                b = part.block
                if name not in into or into[name].dtype != tensor.dtype:
                    into[name] = torch.zeros_like(b.whole, dtype=tensor.dtype, requires_grad=False)
                found[name] = into[name]
                blocks.append(Block(found[name], tensor, b.rows, b.columns, b.merged))
        _scatter(blocks)
        return found

    def narrowed(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The reverse of `widened`: tensors shaped like net's parameters, with zeros for frozen ones."""
        found, blocks, parts = dict(whole), [], []
        for name, tensor in whole.items():
            if (part := self._cut.by_name.get(name)) is not None:
                b = part.block
                found[name] = torch.empty_like(b.part, dtype=tensor.dtype, requires_grad=False)
                blocks.append(Block(tensor, found[name], b.rows, b.columns, b.merged))
                parts.append((part, found[name]))
        _gather(blocks)
        for part, tensor in parts:
            if part.live is not None:
                tensor.masked_fill_(~part.live.to(tensor.device), 0)
        return found

    # ---- checks

    def _check_once(self) -> None:
        """Compares a network in which more is narrowed than before with the model.

        A number in the forward may be a constant after all.
        """
        first: Misfit | None = None
        while True:
            try:
                self._verify()
                break
            except Misfit as misfit:
                first = first or misfit
                if self._literal == LITERALS[-1]:
                    raise first from None
                self._close()
                self._build(self.model, literal=self._literal + 1)
                self._enter(False)
        self._checked |= self._cut.narrowed

    def _verify(self) -> None:
        check_alike(self.model, self.net, self.example)


class _Forget:
    """After steps of the model's optimizer nothing counts as unchanged: not all of torch's kernels count versions."""

    def __init__(self, compaction: Compaction) -> None:
        self.compaction = weakref.ref(compaction)

    def __call__(self, *_: Any) -> None:
        if (compaction := self.compaction()) is not None:
            compaction._versions.clear()


def _gather(blocks: list[Block]) -> None:
    if blocks:
        gather_parts(*_lists(blocks, lambda b: b.part, lambda b: b.whole))
        for block in blocks:
            block.punch()


def _scatter(blocks: list[Block]) -> None:
    if blocks:
        scatter_parts(*_lists(blocks, lambda b: b.whole, lambda b: b.filled()))


def _lists(blocks: list[Block], *tensors: Callable[[Block], Tensor]) -> Any:
    """Lists of what tensors give of each block, of the rows and of the columns."""
    of_tensors = ([b.with_rows(tensor(b)) for b in blocks] for tensor in tensors)
    return *of_tensors, [b.rows for b in blocks], [b.columns for b in blocks]
