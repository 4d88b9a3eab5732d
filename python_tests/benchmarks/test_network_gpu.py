"""What the networks' benchmark does for a GPU, tried on CPU: graphs of whole steps, defaults, header, memory."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import network
import networks.options as network_options
from cases.benchmark_networks import make_masked
from harness import contender, machine
from harness.contender import Wrong, captured, timed
from networks.baselines import PASSES, LiveMode, Small
from networks.contenders import EAGER


class Graph:
    """A replay runs what was captured last, and leaves its result where the capture did."""

    captured = None

    def replay(self):
        run, result = Graph.captured
        result.copy_(run())


@pytest.fixture
def make_believe_cuda(monkeypatch):
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.mark.parametrize("direction", PASSES)
def test_a_graph_of_a_whole_step_is_checked(make_believe_cuda, monkeypatch, direction):
    masked = make_masked()
    contenders = {f"{kind.family}/nchw": kind(masked, direction, "nchw") for kind in EAGER}
    for each in contenders.values():

        def run(run=each.run):
            Graph.captured = run, run().clone()
            return Graph.captured[1]

        monkeypatch.setattr(each, "run", run)
    replays = captured(contenders)
    assert list(replays) == list(contenders)
    check = LiveMode.check
    monkeypatch.setattr(LiveMode, "check", lambda self, out=None: check(self, out + 1))
    with pytest.raises(Wrong, match="tiny_resnet joint kept 0.5: live.*replayed from a CUDA graph"):
        captured(contenders)


def test_one_that_cannot_be_captured_has_all_calls_timed(make_believe_cuda, monkeypatch, capsys):
    def refuses(each):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(contender, "capture", refuses)
    assert captured({"small/nchw": Small(make_masked(), "train", "nchw")}) is None
    assert "tiny_resnet: small/nchw, train: no CUDA graph, RuntimeError" in capsys.readouterr().err


def cuda_args(monkeypatch, *argv):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return network_options.parse(["--device", "cuda", *argv])


def test_defaults_of_a_gpu(monkeypatch):
    args, networks = cuda_args(monkeypatch)
    assert (args.dtype, args.layout, args.clock, args.optimizer) == ("bfloat16", "channels_last", "graph", "torch")
    assert [(n.name, n.image, n.batch) for n in networks][0] == ("resnet50", 224, 128) and len(networks) == 5
    args, _ = cuda_args(monkeypatch, "--dtype", "float32", "--layout", "both")
    assert (args.dtype, args.layout) == ("float32", "both")


@pytest.mark.parametrize(
    ("clock", "graphs", "said"), [("graph", True, "graph"), ("graph", False, "events"), ("events", True, "events")]
)
def test_clock_of_a_gpu(monkeypatch, clock, graphs, said):
    args, _ = cuda_args(monkeypatch, "--clock", clock)
    monkeypatch.setattr(contender, "captured", lambda runs: dict.fromkeys(runs, "replay") if graphs else None)
    monkeypatch.setattr(contender, "interleaved", lambda runs, *_, **__: runs)
    runs, name = timed({"small/nchw": SimpleNamespace(run="call")}, args, 0, 3)
    assert (runs, name) == ({"small/nchw": "replay" if said == "graph" else "call"}, said)


def test_header_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some card")
    monkeypatch.setattr(machine, "ceilings", lambda dtype: {"matrix TFLOP/s": dtype.itemsize})
    args, _ = cuda_args(monkeypatch)
    head = machine.header("network.py", ["--device", "cuda"], args, {"layout": args.layout})
    assert (head["gpu"], head["clock"], head["layout"], head["matrix TFLOP/s"]) == (
        "some card",
        "graph",
        "channels_last",
        2,
    )


def test_peak_memory_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3_000_000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 10_000_000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    assert network.peak_mb(lambda: None, "cuda") == 7
