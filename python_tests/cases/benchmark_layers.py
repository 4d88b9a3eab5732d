"""Cases and rows of benchmarks/conv.py, as small as they can be."""

from dataclasses import replace

import torch

from harness.goals import goals
from layers.case import Case
from layers.goals import GOALS
from layers.masks import make_masks
from layers.problems import Problem
from layers.rows import Row

# Strides, one tap, groups, depthwise with dilation, an image.
VARIED = ["n2c8h6w5k12r3s2p1g1", "n1c6h5k4r1s1p0g1", "n2c8h6k16r3s1p1g4", "n1c12h6k12r3s1p2g12d2", "n1c3h8k6r3s1p1g1"]
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
