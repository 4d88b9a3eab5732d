"""ConvMask: the three masks of a convolution, prepared once as index lists that a training step only reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .ops import extension, mask_table


def check_mask(op: str, name: str, mask: Tensor, shape: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Returns a mask that is bool, of this shape and on this device; raises otherwise, naming operator and argument."""
    if not isinstance(mask, Tensor):
        raise ValueError(f"{op}: {name}: expected a bool tensor {list(shape)}, got {type(mask).__name__}")
    if mask.dtype != torch.bool or mask.shape != torch.Size(shape):
        grad = " that requires grad" if mask.requires_grad else ""
        raise ValueError(
            f"{op}: {name}: expected a bool tensor {list(shape)}, got {mask.dtype} {list(mask.shape)}{grad}"
        )
    if device is not None and mask.device != device:
        raise ValueError(f"{op}: {name}: expected a tensor on {device}, got one on {mask.device}")
    return mask


def make_table(
    filter_mask: Tensor | None, kernel_mask: Tensor | None, input_mask: Tensor | None, K: int, C: int, G: int
) -> Tensor:
    """The int32 table that the operators read. It is built on the host and then brought to the device of the masks."""
    device = next((m.device for m in (filter_mask, kernel_mask, input_mask) if m is not None), torch.device("cpu"))
    if device.type == "meta":
        return torch.empty(mask_table.words(K, C, G), dtype=torch.int32, device=device)
    masks = (None if m is None else m.cpu() for m in (filter_mask, kernel_mask, input_mask))
    return extension.ops.conv_mask(*masks, K, C, G).to(device)


def live_counts(table: Tensor) -> tuple[int, int, int]:
    """How many filters, inputs and kernels of a table are live. Waits for the device: only for when masks change."""
    filters, inputs, kernels = table[mask_table.LIVE_FILTERS : mask_table.LIVE_PAIRS + 1].tolist()
    return filters, inputs, kernels


