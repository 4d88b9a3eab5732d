"""compacted: a `with` block in which the small plain network trains in the masked one's stead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from ..nn.example import Example
from .compaction import Compaction

KEPT = 2  # of a model: with and without its optimizer, say
_NAME = "_compactions"  # where a model has them: in itself, so that they go with it whatever they hold


class _Kept(list[Compaction]):
    """The compactions of a model; its copies and pickles have none."""

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()


@contextmanager
def compacted(
    model: nn.Module, example_input: Any, optimizer: Any = None, *, align: int | None = None, verify: bool = False
) -> Iterator[tuple[nn.Module, torch.optim.Optimizer | None]]:
    """Lets a small plain network train in the stead of a masked one, in a `with` block.

    The small network is model's own class with small layers of torch.nn inside: nothing in it is this package's, so
    compilers, DistributedDataParallel and vendors' kernels treat it like any other. Layers whose filters meet in an add
    keep the union of their live channels, and groups of a convolution as many as the largest of them; what is dead
    among those stays a zero. Tensors that masks leave whole are the model's own. On leaving, also by an exception, live
    entries of parameters and statistics, and of the optimizer's state, are back in model and optimizer, and dead ones
    are as they were.

    The first block traces the network; later ones only gather and scatter, also under other masks. Masks must not
    change inside. Gradients do not cross the border.

    Args:
        model: A network with masked layers.
        example_input: What model takes (see Example): it is traced once; batches and images may have any size.
        optimizer: An optimizer over model's parameters, or a wrapper with it. Its state has to be numbers, and tensors
            shaped like their parameters.
        align: Widths are multiples of it where the network allows that, filled up with zeros that stay zero. None: 8 on
            CUDA, 1 elsewhere.
        verify: Whether to compare the small network with model before the block, in eval mode on the example. The first
            small network of a model always is.

    Yields:
        The small network, and an optimizer for it of the class of optimizer, with the same options and state (None
        without optimizer). Options such as the learning rate follow those of optimizer, and the other way round.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
        >>> report = pk.convert(model)
        >>> model[0].set_masks(filter=torch.arange(8) < 5)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        >>> images = torch.randn(2, 3, 8, 8)
        >>> with pk.compacted(model, images, optimizer) as (net, opt):
        ...     net(images).square().mean().backward()
        ...     opt.step()
        >>> net[0]
        Conv2d(3, 5, kernel_size=(3, 3), stride=(1, 1))
    """
    compaction = _of(model, example_input, optimizer, align)
    net, opt = compaction.enter(verify=verify)
    try:
        yield net, opt
    except BaseException:
        with suppress(Exception):  # what happened inside is what the caller has to see
            compaction.leave()
        raise
    compaction.leave()


def _of(model: nn.Module, example_input: Any, optimizer: Any, align: int | None) -> Compaction:
    kept = model.__dict__.get(_NAME)
    if kept is None:
        kept = model.__dict__[_NAME] = _Kept()
    found = [c for c in kept if c.align == align and c.optimizer is _inside(optimizer)]
    if entered := [c for c in kept if c.entered]:
        return entered[0]  # which says so when it is entered
    compaction = found[0] if found else Compaction(model, example_input, optimizer, align=align)
    compaction.example = Example.of("compacted", example_input)  # for a trace that is yet to come
    kept[:] = [compaction, *(c for c in kept if c is not compaction)][:KEPT]
    return compaction


def _inside(optimizer: Any) -> Any:
    while (inner := getattr(optimizer, "optimizer", None)) is not None and inner is not optimizer:
        optimizer = inner
    return optimizer
