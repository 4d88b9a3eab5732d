"""report_of: a method's state as numbers by name."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .ranking import Counts


def report_of(
    states: Mapping[str, Tensor], history: list[dict[str, Counts]], epoch: int, rate: float, share: float
) -> dict[str, float]:
    """What Method.report returns.

    Args:
        states: By layer name, int8 [K]: 0 live, 1 soft-dead, 2 hard-dead.
        history: By epoch, and in it by layer name, Counts.
        epoch: How many epochs are over.
        rate: The method's.
        share: The share of what the budget is of that is to be dead now.
    """
    counts = {name: [int((state == value).sum()) for value in range(3)] for name, state in states.items()}
    live, soft, hard = (sum(row[value] for row in counts.values()) for value in range(3))
    returned = sum(c.returned for c in history[-1].values()) if history else 0
    found: dict[str, float] = {
        "epoch": epoch, "filters": live + soft + hard, "live": live, "soft": soft, "hard": hard, "returned": returned,
        "live_share": live / max(1, live + soft + hard), "target_share": share, "rate": rate,
    }  # fmt: skip
    return found | {f"live_share_of/{name}": row[0] / max(1, sum(row)) for name, row in counts.items()}
