"""copy_masks: brings the masks of one network to another, such as an average of its weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from .mask_buffers import MaskBuffers

_WRAPPERS = ("module", "_orig_mod")  # DistributedDataParallel, AveragedModel, timm's ModelEmaV2; torch.compile
_HOLDERS = ("ema", "module", "_average_model")  # timm's and ultralytics' ModelEMA; Lightning's WeightAveraging


def copy_masks(source: Any, target: Any) -> None:
    """Gives a network the masks of another one, layer by layer of the same name. The weights of source do not change.

    For averages of weights (EMA, SWA): masks are copied, never averaged. Entries of the parameters that are dead in
    target afterwards are zero; those that come back to life take the values that they have in source. An error changes
    nothing.

    Args:
        source: A network with masked layers. It may be wrapped, as by DistributedDataParallel or `torch.compile`.
        target: A copy of that network, wrapped or not, or what holds one: `torch.optim.swa_utils.AveragedModel`, timm's
            `ModelEmaV3`, ultralytics' `ModelEMA`, Lightning's `WeightAveraging`, or a function that returns one of
            them or None, for none yet.

    Examples:
        >>> model = torch.nn.Sequential(pk.MaskedConv2d(3, 8, 3))
        >>> average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
        >>> model[0].set_masks(filter=torch.arange(8) > 3)
        >>> pk.copy_masks(model, average)
        >>> average.module[0].density, average.module[0].weight[:4].any().item()
        (0.5, False)
    """
    for theirs, ours in matched_layers("copy_masks", source, target):
        ours._take_masks(theirs)


def matched_layers(op: str, source: Any, target: Any) -> list[tuple[MaskBuffers, MaskBuffers]]:
    """The masked layers of two networks by pairs; none if target holds none yet. Raises where they do not match."""
    from_network, to_network = _network(op, "source", source), _network(op, "target", target)
    if from_network is None or to_network is None:
        return []
    layers = {name: m for name, m in from_network.named_modules() if isinstance(m, MaskBuffers)}
    others = dict(to_network.named_modules())
    if not layers:
        raise ValueError(f"{op}: source: expected masked layers (see pk.convert), got none")
    for name, module in others.items():
        if isinstance(module, MaskBuffers):
            _expect(op, name, name in layers, "no masked layer there, as in source", module)
    for name, layer in layers.items():
        other = others.get(name)
        _expect(
            op, name, isinstance(other, MaskBuffers), f"a {type(layer).__name__}, as in source: see pk.convert", other
        )
        is_same = other._mask_names == layer._mask_names and all(  # type: ignore[union-attr]
            mask.shape == other._masks[key].shape  # type: ignore[union-attr]
            for key, mask in layer._masks.items()
        )
        _expect(op, name, is_same, f"{layer}, as in source", other)
    return [(layer, others[name]) for name, layer in layers.items()]  # type: ignore[misc]


def _expect(op: str, name: str, holds: bool, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{op}: target: {name}: expected {expected}, got {'nothing' if got is None else got}")


def _network(op: str, argument: str, thing: Any) -> nn.Module | None:
    """The network inside wrappers and holders; None: there is none yet."""
    given = thing
    while True:
        if isinstance(thing, nn.Module):
            inner = [name for name in _WRAPPERS if list(thing._modules) == [name]]
            if not inner:
                return thing
            thing = thing._modules[inner[0]]
        elif thing is None:
            return None
        else:
            holder = next((name for name in _HOLDERS if hasattr(thing, name)), None)
            if holder is not None:
                thing = getattr(thing, holder)
            elif callable(thing):
                thing = thing()
            else:
                raise ValueError(f"{op}: {argument}: expected a network, or what holds one, got {type(given).__name__}")
