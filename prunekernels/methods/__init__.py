"""Pruning methods: what is pruned, when, and whether it may come back."""

from . import criteria, presets, schedules
from .base import Method
from .centripetal import CSGD
from .coarse import CoarsePruning
from .fpagl import FPAGL
from .ghfp import GHFP
from .norms import recalibrate_norms
from .pgp import PGP, RPGP
from .ranking import Counts
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
    "presets",
    "recalibrate_norms",
    "schedules",
]
