"""Trains a small network on several processes while GHFP prunes half of its filters, in compacted mode.

torchrun --nproc-per-node 2 examples/ddp.py --epochs 3

On two machines, once on each, with --node-rank 0 on the first and 1 on the second:

torchrun --nnodes 2 --node-rank 0 --master-addr first-machine --master-port 29500 --nproc-per-node 2 examples/ddp.py
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import prunekernels as pk


def stripes(count: int) -> TensorDataset:
    """Noisy images [1, 16, 16] of stripes in one of four directions, with the direction as their label."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (count,), generator=generator)
    angles = labels * torch.pi / 4
    at = torch.arange(16.0)
    phase = angles.cos()[:, None, None] * at[:, None] + angles.sin()[:, None, None] * at
    images = (1.5 * phase).sin() + 0.5 * torch.randn(count, 16, 16, generator=generator)
    return TensorDataset(images[:, None], labels)


def network() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, filters in ((1, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(inputs, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))


def main(arguments: list[str] | None = None) -> nn.Module:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32, help="images a step of each process")
    given = parser.parse_args(arguments)

    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    torch.manual_seed(0)  # the same weights on all ranks
    net = network().to(device)
    pk.convert(net)
    optimizer = pk.optim.MaskedSGD(net.parameters(), lr=0.05, momentum=0.9)
    data = stripes(given.images)
    images = data.tensors[0][:2].to(device)
    method = pk.methods.GHFP(  # of net: scores are averaged over the ranks
        net, optimizer, rate=0.5, epochs=given.epochs, duty=0.1, example_input=images, mode="compacted"
    )
    model: nn.Module = net
    cut: object = None
    sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(data, drop_last=True)
    for epoch in range(given.epochs):
        sampler.set_epoch(epoch)
        for x, y in DataLoader(data, given.batch, sampler=sampler, drop_last=True):
            small, opt = method.net, method.opt  # the small network, or net and optimizer where nothing is dead
            now = method.compaction.cut if method.is_compacted and method.compaction else "whole"
            if now is not cut:  # other masks, other parameters
                model, cut = DistributedDataParallel(small, init_sync=False), now
            opt.zero_grad()
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            loss.backward()
            opt.step()
            method.step()
        method.end_epoch()
        ranks = pk.check_same_masks(net)
        if dist.get_rank() == 0:
            print(f"epoch {epoch}: loss {loss.item():.3f}, {method}, masks equal on all {ranks} ranks", flush=True)
    dist.destroy_process_group()
    return net


if __name__ == "__main__":
    main()
