"""demo: trains the same network dense and pruned, and compares the two."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from .run import train

DENSE = {"method": "none", "mode": "dense"}
PRUNED = {"method": "ghfp", "rate": 0.5, "mode": "auto"}


def demo(out: Path, epochs: int, **more: Any) -> str:
    """Trains a dense and a pruned network and returns a table that compares them.

    Args:
        out: Folder for the runs out/dense and out/ghfp; those of an earlier demo are overwritten.
        epochs: Of each run.
        **more: Other fields of Config.
    """
    begun = time.perf_counter()
    common = {"arch": "resnet20", "data": "digits", "size": 32, "epochs": epochs, **more}
    print("ResNet-20 on digits, dense:")
    dense = train({**common, **DENSE, "out": str(out / "dense"), "report": False}, overwrite=True)
    print("The same with GHFP, in the mode that is the fastest: half of the filters are pruned, more and more of them")
    print("for good:")
    beside = {"beside": [str(out / "dense")]}
    pruned = train({**common, **PRUNED, **beside, "out": str(out / "ghfp")}, overwrite=True)
    assert dense is not None and pruned is not None
    return _table(dense, pruned, time.perf_counter() - begun)


def _table(dense: dict[str, Any], pruned: dict[str, Any], seconds: float) -> str:
    times = pruned["epoch_of"]
    rows = [
        ("", "dense", "ghfp", "small network"),
        ("test accuracy", f"{dense['accuracy']:.4f}", f"{pruned['accuracy']:.4f}", f"{pruned['small_accuracy']:.4f}"),
        ("training, s", f"{dense['seconds']:.1f}", f"{pruned['seconds']:.1f}", ""),
        ("an epoch of it, s", f"{dense['epoch_seconds']:.2f}", f"{pruned['epoch_seconds']:.2f}", ""),
        ("an epoch now, s", *(f"{times[name]:.2f}" for name in ("dense", "this", "small"))),
        ("parameters", f"{pruned['parameters']:,}", "", f"{pruned['small_parameters']:,}"),
        ("multiply-adds", f"{pruned['multiply_adds']:,}", "", f"{pruned['small_multiply_adds']:,}"),
    ]
    table = "\n".join(f"{row[0]:<18}" + "".join(f"{cell:>15}" for cell in row[1:]) for row in rows)
    whole, last = dense["seconds"] / pruned["seconds"], times["dense"] / times["this"]
    speed = f"training was {whole:.2f} times as fast as dense over all epochs, {last:.2f} times with the last masks"
    return f"{table}\n\n{speed}\n{seconds:.0f} s in all; the report: {pruned['report']}"
