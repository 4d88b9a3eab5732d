"""What needs the network's structure: its graph, the channels in it, and what follows from them."""

from .coupling import Group, coupled_groups
from .shrink import shrink
from .tidy import Tidied, tidy_masks

__all__ = ["Group", "Tidied", "coupled_groups", "shrink", "tidy_masks"]
