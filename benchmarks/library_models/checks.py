"""What models.py asks of a network: converted, grouped, masked at half, run in each mode, shrunk, exported."""

from __future__ import annotations

import contextlib
import copy
import io
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

import prunekernels as pk
from library_models.catalog import Built
from prunekernels.graph.verify import check_alike
from prunekernels.live import recording
from prunekernels.nn.mask_buffers import MaskBuffers

RATE = 0.5
TOLERANCE = 1e-8  # of the largest value; networks run in float64
OK = "yes"


@dataclass
class Found:
    """What became of each question: OK, or why not."""

    answers: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def asking(self, what: str) -> Iterator[None]:
        """Whatever is raised inside is the answer."""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                yield
        except Exception as error:
            self.answers[what] = reason(error)
        else:
            self.answers.setdefault(what, OK)


class Differs(Exception):
    """Two results that should be the same are not."""


def reason(error: BaseException) -> str:
    """The first line of an error, without numbers of memory or threads."""
    text = " ".join(str(error).split("\n")[0].split())
    return (
        re.sub(r"0x[0-9a-f]+", "0x..", text)[:240]
        if isinstance(error, Differs)
        else f"{type(error).__name__}: {text[:240]}"
    )


def prepare(model: nn.Module) -> nn.Module:
    """float64, norms as after some training, nothing random in the forward."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, (_NormBase, nn.GroupNorm, nn.LayerNorm)) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
        if isinstance(module, _NormBase) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in ("drop_prob", "drop_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model.double()


def floats(output: Any) -> list[Tensor]:
    return [y for y in pytree.tree_leaves(output) if isinstance(y, Tensor) and y.is_floating_point()]


def compare(what: str, got: list[Tensor], want: list[Tensor]) -> float:
    """The largest difference of tensors, over the largest value of each but at least a thousandth of all."""
    if [y.shape for y in got] != [y.shape for y in want]:
        raise Differs(f"{what} of other shapes")
    most = max((float(y.detach().abs().max()) for y in want if y.numel()), default=0.0)
    worst = 0.0
    for y, z in zip(got, want, strict=True):
        if y.numel():
            scale = max(float(z.detach().abs().max()), 1e-3 * most, 1e-30)
            worst = max(worst, float((y.detach() - z.detach()).abs().max()) / scale)
    if not worst <= TOLERANCE:
        raise Differs(f"{what} differ by {worst:.1e} of their largest")
    return worst


def step(net: nn.Module, example: pk.Example) -> tuple[list[Tensor], Tensor]:
    """The outputs in train mode, and a loss that depends on all of them."""
    torch.manual_seed(3)  # detectors draw which boxes they train on
    outputs = floats(example.call(net.train()))
    noise = torch.Generator().manual_seed(2)
    return outputs, sum((y * torch.randn(y.shape, generator=noise, dtype=y.dtype)).sum() for y in outputs)  # type: ignore[return-value]


def gradients(net: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters() if p.requires_grad]


def statistics(net: nn.Module) -> list[Tensor]:
    return [
        b for m in net.modules() if isinstance(m, _NormBase) for b in m.buffers(recurse=False) if b.is_floating_point()
    ]


def check(built: Built) -> Found:
    """Asks everything of one network."""
    found = Found()
    torch.manual_seed(0)
    model, example = prepare(built.model), pk.Example.of("models", built.example).double()
    training = example if built.training is None else pk.Example.of("models", built.training).double()
    with pk.plan.measure(False):
        found.numbers["dense"] = pk.count_flops(model.eval(), example).dense
        convert(model, example, found)
        if found.answers["groups"] == OK:
            check_live(model, training, found)
            check_compacted(model, example, training, found)
            check_shrunk(model, example, found)
    return found


def convert(model: nn.Module, example: pk.Example, found: Found) -> None:
    """Converts, and masks half of each group that is no output, the filters of least norm."""
    with found.asking("converts"):
        report = pk.convert(model, linears=True)
        found.numbers |= {
            "converted": len(report.converted) + len(report.linears),
            "norms": len(report.norms),
            "left_alone": dict(Counter(re.sub(r"\s+", " ", why) for why in report.skipped.values())),
        }
    with found.asking("groups"):
        groups = pk.coupled_groups(model, example)
        layers = dict(model.named_modules())
        pruned = [group for group in groups if not group.is_output and group.width > 1]
        for group in pruned:
            norms = {}
            for name in group.layers:
                weight: Any = layers[name].weight
                filters = weight.transpose(0, 1) if isinstance(layers[name], nn.ConvTranspose2d) else weight
                norms[name] = filters.detach().flatten(1).norm(dim=1)
            keep = torch.ones(group.width, dtype=torch.bool)
            keep[group.combine(norms).argsort()[: int(RATE * group.width)]] = False
            group.set_masks(model, keep)
        found.numbers |= {"groups": len(groups), "pruned_groups": len(pruned)}


def check_live(model: nn.Module, example: pk.Example, found: Found) -> None:
    """A training step in live mode beside one in masked mode."""
    with found.asking("live"):
        masked, live = copy.deepcopy(model), copy.deepcopy(model)
        pk.flow(live)
        want, loss = step(masked, example)
        loss.backward()
        with recording(live) as fallbacks:
            got, loss = step(live, example)
        loss.backward()
        counts: Counter[str] = Counter()
        for row in fallbacks:
            counts[row["op"]] += row["count"]
        found.numbers["fallbacks"] = dict(counts)
        differences = [compare("outputs", got, want), compare("gradients", gradients(live), gradients(masked))]
        found.numbers["live_difference"] = max(
            *differences, compare("statistics", statistics(live), statistics(masked))
        )


def check_compacted(full: nn.Module, example: pk.Example, training: pk.Example, found: Found) -> None:
    """A training step in compacted mode beside one in masked mode; what it writes back is compared."""
    with found.asking("compacted"):
        masked, model = copy.deepcopy(full).train(), copy.deepcopy(full).train()
        want, loss = step(masked, training)
        loss.backward()
        optimizers = [torch.optim.SGD(net.parameters(), 1e-3) for net in (masked, model)]
        optimizers[0].step()
        with pk.compacted(model, example, optimizers[1]) as (net, optimizer):
            if any(isinstance(module, MaskBuffers) for module in net.modules()):
                names = sorted(name for name, m in net.named_modules() if isinstance(m, MaskBuffers))
                found.numbers["wide"] = names
            got, loss = step(net, training)
            difference = compare("outputs", got, want)
            loss.backward()
            assert optimizer is not None
            optimizer.step()
        before = list(full.parameters())
        moved = [[p - old for p, old in zip(net.parameters(), before, strict=True)] for net in (model, masked)]
        difference = max(difference, compare("gradients", *moved))
        found.numbers["compacted_difference"] = max(
            difference, compare("statistics", statistics(model), statistics(masked))
        )


def check_shrunk(model: nn.Module, example: pk.Example, found: Found) -> None:
    """The small network, in the form that shrink chooses, and its export."""
    small: nn.Module | None = None
    with found.asking("shrink"):
        model.eval()
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            small = pk.shrink(model, example)
        found.numbers["form"] = "graph" if "graph form" in printed.getvalue().split(",")[0] else "module"
        found.numbers["said"] = printed.getvalue().strip()
        with torch.no_grad():
            got, want = floats(example.call(small)), floats(example.call(model))
        try:
            found.numbers["shrink_difference"] = compare("outputs", got, want)
        except Differs:  # by more than what rounding decides between equal scores?
            check_alike(model, small, example)
        found.numbers["small"] = pk.count_flops(small, example).dense
    with found.asking("onnx"):
        if small is None:
            raise Differs("no small network")
        narrow = example.map(lambda x: x.float() if x.is_floating_point() else x)
        if found.numbers["form"] == "graph":  # it has float64 among its steps
            with contextlib.redirect_stdout(io.StringIO()):
                small = pk.shrink(model.float(), narrow, form="graph")
        check_onnx(small.float(), narrow)


def check_onnx(small: nn.Module, example: pk.Example) -> None:
    """Exports the small network and runs it in ONNX Runtime."""
    import onnxruntime

    with torch.no_grad():
        want = floats(example.call(small.eval()))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.onnx"
        export_onnx(small, example, path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [given.name for given in session.get_inputs()]
        feeds = dict(zip(names, (x.numpy() for x in example.tensors), strict=True))
        got = [torch.from_numpy(y) for y in session.run(None, feeds)]
    got = [y for y in got if y.is_floating_point()]
    if len(got) != len(want):
        raise Differs(f"{len(got)} outputs instead of {len(want)}")
    for y, z in zip(got, want, strict=True):
        if y.shape != z.shape or (z.numel() and float((y - z).abs().max()) > 1e-3 * max(float(z.abs().max()), 1e-6)):
            raise Differs("outputs differ in ONNX Runtime")


def export_onnx(small: nn.Module, example: pk.Example, path: Path) -> None:
    """By torch.export, or by a trace where the forward depends on values."""
    options: dict[str, Any] = {"kwargs": example.kwargs, "external_data": False, "verbose": False}
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(small, example.args, path, dynamo=True, **options)
        except Exception:
            if len(example.tensors) == len(example.args):  # images in a list: detectors
                raise
            torch.onnx.export(small, example.args, path, dynamo=False, **options)
