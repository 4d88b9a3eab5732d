"""Cases and rows of benchmarks/conv.py, as small as they can be."""

from dataclasses import replace

import torch

from harness.goals import goals
from layers.case import Case
from layers.goals import GOALS
from layers.problems import Problem, make_masks
from layers.rows import Row

SMALL = 'n1c8h6k8r3s1p1g1 "test:small*2"'


def make_case(line, pattern="filter", side="both", kept=0.5):
    p = Problem.parse(line)
    return Case.make(p, make_masks(p, pattern, side, kept), torch.float32, "cpu")


def make_row(**changes):
    texts = dict(problem="p", name="n", mask="filter", side="both", direction="fwd", layout="nchw", plan="dense")
    counts = dict(times=1, kept=0.5, live_k=1, live_c=1, live_kernels=1)
    times = dict(ms=1.0, dense_ms=2.0, masked_dense_ms=3.0, compaction_ms=1.0, sparseprop_ms=None, limit_ms=0.5)
    return replace(Row(**texts, **counts, **times), **changes)


def found(rows):
    return {f.goal.partition(";")[0] + " " + f.target: f for f in goals(rows, GOALS)}
