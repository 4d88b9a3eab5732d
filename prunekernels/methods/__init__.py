"""Pruning methods: what is pruned, when, and whether it may come back."""

from . import criteria, schedules
from .base import Counts, Method
from .centripetal import CSGD, FPAGL
from .coarse import CoarsePruning
from .ghfp import GHFP
from .pgp import PGP, RPGP
from .soft import ASFP, ASRFP, SFP, SRFP
from .while_training import PruneWhileTraining

__all__ = [
    "ASFP",
    "ASRFP",
    "CSGD",
    "FPAGL",
    "GHFP",
    "PGP",
    "RPGP",
    "SFP",
    "SRFP",
    "CoarsePruning",
    "Counts",
    "Method",
    "PruneWhileTraining",
    "criteria",
    "schedules",
]
