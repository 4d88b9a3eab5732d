"""MaskedBatchNorm2d: nn.BatchNorm2d whose dead channels are exactly zero and cost nothing."""

from __future__ import annotations

from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import gather_channels
from ..live import LiveList, LiveTensor
from ..live.channel_list import align_of
from ..live.channel_ops import regroup, to_dense
from ..live.deferred import Deferred, Uses, normalize
from ..live.tensor import FilledTensor, can_flow, wrap, wrap_deferred
from ..ops import gpus
from ..ops.extension import has_extension, ops
from ..ops.transforms import is_recorded_or_transformed
from .lost_masks import remember_masks
from .mask_buffers import _check_plain
from .masked_norm import MaskedNorm
from .reparametrized import deep_copy, is_reparametrized, remove_reparametrization
from .tracing import as_leaf, is_exported, is_traced_by_fx, zeroed

_OPERATOR = "masked_batch_norm"
_BATCHES = "num_batches_tracked"
_SERVED = {  # inputs that masked_batch_norm takes, by type of device
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
_TAKES_PADDING = ("cuda",)  # where it leaves zeros in what lists are padded with


class MaskedBatchNorm2d(MaskedNorm, nn.BatchNorm2d):
    """nn.BatchNorm2d in which a dead channel gives exact 0, keeps its running statistics and gets no gradient.

    Behind a plain norm the channel of a dead filter is a constant (in training, the bias of the norm), so the layers
    downstream still have to read it; behind a masked norm it is zero.

    Args:
        args: As in `nn.BatchNorm2d`.
        kwargs: As in `nn.BatchNorm2d`.

    Attributes:
        channel_mask: Bool [C], True = live. A new layer has all channels live. The buffer of that name, in state dicts
            too, is float32, 1 = live. A state dict has zeros in dead entries of weight and bias.
        plain_class: The class that `restore` makes of the layer. A subclass with a forward of its own sets it.

    Examples:
        >>> norm = pk.MaskedBatchNorm2d(4)
        >>> norm.set_mask(torch.tensor([True, False, True, True]))
        >>> norm(torch.randn(2, 4, 5, 5))[:, 1].any().item()
        False
    """

    plain_class: type[nn.Module] = nn.BatchNorm2d
    _plain: type[Any] = nn.BatchNorm2d  # what from_norm takes and to_norm gives
    _called = "MaskedBatchNorm2d"
    num_features: int
    weight: nn.Parameter
    bias: nn.Parameter
    _own_state = (*MaskedNorm._own_state, "_uses")
    _uses: Uses

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._init_masks()

    def _note_seen(self) -> None:
        super()._note_seen()
        remember_masks(self)

    def forward(self, input: Tensor) -> Tensor:
        """Normalizes the live channels. input and result: [N, C, H, W], plain or live."""
        if is_traced_by_fx(input):
            return as_leaf(self, input, MaskedBatchNorm2d.forward)
        if is_exported():
            return self._exported_forward(input)
        if is_recorded_or_transformed():
            input = input.to_dense() if isinstance(input, LiveTensor) else input  # alone, as in MaskedConv2d
            return self._recorded_forward(input)
        self._bring_up_to_date()
        if isinstance(input, FilledTensor):
            input = input.unfilled("batch_norm")
        if self._all_live and type(input) is not LiveTensor and not self._syncs():
            return super().forward(input)
        self._check_channels(input)
        makes_live = self._flow and not self._forward_hooks and can_flow(input) and not self._channels.almost_full
        channels = self._channels
        if makes_live:
            padded = channels.aligned(align_of(input.device, self._align))
            makes_live, channels = not padded.full, channels if padded.full else padded
        if type(input) is LiveTensor:
            # A channel that is live here but arrives dead is normalized too: its zeros become the bias.
            compact = regroup(input.compact, input.live, channels)
        elif channels.full or (not makes_live and self._has_kernel(input)):
            return self._normalize(input, channels)
        elif channels.is_padded:
            compact = regroup(input, LiveList.all(self.num_features), channels)
        else:
            compact = gather_channels(input, channels.index(input.device))
        y = self._normalize(compact, channels, defer=makes_live and self._uses.worthwhile)
        if isinstance(y, Deferred):
            if isinstance(input, LiveTensor):
                y.guard(input)
            return wrap_deferred(y, channels)
        return wrap(y, channels) if makes_live else to_dense(y, channels)

    def _check_channels(self, input: Tensor) -> None:
        self._check_input_dim(input)
        if input.shape[1] != self.num_features:
            raise ValueError(f"{self._called}: input: expected {self.num_features} channels, got {list(input.shape)}")

    def _mask_tensor(self) -> Tensor:
        """Bool [C], read from the buffer: what torch records or transforms then follows the mask."""
        return self._public_mask("channel_mask")

    def _recorded_forward(self, x: Tensor) -> Tensor:
        """The norm at full width, for compilers and transforms: neither sizes nor Python values depend on the mask."""
        self._check_channels(x)
        live, zero = self._mask_tensor(), x.new_zeros(())
        planes = live.view(1, -1, 1, 1)
        weight, bias = (None if p is None else torch.where(live, p, zero.to(p.dtype)) for p in (self.weight, self.bias))
        y = self._normalize_all(torch.where(planes, x, zero), live, weight, bias)
        return torch.where(planes, y, zero)

    def _normalize_all(self, x: Tensor, live: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The norm of all channels, of which the running statistics of live ones move. live: bool [C]."""
        mean, var, batches = (self._buffers[name] for name in ("running_mean", "running_var", _BATCHES))
        update = self.training and self.track_running_stats
        if update and batches is not None:
            batches.add_(1)
        if mean is None or var is None or (self.training and not update):
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        if not self.training:
            mean, var = torch.where(live, mean, 0), torch.where(live, var, 1)
            return F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)
        factor: float | Tensor = self.momentum or 0.0
        if self.momentum is None and batches is not None:
            factor = 1.0 / batches.to(mean.dtype)
        of_batch = torch.zeros_like(mean), torch.zeros_like(var)  # the momentum of 1 replaces them
        y = F.batch_norm(x, *of_batch, weight, bias, True, 1.0, self.eps)
        with torch.no_grad():
            for running, new in zip((mean, var), of_batch, strict=True):
                running.copy_(torch.where(live, factor * new + (1 - factor) * running, running))
        return y

    def _exported_forward(self, x: Tensor) -> Tensor:
        """The norm in torch's own operators; in eval mode one batch norm, with zeros for what is dead."""
        live, mean, var = self._public_mask("channel_mask"), self.running_mean, self.running_var
        weight, bias = (None if p is None else zeroed(live, p) for p in (self.weight, self.bias))
        if not self.training and mean is not None:
            y = F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)
            return y if weight is not None and bias is not None else zeroed(live.view(1, -1, 1, 1), y)
        if mean is None or var is None or not self.track_running_stats:
            return zeroed(live.view(1, -1, 1, 1), F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps))
        of_batch = torch.zeros_like(mean), torch.zeros_like(var)  # the momentum of 1 replaces them
        y = F.batch_norm(x, *of_batch, weight, bias, True, 1.0, self.eps)
        with torch.no_grad():
            batches: Tensor = self._buffers[_BATCHES].add_(1)  # type: ignore[union-attr]
            factor = 1.0 / batches.to(mean.dtype) if self.momentum is None else self.momentum
            for running, new in zip((mean, var), of_batch, strict=True):
                running.copy_(torch.where(live, factor * new + (1 - factor) * running, running))
        return zeroed(live.view(1, -1, 1, 1), y)

    def _derive(self) -> None:
        super()._derive()
        self._uses = Uses()

    @overload
    def _normalize(self, x: Tensor, channels: LiveList) -> Tensor: ...
    @overload
    def _normalize(self, x: Tensor, channels: LiveList, defer: bool) -> Tensor | Deferred: ...
    def _normalize(self, x: Tensor, channels: LiveList, defer: bool = False) -> Tensor | Deferred:
        """The norm of the live channels, [N, channels.count, H, W], which have been gathered; where there is a kernel
        for x, also of full width, with zeros in dead channels. defer: if the kernel allows it.
        """
        buffers, weight, bias = self._buffers, self.weight, self.bias  # Module's __getattr__ costs 0.5 us a name
        running_mean, running_var = buffers["running_mean"], buffers["running_var"]
        update = self.training and self.track_running_stats
        factor = self._count_batch(update)
        by_batch = self.training or running_mean is None
        if not (update or not by_batch):
            running_mean = running_var = None
        statistics = (weight, bias, running_mean, running_var)
        if self._has_kernel(x) and (not channels.is_padded or x.device.type in _TAKES_PADDING):
            index = channels.features(x.device) if channels.is_padded else channels.index(x.device)
            rest = (x, *statistics, index, self.num_features, by_batch, factor, self.eps)
            return normalize(*rest, self._uses) if defer else ops.masked_batch_norm(*rest)[0]
        return _by_torch(x, *statistics, channels, by_batch, factor, self.eps, update)

    def _count_batch(self, update: bool) -> float:
        """Counts a batch, if running statistics follow it; returns its share of them."""
        batches = self._buffers[_BATCHES]
        if update and batches is not None:
            batches.add_(1)
            if self.momentum is None:
                return 1.0 / float(batches)
        return self.momentum or 0.0

    def _syncs(self) -> bool:
        """Whether the statistics are of several processes now."""
        return False

    def _has_kernel(self, x: Tensor) -> bool:
        """Whether the operator serves this input; otherwise torch's batch norm does."""
        if x.dtype not in _SERVED.get(x.device.type, ()) or x.numel() < 2 or not has_extension():
            return False
        if x.is_cuda and not (gpus.has_kernel(_OPERATOR) and x.is_contiguous(memory_format=torch.channels_last)):
            return False
        statistics = (self._buffers["running_mean"], self._buffers["running_var"], self.weight, self.bias)
        return all(t is None or t.dtype == torch.float32 for t in statistics)

    @classmethod
    def from_norm(cls, norm: nn.BatchNorm2d) -> MaskedBatchNorm2d:
        """A masked layer that shares the parameters and statistics of a plain norm, which stays as it is.

        Args:
            norm: An `nn.BatchNorm2d`. `prunekernels.convert` serves more: subclasses, and weights that are computed.

        Returns:
            A `MaskedBatchNorm2d` with all channels live.

        Examples:
            >>> norm = torch.nn.BatchNorm2d(4)
            >>> pk.MaskedBatchNorm2d.from_norm(norm).weight is norm.weight
            True
        """
        _check_plain(f"{cls._called}.from_norm: norm", norm, cls._plain)
        return cls._over(norm)

    def to_norm(self) -> nn.BatchNorm2d:
        """A plain norm with copies of the parameters and statistics, in which dead channels have weight and bias 0.

        Returns:
            An `nn.BatchNorm2d` that computes the same.

        Examples:
            >>> norm = pk.MaskedBatchNorm2d(4)
            >>> norm.set_mask(torch.arange(4) > 0)
            >>> norm.to_norm().weight.tolist()
            [0.0, 1.0, 1.0, 1.0]
        """
        plain = self if not is_reparametrized(self) else deep_copy(self)
        remove_reparametrization(f"{self._called}.to_norm", "layer", plain)
        norm: nn.BatchNorm2d = plain._plain_copy(self._plain)
        self.zero_dead(norm.weight, norm.bias)
        return norm


