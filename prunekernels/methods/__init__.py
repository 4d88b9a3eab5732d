"""Pruning methods: what is pruned, when, and whether it may come back."""

from . import criteria, presets, schedules
from .base import Method
from .centripetal import CSGD
from .coarse import CoarsePruning
from .fpagl import FPAGL
from .ghfp import GHFP
from .layer_sensitivity import sensitivity
from .norms import recalibrate_norms
from .pgp import PGP, RPGP
from .ranking import Counts
from .sensitivity_table import Sensitivity
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
    "Sensitivity",
    "criteria",
    "presets",
    "recalibrate_norms",
    "schedules",
    "sensitivity",
]
