"""Layers with masks, and what puts them into a network and takes them out again."""
