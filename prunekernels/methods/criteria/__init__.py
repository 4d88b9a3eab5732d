"""Criteria: what a filter is worth. The filters with the smallest scores are pruned.

Functions of the weights (l1, l2, geometric_median) score what they are given. Classes gather over the steps of an
epoch; a method starts them. CRITERIA has both by the names that methods take: `criterion="taylor"`.
"""

from __future__ import annotations

from collections.abc import Callable

from .activations import MeanActivation
from .criterion import Criterion, Random, Scores
from .gradients import Gathered, GradientNorms, GradientSum, Taylor, UpdateNorm
from .weights import CreditedL2, OfWeights, geometric_median, l1, l2

__all__ = [
    "CRITERIA",
    "CreditedL2",
    "Criterion",
    "Gathered",
    "GradientNorms",
    "GradientSum",
    "MeanActivation",
    "OfWeights",
    "Random",
    "Scores",
    "Taylor",
    "UpdateNorm",
    "geometric_median",
    "l1",
    "l2",
    "make_criterion",
]

CRITERIA: dict[str, Callable[[], Criterion]] = {
    "l1": lambda: OfWeights(l1),
    "l2": lambda: OfWeights(l2),
    "credited_l2": CreditedL2,
    "geometric_median": lambda: OfWeights(geometric_median),
    "random": Random,
    "gradient_sum": GradientSum,
    "gradient_norms": GradientNorms,
    "taylor": Taylor,
    "update_norm": UpdateNorm,
    "mean_activation": MeanActivation,
}


def make_criterion(op: str, criterion: object) -> Criterion:
    """Returns the Criterion that is meant.

    Args:
        op: The method's name, for the error.
        criterion: A name in CRITERIA, a Criterion or a function of weights.

    Examples:
        >>> type(pk.methods.criteria.make_criterion("SFP", "taylor")).__name__
        'Taylor'
    """
    if isinstance(criterion, Criterion):
        return criterion
    if isinstance(criterion, str) and criterion in CRITERIA:
        return CRITERIA[criterion]()
    if callable(criterion):
        return OfWeights(criterion)
    names = ", ".join(CRITERIA)
    raise ValueError(f"{op}: criterion: expected one of {names}, a function or a Criterion, got {criterion!r}")
