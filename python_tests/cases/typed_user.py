"""What a user writes, for mypy --strict: the public names, with the types that their results have. Never run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import prunekernels as pk
from prunekernels import (
    MaskedBatchNorm2d,
    MaskedConv2d,
    MaskedGroupNorm,
    MaskedLayerNorm,
    convert,
    count_flops,
    explain,
    flow,
    restore,
)
from prunekernels.methods import GHFP, SFP, Counts, Method, criteria, schedules

x = torch.randn(2, 3, 8, 8)


def layers() -> None:
    conv = MaskedConv2d(3, 8, 3, padding=1, bias=False)
    conv.set_masks(filter=torch.arange(8) > 3, kernel=None, input="all", hard=None)
    conv.weight_grad = "dense"
    conv.grad_scale = torch.ones(8)
    assert_type(conv.filter_mask, Tensor)
    assert_type(conv.hard_mask, Tensor)
    assert_type(conv.density, float)
    assert_type(conv.to_conv(), nn.Conv2d)
    assert_type(MaskedConv2d.from_conv(nn.Conv2d(3, 8, 3)), MaskedConv2d)
    conv.zero_dead()
    layer_plan = conv.plan
    if layer_plan is not None:
        assert_type(layer_plan.forward, str)
    linear, up = pk.MaskedLinear(8, 4), pk.MaskedConvTranspose2d(8, 4, 2, stride=2)
    assert_type(linear.forward(torch.randn(2, 8)), Tensor)
    assert_type(up.filters_first(up.weight), Tensor)
    assert_type(pk.MaskedLinear.from_linear(nn.Linear(8, 4)), pk.MaskedLinear)
    assert_type(up.to_conv(), nn.ConvTranspose2d)
    norm = MaskedBatchNorm2d(8)
    norm.set_mask("all")
    assert_type(norm.channel_mask, Tensor)
    assert_type(norm.to_norm(), nn.BatchNorm2d)
    y: Tensor = norm(conv(x))
    groups, last = MaskedGroupNorm(2, 8), MaskedLayerNorm(8)
    assert_type(groups.to_norm(), nn.GroupNorm)
    assert_type(last.to_norm(), nn.LayerNorm)
    synced = pk.MaskedSyncBatchNorm(8, process_group=None)
    assert_type(synced.to_norm(), nn.SyncBatchNorm)
    assert_type(pk.MaskedSyncBatchNorm.from_norm(nn.SyncBatchNorm(8)), pk.MaskedSyncBatchNorm)
    assert_type(pk.convert_sync_batchnorm(nn.Sequential(norm)), nn.Module)
    assert_type(conv.forward(y), Tensor)


def functions() -> None:
    keep = torch.arange(8) > 3
    weight = torch.randn(8, 3, 3, 3)
    mask = pk.ConvMask(filter_mask=keep)
    assert_type(pk.masked_conv2d(x, weight, filter_mask=keep, padding="same", stride=1), Tensor)
    assert_type(pk.masked_conv2d(x, weight, mask=mask, padding=(1, 1)), Tensor)
    assert_type(pk.reference.masked_conv2d(x, weight, filter_mask=keep), Tensor)
    index = torch.tensor([0, 2], dtype=torch.int32)
    assert_type(pk.scatter_channels(pk.gather_channels(x, index), index, 3), Tensor)
    assert_type(pk.has_extension(), bool)
    assert_type(pk.build_info(), dict[str, str])
    assert_type(pk.kernels(), list[dict[str, Any]])
    with pk.plan.force("dense"), pk.plan.measure(False):
        pass
    assert_type(pk.plan.table(), list[dict[str, Any]])
    pk.plan.clear()


class Scaled(nn.Conv2d):
    """A layer that computes its weight."""

    gain = 2.0


def networks(model: nn.Module) -> None:
    report = convert(model, norms=True, linears=False, filter_fn=lambda name, module: name != "stem")
    assert_type(report.converted, list[str])
    assert_type(report.linears, list[str])
    assert_type(report.skipped, dict[str, str])
    assert_type(flow(model), nn.Module)
    y = model(x)
    if isinstance(y, pk.LiveTensor):
        assert_type(y.to_dense(), Tensor)
    flops = count_flops(model, x)
    assert_type(flops.live, int)
    assert_type(flops.saved, float)
    assert_type(flops, pk.Flops)
    assert_type(explain(model, (x,), backward=False), pk.Explanation)
    times = pk.time_modes(model, x, modes=("masked", "live"), repeats=1)
    assert_type(times, pk.ModeTimes)
    assert_type(times.best, str | None)
    for group in pk.coupled_groups(model, x):
        assert_type(group, pk.Group)
        assert_type(group.width, int)
        assert_type(group.layers, tuple[str, ...])
    assert_type(pk.tidy_masks(model, x), pk.Tidied)
    example = pk.Example(x)
    assert_type(pk.shrink(model, example), nn.Module)
    small, moved = pk.shrink(model, x, optimizer=torch.optim.SGD(model.parameters(), 0.1))
    assert_type(small, nn.Module)
    assert_type(moved, torch.optim.Optimizer)
    paths = pk.save_small(small, "small", x, formats=["pt2", "onnx"], model=model, accuracy=0.9, overwrite=True)
    assert_type(paths, list[Path])
    assert_type(pk.load_small(Path("small"), "cpu"), nn.Module)
    assert_type(pk.rate_for(model, x, flops=0.5, round_to=8), float)
    average = torch.optim.swa_utils.AveragedModel(model)
    pk.copy_masks(model, average)
    pk.check_same_masks(model)
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    live_gradients = pk.LiveGradients(model, timeout=60)
    ddp.register_comm_hook(live_gradients, pk.live_gradients_hook)
    assert_type(live_gradients.sent_bytes, int)
    pk.register_adapter(Scaled, weight=lambda layer: layer.weight * layer.gain)
    assert_type(restore(model), pk.Conversion)


def training(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> list[dict[str, Counts]]:
    optimizer = pk.optim.MaskedSGD(model.parameters(), lr=0.1, momentum=0.9, freeze="dead")
    adamw = pk.optim.MaskedAdamW(model.parameters(), lr=1e-3)
    binding = pk.optim.bind(torch.optim.SGD(model.parameters(), 0.1), model, freeze="hard")
    assert_type(binding, pk.optim.Binding)
    binding.remove()
    pk.optim.bind(adamw, model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    method: Method = GHFP(model, optimizer, 0.5, 10, example_input=x, coupling="joint", duty=0.5, hard=schedules.cubic)
    for data, labels in batches:
        optimizer.zero_grad()
        loss: Tensor = nn.functional.cross_entropy(model(data), labels)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.step()
        method.step()
    scheduler.step()
    with pk.compacted(model, x, optimizer, verify=True) as (net, opt):
        assert_type(net, nn.Module)
        if opt is not None:
            opt.step()
    with method.masked():
        model.eval()
    counts = method.end_epoch()
    assert_type(counts, dict[str, Counts])
    assert_type(counts["stem"].live, int)
    assert_type(method.states, dict[str, Tensor])
    assert_type(method.finished, bool)
    resumed = SFP(model, optimizer, state=method.state_dict(), criterion=largest)
    resumed.load_state_dict(method.state_dict())
    method.detach()
    coarse = pk.methods.CoarsePruning(model, optimizer, data=batches, masks=10)
    assert_type(coarse.error_rates, list[list[float]])
    return method.history


def largest(weights: list[Tensor]) -> list[Tensor]:
    return [weight.abs().amax((1, 2, 3)) for weight in weights]


class TwoStep(Method):
    """A method of one's own."""

    prunes_first = True

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        super().__init__(model, optimizer, 0.5, 10, **options)

    def pruned_share(self, epoch: int) -> float:
        return self.rate if epoch else self.rate / 2

    def soften(self, name: str, rows: Tensor, epoch: int) -> None:
        self.layers[name].weight[rows] *= 0.5


class Squares(criteria.Gathered):
    """A criterion of one's own."""

    def add(self, weights: list[Tensor], grads: list[Tensor], sums: list[Tensor]) -> None:
        for grad, total in zip(grads, sums, strict=True):
            total += grad.square().sum((1, 2, 3))


def fallbacks(model: nn.Module) -> Iterator[str]:
    from prunekernels.live import recording

    with recording(model) as rows:
        model(x)
    for row in rows:
        assert_type(row, dict[str, Any])
        yield row["op"]
