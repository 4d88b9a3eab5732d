"""Live mode: activations keep only their live channels from layer to layer."""

from . import rules  # noqa: F401  (registers them)
from .channel_list import LiveList
from .fallbacks import recording
from .moved import channels_last_of, wrap_last
from .tensor import LiveTensor, full_width

__all__ = ["LiveList", "LiveTensor", "channels_last_of", "full_width", "recording", "wrap_last"]
