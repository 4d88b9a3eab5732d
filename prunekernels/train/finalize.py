"""After the last epoch: shrinks the network, checks and times the small one, and saves it."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from ..compaction.context import compacted
from ..deploy.save import save_small
from ..graph.shrink import shrink
from ..inspect.flops import count_flops
from . import setup
from .checkpoint import write_atomically
from .compiling import Compiled, seconds
from .data import steps_per_epoch
from .dense_step import autocast
from .loop import Trainer, predictions
from .progress import Progress

SECONDS = 4.0  # about how long steps are timed
ROUNDS = (3, 15)  # at least, at most


def finalize_run(run: Trainer) -> dict[str, Any]:
    """Shrinks the run's network, and writes small.pt, summary.json and, if configured, small.onnx.

    Returns:
        What is in summary.json.
    """
    with Progress(4, "small network", enabled=not run.config.quiet) as bar:
        return _finalized(run, bar)


def _finalized(run: Trainer, bar: Progress) -> dict[str, Any]:
    small, checked = shrunk(run)
    bar.update(1, "saving it")
    write_small(run, small)
    bar.update(2, "testing it")
    x, y = timed_batch(run)
    with setup.numerics(run.config):
        run.modes.end()
    plain = run.dense.of(setup.network(run.config, run.data))
    image = run.data.normalised(run.data.test.images[:1]).to(run.device)
    test = run.data.test
    with run.masked():
        answers = predictions(run.model, run.data, run.device, split=test)
    small_answers = predictions(small, run.data, run.device, split=test)
    agreed = answers == small_answers
    bar.update(3, "timing it")
    summary: dict[str, Any] = {
        "accuracy": _share(answers == test.labels), "small_accuracy": _share(small_answers == test.labels),
        "validation_accuracy": None if run.data.validation is None else run.history[-1]["accuracy"],
        "agreed": int(agreed.sum()), "test_images": len(agreed), "checked": checked, "epochs": run.epoch,
        "seconds": sum(row["seconds"] for row in run.history),
        "epoch_seconds": statistics.median(row["seconds"] for row in run.history),
        "parameters": _parameters(plain), "small_parameters": _parameters(small),
        "multiply_adds": count_flops(plain, image).dense, "small_multiply_adds": count_flops(small, image).dense,
        "epoch_of": _epoch_times(run, plain, small, x, y), "mode": run.modes.told,
        "threads": torch.get_num_threads(), "device": str(run.device), "torch": torch.__version__, "ranks": run.ranks,
    }  # fmt: skip
    text = json.dumps(summary, indent=1)
    write_atomically(run.out / "summary.json", lambda path: path.write_text(text))
    return summary


def shrunk(run: Trainer) -> tuple[nn.Module, str]:
    """Returns the small network, in training mode, and the line that says how it was checked."""
    example = run.data.normalised(run.data.test.images[:2]).to(run.device)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), run.masked():
        small = shrink(run.model, example, form="graph")  # loads without the classes of this package
    return small.train(), said.getvalue().strip()


def write_small(run: Trainer, small: nn.Module) -> list[Path]:
    """Writes small.pt, a whole module of plain torch.nn layers, and if configured small.onnx, for any batch size.

    Returns:
        The files written.
    """
    module = copy.deepcopy(small).cpu().eval()
    paths = [run.out / "small.pt"]
    write_atomically(paths[0], lambda path: torch.save(module, path))
    if run.config.onnx:
        example = run.data.normalised(run.data.test.images[:2])
        shapes = ({0: torch.export.Dim.DYNAMIC},)
        options: dict[str, Any] = {"dynamo": True, "dynamic_shapes": shapes, "external_data": False, "verbose": False}
        paths.append(run.out / "small.onnx")
        write_atomically(paths[1], lambda path: torch.onnx.export(module, (example,), path, **options))
    return paths


def write_folder(run: Trainer, small: nn.Module, formats: Sequence[str]) -> list[Path]:
    """Writes the small network to the run's folder "small", in any formats of deploy.save_small.

    Returns:
        The files written.
    """
    config = run.config
    accuracy: dict[str, float] = {}
    with contextlib.suppress(OSError, ValueError):
        summary = json.loads((run.out / "summary.json").read_text())
        accuracy = {"accuracy on the test set": float(summary["small_accuracy"])} if "small_accuracy" in summary else {}
    method = None if config.method == "none" else f"{config.method}, rate {config.rate:g}, {config.epochs} epochs"
    notes = f"{config.arch}, trained on {config.data}."
    with run.masked():
        return save_small(
            small, run.out / "small", formats=formats, model=run.model, accuracy=accuracy, method=method, notes=notes,
            overwrite=True,
        )  # fmt: skip


def _share(right: Tensor) -> float:
    return int(right.sum()) / len(right)


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def timed_batch(run: Trainer) -> tuple[Tensor, Tensor]:
    """The images and labels that one rank has of a batch, as the network takes them."""
    x, y = run.first_batch()
    return run.dense.laid_out(x), y


def _epoch_times(run: Trainer, plain: nn.Module, small: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """Seconds an epoch of three networks: plain ("dense"), the run's with its last masks ("this") and the small one.

    Their steps are timed in turns, so that all three see the same machine; medians, times the steps of an epoch. Of
    several ranks it is what one computes, without what they tell each other. The run's own network is in its last mode,
    and compiled if it was; the small one computes in the numbers that this one does, float32 or bfloat16.
    """
    small = run.dense.of(copy.deepcopy(small))
    bf16 = run.modes.bf16
    with setup.numerics(run.config), _in_last_mode(run, x) as (net, optimizer):
        steps = {
            "dense": stepper(run.dense.bf16, plain, setup.optimizer_of(run.config, plain), x, y),
            "this": stepper(bf16, net, optimizer, run.modes.laid_out(x), y),
            "small": stepper(bf16, small, setup.optimizer_of(run.config, small), x, y),
        }
        for _ in range(2):  # warm-up: plans are chosen, memory is allocated
            round_time = sum(seconds(step, run.device) for step in steps.values())
        rounds = max(ROUNDS[0], min(ROUNDS[1], round(SECONDS / max(round_time, 1e-9))))
        times = [{name: seconds(step, run.device) for name, step in steps.items()} for _ in range(rounds)]
    count = steps_per_epoch(run.data, run.config.batch)
    return {name: count * statistics.median(t[name] for t in times) for name in steps}


@contextlib.contextmanager
def _in_last_mode(run: Trainer, x: Tensor) -> Iterator[tuple[nn.Module, Optimizer]]:
    """A copy of what trained last, in the place of the run's network, and its optimizer, within a `with` block."""
    model = copy.deepcopy(run.model).train()
    optimizer = setup.optimizer_of(run.config, model)
    is_small = run.modes.now == "compacted" and run.method is not None
    with compacted(model, x[:2], optimizer) if is_small else contextlib.nullcontext((model, optimizer)) as (net, opt):
        assert opt is not None
        yield (Compiled(net) if run.modes.is_compiled else net), opt


def stepper(bf16: bool, model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Returns a function that trains this model, and nothing else, for one step, in bfloat16 or float32."""
    model.train()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(x.device, bf16):
            loss = F.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()

    return step