def _by_torch(
    live: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    channels: LiveList,
    by_batch: bool,
    factor: float,
    eps: float,
    update: bool,
) -> Tensor:
    """masked_batch_norm by torch's batch norm of gathered parameters. live [N, channels.count, H, W]."""
    rows = channels.rows(live.device)
    is_live = channels.is_live(live.device) if channels.is_padded else None
    weight, bias = (live_factor(p, rows, is_live) for p in (weight, bias))
    if rows.numel() == 0:  # nothing to normalize, but the parameters stay in the graph, with zero gradients
        live = live if weight is None else live * weight.view(1, -1, 1, 1)
        return live if bias is None else live + bias.view(1, -1, 1, 1)
    live_mean, live_var = (None if t is None else t.index_select(0, rows) for t in (mean, var))
    if is_live is not None and not by_batch:
        live_mean = zeroed(is_live, live_mean)  # type: ignore[arg-type]
        live_var = torch.where(is_live, live_var, torch.ones_like(live_var))  # type: ignore[arg-type]
    y = F.batch_norm(live, live_mean, live_var, weight, bias, by_batch, factor, eps)
    if update:
        put_statistic(mean, live_mean, rows, is_live)
        put_statistic(var, live_var, rows, is_live)
    return y


def live_factor(parameter: Tensor | None, rows: Tensor, is_live: Tensor | None) -> Tensor | None:
    """Weight or bias of the channels in rows; 0 in padding, which is zeros that a norm without a bias leaves alone."""
    picked = None if parameter is None else parameter.index_select(0, rows)
    return picked if picked is None or is_live is None else zeroed(is_live, picked)


@torch.no_grad()
def put_statistic(running: Tensor | None, new: Tensor | None, rows: Tensor, is_live: Tensor | None) -> None:
    """Writes new statistics, [count], to the channels in rows; is_live: bool [count], those that change; None: all."""
    if running is None or new is None:
        return
    if is_live is not None:
        new = torch.where(is_live, new, running.index_select(0, rows))
    running.index_copy_(0, rows, new)