class ConvMask:
    """The masks of one convolution, prepared once, to pass to `masked_conv2d` at every step.

    The masks are copied: a ConvMask does not change. Sizes that the masks do not tell (a filter mask alone says nothing
    of C) come from out_channels and in_channels, or else from the first convolution that uses the ConvMask.

    Args:
        filter_mask: Bool [K], True = live; None: everything live.
        kernel_mask: Bool [K, C / groups], the same for single kernels.
        input_mask: Bool [C], the same for input channels.
        out_channels: K.
        in_channels: C.
        groups: Groups of the convolution.

    Examples:
        >>> mask = pk.ConvMask(filter_mask=torch.tensor([True, False, True, True]), in_channels=3)
        >>> mask
        ConvMask(filters=3/4, inputs=3/3, density=0.750)
        >>> y = pk.masked_conv2d(torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), mask=mask)
        >>> y[:, 1].any().item()
        False
    """

    def __init__(
        self,
        filter_mask: Tensor | None = None,
        kernel_mask: Tensor | None = None,
        input_mask: Tensor | None = None,
        *,
        out_channels: int | None = None,
        in_channels: int | None = None,
        groups: int = 1,
    ) -> None:
        if groups < 1:
            raise ValueError(f"ConvMask: groups: expected at least 1, got {groups}")
        ranks = (("filter_mask", filter_mask, 1), ("kernel_mask", kernel_mask, 2), ("input_mask", input_mask, 1))
        for name, mask, dims in ranks:
            if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != dims):
                got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
                raise ValueError(f"ConvMask: {name}: expected a bool tensor of {dims} dimension(s), got {got}")
        if out_channels is None:
            out_channels = next((len(m) for m in (filter_mask, kernel_mask) if m is not None), None)
        if in_channels is None:
            in_channels = len(input_mask) if input_mask is not None else None
        if in_channels is None and kernel_mask is not None:
            in_channels = kernel_mask.shape[1] * groups
        self.out_channels, self.in_channels, self.groups = out_channels, in_channels, groups
        self.filter_mask = self._own("filter_mask", filter_mask, (out_channels,))
        per_group = None if in_channels is None else in_channels // groups
        self.kernel_mask = self._own("kernel_mask", kernel_mask, (out_channels, per_group))
        self.input_mask = self._own("input_mask", input_mask, (in_channels,))
        self._tables: dict[bool, Tensor] = {}
        self._live: tuple[int, int, int] | None = None
        if out_channels is not None and in_channels is not None:
            self.table(out_channels, in_channels, groups)

    @staticmethod
    def _own(name: str, mask: Tensor | None, shape: tuple[int | None, ...]) -> Tensor | None:
        if mask is None:
            return None
        if isinstance(mask, Tensor) and torch._C._functorch.is_batchedtensor(mask):
            advice = "give the masks themselves to masked_conv2d"
            raise ValueError(f"ConvMask: {name}: expected a mask that vmap does not batch, got a batched one: {advice}")
        expected = [mask.shape[i] if size is None else size for i, size in enumerate(shape)]
        return check_mask("ConvMask", name, mask, expected).detach().clone()

    def table(self, out_channels: int, in_channels: int, groups: int, *, dense_grad: bool = False) -> Tensor:
        """The prepared mask table that the operators read, made by the first call.

        Args:
            out_channels: K of the convolution.
            in_channels: C of the convolution.
            groups: Its groups.
            dense_grad: True: the table for the gradient of weight under `weight_grad="dense"` (input mask alone).

        Returns:
            Int32 tensor of a size that depends on K, C and groups.

        Examples:
            >>> mask = pk.ConvMask(filter_mask=torch.tensor([True, False]))
            >>> mask.table(2, 3, 1).dtype
            torch.int32
        """
        if not self._tables:
            self.check_sizes(out_channels, in_channels, groups)
            K, C, G = self.out_channels, self.in_channels, self.groups = out_channels, in_channels, groups
            self._tables[False] = make_table(self.filter_mask, self.kernel_mask, self.input_mask, K, C, G)
            self._tables[True] = make_table(None, None, self.input_mask, K, C, G).to(self._tables[False].device)
            if not torch.compiler.is_compiling():  # reading the counts would break the graph, and they only save time
                self._live = live_counts(self._tables[False])
        elif (self.out_channels, self.in_channels, self.groups) != (out_channels, in_channels, groups):
            own = f"{self.out_channels} filters, {self.in_channels} channels, {self.groups} groups"
            got = f"{out_channels}, {in_channels}, {groups}"
            raise ValueError(f"ConvMask: mask: expected a convolution of {own}, got {got}")
        return self._tables[dense_grad]

    def check_sizes(self, out_channels: int, in_channels: int, groups: int) -> None:
        """Raises unless the masks are those of a convolution of this size.

        Args:
            out_channels: K of the convolution.
            in_channels: C of the convolution.
            groups: Its groups.

        Examples:
            >>> pk.ConvMask(filter_mask=torch.tensor([True, False])).check_sizes(2, 3, 1)
        """
        given = {"out_channels": out_channels, "in_channels": in_channels, "groups": groups}
        for name, size in given.items():
            known = getattr(self, name)
            if known is not None and known != size:
                raise ValueError(f"ConvMask: {name}: expected {known}, as its masks have, got a weight of {size}")

    def _count(self, which: int) -> int:
        if self._live is None:
            raise ValueError("ConvMask: out_channels, in_channels: expected both, got masks that do not tell them")
        return self._live[which]

    @property
    def live_filters(self) -> int:
        """How many filters the filter mask leaves.

        Examples:
            >>> pk.ConvMask(filter_mask=torch.tensor([True, False, True]), in_channels=4).live_filters
            2
        """
        return self._count(0)

    @property
    def live_inputs(self) -> int:
        """How many input channels the input mask leaves.

        Examples:
            >>> pk.ConvMask(input_mask=torch.tensor([True, False, True]), out_channels=4).live_inputs
            2
        """
        return self._count(1)

    @property
    def live_kernels(self) -> int:
        """How many kernels (filter, channel) all three masks leave.

        Examples:
            >>> pk.ConvMask(filter_mask=torch.tensor([True, False, True]), in_channels=4).live_kernels
            8
        """
        return self._count(2)

    @property
    def nothing_dead(self) -> bool:
        """Whether every kernel is known to be live.

        Examples:
            >>> pk.ConvMask(filter_mask=torch.tensor([True, True]), in_channels=4).nothing_dead
            True
        """
        return self._live is not None and self._live[2] == self._kernels

    @property
    def density(self) -> float:
        """The share of kernels that are live, from 0 to 1.

        Examples:
            >>> pk.ConvMask(filter_mask=torch.tensor([True, False]), in_channels=4).density
            0.5
        """
        return self.live_kernels / max(1, self._kernels)

    @property
    def _kernels(self) -> int:
        return (self.out_channels or 0) * (self.in_channels or 0) // self.groups

    def to(self, device: torch.device | str) -> ConvMask:
        """The same masks on another device.

        Args:
            device: As in `torch.Tensor.to`.

        Returns:
            A new ConvMask.

        Examples:
            >>> pk.ConvMask(filter_mask=torch.tensor([True, False]), in_channels=4).to("cpu").live_filters
            1
        """
        moved = object.__new__(ConvMask)
        moved.out_channels, moved.in_channels, moved.groups = self.out_channels, self.in_channels, self.groups
        for name in ("filter_mask", "kernel_mask", "input_mask"):
            mask = getattr(self, name)
            setattr(moved, name, None if mask is None else mask.to(device))
        moved._live = self._live
        moved._tables = {key: table.to(device) for key, table in self._tables.items()}
        return moved

    def __repr__(self) -> str:
        if not self._tables:
            return "ConvMask(sizes not known yet)"
        filters, inputs = f"{self.live_filters}/{self.out_channels}", f"{self.live_inputs}/{self.in_channels}"
        return f"ConvMask(filters={filters}, inputs={inputs}, density={self.density:.3f})"
