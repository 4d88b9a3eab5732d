"""One training from beginning to end, and its row."""

from __future__ import annotations

import contextlib
import copy
import datetime
import gc
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn

import prunekernels as pk
from harness.machine import commit, cpu_model
from harness.timing import interleaved
from prunekernels.inspect.flops import count_flops
from prunekernels.train.config import Config
from prunekernels.train.data import Data, load, steps_per_epoch
from prunekernels.train.finalize import shrunk
from prunekernels.train.loop import Trainer
from prunekernels.train.models import with_new_weights
from prunekernels.train.subsets import chosen
from trainings.architecture import key_of, live_counts, masks_of, shrunk_to
from trainings.rows import TrainingRow
from trainings.spec import Setting, Spec
from trainings.yardstick import Yardstick

LATENCY_SECONDS = 0.4
COMPARED = 512  # test images on which the small network must say what the masked one does


@dataclass(frozen=True)
class Job:
    """A run; masks: of a run from scratch, those that make its network."""

    spec: Spec
    setting: Setting
    masks: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return str(self.spec)


@cache
def loaded(data: str, size: int | None, train_images: int | None, validation: int) -> Data:
    """The data set, whose images a process reads and chooses once."""
    return chosen(load(data, size), train_images, validation)


@cache
def warm_up() -> None:
    """Makes torch import what tracing a network needs, which is no part of the first run's time."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    torch.optim.SGD(model.parameters(), 0.1)
    pk.convert(model)
    with contextlib.redirect_stdout(io.StringIO()):
        pk.shrink(model, torch.zeros(2, 1, 8, 8))


def trained(job: Job) -> TrainingRow:
    """Trains, in this process, and returns the row."""
    spec, setting = job.spec, job.setting
    torch.set_num_threads(setting.threads)
    warm_up()
    pk.plan.clear()  # a run chooses its plans itself, and pays for it, whatever ran before it
    gc.collect()
    config = spec.config(setting)
    data = loaded(setting.data, setting.size, setting.train_images, setting.validation)
    plain = Spec(spec.arch, "dense", spec.seed, spec.epochs).config(setting)
    torch.manual_seed(spec.seed)
    model = shrunk_to(plain, data, job.masks) if spec.kind == "scratch" else None
    begun = time.perf_counter()
    run = Trainer(config, data=data, model=model)
    setup_seconds = time.perf_counter() - begun
    states = [run.filter_states()]
    with torch.random.fork_rng([]):  # the run draws the same numbers as without a yardstick
        yardstick = Yardstick(plain, data)
    for _ in range(spec.epochs):
        run.run_epoch()
        yardstick.measure()
    return _row(job, run, yardstick, [states[0], *run.states], setup_seconds, plain)


def _row(
    job: Job, run: Trainer, yardstick: Yardstick, states: Sequence[Tensor], setup_seconds: float, plain: Config
) -> TrainingRow:
    spec, data = job.spec, run.data
    dense = next(iter(yardstick.dense.values())).model
    is_pruned = run.method is not None
    masks: dict[str, str] = {}
    counts: list[int] = []
    small, small_ms = run.model, yardstick.dense_ms
    if is_pruned:
        with run.masked():
            masks, counts = masks_of(run.model), live_counts(run.model)
        small = shrunk(run)[0]
        _check_agreement(run, small)
    key = "" if spec.kind == "dense" else key_of(small)
    if spec.kind == "scratch" and key != spec.key:
        raise RuntimeError(f"architecture: expected {spec.key} from the masks of the run that left it, got {key}")
    if spec.kind != "dense":
        small_ms = yardstick.of_small(lambda: with_new_weights(copy.deepcopy(small)))
    image = data.normalised(data.test.images[:1])
    latency = {n: latencies({"small": small, "dense": dense}, image.expand(n, -1, -1, -1)) for n in (1, 64)}
    epoch_seconds = [row["seconds"] for row in run.history]
    epoch_seconds[-1] += run.recalibrate_seconds  # what it evaluates is the network that the run leaves
    dead = [int((state == 1).sum()) for state in states]
    return TrainingRow(
        spec.arch, spec.kind, spec.seed, spec.epochs, spec.method, spec.rate, spec.duty, dict(spec.options), key,
        str(job.setting),
        accuracy=run.history[-1]["accuracy"], train_accuracy=run.history[-1]["train_accuracy"],
        seconds=setup_seconds + sum(epoch_seconds), setup_seconds=setup_seconds, epoch_seconds=epoch_seconds,
        steps=steps_per_epoch(data, run.config.batch), dense_step_ms=yardstick.dense_ms, small_step_ms=small_ms,
        computed=[row["computed"] for row in run.history], live=[row["live"] for row in run.history],
        soft=dead[1:], came_back=came_back(states),
        multiply_adds=count_flops(small, image).dense, dense_multiply_adds=count_flops(dense, image).dense,
        parameters=sum(p.numel() for p in small.parameters()),
        dense_parameters=sum(p.numel() for p in dense.parameters()),
        ms_1=latency[1]["small"], dense_ms_1=latency[1]["dense"],
        ms_64=latency[64]["small"], dense_ms_64=latency[64]["dense"],
        counts=counts, masks=masks, told=run.modes.told,
        commit=commit() or "", cpu=cpu_model(), torch=torch.__version__,
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    )  # fmt: skip


def came_back(states: Sequence[Tensor]) -> list[float | None]:
    """By epoch, the share of the filters that were soft-dead before it and are live after it. states: before the first
    epoch and after each."""
    shares: list[float | None] = []
    for before, after in zip(states, states[1:], strict=False):
        soft = before == 1
        shares.append(float((after[soft] == 0).double().mean()) if bool(soft.any()) else None)
    return shares


@torch.no_grad()
def _check_agreement(run: Trainer, small: nn.Module) -> None:
    x = run.data.normalised(run.data.test.images[:COMPARED])
    with run.masked():
        expected = run.model.eval()(x).argmax(1)
    different = int((small.eval()(x).argmax(1) != expected).sum())
    if different > 2:
        raise RuntimeError(f"small network: expected the masked network's answers, got {different} of {len(x)} others")


@torch.no_grad()
def latencies(models: dict[str, nn.Module], x: Tensor) -> dict[str, float]:
    """Milliseconds of a forward pass, by name of the model, all in NCHW."""
    x = x.contiguous()
    nchw = [model.eval().to(memory_format=torch.contiguous_format) for model in models.values()]  # type: ignore[call-overload]
    passes = {name: (lambda model=model: model(x)) for name, model in zip(models, nchw, strict=True)}  # type: ignore[misc]
    return {name: timing.median for name, timing in interleaved(passes, "cpu", LATENCY_SECONDS).items()}
