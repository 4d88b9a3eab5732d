"""The memory layout of a run, and in which numbers its steps are where amp leaves that open."""

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

import prunekernels as pk
from cases.train import tiny_data, tiny_run
from prunekernels.live.tensor import LiveTensor
from prunekernels.train import checkpoint, dense_step, modes
from prunekernels.train.dense_step import DenseStep, choose
from prunekernels.train.finalize import finalize_run
from prunekernels.train.loop import Trainer
from prunekernels.train.modes import computed_share

LETTER = {"wake": "together", "warm_up": 0, "fine_tune": 0}  # all soft-dead filters train along at once
GHFP = {"method": "ghfp", "duty": 0, "options": {"hard": 1.0, **LETTER}}


@pytest.fixture
def timed(monkeypatch):
    """In place of the measurement: times by form that a test sets, and the forms that were to be timed."""

    class Timed:
        ms, asked = {}, []  # noqa: RUF012

        def __call__(self, forms, network, x, y):
            assert len(x) == len(y) in (2, 16) and x.shape[1:] == (1, 8, 8)
            self.asked.append([form.told for form in forms])
            return {form: self.ms.get(form.told, 9.0) for form in forms}

    made = Timed()
    made.asked = []
    monkeypatch.setattr(dense_step, "_milliseconds", made)
    return made


def channels_last(x):
    """Whether a tensor of more than one channel is channels_last, and could be something else."""
    x = x.compact if isinstance(x, LiveTensor) else x
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def inputs_of_convs(run):
    """Whether the inputs of convolutions of more than one channel are channels_last, in the epoch that run trains."""
    seen = []

    def watch(module, args):
        if isinstance(module, nn.Conv2d) and torch.is_grad_enabled() and min(args[0].shape[1:]) > 1:
            seen.append(channels_last(args[0]))

    hook = register_module_forward_pre_hook(watch)
    try:
        run.run_epoch()
    finally:
        hook.remove()
    return seen


# ---- layout


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_auto_takes_the_faster_layout(timed, capsys, layout):
    timed.ms = {f"{layout} fp32": 2.0}
    run = tiny_run("unused", layout="auto", quiet=False)
    other = {"contiguous": "9.0", "channels_last": "9.0", layout: "2.0"}
    line = f"dense: contiguous fp32 {other['contiguous']} ms, channels_last fp32 {other['channels_last']} ms a step"
    assert f"{line}: {layout} fp32" in capsys.readouterr().out
    assert run.dense == DenseStep(layout, False)
    run.run_epoch()
    weights = [p for p in run.model.parameters() if p.dim() == 4 and p.shape[1] > 1]
    assert {channels_last(p) for p in weights} == {layout == "channels_last"}
    assert timed.asked == [["contiguous fp32", "channels_last fp32"]]


def test_nothing_is_timed_where_nothing_is_open(timed):
    assert tiny_run("unused", layout="auto", deterministic=True).dense == DenseStep("contiguous", False)
    assert tiny_run("unused", layout="auto", mode="live").dense == DenseStep("contiguous", False)
    assert tiny_run("unused", layout="channels_last").dense == DenseStep("channels_last", False)
    assert tiny_run("unused", layout="channels_last", deterministic=True).dense == DenseStep("channels_last", False)
    assert tiny_run("unused", amp=True, mode="dense").dense == DenseStep("contiguous", True)
    assert tiny_run("unused", amp=True, deterministic=True).dense == DenseStep("contiguous", True)
    assert timed.asked == []


def test_measuring_changes_nothing_of_the_run(tmp_path, monkeypatch):
    """Weights, statistics of norms and random numbers are those of a run that measured nothing."""
    fixed = tiny_run(tmp_path / "fixed", epochs=1, deterministic=True)
    fixed.run()
    measure, seen = dense_step._milliseconds, []

    def measured(forms, network, x, y):
        seen.append(measure(forms, network, x, y))
        return {form: float(form.layout != "contiguous") for form in forms}

    monkeypatch.setattr(dense_step, "_milliseconds", measured)
    auto = tiny_run(tmp_path / "auto", epochs=1, layout="auto")
    with torch.random.fork_rng():
        torch.use_deterministic_algorithms(True)
        try:
            auto.run()
        finally:
            torch.use_deterministic_algorithms(False)
    assert len(seen) == 1 and min(seen[0].values()) > 0 and len(seen[0]) == 2
    assert all(map(torch.equal, fixed.model.state_dict().values(), auto.model.state_dict().values()))


@pytest.mark.parametrize(
    ("method", "mode", "expected"),
    [
        ("none", "dense", True), ("ghfp", "compacted", True),  # plain layers take the layout of their weights
        ("ghfp", "masked", False), ("ghfp", "live", False),  # these that of their inputs
    ],
)  # fmt: skip
@pytest.mark.parametrize("arch", ["resnet20", "vgg_small"])
def test_each_mode_computes_in_the_layout_that_suits_it(tmp_path, arch, method, mode, expected):
    given = {"method": method, "arch": arch, "mode": mode, "layout": "channels_last", "deterministic": True}
    run = tiny_run(tmp_path, **(given if method == "none" else {**GHFP, **given}))
    seen = inputs_of_convs(run)
    others = 3 if mode == "compacted" else 0  # of the first layer, whose weights of one channel fit any layout
    assert len(seen) > 10 and seen.count(not expected) <= others
    assert method == "none" or run.history[0]["computed"] < 0.6


