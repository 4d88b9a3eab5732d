"""One small training, by a loop of our own and by the trainers of libraries."""

import torch
from torch import nn
from torch.nn import functional as F

import prunekernels as pk

EPOCHS, STEPS, BATCH = 4, 4, 4
SOFT = {"duty": 0.5, "wake": "together", "clip": True, "criterion": "l2", "warm_up": 0, "fine_tune": 0, "alpha": 0.0}
LR, MOMENTUM, DECAY = 0.05, 0.9, 1e-3


class Net(nn.Module):
    """Two convolutions and norms; its forward is what every library calls."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(6, 3)

    def forward(self, pixel_values, labels=None):
        logits = self.head(self.body(pixel_values))
        return logits if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def data(rank=0):
    """Images [16, 3, 8, 8] and labels."""
    generator = torch.Generator().manual_seed(5 + rank)
    images = torch.randn(STEPS * BATCH, 3, 8, 8, generator=generator)
    return images, torch.randint(3, (STEPS * BATCH,), generator=generator)


def sgd(net):
    return torch.optim.SGD(net.parameters(), LR, MOMENTUM, weight_decay=DECAY)


def loop(
    method, *, rate=0.5, bf16=False, max_norm=None, accumulate=1, live=False, average=None, scaler=None, epochs=EPOCHS,
    **options,
):  # fmt: skip
    """The training by hand. scaler: a GradScaler, with float16. Returns the network, the method and the average."""
    scaler = torch.amp.GradScaler("cpu", enabled=False) if scaler is None else scaler
    dtype = torch.float16 if scaler.is_enabled() else torch.bfloat16
    net = Net()
    pk.convert(net)
    pk.flow(net, live)
    average = None if average is None else average(net)
    optimizer, (images, labels) = sgd(net), data()
    pruning = getattr(pk.methods, method)(
        net, optimizer, rate, epochs, followers=[] if average is None else [average], **options
    )
    for _ in range(epochs):
        for step, (x, y) in enumerate(zip(images.split(BATCH), labels.split(BATCH), strict=True)):
            with torch.autocast("cpu", dtype, enabled=bf16 or scaler.is_enabled()):
                loss = F.cross_entropy(net(x), y)
            scaler.scale(loss / accumulate).backward()
            if (step + 1) % accumulate:
                continue
            scaler.unscale_(optimizer)
            if max_norm is not None:
                pruning.clip_soft()
                nn.utils.clip_grad_norm_(net.parameters(), max_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            pruning.step()
            if average is not None:
                average.update_parameters(net)
        pruning.end_epoch()
    return net, pruning, average


def assert_same_networks(got, expected):
    """To the bit: parameters, statistics and masks, what soft-dead filters hold included."""
    got, expected = ({**dict(net.named_parameters()), **dict(net.named_buffers())} for net in (got, expected))
    assert got.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(got[name], value)]
    assert not different


def live_counts(net):
    return [int(layer.filter_mask.sum()) for layer in net.modules() if isinstance(layer, pk.MaskedConv2d)]
