"""Samples of the operators that move rows and columns of many tensors."""

import torch


def _lists(channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    whole, part = (torch.randn(*size, 3, 3).contiguous(memory_format=layout) for size in ((6, 5), (3, 4)))
    wholes = [whole, torch.randn(7), torch.randn(4, 3), torch.randn(6, 4)]
    parts = [part, torch.randn(3), torch.randn(4, 2), torch.randn(4, 2)]
    rows = [torch.tensor([4, -1, 0]), torch.tensor([1, 2, 6]), None, torch.tensor([0, 2, 3, -1])]
    columns = [torch.tensor([0, 1, 3, -1]), None, torch.tensor([2, 0]), torch.tensor([[0, 3], [1, -1]])]
    return parts, wholes, rows, columns


def gather_samples():
    for channels_last in (False, True):
        yield _lists(channels_last)


def scatter_samples():
    for parts, wholes, *lists in gather_samples():
        yield wholes, parts, *lists


SAMPLES = {"gather_parts_": gather_samples, "scatter_parts_": scatter_samples}
