"""MaskedSyncBatchNorm: nn.SyncBatchNorm whose dead channels are exactly zero, on GPUs and CPUs."""

from __future__ import annotations

import math
from typing import Any, overload

import torch
from torch import Tensor, nn

from ..live import LiveList, LiveTensor
from ..live.deferred import Deferred
from ..live.frames import never_inline, skip_frames
from ..ops.transforms import is_transformed
from .batch_norm import MaskedBatchNorm2d, live_factor, put_statistic
from .process_groups import HeldGroup, world_size
from .synced import Moments, Ranks, SyncedNorm, moments_of_all
from .tracing import as_leaf, is_exported, is_traced_by_fx


class MaskedSyncBatchNorm(MaskedBatchNorm2d):
    """nn.SyncBatchNorm in which a dead channel gives exact 0, keeps its running statistics and gets no gradient.

    In training on several processes the statistics of live channels are those of all processes' inputs, as if one
    process had the whole batch; everything else is as in `MaskedBatchNorm2d`. Unlike torch's layer it also works on
    CPUs (with gloo), for which it is no instance of `nn.SyncBatchNorm`: DistributedDataParallel refuses those there.
    Processes that have no images take part with an empty batch.

    Args:
        args: As in `nn.BatchNorm2d`.
        process_group: The processes that share statistics; None: all of them.
        kwargs: As in `nn.BatchNorm2d`.

    Attributes:
        channel_mask: As in `MaskedBatchNorm2d`.
        process_group: The processes that share statistics; None: all of them.
        plain_class: The class that `restore` makes of the layer. A subclass with a forward of its own sets it.

    Examples:
        >>> norm = pk.MaskedSyncBatchNorm(4)
        >>> norm.set_mask(torch.tensor([True, False, True, True]))
        >>> norm(torch.randn(2, 4, 5, 5))[:, 1].any().item()
        False
    """

    plain_class: type[nn.Module] = nn.SyncBatchNorm
    _plain = nn.SyncBatchNorm
    _called = "MaskedSyncBatchNorm"
    _alone = False  # see without_sync
    process_group: Any

    def __init__(self, *args: Any, process_group: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.process_group = process_group

    def forward(self, input: Tensor) -> Tensor:
        """Normalizes the live channels. input and result: [N, C, ...], plain or live."""
        if is_traced_by_fx(input):
            return as_leaf(self, input, MaskedSyncBatchNorm.forward)
        if self._syncs():
            if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
                return _eagerly(self, input)
            if is_exported() or is_transformed():
                raise RuntimeError(
                    f"{self._called}: expected eval mode, got training on {world_size(self.process_group)} processes, "
                    "which share statistics: neither exporters nor the transforms of torch.func take that"
                )
        if input.dim() == 4:
            return super().forward(input)
        self._check_channels(input)
        dense = input.to_dense() if isinstance(input, LiveTensor) else input
        planes = dense.reshape(*input.shape[:2], math.prod(input.shape[2:]), 1)
        return super().forward(planes).reshape(input.shape)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"{self._called}: input: expected [N, {self.num_features}, ...], got {list(input.shape)}")

    def _syncs(self) -> bool:
        return self.training and not self._alone and world_size(self.process_group) > 1

    def _has_kernel(self, x: Tensor) -> bool:
        return not self._syncs() and super()._has_kernel(x)

    @overload
    def _normalize(self, x: Tensor, channels: LiveList) -> Tensor: ...
    @overload
    def _normalize(self, x: Tensor, channels: LiveList, defer: bool) -> Tensor | Deferred: ...
    def _normalize(self, x: Tensor, channels: LiveList, defer: bool = False) -> Tensor | Deferred:
        if not self._syncs():
            return super()._normalize(x, channels, defer)
        update = self.track_running_stats
        factor = self._count_batch(update)
        rows = channels.rows(x.device)
        is_live = channels.is_live(x.device) if channels.is_padded else None
        ranks = Ranks(rows, is_live, self.num_features, self.process_group)
        weight, bias = (live_factor(p, rows, is_live) for p in (self.weight, self.bias))
        with torch.no_grad():
            moments = moments_of_all(x, ranks)
            if update:
                self._follow(moments, ranks, factor)
        return SyncedNorm.apply(x, weight, bias, moments, ranks, self.eps)  # type: ignore[no-any-return]

    def _follow(self, moments: Moments, ranks: Ranks, factor: float) -> None:
        """Moves the running statistics towards those of a batch, of channels of which there were values."""
        for name, new in (("running_mean", moments.mean), ("running_var", moments.unbiased_var)):
            running = self._buffers[name]
            if running is not None:
                old = running.index_select(0, ranks.rows)
                put_statistic(running, old.lerp(new.to(old.dtype), factor), ranks.rows, moments.values > 0)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        if state["process_group"] is not None:
            state["process_group"] = HeldGroup(state["process_group"])
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        held = state["process_group"]
        super().__setstate__(state | {"process_group": held.group} if isinstance(held, HeldGroup) else state)

    @classmethod
    def from_norm(cls, norm: nn.SyncBatchNorm) -> MaskedSyncBatchNorm:  # type: ignore[override]
        """A masked layer that shares the parameters and statistics of a plain norm, which stays as it is.

        Args:
            norm: An `nn.SyncBatchNorm`. `prunekernels.convert` serves more: subclasses, and weights that are computed.

        Returns:
            A `MaskedSyncBatchNorm` with all channels live.

        Examples:
            >>> norm = torch.nn.SyncBatchNorm(4)
            >>> pk.MaskedSyncBatchNorm.from_norm(norm).weight is norm.weight
            True
        """
        masked = super().from_norm(norm)  # type: ignore[arg-type]
        assert isinstance(masked, MaskedSyncBatchNorm)
        return masked

    def to_norm(self) -> nn.SyncBatchNorm:  # type: ignore[override]
        """A plain norm with copies of the parameters and statistics, in which dead channels have weight and bias 0.

        Returns:
            An `nn.SyncBatchNorm` that computes the same. In training on several processes it takes GPU tensors alone.

        Examples:
            >>> norm = pk.MaskedSyncBatchNorm(4)
            >>> norm.set_mask(torch.arange(4) > 0)
            >>> norm.to_norm().weight.tolist()
            [0.0, 1.0, 1.0, 1.0]
        """
        norm: Any = super().to_norm()
        return norm  # type: ignore[no-any-return]


class _Alone(nn.modules.batchnorm._BatchNorm):
    """nn.SyncBatchNorm on a single process."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


def without_sync(network: nn.Module) -> nn.Module:
    """Makes a private copy of a network one whose norms wait for no other process, in place."""
    for module in network.modules():
        if isinstance(module, MaskedSyncBatchNorm):
            module._alone = True
        elif type(module) is nn.SyncBatchNorm:
            module.__class__ = _Alone  # type: ignore[assignment]
    return network


def _eagerly(layer: MaskedSyncBatchNorm, x: Tensor) -> Tensor:
    """Outside of what is compiled, as ranks that exchange statistics have to wait for each other."""
    return MaskedSyncBatchNorm.forward(layer, x)


never_inline("MaskedSyncBatchNorm exchanges statistics with other processes", _eagerly)
skip_frames(_eagerly)
