"""benchmarks/network.py: what is timed, that a wrong step never is, rounds, and its command line."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import network
import networks.options as network_options
import prunekernels as pk
from cases.benchmark_networks import make_masked
from harness.contender import Wrong
from harness.report import Missing
from networks.baselines import (
    PASSES,
    CompactedMode,
    Dense,
    LiveMode,
    MaskedMode,
    NetworkContender,
    Small,
    expected,
    roundings,
)
from networks.contenders import COMPILED, EAGER, FAMILIES
from networks.jobs import LEAST, MOST, Pace, jobs
from networks.models import MASKS, NETWORKS, draw
from networks.report import NETWORKS as REPORT
from networks.setting import MaskedSetting

EAGER_FAMILIES = [contender.family for contender in EAGER[1:]]
TINY = ["--rounds", "1", "--threads", "1", "--layout", "nchw", "--dtype", "float32", "--contenders", *EAGER_FAMILIES]


RESNET = ["--suite", "tiny_resnet", *TINY]


@pytest.fixture(autouse=True)
def one_thread():
    """Faster for networks this small; and the harness sets the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- what is timed


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("name", ["tiny_resnet", "tiny_vgg"])
def test_all_agree_with_the_reference(name, masks, layout):
    masked = make_masked(name, masks)
    for direction in PASSES:
        for contender in EAGER:
            made = contender(masked, direction, layout)
            made.check()
            made.run()
            made.check()  # from the first weights again


