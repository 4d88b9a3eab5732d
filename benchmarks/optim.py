#!/usr/bin/env python3
"""Times optimizer steps of whole networks: ours beside torch.optim and beside a step of the small network.

    python benchmarks/optim.py --networks resnet56 vgg16 resnet18 --kept 1.0 0.9 0.5 0.3 --json o.json --md o.md

Gradients are random and stay the same; all optimizers step the same parameters, each with its own state. Before
anything is timed, a step of ours is compared with torch's: equal where live, untouched where frozen. Masks are joint,
drawn as network.py draws them.

hard, dead   ours with that freeze; no filter is hard-dead, so `hard` steps nearly everything
foreach      torch.optim with foreach=True
masked       the same, then a multiplication of all weights by their masks
fused        torch.optim with fused=True
small        ours on the network built at that width: the upper bound of what skipping can give
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor, nn

import prunekernels as pk
from harness import command
from harness.goals import LOSS
from harness.machine import header
from harness.options import Parser, add_output_files, duration, keep_ratio
from harness.record import Record
from harness.report import Report, text_table
from harness.timing import interleaved
from networks.models import NETWORKS, apply, draw, wires
from prunekernels.optim import MaskedAdamW, MaskedSGD, bind

OURS = {"sgd": MaskedSGD, "adamw": MaskedAdamW}
THEIRS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
NUMBERS = {"sgd": {"lr": 1e-6, "momentum": 0.9, "weight_decay": 1e-4}, "adamw": {"lr": 1e-6, "weight_decay": 1e-2}}
CHECKED = {"sgd": {"foreach": True}, "adamw": {"fused": True}}  # torch's variant that ours is compared with


@dataclass(frozen=True)
class Job:
    network: str
    optimizer: str
    keep_ratio: float

    def __str__(self) -> str:
        return f"{self.network} {self.optimizer} kept {self.keep_ratio:g}"


@dataclass
class StepRow:
    """Milliseconds of one step."""

    network: str
    optimizer: str
    kept: float  # keep ratio of the filters
    live: float  # share of the parameters' elements that freeze="dead" steps
    ms: dict[str, float]
    quartiles: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def job(self) -> str:
        return str(Job(self.network, self.optimizer, self.kept))

    def flat(self) -> dict[str, object]:
        ratios = {f"vs_{name}": self.ms[name] / self.ms["dead"] for name in ("foreach", "masked", "fused")}
        own = {"network": self.network, "optimizer": self.optimizer, "kept": self.kept, "live": self.live}
        times = {f"{name}_ms": ms for name, ms in self.ms.items()}
        return own | times | ratios | {"hard_vs_foreach": self.ms["foreach"] / self.ms["hard"]} | {
            "of_small": self.ms["small"] / self.ms["dead"]
        }  # fmt: skip


def network(name: str, keep_ratio: float) -> nn.Module:
    """A masked network with random gradients."""
    model = NETWORKS[name].build()
    found = wires(model)
    pk.convert(model)
    apply(model, found, draw(found, "joint", keep_ratio, seed=0), "cpu")
    return with_grads(model)


def with_grads(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


def live_of(model: nn.Module) -> dict[Tensor, Tensor]:
    """Bool by parameter: what a step with freeze="dead" touches. Taken from the layers, not from what the optimizer
    reads."""
    live: dict[Tensor, Tensor] = {p: torch.ones_like(p, dtype=torch.bool) for p in model.parameters()}
    for layer in model.modules():
        if isinstance(layer, pk.MaskedConv2d):
            rows = layer.filter_mask[:, None] & layer.kernel_mask & layer.input_mask
            live[layer.weight] &= rows[:, :, None, None]
        elif isinstance(layer, pk.MaskedBatchNorm2d):
            live[layer.weight] &= layer.channel_mask
            live[layer.bias] &= layer.channel_mask
    return live


def check(model: nn.Module, kind: str) -> float:
    """Compares three steps of ours with three of torch's from the same start; returns the share of live elements."""
    params = list(model.parameters())
    start = [p.detach().clone() for p in params]

    def stepped(optimizer: torch.optim.Optimizer) -> list[Tensor]:
        torch._foreach_copy_([p.detach() for p in params], start)
        for _ in range(3):
            optimizer.step()
        return [p.detach().clone() for p in params]

    ours = OURS[kind](params, freeze="dead", **NUMBERS[kind])
    bind(ours, model)
    live = live_of(model)
    got, expected = stepped(ours), stepped(THEIRS[kind](params, **CHECKED[kind], **NUMBERS[kind]))
    for p, before, a, b in zip(params, start, got, expected, strict=True):
        close = torch.equal if kind == "sgd" else torch.allclose  # AdamW differs by rounding at the ends of parameters
        if not close(a, torch.where(live[p], b, before)):
            raise SystemExit(f"optim.py: {kind}: expected torch's step where live, got another")
    return sum(int(m.sum()) for m in live.values()) / sum(p.numel() for p in params)


