"""Optimizers that leave dead rows alone, and bind, which tells them (or any other optimizer) which rows are dead."""

from .adamw import MaskedAdamW
from .bind import Binding, bind
from .sgd import MaskedSGD

__all__ = ["Binding", "MaskedAdamW", "MaskedSGD", "bind"]
