"""Compacted mode on two processes: DistributedDataParallel is wrapped around the small network of each set of masks."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from cases.ranks import run_ranks
from cases.train import tiny_data, tiny_run
from prunekernels.train import compiling, modes
from prunekernels.train.compiling import Compiled
from prunekernels.train.loop import Trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed"),
]
GHFP = {"method": "ghfp", "duty": 0.34, "options": {"clip": False}, "deterministic": True, "width": 0.5}


def result(run):
    """Of a run: what it has trained, and with how many wrappers around small networks."""
    wrappers, at_step = {}, run.modes.at_step

    def watch(x, y):
        net, optimizer = at_step(x, y)
        assert type(net) is DistributedDataParallel and run.method.is_compacted == (optimizer is not run.optimizer)
        if run.method.is_compacted:
            inner = net.module.net if isinstance(net.module, Compiled) else net.module
            assert inner is run.method.net
            wrappers.setdefault(run.method.compaction.cut, {})[net] = isinstance(net.module, Compiled)
        return net, optimizer

    run.modes.at_step = watch
    run.run()
    return {
        "state": {name: value.clone() for name, value in run.model.state_dict().items()},
        "momentum": [s["momentum_buffer"] for s in run.optimizer.state_dict()["state"].values()],
        "states": run.states, "wrappers": [list(found.values()) for found in wrappers.values()],
    }  # fmt: skip


def several(rank, folder):
    found = {mode: result(tiny_run(folder / mode, mode=mode, **GHFP)) for mode in ("masked", "compacted")}
    tiny_run(folder / "parts", mode="compacted", stop_after=2, **GHFP).run()
    found["parts"] = result(Trainer.resumed(folder / "parts", data=tiny_data()))
    compiling.torch.compile = functools.partial(torch.compile, backend="aot_eager")
    compiles = GHFP | {"duty": 0, "epochs": 4, "compile": True, "compile_after": 2, "width": 0.25}
    found["compiled"] = result(tiny_run(folder / "compiled", mode="compacted", **compiles))
    found["eager"] = result(tiny_run(folder / "eager", mode="compacted", **compiles | {"compile": False}))
    asked = []

    def step_ms(self):
        asked.append(rank)
        return {"masked": 3.0, "live": 2.0, "compacted": 1.0}[self._trial.now]

    modes.Modes._step_ms = step_ms
    auto = tiny_run(folder / "auto", mode="auto", batch=4, **GHFP | {"deterministic": False, "duty": 0})
    found["auto"] = result(auto) | {"asked": asked, "now": auto.modes.now}
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_ranks(several, 2, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("case", ["masked", "compacted", "compiled", "auto"])
def test_ranks_have_the_same_compacted_network(two, case):
    a, b = (found[case] for found in two)
    assert all(torch.equal(value, b["state"][name]) for name, value in a["state"].items())
    assert all(map(torch.equal, a["momentum"], b["momentum"]))


@pytest.mark.parametrize(("case", "expected"), [("compacted", "masked"), ("compiled", "eager")])
def test_compacted_ranks_train_as_masked_ones(two, case, expected):
    """Weights, momentum and the statistics of norms, which are means over the ranks."""
    a, b = two[0][case], two[0][expected]
    assert all(map(torch.equal, a["states"], b["states"])) and any(bool((s > 0).any()) for s in a["states"])
    torch.testing.assert_close(a["state"], b["state"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(a["momentum"], b["momentum"], rtol=1e-3, atol=1e-4)


def test_compacted_ranks_resume_to_the_same_bits(two):
    a, b = two[0]["compacted"], two[0]["parts"]
    assert all(torch.equal(value, b["state"][name]) for name, value in a["state"].items())


def test_each_small_network_is_wrapped_once(two):
    assert two[0]["masked"]["wrappers"] == []
    assert len(two[0]["compacted"]["wrappers"]) > 2 and set(map(tuple, two[0]["compacted"]["wrappers"])) == {(False,)}
    assert [False, True] in two[0]["compiled"]["wrappers"]


def test_rank_0_chooses_compacted_mode_for_all(two):
    assert [found["auto"]["now"] for found in two] == ["compacted"] * 2
    assert two[0]["auto"]["asked"] and not two[1]["auto"]["asked"]
