"""loggers: the numbers of each epoch for TensorBoard, Weights & Biases or MLflow, which are imported when asked for."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .checkpoint import write_atomically
from .optional_deps import need

IDS = "loggers.json"  # in a run's folder: the names under which the services know it, so that a resumed run goes on
PROJECT = "prunekernels"  # unless the service's own environment variable says another
MODULES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
Log = Callable[[Mapping[str, float], int], None]  # numbers by name, of this epoch


class Loggers:
    """Some loggers of a run; each begins when the first epoch is over. Nothing is imported without a name.

    Args:
        names: Of MODULES.
        out: Folder of the run.
        settings: Those of the run, as plain values.
    """

    def __init__(self, names: Sequence[str], out: Path, settings: Mapping[str, Any]) -> None:
        self._names, self._out, self._settings = names, out, settings
        self._logs: list[tuple[Log, Callable[[], Any]]] | None = None

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        """Logs the finite ones of these numbers. epoch: from 1."""
        if self._logs is None:
            self._logs = [BEGIN[name](self._out, self._settings, epoch) for name in self._names]
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        for log, _ in self._logs:
            log(finite, epoch)

    def close(self) -> None:
        """Writes what is held back, and ends the loggers."""
        for _, close in self._logs or ():
            close()
        self._logs = None


def check_loggers(names: Sequence[str]) -> None:
    """Raises ImportError for a logger whose package is missing, ValueError for an unknown one."""
    for name in names:
        if name not in MODULES:
            raise ValueError(f"train: log: expected some of {', '.join(MODULES)}, got {name!r}")
        need(MODULES[name], f"train: --log {name}")


def _tensorboard(out: Path, settings: Mapping[str, Any], epoch: int) -> tuple[Log, Callable[[], Any]]:
    need("tensorboard", "train: --log tensorboard")
    from torch.utils.tensorboard import SummaryWriter  # type: ignore[attr-defined]

    writer: Any = SummaryWriter(str(out / "tensorboard"), purge_step=epoch)  # type: ignore[no-untyped-call]
    rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}", epoch)

    def log(values: Mapping[str, float], epoch: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, epoch)
        writer.flush()

    return log, writer.close


def _wandb(out: Path, settings: Mapping[str, Any], epoch: int) -> tuple[Log, Callable[[], Any]]:
    wandb = need("wandb", "train: --log wandb")
    known = _ids(out).get("wandb") if epoch > 1 else None
    begun = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT), name=out.name, dir=str(out), config=dict(settings),
        id=known, resume="allow",
    )  # fmt: skip
    _keep_id(out, "wandb", begun.id)
    return lambda values, epoch: begun.log(dict(values), step=epoch), begun.finish


def _mlflow(out: Path, settings: Mapping[str, Any], epoch: int) -> tuple[Log, Callable[[], Any]]:
    mlflow = need("mlflow", "train: --log mlflow")
    client = mlflow.MlflowClient()
    run_id = _ids(out).get("mlflow") if epoch > 1 else None
    if run_id is None:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = client.get_experiment_by_name(name)
        place = client.create_experiment(name) if experiment is None else experiment.experiment_id
        run_id = client.create_run(place, run_name=out.name).info.run_id
        for setting, value in settings.items():
            client.log_param(run_id, setting, str(value)[:500])
        _keep_id(out, "mlflow", run_id)
    else:
        client.update_run(run_id, status="RUNNING")

    def log(values: Mapping[str, float], epoch: int) -> None:
        for name, value in values.items():
            client.log_metric(run_id, name, value, step=epoch)

    return log, lambda: client.set_terminated(run_id)


def _ids(out: Path) -> dict[str, str]:
    path = out / IDS
    return json.loads(path.read_text()) if path.is_file() else {}


def _keep_id(out: Path, name: str, value: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_ids(out) | {name: value})
    write_atomically(out / IDS, lambda path: path.write_text(text))


BEGIN = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
