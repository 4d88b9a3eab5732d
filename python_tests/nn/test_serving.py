"""One network served by several threads, and a change of masks in the middle: a changed copy takes its place."""

import copy
import threading
import time

import pytest
import torch
from torch import nn

import prunekernels as pk


def network(flow, keep):
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 12, 3)
    net = nn.Sequential(first, nn.BatchNorm2d(16), nn.ReLU(), second, nn.BatchNorm2d(12), nn.ReLU()).eval()
    pk.convert(net)
    set_masks(net, keep)
    return pk.flow(net, flow)


def set_masks(net, keep):
    for conv, norm in ((net[0], net[1]), (net[3], net[4])):
        live = torch.arange(conv.out_channels) % keep == 0
        conv.set_masks(filter=live)
        norm.set_mask(live)


def answers(net, x):
    with torch.inference_mode():
        return net(x)


def serve(threads, calls, call, meanwhile=None):
    """The results of `calls` calls on each of some threads that start together; raises what a thread raised."""
    barrier, results, errors = threading.Barrier(threads + 1), [], []

    def work():
        torch.set_num_threads(1)
        barrier.wait()
        try:
            for _ in range(calls):
                results.append(call())
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    barrier.wait()
    if meanwhile is not None:
        meanwhile(results)
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    return results


@pytest.mark.parametrize("threads", [1, 4, 16])
@pytest.mark.parametrize("flow", [False, True])
def test_threads_get_the_answer_of_one(flow, threads):
    """The first call included, which brings masks up to date and lowers the layers."""
    x = torch.randn(2, 3, 9, 9)
    expected = answers(network(flow, 2), x)
    for _ in range(3):
        net = network(flow, 2)
        results = serve(threads, 3, lambda net=net: answers(net, x))
        assert len(results) == 3 * threads and all(torch.equal(y, expected) for y in results)


class Server:
    """Serves the network that `net` is when a call begins: as docs/integrations.md has it."""

    def __init__(self, net):
        self.net = net

    def __call__(self, x):
        return answers(self.net, x)

    def change(self, keep):
        changed = copy.deepcopy(self.net)
        set_masks(changed, keep)
        self.net = changed


@pytest.mark.parametrize("threads", [1, 4, 16])
@pytest.mark.parametrize("flow", [False, True])
def test_a_swapped_copy_is_never_a_mixture(flow, threads):
    x = torch.randn(2, 3, 9, 9)
    both = [answers(network(flow, keep), x) for keep in (2, 3)]
    assert not torch.equal(*both)
    server = Server(network(flow, 2))

    def change(results):
        deadline = time.monotonic() + 20
        while len(results) < threads and time.monotonic() < deadline:
            time.sleep(0.0005)
        server.change(3)

    calls = 120 // threads + 4
    results = serve(threads, calls, lambda: server(x), change)
    which = [[torch.equal(y, known) for known in both] for y in results]
    assert len(results) == threads * calls and all(sum(each) == 1 for each in which)
    assert torch.equal(server(x), both[1]) and which[0] == [True, False]