def steps(model: nn.Module, small: nn.Module, kind: str) -> dict[str, Callable[[], object]]:
    """What is timed, by name; see the top of this file."""
    params, numbers = list(model.parameters()), NUMBERS[kind]
    ours = {freeze: OURS[kind](params, freeze=freeze, **numbers) for freeze in ("hard", "dead")}
    for optimizer in ours.values():
        bind(optimizer, model)
    theirs = {name: THEIRS[kind](params, **{name: True}, **numbers) for name in ("foreach", "fused")}
    masked = THEIRS[kind](params, foreach=True, **numbers)
    masks = [live.to(p.dtype) for p, live in live_of(model).items()]
    weights = [p.detach() for p in params]

    def then_mask() -> None:
        masked.step()
        torch._foreach_mul_(weights, masks)

    bound = OURS[kind](small.parameters(), **numbers)
    every = {name: optimizer.step for name, optimizer in (ours | theirs).items()}
    return every | {"masked": then_mask, "small": bound.step}


def row(name: str, kind: str, keep_ratio: float, seconds: float) -> StepRow:
    torch.manual_seed(0)
    model = network(name, keep_ratio)
    live = check(model, kind)
    small = with_grads(NETWORKS[name].build(keep_ratio))
    found = interleaved(steps(model, small, kind), "cpu", seconds)
    times = {which: timing.median for which, timing in found.items()}
    return StepRow(name, kind, keep_ratio, live, times, {which: (t.low, t.high) for which, t in found.items()})


def summary(rows: Sequence[StepRow], markdown: bool) -> str:
    whole = [r.ms["foreach"] / r.ms["hard"] for r in rows]
    lost = [r.job for r, ratio in zip(rows, whole, strict=True) if ratio < LOSS]
    lines = [f'{len(lost)} of {len(rows)} rows lost to foreach with freeze="hard": {", ".join(lost) or "-"}']
    for kind in OURS:
        for kept in sorted({r.kept for r in rows}, reverse=True):
            of = [r.flat() for r in rows if r.kept == kept and r.optimizer == kind]
            for ratio in ("vs_foreach", "vs_fused", "of_small"):
                values = torch.tensor([float(r[ratio]) for r in of], dtype=torch.float64)  # type: ignore[arg-type]
                if of:
                    lines.append(f"{kind}, kept {kept:g}, {ratio}: geometric mean {values.log().mean().exp():.2f}")
    return "\n".join(f"- {line}" for line in lines)


def table(rows: Sequence[StepRow], markdown: bool) -> str:
    return text_table([r.flat() for r in rows], markdown)


STEPS = Report("Optimizer benchmark", StepRow, table, summary)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("optim.py", str(__doc__))
    add, known = parser.add_argument, ("resnet56", "vgg16", "resnet18")
    add("--networks", nargs="+", choices=list(NETWORKS), default=known, help=f"default: {' '.join(known)}")
    add("--optimizers", nargs="+", choices=list(OURS), default=list(OURS), help="default: both")
    add("--kept", nargs="+", type=keep_ratio, default=[1.0, 0.9, 0.5, 0.3], help="keep ratios of the filters")
    add("--seconds", type=duration, default=3.0, help="to spend on a row; default: %(default)s")
    add_output_files(parser, ("json", "md"))
    return parser.parse_args(argv, argparse.Namespace(dtype="float32"))


def main(argv: Sequence[str]) -> int:
    args = parse(argv)

    def make_header() -> dict[str, object]:
        return header("optim.py", argv, args)

    def rows_of(job: Job) -> Iterator[StepRow]:
        yield row(job.network, job.optimizer, job.keep_ratio, args.seconds)

    jobs = [Job(*each) for each in product(args.networks, args.optimizers, args.kept)]
    record = Record(args, STEPS, jobs, make_header())
    return command.run(record, lambda record: command.run_jobs(record, record.todo(), rows_of), make_header)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
