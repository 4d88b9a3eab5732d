"""What needs the network's structure: its graph, the channels in it, and what follows from them."""

from .shrink import shrink

__all__ = ["shrink"]
