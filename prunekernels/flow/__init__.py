"""The network gear: activations stay channel-compact from layer to layer."""

from . import arithmetic, gradients, rules, shape  # noqa: F401  (they register their rules)
from .breaks import record
from .lists import LiveList
from .live import LiveTensor, full_width

__all__ = ["LiveList", "LiveTensor", "full_width", "record"]
