"""Training: reference networks, data, and a loop with checkpoints and a report."""
