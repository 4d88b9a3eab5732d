"""What a network's graph tells about its channels: which are coupled, which are dead, which can be left out."""

from .coupling import Group, coupled_groups
from .tidy import Tidied, tidy_masks

__all__ = ["Group", "Tidied", "coupled_groups", "tidy_masks"]
