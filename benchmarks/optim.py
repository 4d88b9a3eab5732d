#!/usr/bin/env python3
"""Times optimizer steps of whole networks: ours beside torch.optim and beside the small network's step.

    python benchmarks/optim.py --networks resnet56 vgg16 resnet18 --kept 1.0 0.9 0.5 0.3 --json o.json --md o.md

Gradients are random and stay; all optimizers step the same parameters, each with state of its own. Before anything is
timed, a step of ours is compared with torch's: equal where live, untouched where frozen. Masks are joint, as network.py
draws them. `foreach` is torch.optim with foreach=True, `masked` the same and a multiplication of all weights by their
masks, `fused` torch's with fused=True; `small` is ours on the network built at that width, the limit of what skipping
can give. `hard`, `dead`: ours with that freeze; no filter is hard-dead, so `hard` steps nearly everything.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import prunekernels as pk
from harness.machine import header
from harness.timing import interleaved
from layers.options import kept_share
from layers.report import NOTHING, document, text_table, write_whole
from networks.models import NETWORKS, apply, draw, wires
from prunekernels.optim import MaskedAdamW, MaskedSGD, bind

OURS = {"sgd": MaskedSGD, "adamw": MaskedAdamW}
THEIRS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
NUMBERS = {"sgd": {"lr": 1e-6, "momentum": 0.9, "weight_decay": 1e-4}, "adamw": {"lr": 1e-6, "weight_decay": 1e-2}}
CHECKED = {"sgd": {"foreach": True}, "adamw": {"fused": True}}
LOST = 0.98


@dataclass
class StepRow:
    """Milliseconds of one step."""

    network: str
    optimizer: str
    kept: float
    live: float  # share of the parameters' elements that freeze="dead" steps
    ms: dict[str, float]
    quartiles: dict[str, tuple[float, float]] = field(default_factory=dict)

    def flat(self) -> dict[str, object]:
        ratios = {f"vs_{name}": self.ms[name] / self.ms["dead"] for name in ("foreach", "masked", "fused")}
        own = {"network": self.network, "optimizer": self.optimizer, "kept": self.kept, "live": self.live}
        times = {f"{name}_ms": ms for name, ms in self.ms.items()}
        return own | times | ratios | {"hard_vs_foreach": self.ms["foreach"] / self.ms["hard"]} | {
            "of_small": self.ms["small"] / self.ms["dead"]
        }  # fmt: skip


def network(name: str, kept: float) -> nn.Module:
    """Masked, with random gradients."""
    model = NETWORKS[name].build()
    found = wires(model)
    pk.convert(model)
    apply(model, found, draw(found, "joint", kept, seed=0), "cpu")
    return with_grads(model)


def with_grads(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


def live_of(model: nn.Module) -> dict[Tensor, Tensor]:
    """By parameter, bool: what a step of freeze="dead" touches. From the layers, not from what the optimizer reads."""
    live = {p: torch.ones_like(p, dtype=torch.bool) for p in model.parameters()}
    for layer in model.modules():
        if isinstance(layer, pk.MaskedConv2d):
            rows = layer.filter_mask[:, None] & layer.kernel_mask & layer.input_mask
            live[layer.weight] &= rows[:, :, None, None]
        elif isinstance(layer, pk.MaskedBatchNorm2d):
            live[layer.weight] &= layer.channel_mask
            live[layer.bias] &= layer.channel_mask
    return live


def check(model: nn.Module, kind: str) -> float:
    """Three steps of ours and torch's from the same start; the share of elements that are live."""
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
        close = torch.equal if kind == "sgd" else torch.allclose  # AdamW: but for the ends of parameters
        if not close(a, torch.where(live[p], b, before)):
            raise SystemExit(f"optim.py: {kind}: expected torch's step where live, got another")
    return sum(int(m.sum()) for m in live.values()) / sum(p.numel() for p in params)


def steps(model: nn.Module, small: nn.Module, kind: str) -> dict[str, Callable[[], object]]:
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

    limit = OURS[kind](small.parameters(), **numbers)
    every = {name: optimizer.step for name, optimizer in (ours | theirs).items()}
    return every | {"masked": then_mask, "small": limit.step}


def row(name: str, kind: str, kept: float, seconds: float) -> StepRow:
    torch.manual_seed(0)
    model = network(name, kept)
    live = check(model, kind)
    small = with_grads(NETWORKS[name].build(kept))
    found = interleaved(steps(model, small, kind), "cpu", seconds)
    times = {which: timing.median for which, timing in found.items()}
    return StepRow(name, kind, kept, live, times, {which: (t.low, t.high) for which, t in found.items()})


def summary(rows: Sequence[StepRow]) -> str:
    whole = [r.ms["foreach"] / r.ms["hard"] for r in rows]
    lost = [f"{r.network} {r.optimizer} kept {r.kept:g}" for r, ratio in zip(rows, whole, strict=True) if ratio < LOST]
    lines = [f'{len(lost)} of {len(rows)} rows lost to foreach with freeze="hard": {", ".join(lost) or "-"}']
    for kind in OURS:
        for kept in sorted({r.kept for r in rows}, reverse=True):
            of = [r.flat() for r in rows if r.kept == kept and r.optimizer == kind]
            for ratio in ("vs_foreach", "vs_fused", "of_small"):
                values = torch.tensor([float(r[ratio]) for r in of], dtype=torch.float64)  # type: ignore[arg-type]
                if of:
                    lines.append(f"{kind}, kept {kept:g}, {ratio}: geometric mean {values.log().mean().exp():.2f}")
    return "\n".join(f"- {line}" for line in lines)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ("resnet56", "vgg16", "resnet18")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=known, help="default: %(default)s")
    parser.add_argument("--optimizers", nargs="+", choices=list(OURS), default=list(OURS))
    parser.add_argument("--kept", nargs="+", type=kept_share, default=[1.0, 0.9, 0.5, 0.3], help="shares of filters")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row; default: %(default)s")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--md", type=Path, help="write the tables here")
    return parser.parse_args(argv, argparse.Namespace(device="cpu", dtype="float32", plan=None, layout=None))


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    rows = []
    for name in args.networks:
        for kind in args.optimizers:
            for kept in args.kept:
                rows.append(row(name, kind, kept, args.seconds))
                print(text_table([rows[-1].flat()], markdown=False), flush=True)
    head = {k: v for k, v in header(args, argv, "optim.py").items() if v is not None}
    print(summary(rows))
    if args.json:
        body = {"header": head, "rows": [r.flat() | {"quartiles": asdict(r)["quartiles"]} for r in rows]}
        write_whole(args.json, json.dumps(body, indent=1) + "\n")
    if args.md:
        table = text_table([r.flat() for r in rows], markdown=True)
        write_whole(args.md, document("Optimizer benchmark", head, summary(rows), "", NOTHING, table))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
