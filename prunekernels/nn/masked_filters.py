"""MaskedFilters: what masked layers with filters share: the masks of filters, input channels and kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..functional import WEIGHT_GRADS, check_grad_scale
from ..masks import live_counts, make_table
from ..ops import mask_table
from ..ops.transforms import ConvLive
from .mask_buffers import MaskBuffers, Plain, public_mask
from .reparametrized import deep_copy, is_reparametrized, remove_reparametrization
from .sharding import check_whole

MaskArgument = Tensor | str | None


class MaskedFilters(MaskBuffers):
    """Base of the masked layers that have filters: `MaskedConv2d` and others.

    K filters read C input channels; with groups, each filter reads those of its group alone. The masks are bool,
    True = live; a new layer has everything live.

    Attributes:
        filter_mask: Bool [K]: the filters that are computed. The output of a dead one is exactly 0, bias included.
        kernel_mask: Bool [K, C / groups]: the kernels (one filter, one input channel) that are computed.
        input_mask: Bool [C]: the input channels that are read.
        hard_mask: Bool [K], False = dead for good. Such a filter is dead in filter_mask too, and its weights get no
            gradient even when `weight_grad` is "dense".
        plain_class: The class that `restore` makes of the layer. A subclass with a forward of its own sets it.
    """

    plain_class: type[nn.Module]
    _called: str  # the name of the class in errors, also of those that are made at run time
    _mask_names = ("filter_mask", "kernel_mask", "input_mask", "hard_mask")
    _own_state: tuple[str, ...] = (
        *_mask_names, "_mask_table", "_grad_table", "_grad_scale", "_weight_grad", "_seen", "_live", "_all_live",
        "_last_input", "_lowered",
    )  # fmt: skip
    filter_mask: Tensor = public_mask("filter_mask")
    kernel_mask: Tensor = public_mask("kernel_mask")
    input_mask: Tensor = public_mask("input_mask")
    hard_mask: Tensor = public_mask("hard_mask")
    out_channels: int  # K
    in_channels: int  # C
    groups: int
    weight: Tensor
    bias: nn.Parameter | None
    _mask_table: Tensor
    _grad_table: Tensor
    _grad_scale: Tensor | None
    _live: tuple[int, int, int]  # counts of live filters, inputs and kernels
    _lowered: dict[Any, Any]  # how live mode serves it: by the live channels of an input, and by device
    _last_input: tuple[torch.Size, tuple[int, ...], torch.dtype] | None = (
        None  # its size and stride, and the dtype of the result
    )

    def _prepared(self, x: Tensor) -> Tensor:
        """What the layer itself gets of its input; see register_adapter."""
        return x

    def _computed_weight(self) -> Tensor:
        """The weight that the layer computes with, before masks; read once a run, since it may be computed."""
        return self.weight

    def _init_masks(self) -> None:
        K, Cg, device = self.out_channels, self.in_channels // self.groups, self._device_of_parameters()
        self._weight_grad, self._grad_scale = "masked", None
        # Of fixed size, written in place: torch.compile and CUDA graphs go on reading them when masks change.
        self._mask_table = torch.zeros(
            mask_table.words(K, self.in_channels, self.groups), dtype=torch.int32, device=device
        )
        self._grad_table = self._mask_table.clone()
        self._add_masks(((K,), (K, Cg), (self.in_channels,), (K,)), device)

    def _derive(self) -> None:
        filters, kernels, inputs, hard = self._masks.values()
        sizes = (self.out_channels, self.in_channels, self.groups)
        table, grad_table = make_table(filters & hard, kernels, inputs, *sizes), make_table(hard, None, inputs, *sizes)
        if table.device == self._mask_table.device:
            self._mask_table.copy_(table)
            self._grad_table.copy_(grad_table)
        else:
            self._mask_table, self._grad_table = table, grad_table
            if self._grad_scale is not None:
                self._grad_scale = None if self._grad_scale.is_meta else self._grad_scale.to(table.device)
        if table.is_meta:
            self._live = (self.out_channels, self.in_channels, kernels.numel())
        else:
            self._live = live_counts(table)
        self._all_live = self._live[2] == kernels.numel()
        self._lowered = {}

    def _exported_masks(self) -> tuple[Tensor, Tensor, Tensor]:
        """Filters that neither of their masks drops, kernels, inputs."""
        filters, kernels, inputs, hard = (self._public_mask(name) for name in self._mask_names)
        return filters & hard, kernels, inputs

    def _live_tensors(self) -> ConvLive:
        """What is live, from masks that functional_call may have put in, maybe batched."""
        filters, sizes = self.filter_mask & self.hard_mask, (self.out_channels, self.in_channels, self.groups)
        dense_grad = self._weight_grad == "dense"
        masks = (filters, self.kernel_mask, self.input_mask)
        return ConvLive.of_masks(*masks, *sizes, dense_grad=dense_grad, hard_mask=self.hard_mask)

    def _dead_parts(self) -> dict[str, Tensor]:
        """By parameter, bool: what the masks drop of the weight that the layer computes with, and of the bias."""
        if self._all_live:
            return {}
        K, C, Cg = self.out_channels, self.in_channels, self.in_channels // self.groups
        kernels = mask_table.live_kernels(self._mask_table, K, C, Cg)
        return {"weight": ~self._like_weight(kernels), "bias": ~mask_table.live_filters(self._mask_table, K)}

    def _like_weight(self, kernels: Tensor) -> Tensor:
        """What belongs to kernels, [K, C / groups], in a shape that expands to the weight's."""
        return kernels.view(*kernels.shape, *[1] * (len(self._weight_shape()) - 2))  # a weight may be computed anew

    def _weight_shape(self) -> tuple[int, ...]:
        """Of the weight, where no tool has split it."""
        return (self.out_channels, self.in_channels // self.groups, *getattr(self, "kernel_size", ()))

    def filters_first(self, tensor: Tensor) -> Tensor:
        """A tensor with the weight's dimensions as [K, C / groups, ...]: itself, but for transposed convolutions.

        Those store filters in the second dimension: in one group the result is a view, in several a copy.

        Args:
            tensor: The weight, or what belongs to its entries: a gradient, a momentum.

        Examples:
            >>> layer = pk.MaskedConvTranspose2d(4, 8, 3)
            >>> tuple(layer.weight.shape), tuple(layer.filters_first(layer.weight).shape)
            ((4, 8, 3, 3), (8, 4, 3, 3))
        """
        return tensor

    def _weight_table(self, table: Tensor) -> Tensor:
        """A mask table of the layer as the optimizers read it for the weight, whose first dimensions it counts."""
        return table

    def _dead_entries(self) -> dict[str, Tensor]:
        return self._dead_parts()

    @torch.no_grad()
    def set_masks(
        self,
        filter: MaskArgument = None,
        kernel: MaskArgument = None,
        input: MaskArgument = None,
        hard: MaskArgument = None,
    ) -> None:
        """Changes masks in place. An error changes nothing.

        Each argument is a bool tensor on the device of the layer (True = live), "all" (everything live) or None (no
        change).

        Args:
            filter: [K]. A live entry for a hard-dead filter is an error; "all" revives the filters that are not
                hard-dead.
            kernel: [K, C / groups].
            input: [C].
            hard: [K]. What is dead here becomes dead in filter_mask too.

        Examples:
            >>> layer = pk.MaskedConv2d(4, 8, 3)
            >>> layer.set_masks(filter=torch.arange(8) > 1, input=torch.arange(4) > 0)
            >>> layer.density  # 6 of 8 filters, 3 of 4 channels
            0.5625
            >>> layer.set_masks(filter="all", input="all")
        """
        op = f"{self._called}.set_masks"
        given = {"filter": filter, "kernel": kernel, "input": input, "hard": hard}
        new = {name: self._parse(op, name, mask, getattr(self, f"{name}_mask")) for name, mask in given.items()}
        hard_mask = self.hard_mask if new["hard"] is None else new["hard"]
        if isinstance(filter, Tensor) and bool((filter & ~hard_mask).any()):
            revived = torch.nonzero(filter & ~hard_mask).flatten().tolist()
            raise ValueError(f"{op}: filter: expected hard-dead filters to stay dead, got filters {revived} live")
        new["filter"] = (self.filter_mask if new["filter"] is None else new["filter"]) & hard_mask
        for name, mask in new.items():
            if mask is not None:
                self._masks[f"{name}_mask"].copy_(mask)
        self._store_all()

    @property
    def weight_grad(self) -> str:
        """The gradient of dead weights: "masked" (zero) or "dense" (as if they were live, so soft-dead filters train).

        Examples:
            >>> layer = pk.MaskedConv2d(4, 8, 3)
            >>> layer.weight_grad = "dense"
        """
        return self._weight_grad

    @weight_grad.setter
    def weight_grad(self, value: str) -> None:
        if value not in WEIGHT_GRADS:
            raise ValueError(f"{self._called}: weight_grad: expected one of {', '.join(WEIGHT_GRADS)}, got {value!r}")
        self._weight_grad = value
        self._lowered = {}

    @property
    def grad_scale(self) -> Tensor | None:
        """None, or float32 [K]: row k of the gradient of weight is multiplied by entry k.

        Examples:
            >>> layer = pk.MaskedConv2d(4, 8, 3)
            >>> layer.grad_scale = torch.linspace(0, 1, 8)
        """
        return self._grad_scale

    @grad_scale.setter
    def grad_scale(self, value: Tensor | None) -> None:
        if value is not None:
            check_grad_scale(self._called, value, self.out_channels, self.filter_mask.device)
        self._grad_scale = value

    @property
    def density(self) -> float:
        """The share of kernels that are live, from 0 to 1.

        Examples:
            >>> pk.MaskedConv2d(4, 8, 3).density
            1.0
        """
        self._refresh_if_edited()
        return self._live[2] / max(1, self.kernel_mask.numel())

    @torch.no_grad()
    def zero_dead(self, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        """Writes exact zeros into the dead entries of weight and bias, in place.

        Args:
            weight: of the shape of the layer's; None: the weight and bias of the layer.
            bias: [K].

        Examples:
            >>> layer = pk.MaskedConv2d(4, 8, 3)
            >>> layer.set_masks(filter=torch.arange(8) > 3)
            >>> layer.zero_dead()
            >>> layer.weight[:4].any().item()
            False
        """
        if weight is None:
            if is_reparametrized(self):
                raise ValueError(
                    f"{self._called}.zero_dead: weight: expected a parameter, got one that is computed: see "
                    "pk.restore(model, bake=True)"
                )
            weight, bias = self.weight, self.bias
        check_whole("zero_dead", self._called, self, weight)
        self._look()
        dead = self._dead_parts()
        if dead:
            weight.masked_fill_(dead["weight"], 0)
            if bias is not None:
                bias.masked_fill_(dead["bias"], 0)

    def _full_forward(self, input: Tensor, *rest: Any) -> Tensor:
        """The layer in masked mode: full width in and out, work skipped inside."""
        if self._all_live and self._grad_scale is None:
            y = super().forward(input, *rest)
        else:
            y = self._masked_forward(input, *rest)
        if type(input) is Tensor:
            self.__dict__["_last_input"] = (input.size(), input.stride(), y.dtype)  # past Module's slow __setattr__
        return y

    def _masked_forward(self, input: Tensor, *rest: Any) -> Tensor:
        raise NotImplementedError

    def _to_plain(self, called: str, plain_class: type[Plain]) -> Plain:
        """A plain layer with copies of the parameters, in which dead weights and biases are zero."""
        own = self if not is_reparametrized(self) else deep_copy(self)
        remove_reparametrization(called, "layer", own)
        plain: Any = own._plain_copy(plain_class)
        self.zero_dead(plain.weight, plain.bias)
        return plain

    def extra_repr(self) -> str:
        if self._all_live:
            return super().extra_repr()
        filters, inputs, kernels = self._live
        parts = [f"filters={filters}/{self.out_channels}", f"inputs={inputs}/{self.in_channels}"]
        return ", ".join([super().extra_repr(), *parts, f"kernels={kernels}/{self.kernel_mask.numel()}"])
