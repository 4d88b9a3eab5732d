"""A small network trained for thousands of steps with other masks every 50, and what it has become."""

import dataclasses
import time

import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk

MASKS_EVERY = 50
PAGE = 4096


class Net(nn.Module):
    """A stem, a residual block with a depthwise convolution, a grouped one, a classifier."""

    def __init__(self, width=16, classes=4):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.depthwise, self.inner_norm = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.BatchNorm2d(width)
        self.pointwise, self.outer_norm = nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)
        self.grouped, self.last_norm = nn.Conv2d(width, 2 * width, 3, stride=2, groups=4), nn.BatchNorm2d(2 * width)
        self.classifier = nn.Linear(2 * width, classes)

    def forward(self, x):
        x = F.relu(self.stem_norm(self.stem(x)))
        inner = F.relu(self.inner_norm(self.depthwise(x)))
        x = F.relu(x + self.outer_norm(self.pointwise(inner)))
        x = F.relu(self.last_norm(self.grouped(x)))
        return self.classifier(x.mean((2, 3)))


@dataclasses.dataclass
class Outcome:
    tensors: dict  # parameters and momentum
    growth: int  # bytes of resident memory after the warm-up, at most
    early: float  # CPU seconds of a tenth of the steps, behind the warm-up
    late: float  # the same of the last tenth
    losses: tuple  # means of the same tenths

    @property
    def subnormal(self):
        """How many numbers are not zero and too small for their dtype."""
        tiny = lambda t: (t != 0) & (t.abs() < torch.finfo(t.dtype).tiny)  # noqa: E731
        return sum(int(tiny(t).sum()) for t in self.tensors.values())

    @property
    def finite(self):
        return all(bool(t.isfinite().all()) for t in self.tensors.values())


def resident():
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE


def change_masks(net, groups, generator):
    """A random half of the joint channels becomes live. The first quarter is dead at all times, so that its momentum
    and, by weight decay, its weights shrink for as long as the run takes."""
    for group in groups:
        keep = torch.rand(group.width, generator=generator) < 0.5
        keep[: group.width // 4], keep[-1] = False, True
        group.set_masks(net, keep)


def optimizer_of(net):
    """SGD under which dead filters become subnormal: the momentum of the stem's, and the weights of all others.

    With a rate and a momentum this small, steps bring two networks nearer to each other that differ by rounding.
    """
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m is not net.stem]
    with torch.no_grad():
        for conv in convs:
            conv.weight[: len(conv.weight) // 4] = 1.01 * torch.finfo(conv.weight.dtype).tiny
    decaying = [conv.weight for conv in convs]
    others = [p for p in net.parameters() if not any(p is weight for weight in decaying)]
    groups = [{"params": decaying, "weight_decay": 0.05}, {"params": others}]
    optimizer = pk.optim.MaskedSGD(groups, lr=0.001, momentum=0.5)
    pk.optim.bind(optimizer, net)
    return optimizer


def train(mode, dtype, steps, warm, seed=0):
    """The outcome of so many steps. mode: masked or live."""
    torch.manual_seed(seed)
    generator, x = torch.Generator().manual_seed(seed), torch.randn(2, 3, 8, 8, dtype=dtype)
    net = Net().to(dtype)
    groups = [group for group in pk.coupled_groups(net, x) if not group.is_output]
    pk.convert(net)
    if mode == "live":
        pk.flow(net)
    optimizer = optimizer_of(net)
    tenth = (steps - warm) // 10
    begins, before, highest, losses = {}, 0, 0, []
    for step in range(steps):
        if step in (warm, warm + tenth, steps - tenth):
            begins[step] = time.process_time()
        if step == warm:
            before = highest = resident()
        if step % MASKS_EVERY == 0:
            change_masks(net, groups, generator)
            highest = max(highest, resident())
        losses.append(train_step(net, optimizer, generator, dtype))
    end = time.process_time()
    momentum = {f"momentum {i}": s["momentum_buffer"] for i, s in enumerate(optimizer.state.values())}
    return Outcome(
        tensors={name: t.detach().clone() for name, t in (dict(net.named_parameters()) | momentum).items()},
        growth=max(highest, resident()) - before,
        early=begins[warm + tenth] - begins[warm],
        late=end - begins[steps - tenth],
        losses=(sum(losses[warm : warm + tenth]) / tenth, sum(losses[-tenth:]) / tenth),
    )


def train_step(net, optimizer, generator, dtype):
    """A step on images that are brighter in the quadrant of their class. Returns the loss."""
    y = torch.randint(4, (8,), generator=generator)
    x = torch.randn(8, 3, 8, 8, generator=generator, dtype=dtype)
    for image, label in zip(x, y.tolist(), strict=True):
        image[:, 4 * (label // 2) :, 4 * (label % 2) :][:, :4, :4] += 1
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(net(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()