@pytest.mark.parametrize("mode", ["masked", "live", "compacted"])
def test_layouts_agree(mode):
    losses = []
    for layout in ("contiguous", "channels_last"):
        run = tiny_run("unused", mode=mode, layout=layout, deterministic=True, **GHFP)
        run.run_epoch()
        losses.append(run.history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_layout_resumes(tmp_path, timed):
    timed.ms = {"channels_last fp32": 2.0}
    run = tiny_run(tmp_path, layout="auto", stop_after=1, **GHFP)
    run.run()
    again = Trainer.resumed(tmp_path, data=tiny_data())
    assert again.dense == DenseStep("channels_last", False) and len(timed.asked) == 1
    assert any(channels_last(p) for p in again.model.parameters() if p.dim() == 4)
    again.run()
    with pytest.raises(ValueError, match="train: layout: expected 'auto', as in .*, got 'contiguous'"):
        Trainer.resumed(tmp_path, {"layout": "contiguous"}, data=tiny_data())


def test_a_checkpoint_without_a_layout_resumes_as_it_was(tmp_path, timed):
    tiny_run(tmp_path, stop_after=1, amp=True, **GHFP).run()
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    del state["config"]["layout"], state["modes"]["dense"]
    checkpoint.save(tmp_path / "checkpoint.pt", state)
    asked = len(timed.asked)
    assert Trainer.resumed(tmp_path, data=tiny_data()).dense == DenseStep("contiguous", True)
    assert len(timed.asked) == asked


def layout_of(bf16):
    """In which masked and live mode compute by default."""
    has_kernels = pk.has_extension() and pk.build_info()["isa"] == "avx512bf16"
    return "channels_last" if bf16 and has_kernels else "contiguous"


@pytest.mark.parametrize("layout", ["auto", "contiguous", "channels_last"])
@pytest.mark.parametrize("mode", ["masked", "live"])
def test_bfloat16_in_the_layout_of_its_kernels(tmp_path, mode, layout):
    given = {"mode": mode, "amp": True, "layout": layout, "deterministic": True}
    run = tiny_run(tmp_path, **GHFP, **given)
    wanted = layout_of(True) if layout == "auto" else layout
    assert run.dense == DenseStep(wanted, True)
    seen = inputs_of_convs(run)
    assert len(seen) > 10 and set(seen) == {wanted == "channels_last"}


@pytest.fixture
def by_form(monkeypatch):
    """In place of the measurement of modes: times by form that a test sets."""
    times = {}
    monkeypatch.setattr(modes.Modes, "_step_ms", lambda self: times.get(self._trial.now, 9.0))
    return times


@pytest.mark.parametrize("best", ["live channels_last", "live", "masked channels_last", "compacted"])
def test_auto_tries_the_other_layout_of_what_is_fast(tmp_path, timed, by_form, capsys, best):
    by_form.update({"masked": 4.0, "live": 4.0, "compacted": 5.0, best: 2.0})
    run = tiny_run(tmp_path, layout="auto", quiet=False, batch=2, **GHFP)
    run.run()
    line = next(line for line in capsys.readouterr().out.splitlines() if "a step: " in line and "dense:" not in line)
    assert line.endswith(f"a step: {best}")
    assert ("masked channels_last" in line) == (best.startswith("masked") or best == "live channels_last")
    mode, _, other = best.partition(" ")
    assert run.modes.now == mode and run.modes.layout == (other or "contiguous")
    if mode != "compacted":
        x = run.modes.laid_out(torch.ones(2, 3, 4, 4))
        assert channels_last(x) == (other == "channels_last")


def test_a_layout_resumes_and_is_known_to_similar_masks(tmp_path, timed, by_form):
    by_form.update({"masked": 4.0, "live": 4.0, "compacted": 5.0, "live channels_last": 2.0})
    run = tiny_run(tmp_path, layout="auto", stop_after=2, batch=2, **GHFP)
    run.run()
    by_form.clear()
    again = Trainer.resumed(tmp_path, data=tiny_data())
    seen = inputs_of_convs(again)
    assert set(seen) == {True} and again.modes.layout == "channels_last"
    key = next(iter(again.modes._times))
    again.modes._masks[: len(again.modes._masks) // 10] = False  # others, nearly as many
    forms, variants = again.modes._contenders()
    assert key and forms[0] == "live channels_last" and "live" not in variants


def test_a_given_layout_is_not_left_open(tmp_path, timed, by_form):
    run = tiny_run(tmp_path, layout="contiguous", batch=2, **GHFP)
    run.modes.look_at_masks()
    assert run.modes._contenders()[1] == {}


# ---- amp


def autocasts(run):
    """By step of the run, its mode and whether it autocasts."""
    seen, autocast = [], run.modes.autocast

    def watch():
        context = autocast()
        seen.append((run.modes.now, isinstance(context, torch.autocast)))
        return context

    run.modes.autocast = watch
    return seen


@pytest.fixture
def by_numbers(monkeypatch):
    """In place of the measurement of modes: times that a test sets, by whether all filters are live, by mode and by
    whether it is in bfloat16.
    """
    times = {}

    def step_ms(self):
        all_live = computed_share(m for m in self.model.modules() if isinstance(m, nn.Conv2d)) == 1
        mode, numbers = self._trial.now.split()
        assert self.now == mode and self.bf16 == (numbers == "bf16")
        return times.get((all_live, mode, self.bf16), 9.0)

    monkeypatch.setattr(modes.Modes, "_step_ms", step_ms)
    return times


@pytest.mark.parametrize(("mode", "bf16"), [("live", False), ("live", True), ("compacted", False), ("masked", True)])
@pytest.mark.parametrize("all_live", [("masked", True), ("live", False)])
def test_auto_takes_bf16_where_that_is_faster(tmp_path, timed, by_numbers, mode, bf16, all_live):
    """Where nothing is dead, as while soft-dead filters train along, and where something is."""
    by_numbers[(False, mode, bf16)] = by_numbers[(True, *all_live)] = 3.0
    run = tiny_run(tmp_path, amp=True, method="sfp", duty=0.34, options=LETTER, epochs=6, batch=2)
    seen = autocasts(run)
    run.run()
    assert set(seen[-48:-24]) == {all_live, (mode, bf16)}
    assert timed.asked == [["contiguous bf16", "contiguous fp32"]]


def test_auto_says_the_times_of_both(tmp_path, timed, by_numbers, capsys):
    by_numbers.update({(False, "masked", True): 4.0, (False, "live", False): 2.0})
    run = tiny_run(tmp_path, amp=True, quiet=False, batch=2, **GHFP)
    run.run()
    said = capsys.readouterr().out
    assert "dense: contiguous bf16 9.0 ms, contiguous fp32 9.0 ms a step: contiguous bf16" in said
    bf16, fp32 = "masked bf16 4.0 ms, live bf16 9.0 ms, compacted bf16 9.0 ms", "masked fp32 9.0 ms, live fp32 2.0 ms"
    assert f"{bf16}, {fp32}, compacted fp32 9.0 ms a step: live fp32" in said
    assert run.modes.told == "live mode, by auto, in float32"


def test_numbers_resume(tmp_path, timed, by_numbers):
    timed.ms = {"contiguous fp32": 2.0}
    by_numbers[False, "live", False] = 2.0
    tiny_run(tmp_path, amp=True, stop_after=2, batch=2, **GHFP).run()
    by_numbers.clear()
    again = Trainer.resumed(tmp_path, data=tiny_data())
    assert again.dense == DenseStep("contiguous", False)
    seen = autocasts(again)
    again.run()
    assert set(seen) == {("live", False)}


def test_a_plain_network_in_float32(tmp_path, timed):
    timed.ms = {"contiguous fp32": 2.0}
    run = tiny_run(tmp_path, amp=True, epochs=1)
    seen = autocasts(run)
    run.run()
    assert {bf16 for _, bf16 in seen} == {False} and run.modes.told == "plain network, in float32"


@pytest.mark.parametrize(
    "given",
    [
        {"mode": "dense"}, {"mode": "masked"}, {"mode": "live"}, {"mode": "compacted"},
        {"mode": "auto", "deterministic": True},
    ],
)  # fmt: skip
def test_amp_is_bf16_where_nothing_is_chosen(tmp_path, given):
    run = tiny_run(tmp_path, amp=True, epochs=2, **given, **GHFP)
    seen = autocasts(run)
    run.run()
    assert {bf16 for _, bf16 in seen} == {True}


def test_auto_measures_both_for_real(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("prunekernels.train.finalize.SECONDS", 0.05)
    run = tiny_run(tmp_path, amp=True, layout="auto", quiet=False, epochs=4, batch=2, **GHFP)
    run.run()
    lines = [line for line in capsys.readouterr().out.splitlines() if "a step" in line]
    assert lines[0].count(" ms") == 4 and lines[1].count(" ms") >= 6 and "not possible" not in lines[1]
    summary = finalize_run(run)
    assert summary["mode"] == run.modes.told and min(summary["epoch_of"].values()) > 0


def test_choose_leaves_the_network_alone():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 4)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    config = tiny_run("unused", layout="auto", amp=True).config
    torch.set_rng_state(random)
    step, line = choose(config, net, lambda: (torch.ones(6, 2, 8, 8), torch.zeros(6, dtype=torch.long)))
    assert torch.equal(random, torch.get_rng_state()) and all(p.grad is None for p in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert line.endswith(step.told) and all(p.is_contiguous() for p in net.parameters())
