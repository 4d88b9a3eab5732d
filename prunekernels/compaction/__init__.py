"""Compacted mode: between two mask changes the small plain network trains, and gives everything back."""
