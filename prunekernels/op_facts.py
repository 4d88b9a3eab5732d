"""What PyTorch's operators make of a channel that holds the same number everywhere, by operator name (relu, not relu_).

Live mode relies on it to leave dead channels out of an operator, the network's graph to follow constants through one.
"""

from __future__ import annotations

from typing import NamedTuple


class Fact(NamedTuple):
    """kind: "pointwise" is y = f(x) for every element alone; "random" is that, but draws numbers in training; "copy" is
    y = x in another place, layout or type; "pool" and "reduction" combine pixels of one channel.

    keeps: which numbers a channel still holds behind the operator if it held them before, whatever the further
    arguments are: every "constant"; every constant, if the operator does not pad ("unpadded"); "zero"; or "nothing".
    """

    kind: str
    keeps: str


def _facts(kind: str, keeps: str, names: str) -> dict[str, Fact]:
    return dict.fromkeys(names.split(), Fact(kind, keeps))


FACTS: dict[str, Fact] = {
    **_facts("pointwise", "zero", "relu relu6 leaky_relu elu selu celu silu gelu hardswish tanh mish softsign"),
    **_facts("pointwise", "zero", "tanhshrink hardshrink softshrink abs neg negative positive sign square sin tan"),
    **_facts("pointwise", "zero", "asin atan sinh asinh erf expm1 log1p trunc round floor ceil"),
    **_facts("pointwise", "nothing", "hardsigmoid sigmoid softplus log_sigmoid rsqrt exp log cos"),
    **_facts("pointwise", "nothing", "hardtanh threshold clamp clamp_min clamp_max pow"),  # their arguments decide
    **_facts("pointwise", "nothing", "sqrt"),  # sqrt(0) = 0, but the gradient there is infinite and must be seen
    **_facts("random", "zero", "rrelu dropout dropout2d feature_dropout"),
    **_facts("random", "nothing", "alpha_dropout"),
    **_facts("copy", "constant", "clone contiguous detach alias to _to_copy"),
    **_facts("pool", "constant", "max_pool2d adaptive_max_pool2d adaptive_avg_pool2d upsample_nearest2d"),
    **_facts("pool", "unpadded", "avg_pool2d"),
    # Their weights add up to 1 but for rounding.
    **_facts("pool", "zero", "upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d interpolate upsample"),
    **_facts("pool", "zero", "lp_pool2d"),
    **_facts("reduction", "constant", "mean amax amin"),
    **_facts("reduction", "zero", "sum var std"),
}


def operators(*kinds: str) -> list[str]:
    """Names of the operators of these kinds."""
    return [name for name, fact in FACTS.items() if fact.kind in kinds]


def keeps_constant(*kinds: str) -> list[str]:
    """Names of the operators of these kinds behind which a channel that holds one number still holds it."""
    return [name for name in operators(*kinds) if FACTS[name].keeps == "constant"]


def keeps_zero(*kinds: str) -> list[str]:
    """Names of the operators of these kinds behind which a channel of zeros is one of zeros."""
    return [name for name in operators(*kinds) if FACTS[name].keeps != "nothing"]
