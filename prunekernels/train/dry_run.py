"""dry_run: what a training would prune, what that saves and how fast its steps are, before it has begun."""

from __future__ import annotations

import contextlib
import copy
import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..graph.shrink import shrink
from ..inspect.flops import count_flops
from ..inspect.observe import text_table
from . import setup
from .compiling import seconds
from .data import steps_per_epoch
from .finalize import stepper, timed_batch
from .loop import Trainer
from .progress import Progress
from .report import rate_text
from .run import check_out, check_packages
from .scratch import begun_run, resumed_run

ROUNDS, SECONDS = (3, 15), 2.0  # steps of each network that are timed: at least, at most, about so long


def dry_run(given: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False) -> str:
    """Makes a run as `train` would, and tells what it would do. Nothing is trained, and nothing written.

    Args:
        given: As train's.
        resume: As train's.
        overwrite: As train's.

    Returns:
        A table of layers, and lines with the network's multiply-adds, parameters and times.
    """
    check_out(Path(given["out"]), resume or overwrite)
    with Progress(3, "dry run", enabled=not given.get("quiet", False)) as bar:
        return _told({**given, "quiet": True}, resume, bar)


def _told(given: Mapping[str, Any], resume: bool, bar: Progress) -> str:
    run = resumed_run(given["out"], given) if resume else begun_run(given)
    check_packages(run.config)
    bar.update(1, "the run is made")
    plain = copy.deepcopy(run.model) if run.method is None else run.dense.of(setup.network(run.config, run.data))
    small, table = None, "no method: nothing is pruned"
    if run.method is not None:
        live = run.method.forecast()
        run.method.channel_masks.set_masks(live, {name: torch.ones_like(mask) for name, mask in live.items()}, True)
        rows = [[name, str(len(mask)), str(int(mask.sum()))] for name, mask in live.items()]
        rows += [[name, str(layer.out_channels), why] for name, layer in run.layers.items()
                 if (why := run.method.left_out.get(name)) is not None]  # fmt: skip
        table = text_table(["layer", "filters", "live in the end"], rows)
        small = run.dense.of(_small(run))
    bar.update(2, "timing steps")
    return "\n".join([_head(run), "", table, "", *_costs(run, plain, small), "nothing was trained, nothing written"])


def _small(run: Trainer) -> nn.Module:
    example = run.data.normalised(run.data.test.images[:2]).to(run.device)
    with contextlib.redirect_stdout(io.StringIO()):
        return shrink(run.model, example, form="graph").train()


def _head(run: Trainer) -> str:
    config, data = run.config, run.data
    network = f"the small network of {config.small_of}" if config.small_of is not None else config.arch
    what = "dense" if run.method is None else f"{config.method} at {rate_text(config)}"
    if run.method is not None and isinstance(config.options.get("budget"), Mapping):
        what += f", which is rate {run.method.rate:g}"
    epochs = f"epochs {run.epoch + 1} to {config.epochs}" if run.epoch else f"{config.epochs} epochs"
    images = f"{len(data.train):,} images, {steps_per_epoch(data, config.batch):,} steps an epoch"
    return f"{network} on {config.data}: {what}; {epochs} of {images}; {run.device}, into {run.out}"


def _costs(run: Trainer, plain: nn.Module, small: nn.Module | None) -> list[str]:
    """Lines on multiply-adds, parameters and times, dense and in the end."""
    image = run.data.normalised(run.data.test.images[:1]).to(run.device)
    networks = [plain] if small is None else [plain, small]
    adds = [count_flops(net, image).dense for net in networks]
    sizes = [sum(p.numel() for p in net.parameters()) for net in networks]
    ms = _step_times(run, networks)
    left = run.config.epochs - run.epoch
    minutes = [left * steps_per_epoch(run.data, run.config.batch) * each / 60e3 for each in ms]
    rows: list[tuple[str, list[str], Sequence[float]]] = [
        ("multiply-adds an image", [f"{n:,}" for n in adds], adds),
        ("parameters", [f"{n:,}" for n in sizes], sizes),
        ("step, ms", [f"{n:.1f}" for n in ms], ms),
        (f"{left} epochs, minutes", [f"{n:.1f}" for n in minutes], minutes),
    ]
    if small is None:
        return [text_table(["", "dense"], [[name, *cells] for name, cells, _ in rows])]
    cells = [[name, *cells, f"{numbers[1] / max(numbers[0], 1e-12):.2f}"] for name, cells, numbers in rows]
    table = text_table(["", "dense", "in the end", "of dense"], cells)
    return [table, "times: of plain networks on this machine now; a training lies between the two columns"]


def _step_times(run: Trainer, networks: list[nn.Module]) -> list[float]:
    """Milliseconds of a training step of each network, medians of steps in turns."""
    x, y = timed_batch(run)
    with setup.numerics(run.config):
        steps = [stepper(run.dense.bf16, net, setup.optimizer_of(run.config, net), x, y) for net in networks]
        for _ in range(2):  # allocates, chooses algorithms
            one_round = sum(seconds(step, run.device) for step in steps)
        rounds = max(ROUNDS[0], min(ROUNDS[1], round(SECONDS / max(one_round, 1e-9))))
        times = [[seconds(step, run.device) for step in steps] for _ in range(rounds)]
    return [1e3 * statistics.median(of_net) for of_net in zip(*times, strict=True)]