@pytest.fixture
def quick_compile(monkeypatch):
    """torch.compile as it is, but for the C++ compiler, which takes half a minute for each network."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.mark.slow
@pytest.mark.parametrize("direction", PASSES)
def test_compacted_and_its_baselines_compiled(quick_compile, direction):
    torch._dynamo.reset()
    masked = make_masked("tiny_vgg")
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for contender in COMPILED:
            made = contender(masked, direction, "nchw")
            made.check()
            made.run()
            made.check()


def test_compacted_is_small_and_its_gradients_are_compared_at_full_width(monkeypatch):
    masked = make_masked()
    compacted = CompactedMode(masked, "train", "channels_last")
    small = Small(masked, "train", "channels_last")
    shapes = [p.shape for p in compacted.model.parameters()]
    assert shapes == [p.shape for p in small.model.parameters()]
    compacted.run()
    assert {n: g.shape for n, g in compacted.gradients().items()} == {
        n: p.shape for n, p in masked.model().named_parameters()
    }
    widen = compacted.compaction.widen
    monkeypatch.setattr(compacted.compaction, "widen", lambda name, g: widen(name, g.flip(0)))
    with pytest.raises(Wrong, match="compacted .*gradient of .* is wrong"):
        compacted.check()


def test_gradients_that_are_rounding_alone_may_differ(monkeypatch):
    masked = make_masked()
    name, live = "stem.norm.bias", LiveMode(masked, "train", "nchw")
    rounding, length = roundings(masked)[name], expected(masked, "train").gradients[name].norm()
    assert 0 < rounding < 1e-4 * length
    off = expected(masked, "train").gradients[name] + torch.where(masked.live.filters["stem.conv"], length, 0.0)
    gradients = live.gradients
    monkeypatch.setattr(live, "gradients", lambda: gradients() | {name: off})
    masked.roundings[name] = 3 * float(length)
    live.check()
    masked.roundings[name] = rounding
    with pytest.raises(Wrong, match=name):
        live.check()


@pytest.mark.slow
@pytest.mark.parametrize("masks", MASKS)
def test_depthwise_convolutions_agree_too(masks):
    masked = make_masked("mobilenet_v2", masks, batch=8)
    for contender in (LiveMode, CompactedMode, Small) if masks == "joint" else (CompactedMode,):
        contender(masked, "train", "nchw").check()


@pytest.mark.slow
def test_bottlenecks_with_shortcuts_that_have_weights_agree_too(monkeypatch):
    # With fewer pixels the last norms would have too few to be well conditioned.
    monkeypatch.setitem(NETWORKS, "bottlenecks", replace(NETWORKS["resnet50"], image=64, classes=10))
    masked = make_masked("bottlenecks", batch=4)
    for contender in (LiveMode, Small):
        contender(masked, "train", "nchw").check()


def test_bfloat16_by_autocast():
    masked = make_masked(dtype=torch.bfloat16)
    for contender in (LiveMode, CompactedMode, Small):
        made = contender(masked, "infer", "nchw")
        made.check()
        assert made.run().dtype == torch.bfloat16


@pytest.mark.parametrize("optimizer", ["masked", "torch"])
def test_optimizers(optimizer):
    masked = make_masked(optimizer=optimizer)
    live = LiveMode(masked, "train", "nchw")
    assert (type(live.optimizer).__name__ == "MaskedSGD") == (optimizer == "masked")
    assert type(Dense(masked, "train", "nchw").optimizer) is torch.optim.SGD
    name, weight = "stem.conv.weight", live.model.stem.conv.weight
    live.run()
    dead = masked.cut.dead(name, weight)
    assert dead.equal(masked.cut.dead(name, live.first[name])) == (optimizer == "masked")  # torch decays it


def test_a_step_trains_and_rewinding_undoes_it():
    small = Small(make_masked(), "train", "nchw")
    first = small.run()
    for _ in range(5):
        last = small.run()
    assert last < first
    small.rewind()
    assert torch.equal(small.run(), first) and small.optimizer.state


def test_dense_is_made_once_and_serves_both_passes():
    masked = make_masked()
    trained = Dense.of(masked, "train", "nchw")
    assert trained.run().dim() == 0
    inferring = Dense.of(make_masked_like(masked, 0.3), "infer", "nchw")
    assert inferring is trained and inferring.run().shape == (2, 10) and not inferring.model.training


def make_masked_like(masked, kept):
    return MaskedSetting(masked.setting, "joint", kept, draw(masked.setting.wires, "joint", kept, 0))


def test_wrong_steps_are_found(monkeypatch):
    masked = make_masked()
    other = make_masked_like(masked, 0.45)
    other.results = {"train": expected(masked, "train")}
    with pytest.raises(Wrong, match=r"tiny_resnet joint kept 0.45: masked \(nchw\), train: loss is wrong"):
        MaskedMode(other, "train", "nchw").check()
    live = LiveMode(masked, "train", "nchw")
    gradients = live.gradients
    monkeypatch.setattr(live, "gradients", lambda: gradients() | {"stem.norm.bias": torch.ones(16)})
    with pytest.raises(Wrong, match="gradient of stem.norm.bias is wrong"):
        live.check()
    almost = expected(masked, "train").gradients["stem.norm.bias"] + 1e-4
    monkeypatch.setattr(live, "gradients", lambda: gradients() | {"stem.norm.bias": almost})
    with pytest.raises(Wrong, match="gradient of stem.norm.bias is not exactly zero where it is dead"):
        live.check()
    monkeypatch.setattr(live, "gradients", lambda: {})
    with pytest.raises(Wrong, match="no gradient of classifier.bias"):
        live.check()


# ---- rounds


def pace_of(argv, todo, left, monkeypatch):
    args, _ = network_options.parse(argv)
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    args.began, args.minutes = 0.0, left / 60
    return Pace(todo, args), now


def test_time_is_shared_by_work_and_goals_get_more(monkeypatch):
    todo = jobs([NETWORKS["resnet18"]], ["joint"], [0.5, 0.7], ["float32"])
    pace, now = pace_of([], todo, 300, monkeypatch)
    assert pace.begin(todo[0])  # 200 seconds: a goal speaks of it
    now[0] = 20
    assert pace.rounds("train", 10_000) == 14  # of 160 seconds, 20 are over
    now[0] = 150
    assert pace.rounds("train", 10_000) == LEAST and pace.rounds("infer", 10_000) == 5
    now[0] = 250
    assert pace.begin(todo[1])
    assert pace.rounds("infer", 1.0) == MOST
    now[0] = 301
    pace, now = pace_of([], todo, 300, monkeypatch)
    now[0] = 300
    assert not pace.begin(todo[0])


def test_rounds_and_seconds_overrule_the_minutes(monkeypatch):
    pace, _ = pace_of(["--rounds", "7"], [], 60, monkeypatch)
    assert pace.rounds("train", 1e9) == 7
    pace, _ = pace_of(["--seconds", "8"], [], 60, monkeypatch)
    assert pace.rounds("train", 1000) == 8 and pace.rounds("train", 1e9) == LEAST


def test_slow_layouts_are_not_timed():
    trials = {"dense/nchw": 13.0, "dense/channels_last": 10.0, "small/nchw": 9.0}
    assert network.finalists(trials) == ["dense/channels_last", "small/nchw"]


def test_dense_is_timed_in_the_faster_layout_of_the_first_masks(monkeypatch):
    masked = make_masked()
    args, _ = network_options.parse(["--rounds", "1", "--contenders", "small"])
    pace = SimpleNamespace(rounds=lambda *_: 1)
    monkeypatch.setattr(network, "fastest", lambda timings, family: f"{family}/channels_last")
    monkeypatch.setattr(network, "SLOWER", 1e9)
    first, second = (network.measure(masked, "infer", pace, args) for _ in range(2))
    assert {"dense/nchw", "dense/channels_last"} <= set(first.trials)
    assert set(second.quartiles) == {"dense/channels_last", "small/nchw", "small/channels_last"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_in_float32_stands_beside_bfloat16(dtype):
    masked = make_masked(dtype=dtype)
    args, _ = network_options.parse(["--rounds", "1", "--layout", "nchw", "--contenders", "dense+fp32"])
    row = network.measure(masked, "train", SimpleNamespace(rounds=lambda *_: 1), args)
    if dtype == torch.float32:
        assert row.dense_fp32_ms is None and set(row.trials) == {"dense/nchw"}
        return
    assert row.dense_fp32_ms > 0 and set(row.trials) == {"dense/nchw", "dense+fp32/nchw"}
    seen = {}
    for key, contender in masked.setting.dense.items():
        contender.enter("infer")
        seen[key] = contender.run().dtype
    assert seen == {"dense/nchw": torch.bfloat16, "dense+fp32/nchw": torch.float32}


def compiled_by(masked, direction, trials, *argv):
    args, _ = network_options.parse([*argv])
    found = network.compiled_entries(masked, direction, trials, args)
    return [f"{kind.family}/{layout}" for kind, layout in found]


def test_what_is_compiled():
    trials = {"dense/nchw": 2.0, "dense/channels_last": 1.0, "small/nchw": 1.0, "small/channels_last": 2.0}
    masked, other = make_masked(), make_masked_like(make_masked(), 0.3)
    goal_row = ["dense+compile/channels_last", "compacted+compile/channels_last", "small+compile/nchw"]
    assert compiled_by(masked, "train", trials) == goal_row
    for of, direction in ((masked, "infer"), (other, "train")):
        assert compiled_by(of, direction, trials) == goal_row[:1]
    assert compiled_by(other, "train", trials, "--contenders", "small+compile") == goal_row[2:]
    both = compiled_by(masked, "train", trials, "--compiled-layout", "both")
    assert len(both) == 6 and both[:2] == ["dense+compile/nchw", "dense+compile/channels_last"]
    masked.setting.dense_layout["dense+compile", "train"] = "nchw"  # it was faster under other masks
    assert compiled_by(masked, "train", trials) == ["dense+compile/nchw", *goal_row[1:]]


def test_presets():
    args, networks = network_options.parse(["--goals"])
    assert (args.kept, args.masks, args.passes, args.minutes) == ([0.5], ["joint"], ["train"], 25)
    assert args.dtypes == ("float32", "bfloat16") and "compacted+compile" in args.contenders
    assert [n.name for n in networks] == ["resnet18", "vgg16", "resnet56", "mobilenet_v2"]
    args, _ = network_options.parse(["--quick"])
    assert args.minutes == 12 and not any("compile" in name for name in args.contenders)


@pytest.mark.parametrize(("settling", "ms"), [(1, 7.0), (2, 5.0), (network.WARMUPS, 5.0)])
def test_plans_are_settled_before_anything_is_timed(monkeypatch, settling, ms):
    done, checked = [], []

    def settle(run, most):
        assert most == network.WARMUPS
        for _ in range(settling):
            run()
        return settling

    monkeypatch.setattr(pk.plan, "settle", settle)
    stub = SimpleNamespace(run=lambda: done.append(1) or "result", rewind=lambda: done.clear(), check=checked.append)
    stub.ms = 1e9
    times = iter([7.0, 5.0])
    network.first_runs(stub, lambda run: (run(), next(times))[1])
    assert (len(done), checked, stub.ms) == (1 + settling + (settling > 1), ["result"], ms)


# ---- the command


def run_to_files(folder, *argv):
    files = [word for name in ("json", "csv", "md") for word in (f"--{name}", str(folder / f"n.{name}"))]
    return network.main([*argv, *files])


@pytest.mark.slow
def test_end_to_end(tmp_path, capsys):
    argv = ["--suite", "tiny", "--kept", "0.5", "--rounds", "1", "--threads", "1", "--dtype", "float32"]
    assert run_to_files(tmp_path, *argv, "--contenders", *EAGER_FAMILIES) == 0
    rows, missing = REPORT.read(tmp_path / "n.json")
    body = json.loads((tmp_path / "n.json").read_text())
    kinds = [("tiny_resnet", "joint"), ("tiny_resnet", "independent"), ("tiny_vgg", "joint")]  # nothing meets in VGG
    assert [(r.network, r.masks, r.kept, r.direction) for r in rows] == [
        (*kind, 0.5, direction) for kind in kinds for direction in PASSES
    ]
    assert missing == Missing({}, []) and all(r.small_ms for r in rows)
    assert all(min(r.dense_ms, r.masked_ms, r.live_ms, r.compacted_ms, r.compacted_peak_mb) > 0 for r in rows)
    families = ["dense", *EAGER_FAMILIES]
    assert set(rows[0].trials) == {f"{f}/{layout}" for f in families for layout in ("nchw", "channels_last")}
    assert set(rows[0].quartiles) <= set(rows[0].trials) and len(rows[0].layouts.split()) == len(FAMILIES)
    assert "--kept 0.5" in body["header"]["command"] and "network.py" in body["header"]["command"]
    assert len(body["summary"]) == 4 and len(body["goals"]) == 6
    with (tmp_path / "n.csv").open() as file:
        assert [float(r["kept"]) for r in csv.DictReader(file)] == [r.kept for r in rows]
    assert {r.fastest_dense for r in rows} == {"eager"} and {r.best for r in rows} <= {"masked", "live", "compacted"}
    printed, text = capsys.readouterr().out, (tmp_path / "n.md").read_text()
    assert "# Network benchmark" in text and "| tiny_resnet | joint | 0.5 | train |" in text
    assert "\nlive mode, training step" in printed and printed.splitlines()[-1] == f"md: {tmp_path / 'n.md'}"


@pytest.mark.slow
def test_compiled_forms_in_a_row(tmp_path, quick_compile):
    argv = ["--suite", "tiny_vgg", *TINY[: -len(EAGER_FAMILIES) - 1], "--goals"]
    assert run_to_files(tmp_path, *argv) == 0
    (row,) = REPORT.read(tmp_path / "n.json")[0]
    assert min(row.dense_compile_ms, row.compacted_compile_ms, row.small_compile_ms) > 0
    assert row.layouts == " ".join(["nchw"] * 8 + ["-"]) and row.rounds == 1
    text = (tmp_path / "n.md").read_text()
    assert "both compiled" in text and "compacted_compile_ms" in text


def test_jobs_that_goals_speak_of_come_first(monkeypatch):
    seen = []
    monkeypatch.setattr(network.Bench, "rows_of", lambda self, job, pace: seen.append(str(job)) or [])
    network.main(["--suite", "resnet56", "--kept", "0.7", "0.95", "0.5", "--dtype", "float32"])
    assert seen == [
        "resnet56 joint kept 0.5",
        "resnet56 joint kept 0.95",
        "resnet56 independent kept 0.95",
        "resnet56 joint kept 0.7",
        "resnet56 independent kept 0.7",
        "resnet56 independent kept 0.5",
    ]


def test_out_of_time_names_what_was_not_run_and_is_resumed(tmp_path, capsys):
    argv = [*RESNET, "--kept", "0.5", "--masks", "joint", "--pass", "train"]
    assert run_to_files(tmp_path, *argv, "--minutes", "1e-9") == 1
    assert json.loads((tmp_path / "n.json").read_text())["not_run"] == ["tiny_resnet joint kept 0.5"]
    assert "out of time" in capsys.readouterr().err
    assert run_to_files(tmp_path, *argv, "--resume") == 0
    (row,) = REPORT.read(tmp_path / "n.json")[0]
    assert (row.direction, row.rounds) == ("train", 1)
    assert run_to_files(tmp_path, *argv, "--resume") == 0  # nothing is left to do
    assert REPORT.read(tmp_path / "n.json")[0] == [row]


def test_a_wrong_mode_ends_the_run_and_a_wrong_baseline_is_left_out(tmp_path, monkeypatch, capsys):
    argv = [*RESNET, "--kept", "0.5", "--masks", "joint", "--pass", "infer"]
    infer = NetworkContender.infer
    monkeypatch.setattr(Small, "infer", lambda self: infer(self) + 1)
    assert run_to_files(tmp_path, *argv) == 0
    (row,) = REPORT.read(tmp_path / "n.json")[0]
    assert row.small_ms is None and row.of_limit is None and row.layouts == "nchw nchw nchw - nchw - - - -"
    assert "small (nchw), infer: logits is wrong" in capsys.readouterr().err
    monkeypatch.setattr(LiveMode, "infer", lambda self: infer(self) + 1)
    with pytest.raises(SystemExit, match="live .*logits is wrong"):
        run_to_files(tmp_path, *argv)
    assert run_to_files(tmp_path, *argv, "--keep-going") == 1
    assert "## Failed\n\n- tiny_resnet joint kept 0.5: Wrong" in (tmp_path / "n.md").read_text()


def test_chosen_contenders_and_quick(tmp_path):
    argv = ["--suite", "tiny_vgg", *TINY, "--quick", "--contenders", "live", "--dtype", "both"]
    assert run_to_files(tmp_path, *argv) == 0
    rows, _ = REPORT.read(tmp_path / "n.json")
    assert [(r.kept, r.direction, r.masks, r.masked_ms, r.small_ms, r.dtype) for r in rows] == [
        (kept, "train", "joint", None, None, dtype) for kept in (0.95, 0.5) for dtype in ("float32", "bfloat16")
    ]
    assert "masked_ms" not in (tmp_path / "n.md").read_text()


def test_old_names_of_contenders_are_understood(capsys):
    args, _ = network_options.parse(["--rivals", "network", "layer", "small"])
    assert args.contenders == ["live", "masked", "small"]
    assert capsys.readouterr().err == "warning: --rivals is now --contenders\n"
    assert args.all_compiled
    args, _ = network_options.parse([])
    assert args.contenders == FAMILIES[1:] and not args.all_compiled


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--suite", "nope"], "--suite"),
        (["--kept", "0"], "--kept"),
        (["--masks", "both"], "--masks"),
        (["--batch", "nope=4"], "unknown network 'nope'"),
        (["--batch", "resnet56=0"], "--batch"),
        (["--minutes", "0"], "--minutes"),
        (["--seconds", "-1"], "--seconds"),
        (["--pass", "sideways"], "--pass"),
        (["--resume"], "--resume goes on with a --json file"),
        (["--json", "/no/such/folder/n.json"], "cannot write"),
        (["--optimizer", "adam"], "--optimizer"),
        (["--device", "cuda"], "finds no CUDA device"),
    ],
)
def test_bad_command_lines_are_refused(argv, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        network.main(argv)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_batches_by_network_or_for_all():
    _, found = network_options.parse(["--suite", "resnet56", "tiny", "--batch", "3", "tiny_vgg=5"])
    assert [(n.name, n.batch) for n in found] == [("resnet56", 3), ("tiny_resnet", 3), ("tiny_vgg", 5)]
