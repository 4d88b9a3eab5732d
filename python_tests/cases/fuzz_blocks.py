"""A random network of convolutions, norms, activations and sums, written as one line of text that gives it back."""

import copy
import dataclasses
import json

import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk

WIDTH, SIZES = 12, ((2, 5, 6), (1, 16, 33), (6, 2, 3))


def wide(x):
    """Without a rule of live mode, of what is no longer zero where x is dead."""
    return torch.flip(torch.sigmoid(x), (1,)) - 0.5


TOLERANCE = {"float32": 1e-2, "float64": 1e-8}  # of the whole: where a rounded number has another sign, a slope differs
UNARY = {
    "relu": F.relu,
    "relu_": torch.relu_,
    "module": lambda x: nn.ReLU(inplace=True)(x),
    "sigmoid": torch.sigmoid,
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "scaled": lambda x: x * 0.5,
    "scaled_": lambda x: x.mul_(0.5),
    "view": lambda x: x[:, :, :1].expand_as(x),
    "detached": lambda x: x.detach(),
    "copied": lambda x: x.clone(),
    "other layout": lambda x: x.contiguous(memory_format=torch.channels_last),
    "checkpointed": lambda x: torch.utils.checkpoint.checkpoint(F.relu, x, use_reentrant=False),
    "checkpointed wide": lambda x: torch.utils.checkpoint.checkpoint(wide, x, use_reentrant=False),
}
BINARY = {
    "sum": torch.add,
    "sum_": lambda a, b: a.add_(b),
    "operator": lambda a, b: a + b,
    "difference": torch.sub,
    "scaled sum": lambda a, b: torch.add(a, b, alpha=0.5),
    "product": torch.mul,
}
STEPS = ("conv norm", "conv norm", "conv norm", "norm", "relu", "relu", "sum", "operator", *UNARY, *BINARY)


@dataclasses.dataclass(frozen=True)
class Program:
    """steps: (what, its operands). Results have numbers; the input is number 0."""

    steps: tuple
    read: tuple  # numbers of results that the loss reads, beside the last
    size: tuple  # N, H, W
    joint: bool  # all masks are one
    training: bool
    channels_last: bool
    gradients: bool
    dtype: str
    seed: int

    def __str__(self):
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def parse(cls, text):
        fields = json.loads(text)
        steps = tuple((name, tuple(operands)) for name, operands in fields["steps"])
        return cls(**fields | {"steps": steps, "size": tuple(fields["size"]), "read": tuple(fields["read"])})


def draw(rng):
    """A program. rng: as random.Random, such as hypothesis' own."""
    steps = [("conv norm", (0,))]
    for _ in range(rng.randrange(2, 10)):
        name = rng.choice(STEPS)
        newest = len(steps)
        operands = [rng.choice((newest, newest, newest, max(1, newest - 1), rng.randrange(1, newest + 1)))]
        operands += [rng.randrange(1, newest + 1)] * (name in BINARY)
        steps.append((name, tuple(operands)))
    flags = {name: rng.random() < 0.5 for name in ("joint", "channels_last")}
    return Program(
        steps=tuple(steps),
        read=tuple(i for i in range(1, len(steps)) if rng.random() < 0.2),
        size=rng.choice(SIZES),
        training=rng.random() < 0.7,
        gradients=rng.random() < 0.8,
        dtype=rng.choice(("float32", "float32", "float64")),
        seed=rng.randrange(2**32),
        **flags,
    )


class Net(nn.Module):
    def __init__(self, program):
        super().__init__()
        generator = torch.Generator().manual_seed(program.seed)
        self.steps, self.layers = program.steps, nn.ModuleDict()
        for i, (name, operands) in enumerate(program.steps):
            if "conv" in name:
                self.layers[f"conv{i}"] = nn.Conv2d(WIDTH if operands[0] else 3, WIDTH, 3, padding=1, bias=False)
            if "norm" in name:
                self.layers[f"norm{i}"] = nn.BatchNorm2d(WIDTH)
        self.layers["head"] = nn.Conv2d(WIDTH, 4, 1)
        pk.convert(self)
        keep = torch.rand(WIDTH, generator=generator) < 0.5
        for name, layer in self.layers.items():
            keep = keep if program.joint else torch.rand(WIDTH, generator=generator) < 0.5
            if name.startswith("conv"):
                layer.set_masks(filter=keep)
            elif name.startswith("norm"):
                layer.set_mask(keep)
                nn.init.normal_(layer.weight, generator=generator), nn.init.normal_(layer.bias, generator=generator)
        self.to(getattr(torch, program.dtype))

    def forward(self, x):
        results = [x]
        for i, (name, operands) in enumerate(self.steps):
            given = [results[operand] for operand in operands]
            if name in UNARY or name in BINARY:
                results.append((UNARY | BINARY)[name](*given))
                continue
            y = self.layers[f"conv{i}"](given[0]) if "conv" in name else given[0]
            results.append(self.layers[f"norm{i}"](y) if "norm" in name else y)
        return self.layers["head"](results[-1]), results


def outcome(net, program):
    """What the loss reads, and gradients."""
    N, H, W = program.size
    x = torch.randn(N, 3, H, W, generator=torch.Generator().manual_seed(program.seed), dtype=torch.float64)
    x = x.to(getattr(torch, program.dtype)).requires_grad_(program.gradients)
    layout = torch.channels_last if program.channels_last else torch.contiguous_format
    with torch.set_grad_enabled(program.gradients):
        y, results = net(x.contiguous(memory_format=layout) * 1)
        found = [y, *(pk.live.full_width(results[number]) for number in program.read)]
    if program.gradients:
        torch.stack([each.square().mean() for each in found]).sum().backward()
        found += [x.grad, *(p.grad for p in net.parameters())]
    return [None if t is None else t.detach() for t in (*found, *net.buffers())]


def outcome_or_none(net, program):
    """None: autograd does not take this program, since what it has saved is changed in place. Masked mode may have
    saved a copy; live mode saves what plain torch does.
    """
    try:
        return outcome(net, program)
    except RuntimeError as error:
        if "inplace" in str(error) or "in-place" in str(error) or "written-to tensor" in str(error):
            return None
        raise


def check(program):
    """In live mode the network computes what it does in masked mode."""
    torch.manual_seed(program.seed % 2**31)
    net = Net(program).train(program.training)
    if program.channels_last:
        net.to(memory_format=torch.channels_last)
    live = pk.flow(copy.deepcopy(net))
    want = outcome_or_none(net, program)
    got_all = outcome_or_none(live, program) if want is not None else None
    if want is None or got_all is None:
        return
    for got, expected in zip(got_all, want, strict=True):
        assert (got is None) == (expected is None)
        if got is not None and expected.numel():
            apart, scale = (float(t.double().norm()) for t in (got - expected, expected))
            assert apart <= TOLERANCE[program.dtype] * (scale + 1e-3), f"{apart} apart, of {scale}"
