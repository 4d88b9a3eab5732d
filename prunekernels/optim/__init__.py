"""Optimizers that leave dead rows alone, and bind, which makes any optimizer do so."""

from .adamw import MaskedAdamW
from .binding import Binding
from .freezing import bind
from .sgd import MaskedSGD

__all__ = ["Binding", "MaskedAdamW", "MaskedSGD", "bind"]
