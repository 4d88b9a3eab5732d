"""Training: reference networks."""
