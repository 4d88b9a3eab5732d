"""What is timed in a layer: ours and its baselines, which are dense (compiled: layers/compiled.py), where-mask + dense,
Python compaction, SparseProp and the upper bound L.

All run in the same way: `forward` differs, autograd does the rest. A single gradient is timed as autograd.grad of a
retained graph in which nothing else needs a gradient.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import prunekernels as pk
from harness.contender import Wrong
from harness.options import FORMATS
from layers.case import RESULTS, Case

DIRECTIONS = {"fwd": ("y",), "grad_input": ("grad_x",), "grad_weight": ("grad_w",), "fwd+bwd": RESULTS}
# Largest error over largest value. One wrong input channel of 512 in a 3x3 layer makes about 3e-3.
TOLERANCE = {torch.float32: 3e-4, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}


class LayerContender:
    """One way to compute a case, in one layout and direction; see harness.contender.Contender."""

    family = ""
    ours = False
    layouts: tuple[str, ...] = tuple(FORMATS)

    def __init__(self, case: Case, direction: str, layout: str) -> None:
        self.case, self.problem, self.direction, self.layout = case, case.problem, direction, layout
        self.outputs = [n for n in DIRECTIONS[direction] if n != "grad_x" or not case.problem.image_input]
        # A copy for each contender: none may find its operands in the cache because the one before has read them.
        memory_format = FORMATS.get(layout, torch.contiguous_format)
        x, w, g = (t.detach().clone(memory_format=memory_format) for t in self.operands())
        self.leaves = [t.requires_grad_() for n, t in (("grad_x", x), ("grad_w", w)) if n in self.outputs]
        self.x, self.w, self.g = x, w, g
        self.prepare()
        self.begin()

    @classmethod
    def supports(cls, case: Case, direction: str) -> bool:
        return True

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.case.x, self.case.w, self.case.g

    def prepare(self) -> None:
        """What a user does once, when the mask changes; not timed."""

    def forward(self) -> Tensor:
        raise NotImplementedError

    def begin(self) -> None:
        """Makes the graph that single gradients are timed on; its backward pass runs on the stream of this call."""
        self.graph: Tensor | None = None  # frees the old graph first: the nodes of its leaves belong to another stream
        if "y" not in self.outputs:
            self.graph = self.forward()

    def run(self) -> tuple[Tensor, ...]:
        """What is timed: fresh results in the order of `outputs`."""
        if self.graph is not None:
            return torch.autograd.grad(self.graph, self.leaves, self.g, retain_graph=True)
        y = self.forward()
        return (y, *torch.autograd.grad(y, self.leaves, self.g)) if self.leaves else (y,)

    def rewind(self) -> None:
        """Nothing to undo: a run leaves its operands as they are."""

    def full_width(self, name: str, got: Tensor) -> Tensor:
        """A result in the form of the expected one."""
        return got

    def expected(self, name: str) -> Tensor:
        return self.case.reference[name]

    def check(self, results: Sequence[Tensor] | None = None) -> None:
        """Raises Wrong unless these results, or those of a run, are the reference's."""
        for name, result in zip(self.outputs, self.run() if results is None else results, strict=True):
            got, want = self.full_width(name, result.detach()), self.expected(name)
            what = f"{self.problem.format()}: {self.family} ({self.layout}), {self.direction}: {name}"
            if got.shape != want.shape:
                raise Wrong(f"{what} has the shape {tuple(got.shape)}, expected {tuple(want.shape)}")
            error = ((got.to(want.dtype) - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()
            if not error <= TOLERANCE[got.dtype]:  # written so that NaN is wrong too
                raise Wrong(f"{what} is wrong, largest error {error:.1e} of the largest value")
            live = self.case.live[name]
            if want is self.case.reference[name] and torch.where(live, 0, got).any():
                raise Wrong(f"{what} is not exactly zero where it is dead")


class MaskedDense(LayerContender):
    """torch.where on the operands, then the whole convolution."""

    family = "masked_dense"

    def forward(self) -> Tensor:
        return F.conv2d(self.case.mask_x(self.x), self.case.mask_w(self.w), **self.problem.conv_args)


class Dense(LayerContender):
    """The whole convolution with nothing masked; its operands have zeros in their dead entries from the start."""

    family = "dense"

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.case.mask_x(self.case.x), self.case.mask_w(self.case.w), self.case.g

    def forward(self) -> Tensor:
        return F.conv2d(self.x, self.w, **self.problem.conv_args)

    def full_width(self, name: str, got: Tensor) -> Tensor:
        return torch.where(self.case.live[name], got, 0) if name == "grad_w" else got


class DenseAgain(Dense):
    """A second dense contender: what lies between the two is noise."""

    family = "dense_again"

    @classmethod
    def supports(cls, case: Case, direction: str) -> bool:
        return not case.x.is_cuda  # where time is short, and noise small


class Compaction(LayerContender):
    """index_select, F.conv2d, index_copy: ten lines of Python."""

    family = "compaction"

    def forward(self) -> Tensor:
        small = self.case.small
        w = self.case.mask_w(self.w) if small.ragged else self.w
        y = F.conv2d(small.cut_x(self.x), small.cut_w(w), **small.conv_args(self.problem))
        if small.rows is None:
            return y
        out = torch.empty(self.problem.out_shape, dtype=y.dtype, device=y.device, memory_format=FORMATS[self.layout])
        return out.zero_().index_copy_(1, small.rows, y)


class UpperBound(LayerContender):
    """L: the convolution of the live sizes, and the zeros that full width demands, written into fresh memory."""

    family = "limit"  # as the columns of results files call it

    @classmethod
    def supports(cls, case: Case, direction: str) -> bool:
        return case.masks.kernel is None  # no smaller convolution computes scattered live kernels

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        small = self.case.small
        return small.cut_x(self.case.x), small.cut_w(self.case.w), small.cut_y(self.case.g)

    def prepare(self) -> None:
        (n, c, h, w), (_, k, p, q) = self.problem.x_shape, self.problem.out_shape
        zeros = {"y": (n, k - self.g.shape[1], p, q), "grad_x": (n, c - self.x.shape[1], h, w)}
        self.zeros = [shape for name, shape in zeros.items() if name in self.outputs and shape[1] > 0]

    def forward(self) -> Tensor:
        return F.conv2d(self.x, self.w, **self.case.small.conv_args(self.problem))

    def run(self) -> tuple[Tensor, ...]:
        zeros = [torch.zeros(shape, dtype=self.x.dtype, device=self.x.device) for shape in self.zeros]
        results = super().run()
        del zeros  # not earlier: the allocator would hand their warm pages to the convolution
        return results

    def expected(self, name: str) -> Tensor:
        small = self.case.small
        return {"y": small.cut_y, "grad_x": small.cut_x, "grad_w": small.cut_w}[name](self.case.reference[name])


@cache
def sparseprop() -> Any:
    """The package sparseprop.modules, or None."""
    # Its OpenMP runtime reads the number of threads once, when it is loaded.
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    try:
        import sparseprop.modules.conv2d
        import sparseprop.modules.utils
    except ImportError:
        return None
    return sparseprop.modules


class SparseProp(LayerContender):
    """SparseConv2d of the package sparseprop: unstructured sparse weights, vectorised over batch or row."""

    family = "sparseprop"
    layouts = ("over_batch", "over_row")

    @classmethod
    def supports(cls, case: Case, direction: str) -> bool:
        p = case.problem
        # Version 0.1.14 returns wrong numbers for batches that are not a multiple of 8.
        fits = p.stride <= 2 and p.groups == 1 and p.dilation == 1 and p.batch % 8 == 0
        # Its backward pass always computes both gradients, so one alone would be unfair to it.
        wanted = case.masks.kernel is not None and direction in ("fwd", "fwd+bwd")
        return fits and wanted and case.x.dtype == torch.float32 and not case.x.is_cuda and sparseprop() is not None

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.case.x, self.case.mask_w(self.case.w), self.case.g

    def prepare(self) -> None:
        over_row = self.layout == "over_row"
        p = self.problem
        self.layer = sparseprop().conv2d.SparseConv2d(self.w.detach(), None, p.padding, p.stride, over_row)
        self.layer.requires_grad_("grad_w" in self.outputs)
        self.leaves = [self.layer.W_val if leaf is self.w else leaf for leaf in self.leaves]

    def forward(self) -> Tensor:
        return self.layer(self.x)

    def full_width(self, name: str, got: Tensor) -> Tensor:
        if name != "grad_w":
            return got
        return sparseprop().utils.from_sparse_format_conv2d(got, self.layer.W_idx, self.problem.weight_shape)


class Ours(LayerContender):
    """pk.masked_conv2d under the plan in force."""

    family = "ours"
    ours = True

    def prepare(self) -> None:
        m, p = self.case.masks, self.problem
        sizes = dict(out_channels=p.filters, in_channels=p.channels, groups=p.groups)
        self.mask = pk.ConvMask(m.filter, m.kernel, m.input, **sizes)

    def forward(self) -> Tensor:
        return pk.masked_conv2d(self.x, self.w, mask=self.mask, **self.problem.conv_args)

    def plan(self) -> str:
        """The plans chosen in this layout, one for each output: "direct/compact". Ask after a run: it may measure."""
        p = self.problem
        args: dict[str, Any] = {
            name: value if name == "groups" else (value, value) for name, value in p.conv_args.items()
        }
        args |= {"dtype": self.x.dtype, "memory_format": FORMATS[self.layout]}
        if self.x.is_cuda:
            if "device" not in signature(pk.plan.choose).parameters:
                return "-"  # this version chooses plans for the CPU only
            args["device"] = self.x.device
        names = {"y": "forward", "grad_x": "grad_input", "grad_w": "grad_weight"}
        return "/".join(pk.plan.choose(names[n], p.x_shape, p.weight_shape, self.mask, **args) for n in self.outputs)


BASELINES = (Dense, DenseAgain, MaskedDense, Compaction, SparseProp, UpperBound)
