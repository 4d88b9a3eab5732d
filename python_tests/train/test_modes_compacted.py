"""Modes: which mode a run's steps are in, what is measured for that, and when torch.compile serves."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import prunekernels as pk
from cases.train import tiny_data, tiny_run
from prunekernels.compaction.compaction import Compaction
from prunekernels.nn.mask_buffers import MaskBuffers
from prunekernels.train import checkpoint, compiling, modes
from prunekernels.train.compiling import Compiled, step_times
from prunekernels.train.finalize import finalize_run
from prunekernels.train.loop import Trainer

COMPACTED = {"masked": 4.0, "live": 3.0, "compacted": 2.0}
LIVE = {"masked": 4.0, "live": 2.0, "compacted": 3.0}
LETTER = {"wake": "together", "warm_up": 0, "fine_tune": 0, "criterion": "l2"}  # masks change after each epoch
GHFP = {"method": "ghfp", "duty": 0.34, "arch": "vgg_small", "options": LETTER}


@pytest.fixture
def timed(monkeypatch):
    """In place of the clock: times of steps by mode that a test sets, and the share of live filters at each of them."""

    class Timed:
        ms, shares = COMPACTED, []  # noqa: RUF012

    made = Timed()
    made.shares = []

    def step_ms(self):
        made.shares.append(modes_of(self.model)[0])
        return made.ms[self._trial.now]

    monkeypatch.setattr(modes.Modes, "_step_ms", step_ms)
    return made


def modes_of(model):
    """The share of live filters, and whether live mode is on."""
    layers = [m for m in model.modules() if isinstance(m, pk.MaskedConv2d)]
    return modes.computed_share(layers), any(m._flow for m in model.modules() if isinstance(m, MaskBuffers))


def watched(run):
    """By step of the run, its mode as the network shows it: masked, live or compacted, and the live share."""
    seen, at_step = [], run.modes.at_step

    def watch(x, y):
        found = at_step(x, y)
        share, is_live = modes_of(run.model)
        seen.append(("compacted" if run.method.is_compacted else "live" if is_live else "masked", round(share, 2)))
        return found

    run.modes.at_step = watch
    return seen


# ---- auto


MASKED = {"masked": 1.0, "live": 3.0, "compacted": 3.0}


@pytest.mark.parametrize(("times", "mode"), [(COMPACTED, "compacted"), (LIVE, "live"), (MASKED, "masked")])
def test_auto_takes_the_fastest_mode(tmp_path, timed, times, mode):
    timed.ms = times
    run = tiny_run(tmp_path, batch=2, **(GHFP | {"method": "sfp", "epochs": 5}))
    seen = watched(run)
    run.run()
    assert len(seen) == 120 and {m for m, share in seen if share < 1} == set(COMPACTED)  # all are tried
    last = seen[-48:-24]  # the last epoch but one
    assert {m for m, share in last if share < 1} == {mode}
    all_live = {m for m, share in last if share == 1}  # while soft-dead filters train along
    assert all_live == {min(("masked", "live"), key=times.get)}
    assert len(timed.shares) < 48


def test_auto_says_the_times(tmp_path, timed, capsys):
    tiny_run(tmp_path, quiet=False, batch=2, **(GHFP | {"duty": 0, "epochs": 1})).run()
    said = [line for line in capsys.readouterr().out.splitlines() if "a step" in line]
    if not said:
        pytest.fail("no line with times")
    assert "of the filters live: masked 4.0 ms, live 3.0 ms, compacted 2.0 ms a step: compacted" in said[0]


def test_auto_says_why_compacted_mode_is_not_possible(tmp_path, timed, capsys, monkeypatch):
    refused = ValueError("it has a forward of its own\nand more")
    monkeypatch.setattr(Compaction, "enter", lambda *_, **__: (_ for _ in ()).throw(refused))
    tiny_run(tmp_path, quiet=False, batch=2, **GHFP).run()
    said = capsys.readouterr().out
    assert "0.50 of the filters live: masked 4.0 ms, live 3.0 ms a step, compacted not possible (" in said
    assert "it has a forward of its own" in said and "and more" not in said


def test_auto_measures_for_real(tmp_path, capsys):
    run = tiny_run(tmp_path, quiet=False, batch=2, **(GHFP | {"epochs": 4}))
    run.run()
    said = [line for line in capsys.readouterr().out.splitlines() if "a step" in line and "1.00 of" not in line]
    assert said and all(name in said[0] for name in ("masked", "live", "compacted")) and "not possible" not in said[0]
    assert run.modes.now in COMPACTED


def test_a_run_that_ends_before_a_choice(tmp_path, timed):
    """Its summary needs a mode all the same: the fastest so far."""
    run = tiny_run(tmp_path, **(GHFP | {"epochs": 1}))
    run.run()
    assert run.modes._trial is not None
    run.modes.end()
    assert run.modes._trial is None and run.modes.told.startswith(run.modes.now)


def test_trials_train_to_the_same_network(tmp_path, timed):
    """Steps in all modes, one after another, are those of masked mode to rounding."""
    states = {}
    for mode in ("masked", "auto"):
        run = tiny_run(tmp_path / mode, mode=mode, batch=4, **(GHFP | {"options": LETTER | {"clip": False}}))
        seen = watched(run)
        run.run()
        states[mode] = run.model.state_dict()
    assert {m for m, _ in seen} == set(COMPACTED)
    torch.testing.assert_close(states["masked"], states["auto"], rtol=1e-3, atol=1e-4)


def test_choices_are_in_the_checkpoint(tmp_path, timed):
    run = tiny_run(tmp_path, stop_after=2, batch=2, **(GHFP | {"duty": 0}))
    run.run()
    known, timed.ms = set(run.modes._chosen), LIVE
    assert known
    again = Trainer.resumed(tmp_path, data=tiny_data())
    assert again.modes._chosen == run.modes._chosen and again.modes._times == run.modes._times
    seen = watched(again)
    again.run()
    assert seen and {m for m, share in seen if str(round(10 * share)) in known} == {"compacted"}


def test_similar_masks_tell_what_is_worth_a_trial(tmp_path, timed):
    """What is far behind at a share of live filters is not tried at the next one."""
    timed.ms = {"masked": 9.0, "live": 4.0, "compacted": 2.0}
    given = {"method": "prune-while-training", "options": {"start": 0, "end": 2}, "epochs": 4}
    run = tiny_run(tmp_path, batch=2, **(GHFP | given))
    seen = watched(run)
    run.run()
    shares = sorted({share for _, share in seen}, reverse=True)
    tried = [{m for m, share in seen if share == at} for at in shares]
    assert tried == [{"masked", "live"}, {"live", "compacted"}, {"compacted"}, {"compacted"}]


def test_a_checkpoint_without_choices_resumes(tmp_path, timed):
    """As those that were written before there were any."""
    tiny_run(tmp_path, stop_after=1, mode="live", **GHFP).run()
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    del state["modes"], state["config"]["compile"], state["config"]["compile_after"]
    checkpoint.save(tmp_path / "checkpoint.pt", state)
    run = Trainer.resumed(tmp_path, data=tiny_data())
    seen = watched(run)
    run.run()
    assert {m for m, _ in seen} == {"live"} and run.epoch == 3


def test_a_deterministic_run_measures_nothing(tmp_path, timed, capsys):
    run = tiny_run(tmp_path, deterministic=True, quiet=False, **GHFP)
    seen = watched(run)
    run.run()
    assert timed.shares == [] and {m for m, share in seen if share < 1} == {"compacted"}
    assert "of the filters live: compacted; not timed, as the run is deterministic" in capsys.readouterr().out


def test_a_deterministic_run_without_a_small_form_is_masked(tmp_path, timed, capsys, monkeypatch):
    refused = ValueError("compacted: model: expected another network\nand more")
    monkeypatch.setattr(Compaction, "enter", lambda *_, **__: (_ for _ in ()).throw(refused))
    run = tiny_run(tmp_path, deterministic=True, quiet=False, **GHFP)
    seen = watched(run)
    run.run()
    assert {m for m, _ in seen} == {"masked"}
    said = capsys.readouterr().out
    assert "live: masked; compacted not possible (" in said and "expected another network)\n" in said


def test_compacted_mode_trains_to_the_same_network(tmp_path):
    runs = {}
    for mode in ("masked", "compacted"):
        # Gradients that the method clips to one length make scores equal to rounding, and any filter the weakest.
        given = {"arch": "resnet20", "method": "ghfp", "duty": 0.34, "options": {"clip": False}}
        run = tiny_run(tmp_path / mode, mode=mode, deterministic=True, **given)
        seen = watched(run)
        run.run()
        runs[mode] = run
        assert {m for m, share in seen if share < 1} == {mode}
    a, b = runs["masked"], runs["compacted"]
    assert all(map(torch.equal, a.states, b.states))
    torch.testing.assert_close(a.model.state_dict(), b.model.state_dict(), rtol=1e-3, atol=1e-4)
    assert a.optimizer.param_groups[0]["lr"] == b.optimizer.param_groups[0]["lr"]
    assert [row["computed"] for row in a.history] == [row["computed"] for row in b.history]


@pytest.mark.parametrize("mode", ["auto", "compacted", "dense"])
def test_modes_leave_a_network_plain_that_no_method_prunes(mode):
    run = tiny_run("unused", mode=mode)
    run.run_epoch()
    assert not any(isinstance(m, pk.MaskedConv2d) for m in run.model.modules())
    assert type(run.optimizer) is torch.optim.SGD and run.modes.told == "plain network"


def test_mode_is_no_option_of_the_method():
    with pytest.raises(ValueError, match="train: ghfp: expected options among .*, got 'mode'"):
        tiny_run("unused", method="ghfp", options={"mode": "compacted"})


@pytest.mark.parametrize(("mode", "times"), [("compacted", COMPACTED), ("auto", LIVE), ("auto", COMPACTED)])
def test_the_summary_of_a_compacted_run(tmp_path, timed, monkeypatch, mode, times):
    timed.ms = times
    monkeypatch.setattr("prunekernels.train.finalize.SECONDS", 0.01)
    run = tiny_run(tmp_path, mode=mode, batch=2, **GHFP)
    run.run()
    summary = finalize_run(run)
    best = min(times, key=times.get)
    assert summary["mode"] == ("compacted mode" if mode == "compacted" else f"{best} mode, by auto")
    assert set(summary["epoch_of"]) == {"dense", "this", "small"} and summary["agreed"] == 16


# ---- torch.compile


@pytest.fixture
def backend(monkeypatch):
    """In place of inductor: a compiler that counts the graphs it gets."""
    counter = CompileCounterWithBackend("aot_eager")
    compile_with = torch.compile
    monkeypatch.setattr(compiling.torch, "compile", lambda f: compile_with(f, backend=counter))
    torch._dynamo.reset()
    return counter


@pytest.fixture
def step_ms(monkeypatch):
    """In place of what is measured: the times of steps."""
    ms = {"eager": 2.0, "compiled": 1.0}
    monkeypatch.setattr(compiling, "ROUNDS", 1)

    def times(*args):
        return {name: ms[name] for name in step_times(*args)}

    monkeypatch.setattr(modes, "step_times", times)
    return ms


COMPILED = {"method": "ghfp", "duty": 0, "options": LETTER, "epochs": 4, "compile": True, "compile_after": 4}


def forms(run):
    """By step, whether it was compiled."""
    seen, at_step = [], run.modes.at_step

    def watch(x, y):
        net, optimizer = at_step(x, y)
        seen.append(isinstance(net, Compiled))
        return net, optimizer

    run.modes.at_step = watch
    return seen


@pytest.mark.parametrize("mode", ["compacted", "masked"])
def test_compiles_once_masks_stand_still(tmp_path, backend, step_ms, capsys, mode):
    twice = {"method": "pgp", "options": {"fine_tune": 3}, "epochs": 5}
    run = tiny_run(tmp_path, mode=mode, quiet=False, **(COMPILED | twice))
    seen = forms(run)
    run.run()
    assert seen == [False] * 10 + [True] * 5  # masks change for the last time after six steps
    assert backend.frame_count == 1
    said = capsys.readouterr().out
    assert "the same masks for 4 steps: eager 2.0 ms, compiled 1.0 ms a step: compiled\n" in said
    assert run.modes.told == f"{mode} mode, compiled"


def test_hard_masks_alone_change_nothing_that_is_compacted(tmp_path, backend, step_ms):
    """GHFP without a dense phase masks the same filters in all epochs; more and more of them are hard-dead."""
    run = tiny_run(tmp_path, mode="compacted", **COMPILED)
    seen = forms(run)
    run.run()
    assert seen == [False] * 4 + [True] * 8 and backend.frame_count == 1


def test_a_compiled_run_trains_as_an_eager_one(tmp_path, backend, step_ms):
    runs = []
    for compiles in (True, False):
        given = COMPILED | {"compile": compiles, "mode": "compacted", "deterministic": True}
        run = tiny_run(tmp_path / str(compiles), **given)
        run.run()
        runs.append(run.model.state_dict())
    torch.testing.assert_close(*runs, rtol=1e-3, atol=1e-4)


def test_eager_stays_where_compacted_steps_are_no_faster(tmp_path, backend, step_ms, capsys):
    step_ms["compiled"] = 3.0
    run = tiny_run(tmp_path, mode="compacted", quiet=False, **(COMPILED | {"compile_after": 1}))
    seen = forms(run)
    run.run()
    assert not any(seen) and ": eager 2.0 ms, compiled 3.0 ms a step: eager\n" in capsys.readouterr().out


def test_live_mode_is_not_compiled(tmp_path, backend, step_ms, capsys):
    run = tiny_run(tmp_path, mode="live", quiet=False, **(COMPILED | {"compile_after": 1}))
    seen = forms(run)
    run.run()
    assert not any(seen) and backend.frame_count == 0
    assert capsys.readouterr().out.count("eager, as live mode runs without torch.compile\n") >= 1


def test_a_compiler_that_fails_leaves_compacted_steps_eager(tmp_path, monkeypatch, capsys):

    def failing(graph, inputs):
        raise RuntimeError("no compiler here\nof many lines")

    compile_with = torch.compile
    monkeypatch.setattr(compiling.torch, "compile", lambda f: compile_with(f, backend=failing))
    run = tiny_run(tmp_path, mode="compacted", quiet=False, **(COMPILED | {"compile_after": 1}))
    seen = forms(run)
    run.run()
    said = [line for line in capsys.readouterr().out.splitlines() if "torch.compile failed" in line]
    assert not any(seen) and run.epoch == 4
    assert said and "eager, as torch.compile failed (" in said[0] and "no compiler here" in said[0]


def test_compiled_resume_compacted_to_the_same_bits(tmp_path, backend, step_ms):
    """The choice to compile is in the checkpoint, and how long masks have stood still."""
    given = COMPILED | {"mode": "compacted", "deterministic": True, "options": {"fine_tune": 3}, "epochs": 5}
    whole = tiny_run(tmp_path / "whole", **given)
    whole.run()
    tiny_run(tmp_path / "parts", stop_after=4, **given).run()
    step_ms["compiled"] = 3.0  # measured anew it would be eager
    parts = Trainer.resumed(tmp_path / "parts", data=tiny_data())
    seen = forms(parts)
    parts.run()
    assert seen == [True] * 3
    assert all(map(torch.equal, whole.model.state_dict().values(), parts.model.state_dict().values()))


def test_many_small_networks_are_compiled_each_once(backend):
    """Beyond torch's limit of recompilations of one piece of code; those that come back are not compiled again."""
    nets = [Compiled(nn.Sequential(nn.Conv2d(1, k, 3), nn.ReLU(), nn.Conv2d(k, 2, 1))) for k in range(1, 13)]
    x = torch.randn(2, 1, 5, 5)
    for _ in range(2):
        for compiled in nets:
            torch.testing.assert_close(compiled(x), compiled.net(x))
    assert backend.frame_count == len(nets)


@pytest.mark.parametrize("names", [["eager"], ["eager", "compiled"]])
def test_step_times_leave_the_network_alone(backend, names):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(36, 2))
    x = torch.randn(8, 1, 5, 5)
    net(x).sum().backward()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    grads, random = [p.grad.clone() for p in net.parameters()], torch.get_rng_state()
    forms = {name: net if name == "eager" else Compiled(net) for name in names}
    times = step_times(net, forms, lambda form: form(x).square().sum(), torch.device("cpu"))
    assert set(times) == set(forms) and min(times.values()) > 0
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(p.grad, grad) for p, grad in zip(net.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
