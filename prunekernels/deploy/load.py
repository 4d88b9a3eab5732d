"""load_small: a small network from the folder that save_small wrote."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from ..graph.known_example import remember_example
from .folder import read_network


def load_small(folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> nn.Module:
    """Builds the network that save_small wrote, without its class.

    The network is a torch.fx.GraphModule with the layers, names and parameters of the saved one, in the same order, so
    state dicts and optimizers fit. It trains as that did: norms and dropout follow train() and eval(), and where the
    forward is another one in training, so it is here. Convert it to prune it further.

    Nothing in the files is executed or unpickled: config.json names layers of torch.nn and operations of torch, of
    which a fixed list is known, and model.safetensors holds numbers. A file that is truncated, of another format, or of
    a newer version, raises ValueError with its name and the reason. model.pt2 is not read.

    Args:
        folder: The folder, with config.json and model.safetensors.
        device: Where the network goes.

    Returns:
        The network, in eval mode.

    Examples:
        >>> import tempfile
        >>> small = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1, bias=False), torch.nn.BatchNorm2d(4))
        >>> folder = tempfile.mkdtemp()
        >>> written = pk.save_small(small, folder, torch.randn(2, 3, 8, 8), formats=["safetensors"])
        >>> loaded = pk.load_small(folder)
        >>> [name for name, _ in loaded.named_parameters()]
        ['0.weight', '1.weight', '1.bias']
        >>> loaded.train()(torch.randn(2, 3, 8, 8)).sum().backward()
    """
    network, example, _ = read_network("load_small", Path(folder))
    network = network.to(device)
    remember_example(network, example)
    return network
