"""Which results files docs/ shows, and their rows."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TRAINING = "2026-11-28-epyc-2core-395d407-network"
NETWORKS = "2026-11-24-epyc-2core-a2b5f66-network"
INDEPENDENT = "2026-11-24-epyc-2core-3533bc9-network-independent"
MASK_CHANGE = "2026-11-28-epyc-2core-a646ebc-mask-change"
WHOLE_RUN = "2026-11-28-epyc-2core-03b48f5-whole-run"
WIRE = "2026-11-29-epyc-2core-fa81132-wire"
FILTERS = "2026-11-24-epyc-2core-eda2bad-filters"
FILTERS_BF16 = "2026-11-28-epyc-2core-a646ebc-filters-bf16"
NEW_SHAPES = "2026-11-28-epyc-2core-a646ebc-new-shapes"
KERNELS = "2026-11-28-epyc-2core-a646ebc-kernels"
BLOCKS = ("2026-11-28-epyc-2core-a646ebc-blocks-16x32", "2026-11-28-epyc-2core-a646ebc-blocks-4x4")
MODELS = "2026-11-29-epyc-2core-1b72678-models"
OPTIMIZERS = "2026-11-24-epyc-2core-f486e33-optim"
METHODS = ("2026-11-24-epyc-2core-9f10d70-methods", "2026-11-24-epyc-2core-4b4d01a-methods-pgp")
EVIDENCE = "2026-11-28-epyc-2core-7e132bd-methods-fashion"
DETECTION, ADAPTATION = "2026-11-28-epyc-2core-15640cb-detect-fashion", "2026-11-28-epyc-2core-15640cb-adapt-fashion"

Row = dict[str, Any]
NAMES = {"resnet56": "ResNet-56", "vgg16": "VGG-16", "resnet18": "ResNet-18"}
MORE_NAMES = NAMES | {"mobilenet_v2": "MobileNetV2", "resnet20": "ResNet-20", "resnet50": "ResNet-50"}
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


@cache
def load(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


def fastest_dense(row: Row) -> float:
    """Milliseconds in the fastest of its forms that were timed."""
    return min(row.get(f"{form}_ms") or math.inf for form in ("dense", "dense_compile", "dense_fp32"))


def network_rows(direction: str, name: str = NETWORKS) -> list[Row]:
    """Rows with "masked" and "live", the speed-ups of both modes over the fastest dense, and "small", that of the small
    network."""
    rows = [dict(row) for row in load(name)["rows"] if row["direction"] == direction]
    for row in rows:  # older files call masked mode "layer" and live mode "network"
        dense = fastest_dense(row)
        row["masked"] = dense / row.get("masked_ms", row.get("layer_ms"))
        row["live"] = dense / row.get("live_ms", row.get("network_ms"))
        row["small"] = dense / row["small_ms"]
    return rows


def method_rows(arch: str, rate: float) -> list[Row]:
    """By method, the rows of a network and a rate; the dense training first."""
    rows = [row for name in METHODS for row in load(name)["summary"]]
    dense = next(row for row in rows if row["arch"] == arch and row["method"] == "none")
    found = [row for row in rows if row["arch"] == arch and row["rate"] == rate and row["method"] != "none"]
    return [dense, *sorted(found, key=lambda row: (row["method"], row["duty"], row["clip"] is not None))]


def training_rows() -> list[Row]:
    """By network, then by keep ratio, the smallest first."""
    rows = load(TRAINING)["rows"]
    order = list(MORE_NAMES)
    return sorted(rows, key=lambda row: (order.index(row["network"]), row["kept"], row["dtype"] != "float32"))
