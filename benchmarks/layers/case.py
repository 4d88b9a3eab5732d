"""One problem with masks and operands: the reference's results, and the small convolution of the live parts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.masks import Masks
from layers.problems import Problem

RESULTS = ("y", "grad_x", "grad_w")
REFERENCE_FP64_MACS = 2e8  # bigger references are computed in single precision: double would outlast the timing


@dataclass(frozen=True)
class Case:
    """A problem with masks and operands. Dead entries of x and w hold numbers, not zeros."""

    problem: Problem
    masks: Masks
    x: Tensor  # [N, C, H, W]
    w: Tensor  # [K, C/G, R, R]
    g: Tensor  # [N, K, P, Q] gradient of the output

    @classmethod
    def make(cls, problem: Problem, masks: Masks, dtype: torch.dtype, device: str, seed: int = 0) -> Case:
        generator = torch.Generator(device).manual_seed(seed)
        shapes = problem.x_shape, problem.weight_shape, problem.out_shape
        x, w, g = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes)
        return cls(problem, masks.to(device), x, w / w[0].numel() ** 0.5, g)

    @cached_property
    def live(self) -> dict[str, Tensor]:
        """Bool by result, True = may differ from zero; broadcasts against that result."""
        inputs = self.masks.live_inputs(self.problem.groups)
        return {
            "y": self.masks.live_filters[None, :, None, None],
            "grad_x": inputs[None, :, None, None],
            "grad_w": self.masks.pairs[:, :, None, None],
        }

    @cached_property
    def zero(self) -> Tensor:
        """A tensor on the device: a Python 0 would be copied there each time, which a CUDA graph cannot record."""
        return self.x.new_zeros(())

    def mask_x(self, x: Tensor) -> Tensor:
        return x if self.masks.input is None else torch.where(self.masks.input[:, None, None], x, self.zero)

    def mask_w(self, w: Tensor) -> Tensor:
        return torch.where(self.live["grad_w"], w, self.zero)

    @cached_property
    def reference(self) -> dict[str, Tensor]:
        exact = torch.float64 if self.problem.macs * self.problem.batch <= REFERENCE_FP64_MACS else torch.float32
        x, w = (t.detach().to(exact, copy=True).requires_grad_() for t in (self.x, self.w))
        autotuned, torch.backends.cudnn.benchmark = (
            torch.backends.cudnn.benchmark,
            False,
        )  # tuning pays for repeated runs only
        try:
            y = F.conv2d(self.mask_x(x), self.mask_w(w), **self.problem.conv_args)
            grads = torch.autograd.grad(y, (x, w), self.g.to(exact))
        finally:
            torch.backends.cudnn.benchmark = autotuned
        return dict(zip(RESULTS, (y.detach(), *grads), strict=True))

    @cached_property
    def small(self) -> Small:
        return Small.of(self)


@dataclass(frozen=True)
class Small:
    """The small convolution inside a masked one: which filters and input channels it has, and how to take them out."""

    rows: Tensor | None  # live filters, None = all
    cols: Tensor | None  # live input channels, None = all
    taps: Tensor | None  # live columns of the weight, None = all; grouped layers have a list per row, [rows, columns]
    groups: int
    ragged: bool  # some kernels inside are dead all the same

    @classmethod
    def of(cls, case: Case) -> Small:
        p, pairs = case.problem, case.masks.pairs.cpu()
        filters, inputs = (m.cpu().view(p.groups, -1) for m in (case.masks.live_filters, case.live["grad_x"]))
        alive = filters.any(1)
        if any(len(m[alive].sum(1).unique()) > 1 for m in (filters, inputs)):
            # F.conv2d wants groups of one size: where live counts differ, keep whole groups.
            filters, inputs = (alive[:, None].expand_as(m) for m in (filters, inputs))
        groups, width = int(alive.sum()), inputs.shape[1]
        rows, cols = filters.flatten().nonzero()[:, 0], inputs.flatten().nonzero()[:, 0]
        taps = (cols % width).view(groups, -1).repeat_interleave(len(rows) // groups, 0)  # [rows, columns]
        ragged = not pairs[rows].gather(1, taps).all()
        device = case.x.device
        return cls(
            rows.to(device) if len(rows) < p.filters else None,
            cols.to(device) if len(cols) < p.channels else None,
            None if taps.shape[1] == width else cols.to(device) if p.groups == 1 else taps.to(device),
            groups,
            ragged,
        )

    def conv_args(self, problem: Problem) -> dict[str, Any]:
        return problem.conv_args | {"groups": self.groups}

    def cut_x(self, x: Tensor) -> Tensor:
        return x if self.cols is None else x.index_select(1, self.cols)

    def cut_y(self, y: Tensor) -> Tensor:
        return y if self.rows is None else y.index_select(1, self.rows)

    def cut_w(self, w: Tensor) -> Tensor:
        if self.rows is not None:
            w = w.index_select(0, self.rows)
        if self.taps is None:
            return w
        if self.taps.dim() == 1:
            return w.index_select(1, self.taps)
        return w[torch.arange(len(w), device=w.device)[:, None], self.taps]
