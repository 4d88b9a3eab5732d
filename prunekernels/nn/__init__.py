"""Masked layers, and functions that put them into a network, take them out and switch live mode."""
