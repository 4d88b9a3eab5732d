"""What the harness does for a GPU, tried on CPU: graphs, header, rates, goals."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import conv
from cases.benchmark_layers import SMALL, found, make_case, make_row
from harness import contender, gpu, machine
from harness.contender import Wrong, captured
from harness.report import Missing
from layers.baselines import Ours
from layers.problems import Problem
from layers.report import LAYERS, summarise

# ---- CUDA graphs


class Stub:
    problem, direction = Problem.parse(SMALL), "fwd"

    def __init__(self):
        self.begun = 0

    def begin(self):
        self.begun += 1


def test_graphs_of_all_or_calls_of_all(monkeypatch, capsys):
    contenders = {"dense/nchw": Stub(), "limit/nchw": Stub()}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(contender, "capture", lambda each: f"graph of {id(each)}")
    assert captured(contenders) == {key: f"graph of {id(each)}" for key, each in contenders.items()}

    def refuses(each):
        if each is contenders["limit/nchw"]:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(contender, "capture", refuses)
    assert captured(contenders) is None and [each.begun for each in contenders.values()] == [1, 1]
    assert "limit/nchw, fwd: no CUDA graph, RuntimeError: operation not permitted" in capsys.readouterr().err


@pytest.fixture
def make_believe_cuda(monkeypatch):
    """Streams and graphs that do nothing: the CPU has computed what is captured."""

    class Graph:
        replay = staticmethod(lambda: replayed.append(1))

    replayed: list = []
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: nullcontext())
    return replayed


@pytest.mark.parametrize("direction", ["fwd", "grad_weight", "fwd+bwd"])
def test_a_graphs_results_are_checked(make_believe_cuda, monkeypatch, direction):
    case = make_case("n1c8h6k12r3s1p1g1")
    entries = conv.entries(case, direction, "both")
    contenders = {f"{kind.family}/{layout}": kind(case, direction, layout) for kind, layout in entries}
    runs = captured(contenders)
    assert list(runs) == list(contenders) and len(make_believe_cuda) == len(contenders)
    run = Ours.run
    monkeypatch.setattr(Ours, "run", lambda self: tuple(t + 1 for t in run(self)))
    with pytest.raises(Wrong, match="ours.*replayed from a CUDA graph"):
        captured({"ours/nchw": Ours(case, direction, "nchw")})


def test_a_wrong_replay_of_ours_is_a_wrong_result(monkeypatch):
    class Mine(Ours, Stub):
        begin, __init__ = Stub.begin, Stub.__init__

    def capture(each):
        raise Wrong("y is wrong")

    monkeypatch.setattr(contender, "capture", capture)
    with pytest.raises(Wrong, match="y is wrong, replayed from a CUDA graph"):
        captured({"ours/nchw": Mine()})


def test_the_cpu_is_always_alive():
    assert gpu.alive("cpu")


def test_header_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some card")
    monkeypatch.setattr(machine, "ceilings", lambda dtype: {"copy GB/s": 3000, "matrix TFLOP/s": dtype.itemsize})
    args, _ = conv.parse(["--suite", "gpu_quick", "--dtype", "bfloat16", "--device", "cpu"])
    args.device = "cuda"
    head = machine.header("conv.py", [], args)
    assert (head["gpu"], head["compute capability"], head["clock"]) == ("some card", "9.0", "graph")
    assert {"driver", "cuda", "cudnn"} <= set(head) and head["matrix TFLOP/s"] == 2


def test_commit_can_be_given(monkeypatch):
    machine.commit.cache_clear()
    monkeypatch.setenv("COMMIT", "abc1234-dirty")
    assert machine.commit() == "abc1234-dirty"
    machine.commit.cache_clear()


# ---- rates and goals


GPU = dict(device="cuda", dtype="bfloat16", layout="channels_last", direction="fwd+bwd", clock="graph")
PROBLEM = "n2c8h6k4r3s1p1g1"  # 72 pixels in and out, 32 kernels


def test_rates_count_live_work_and_the_fewest_bytes():
    row = make_row(problem=PROBLEM, live_k=2, live_c=4, live_kernels=8, ms=1e-3, direction="fwd")
    assert row.density == 0.25
    assert row.tflops * 1e6 == pytest.approx(2 * 8 * 9 * 72)  # in a microsecond
    assert row.gb_s * 1e3 == pytest.approx(4 * (4 * 72 + 8 * 9 + 4 * 72))
    training = make_row(problem=PROBLEM, live_k=2, live_c=4, live_kernels=8, ms=1e-3, **GPU)
    assert training.tflops == pytest.approx(3 * row.tflops)
    sizes = (4 * 72 + 8 * 9 + 4 * 72) + (2 * 72 + 8 * 9 + 8 * 72) + (4 * 72 + 2 * 72 + 32 * 9)
    assert training.gb_s * 1e3 == pytest.approx(2 * sizes)
    image = make_row(problem="n2c3h6k4r3s1p1g1", live_kernels=12, ms=1e-3, direction="fwd+bwd")
    assert image.tflops * 1e6 == pytest.approx(2 * 2 * 12 * 9 * 72)


def test_goals_of_gpu_layers():
    rows = [
        make_row(**GPU, name="good", kept=0.7, ms=1.0, limit_ms=0.9, compaction_ms=1.4),
        make_row(**GPU, name="poor", kept=0.3, ms=1.0, limit_ms=0.8, compaction_ms=1.0, times=3),
        make_row(**GPU, name="lost", kept=1.0, ms=4.0, side="out"),
        make_row(**GPU | {"dtype": "float32"}, name="single", kept=0.5, limit_ms=0.1),
        make_row(**GPU | {"layout": "nchw"}, name="planes", kept=0.5, limit_ms=0.1),
    ]
    said = found(rows)
    assert len(said) == 3  # none of the CPU's
    compaction = said["GPU bf16 filters in and out: over compaction, mean >= 1.3"]
    assert (compaction.reached, compaction.rows, compaction.verdict) == (pytest.approx(1.4**0.25), 2, "missed")
    bound = said["GPU bf16 filters in and out: share of limit, mean >= 0.85"]
    assert (bound.reached, bound.failing, bound.verdict) == (pytest.approx((0.9 * 0.8**3) ** 0.25), 1, "missed")
    dense = said["GPU any mask: over dense, each >= 0.98"]
    assert (dense.reached, dense.rows, dense.failing_most) == (0.5, 5, "lost out kept 1: 0.50")


def test_goal_of_gpu_blocks_is_measured_by_the_exact_density():
    block = dict(mask="block", side="64x16", limit_ms=None, problem=PROBLEM)
    rows = [
        make_row(**GPU | block, name="a", live_kernels=8, kept=0.3, ms=1.0, dense_ms=4.0),
        make_row(**GPU | block, name="b", live_kernels=16, kept=0.5, ms=1.0, dense_ms=0.9),
        make_row(**GPU | block, name="full", live_kernels=32, kept=0.9, ms=1.0, dense_ms=0.99),
    ]
    said = found(rows)
    mean = said["GPU bf16 blocks: over dense x density, mean >= 0.7"]
    assert (mean.reached, mean.rows, mean.failing) == (pytest.approx((1 * 0.45) ** 0.5), 2, 1)
    assert mean.failing_most == "b blocks kept 0.5: 0.45"
    assert said["GPU any mask: over dense, each >= 0.98"].failing_most == "b blocks kept 0.5: 0.90"


def test_gpu_rows_survive_files_and_show_their_rates(tmp_path):
    rows = [make_row(**GPU, problem=PROBLEM), make_row(**GPU | {"dtype": "float32"}, problem=PROBLEM)]
    missing = Missing({"a filter both kept 1": "Wrong: b"}, ["c filter both kept 1"])
    (tmp_path / "r.json").write_text(LAYERS.json(rows, {"gpu": "some"}, missing))
    assert LAYERS.read(tmp_path / "r.json") == (rows, missing)
    text = LAYERS.markdown(rows, {"gpu": "some"}, missing)
    assert "| tflops | gb_s | clock |" in text and "| dtype | mask |" in text
    assert {s.dtype for s in summarise(rows)} == {"bfloat16", "float32"}
