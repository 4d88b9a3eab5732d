"""PAPER: by method, the numbers of its paper, and what each of them is known from.

    PAPER["SFP"].method      keywords of the class
    PAPER["SFP"].training    settings of the training command
    PAPER["SFP"].evidence    by name, a key of EVIDENCE
    PAPER["SFP"].left_out    what the paper has and the training command does not

The share of filters that is pruned is left to the user in all of them, and so is the network. Learning rates fall by a
cosine in the training command, whatever the paper has. A preset says nothing where nothing is known: there the class's
own defaults stay, which its docstring calls a reconstruction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from . import schedules

PRESETS = ("paper",)
EVIDENCE = {
    "code": "code by the authors",
    "later code": "later code by the first author",
    "other code": "code by others",
    "abstract": "the abstract",
    "summary": "summaries by others",
    "ours": "our reconstruction",
}


@dataclass(frozen=True)
class Preset:
    """The numbers of a paper.

    Args:
        method: Keywords of the method's class; duty is 1 with all of them.
        training: Settings of the training command, by their names in train's Config; empty where none are known.
        evidence: By keyword and setting, what it is known from: a key of EVIDENCE.
        left_out: What the paper does and the training command does not.

    Examples:
        >>> import prunekernels as pk
        >>> pk.methods.presets.PAPER["CSGD"].method["strength"]
        0.003
    """

    method: Mapping[str, Any]
    training: Mapping[str, Any]
    evidence: Mapping[str, str]
    left_out: str


def _preset(
    *, method: Mapping[str, Mapping[str, Any]], training: Mapping[str, Mapping[str, Any]], left_out: str
) -> Preset:
    """method, training: by evidence, the values known from it."""
    parts = [{name: value for values in part.values() for name, value in values.items()} for part in (method, training)]
    evidence = {name: tag for part in (method, training) for tag, values in part.items() for name in values}
    return Preset(parts[0], parts[1], evidence, left_out)


_SOFT: dict[str, Any] = {
    "criterion": "l2", "coupling": "independent", "fine_tune": 0, "scale_norms": False
}  # fmt: skip
_CIFAR: dict[str, Any] = {
    "epochs": 200, "batch": 128, "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "augment": "shift+flip"
}  # fmt: skip
# Norms are masked along with hard-dead filters: with norms=False, as in most public code, no network gets small.
_STEPS = "Nesterov momentum; lr times 0.2 after 60, 120 and 160 epochs"
_RISING = partial(schedules.asymptotic, full_from=0.9)
_SOFTER = {"alpha": 0.5, "alpha_schedule": schedules.decay}
_PGP: dict[str, Any] = {"remove": 0.5, "coupling": "joint"}
_PGP_CIFAR = _CIFAR | {"epochs": 30, "weight_decay": 0.0}
_PGP_LEFT_OUT = "lr 0.01 in the 20 epochs of fine-tuning"
_CSGD: dict[str, Any] = {
    "clusters": "kmeans", "start": -1, "merge_at": 1.0, "exact": False, "coupling": "joint", "fine_tune": 0
}  # fmt: skip

PAPER: Mapping[str, Preset] = {
    "SFP": _preset(
        method={"code": _SOFT | {"schedule": schedules.constant, "alpha": 0.0}},
        training={"code": _CIFAR},
        left_out=f"{_STEPS}; lr 0.01 in the first epoch",
    ),
    "ASFP": _preset(
        method={"other code": _SOFT | {"schedule": _RISING, "alpha": 0.0}},
        training={"other code": _CIFAR},
        left_out=_STEPS,
    ),
    "SRFP": _preset(
        method={"later code": _SOFT | {"schedule": schedules.constant} | _SOFTER},
        training={"later code": _CIFAR},
        left_out=f"{_STEPS}; cutout",
    ),
    "ASRFP": _preset(
        method={"later code": _SOFT | {"schedule": _RISING} | _SOFTER},
        training={"later code": _CIFAR},
        left_out=f"{_STEPS}; cutout",
    ),
    "GHFP": _preset(
        method={
            "later code": _SOFT | {"alpha": 0.0, "hard": schedules.cubic},
            "ours": {"schedule": schedules.constant},
        },
        training={"later code": _CIFAR},
        left_out=f"{_STEPS}; cutout",
    ),
    "PGP": _preset(
        method={"code": {"criterion": "gradient_sum"} | _PGP, "ours": {"off_by_one": False}},
        training={"code": {"measure": True} | _PGP_CIFAR},
        left_out=_PGP_LEFT_OUT,
    ),
    "RPGP": _preset(
        method={"code": {"criterion": "gradient_norms"} | _PGP, "ours": {"off_by_one": False}},
        training={"code": _PGP_CIFAR},
        left_out=_PGP_LEFT_OUT,
    ),
    "PruneWhileTraining": _preset(
        method={"abstract": {"criterion": "l1", "fine_tune": 0}},
        training={},
        left_out="not known: when filters go, the training",
    ),
    "CoarsePruning": _preset(
        method={"abstract": {"masks": 100}, "summary": {"layerwise": False}, "ours": {"block": (1, 1)}},
        training={},
        left_out="more masks for rates above 0.4; not known: the training",
    ),
    "CSGD": _preset(
        method={"code": {"strength": 3e-3} | _CSGD},
        training={"code": {"epochs": 600, "batch": 64, "lr": 0.03, "momentum": 0.9, "weight_decay": 1e-4}},
        left_out="a network that is trained before; Nesterov momentum; lr times 0.1 after 200 and 400 epochs",
    ),
    "FPAGL": _preset(
        method={"ours": {"strength": 0.05, "taylor": True, "adaptive": "filter", "collapse": 0.75} | _CSGD},
        training={},
        left_out="not known: the training",
    ),
}
