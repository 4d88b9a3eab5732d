"""The network gear: activations stay channel-compact from layer to layer."""

from .channel_list import LiveList
from .fallbacks import record
from .rules import autograd, elementwise, pointwise, reshape  # noqa: F401  (they register their rules)
from .tensor import LiveTensor, full_width

__all__ = ["LiveList", "LiveTensor", "full_width", "record"]
