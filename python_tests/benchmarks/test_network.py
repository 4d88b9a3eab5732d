"""The networks' benchmark: masks, the small network inside, that wrong steps are never timed, rounds, files, goals."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import network
import networks.options as network_options
import networks.report as network_report
import prunekernels as pk
from cases.benchmark_networks import make_masked, make_setting
from harness.contender import Wrong
from harness.goals import goals
from harness.report import Missing
from networks.baselines import (
    CONTENDERS,
    FAMILIES,
    PASSES,
    Dense,
    LiveMode,
    MaskedMode,
    NetworkContender,
    Small,
    expected,
)
from networks.jobs import LEAST, MOST, Pace, jobs
from networks.models import MASKS, NETWORKS, apply, draw, wires
from networks.report import NETWORKS as REPORT
from networks.rows import GOALS, NetworkRow, summarise
from networks.setting import MaskedSetting
from prunekernels.train.models import scaled

TINY = ["--rounds", "1", "--threads", "1", "--layout", "nchw"]
RESNET = ["--suite", "tiny_resnet", *TINY]


@pytest.fixture(autouse=True)
def one_thread():
    """Faster for networks this small; and the harness sets the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- networks and masks


@pytest.mark.parametrize("name", NETWORKS)
def test_multiply_adds_that_share_out_the_time(name):
    n = NETWORKS[name]
    found = pk.count_flops(n.build(), torch.randn(1, 3, n.image, n.image)).dense / 1e6
    assert n.mmacs == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("name", ["resnet56", "vgg16", "resnet18", "resnet50", "tiny_resnet", "tiny_vgg"])
def test_every_convolution_is_wired_once(name):
    with torch.device("meta"):
        model = NETWORKS[name].build()
    convs = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)}
    found = wires(model)
    assert sorted(w.conv for w in found) == sorted(convs)
    assert [w.filters for w in found] == [convs[w.conv].out_channels for w in found]
    sizes = {w.group: w.filters for w in found}
    assert all(sizes[w.reads] == convs[w.conv].in_channels for w in found if w.reads)
    assert [w.conv for w in found if w.reads is None] == [found[0].conv]


def test_which_networks_have_joins():
    assert {name for name, n in NETWORKS.items() if not n.has_joins()} == {"vgg16", "tiny_vgg"}


def test_groups_of_a_residual_network():
    groups = {w.conv: w.group for w in make_setting().wires}
    stage2 = [groups[f"stage2.{b}.body.conv2"] for b in range(3)]
    assert len({*stage2}) == 1 and stage2[0] != groups["stem.conv"] == groups["stage1.2.body.conv2"]
    assert groups["stage2.0.body.conv1"] == "stage2.0.body.conv1"


@pytest.mark.parametrize("name", ["tiny_resnet", "tiny_vgg", "resnet18"])
def test_joint_masks_are_those_of_the_groups_that_the_package_finds(name):
    n = NETWORKS[name]
    mine, theirs = n.build(), n.build()
    found = wires(mine)
    live = draw(found, "joint", 0.5, 0)
    pk.convert(mine)
    pk.convert(theirs)
    apply(mine, found, live, "cpu")
    for group in pk.coupled_groups(theirs, torch.randn(1, 3, n.image, n.image)):
        widest = next(conv for conv in group.layers if len(live.filters[conv]) == group.width)
        group.set_masks(theirs, live.filters[widest])
    expected = dict(theirs.named_buffers())
    for buffer, mask in mine.named_buffers():
        assert not buffer.endswith("_mask") or mask.equal(expected[buffer]), buffer


@pytest.mark.parametrize("kept", [0.95, 0.7, 0.3, 0.01])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("name", ["tiny_resnet", "tiny_vgg", "resnet50"])
def test_counts_are_those_of_the_narrow_network(name, masks, kept):
    with torch.device("meta"):
        found = wires(NETWORKS[name].build())
        narrow = NETWORKS[name].build(kept)
    live = draw(found, masks, kept, 0)
    for w in found:
        assert live.filters[w.conv].sum() == scaled(w.filters, kept) == narrow.get_submodule(w.conv).out_channels
        if w.reads and masks == "joint":
            assert live.inputs[w.conv].sum() == narrow.get_submodule(w.conv).in_channels
    assert masks != "joint" or live.features.sum() == narrow.classifier.in_features


def test_joint_masks_agree_where_filters_meet_and_independent_ones_do_not():
    found = make_setting().wires
    stage = [w.conv for w in found if w.group == "stem.conv"]
    joint, independent = (draw(found, masks, 0.5, 0) for masks in MASKS)
    assert all(torch.equal(joint.filters[c], joint.filters[stage[0]]) for c in stage)
    assert not all(torch.equal(independent.filters[c], independent.filters[stage[0]]) for c in stage)
    # A block's input is the union of all that was added up before it.
    assert independent.inputs["stage1.1.body.conv1"].equal(
        independent.filters["stem.conv"] | independent.filters["stage1.0.body.conv2"]
    )
    shortcut = joint.filters["stage2.0.body.conv2"][:16]
    assert shortcut.equal(joint.filters["stem.conv"])  # a shortcut without parameters brings these


def test_masks_follow_the_seed():
    found = make_setting().wires
    a, b, c = (draw(found, "joint", 0.5, seed).filters["stem.conv"] for seed in (1, 1, 2))
    assert a.equal(b) and not a.equal(c)


# ---- what is timed


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("name", ["tiny_resnet", "tiny_vgg"])
def test_all_agree_with_the_reference(name, masks, layout):
    masked = make_masked(name, masks)
    for direction in PASSES:
        for contender in CONTENDERS:
            made = contender(masked, direction, layout)
            made.check()
            made.run()
            made.check()  # from the first weights again


def test_bottlenecks_with_shortcuts_that_have_weights_agree_too(monkeypatch):
    # With fewer pixels the last norms would have too few to be well conditioned.
    monkeypatch.setitem(NETWORKS, "bottlenecks", replace(NETWORKS["resnet50"], image=64, classes=10))
    masked = make_masked("bottlenecks", batch=4)
    for contender in (LiveMode, Small):
        contender(masked, "train", "nchw").check()


def test_bfloat16_by_autocast():
    masked = make_masked(dtype=torch.bfloat16)
    for contender in (LiveMode, Small):
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
    todo = jobs([NETWORKS["resnet18"]], ["joint"], [0.5, 0.7])
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


def test_layouts_without_a_chance_sit_out():
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


@pytest.mark.parametrize(("known", "runs"), [([1, 1], 1), ([1, 2, 2, 2], 2), (list(range(20)), 1 + network.WARMUPS)])
def test_plans_are_measured_before_anything_is_timed(monkeypatch, known, runs):
    known, done, checked = iter(known), [], []
    monkeypatch.setattr(pk.plan, "table", lambda: [0] * next(known))
    stub = SimpleNamespace(run=lambda: done.append(1) or "result", rewind=lambda: done.clear(), check=checked.append)
    stub.ms = 1e9
    times = iter([7.0, 5.0, 4.0, 3.0])
    network.first_runs(stub, lambda run: (run(), next(times))[1])
    assert (len(done), checked, stub.ms) == (runs, ["result"], [7.0, 5.0, 4.0, 3.0][runs - 1])


# ---- the command


def run_to_files(folder, *argv):
    files = [word for name in ("json", "csv", "md") for word in (f"--{name}", str(folder / f"n.{name}"))]
    return network.main([*argv, *files])


def test_end_to_end(tmp_path, capsys):
    assert run_to_files(tmp_path, "--suite", "tiny", "--kept", "0.5", "--rounds", "1", "--threads", "1") == 0
    rows, missing = REPORT.read(tmp_path / "n.json")
    body = json.loads((tmp_path / "n.json").read_text())
    kinds = [("tiny_resnet", "joint"), ("tiny_resnet", "independent"), ("tiny_vgg", "joint")]  # nothing meets in VGG
    assert [(r.network, r.masks, r.kept, r.direction) for r in rows] == [
        (*kind, 0.5, direction) for kind in kinds for direction in PASSES
    ]
    assert missing == Missing({}, []) and all(r.small_ms for r in rows)
    assert all(min(r.dense_ms, r.masked_ms, r.live_ms, r.live_peak_mb) > 0 for r in rows)
    assert set(rows[0].trials) == {f"{f}/{layout}" for f in FAMILIES for layout in ("nchw", "channels_last")}
    assert set(rows[0].quartiles) <= set(rows[0].trials) and len(rows[0].layouts.split()) == 4
    assert "--kept 0.5" in body["header"]["command"] and "network.py" in body["header"]["command"]
    assert len(body["summary"]) == 4 and len(body["goals"]) == 1
    with (tmp_path / "n.csv").open() as file:
        assert [float(r["kept"]) for r in csv.DictReader(file)] == [r.kept for r in rows]
    printed, text = capsys.readouterr().out, (tmp_path / "n.md").read_text()
    assert "# Network benchmark" in text and "| tiny_resnet | joint | 0.5 | train |" in text
    assert "\nlive mode, training step" in printed and printed.splitlines()[-1] == f"md: {tmp_path / 'n.md'}"


def test_jobs_that_goals_speak_of_come_first(monkeypatch):
    seen = []
    monkeypatch.setattr(network.Bench, "rows_of", lambda self, job, pace: seen.append(str(job)) or [])
    network.main(["--suite", "resnet56", "--kept", "0.7", "0.95", "0.5"])
    assert seen == [
        "resnet56 joint kept 0.95",
        "resnet56 joint kept 0.5",
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
    assert row.small_ms is None and row.of_limit is None and row.layouts == "nchw nchw nchw -"
    assert "small (nchw), infer: logits is wrong" in capsys.readouterr().err
    monkeypatch.setattr(LiveMode, "infer", lambda self: infer(self) + 1)
    with pytest.raises(SystemExit, match="live .*logits is wrong"):
        run_to_files(tmp_path, *argv)
    assert run_to_files(tmp_path, *argv, "--keep-going") == 1
    assert "## Failed\n\n- tiny_resnet joint kept 0.5: Wrong" in (tmp_path / "n.md").read_text()


def test_chosen_contenders_and_quick(tmp_path):
    argv = ["--suite", "tiny_vgg", *TINY, "--quick", "--contenders", "live"]
    assert run_to_files(tmp_path, *argv) == 0
    rows, _ = REPORT.read(tmp_path / "n.json")
    assert [(r.kept, r.direction, r.masks, r.masked_ms, r.small_ms) for r in rows] == [
        (0.95, "train", "joint", None, None),
        (0.5, "train", "joint", None, None),
    ]
    assert "masked_ms" not in (tmp_path / "n.md").read_text()


def test_old_names_of_contenders_are_understood(capsys):
    args, _ = network_options.parse(["--rivals", "network", "layer", "small"])
    assert args.contenders == ["live", "masked", "small"]
    assert capsys.readouterr().err == "warning: --rivals is now --contenders\n"
    assert network_options.parse([])[0].contenders == ("masked", "live", "small")


def test_rows_of_older_files_have_todays_names(tmp_path):
    old = asdict(make_row(live_peak_mb=7.0, trials={"dense/nchw": 1.0, "live/nchw": 2.0}))
    old["quartiles"] = {"layer/channels_last": [1, 2, 3]}
    for name in ("layer_ms", "network_ms", "network_peak_mb"):
        old[name] = old.pop(name.replace("layer", "masked").replace("network", "live"))
    old["trials"] = {"dense/nchw": 1.0, "network/nchw": 2.0}
    (tmp_path / "n.json").write_text(json.dumps({"rows": [old]}))
    (row,) = REPORT.read(tmp_path / "n.json")[0]
    assert (row.masked_ms, row.live_ms, row.live_peak_mb, row.live_vs_dense) == (3.0, 2.0, 7.0, 2.0)
    assert row.quartiles == {"masked/channels_last": [1, 2, 3]}
    assert row.trials == {"dense/nchw": 1.0, "live/nchw": 2.0}


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


# ---- goals


ROW = dict(network="n", batch=1, masks="joint", kept=0.5, direction="train", dense_ms=4.0, masked_ms=3.0)
ROW |= dict(live_ms=2.0, small_ms=1.9, layouts="nchw nchw nchw nchw", rounds=3, optimizer="masked")


def make_row(**changes):
    return NetworkRow(**ROW | changes)


def test_ratios_and_summary():
    rows = [make_row(), make_row(network="m", live_ms=5.0), make_row(network="o", small_ms=None)]
    assert (rows[0].masked_vs_dense, rows[0].live_vs_dense, rows[0].of_limit) == (4 / 3, 2, 0.95)
    assert rows[2].of_limit is None
    (s,) = summarise(rows)
    assert (s.networks, s.worst, s.worst_of_limit, s.lost_to_dense) == (3, "m", 0.38, 1)
    assert s.live_vs_dense == pytest.approx((2 * 2 * 0.8) ** (1 / 3))


def test_goals_name_the_rows_that_fail():
    rows = [
        make_row(),
        make_row(network="slow", live_ms=3.8),
        make_row(network="slow", kept=0.3, live_ms=3.8),
        make_row(masks="independent", small_ms=0.1),
        make_row(direction="infer", small_ms=0.1),
        make_row(kept=0.95, masks="independent", live_ms=4.2),
        make_row(kept=1.0, live_ms=3.9),
    ]
    bound, dense = goals(rows, GOALS)
    assert (bound.target, bound.rows, bound.failing, bound.verdict) == (">= 0.9", 2, 1, "missed")
    assert bound.failing_most == "slow joint kept 0.5: 0.50" and bound.goal.endswith("kept 0.5")
    assert (dense.target, dense.rows, dense.failing_most) == (">= 0.98", 2, "n independent kept 0.95: 0.95")
    assert all(g.goal.startswith("GPU") for g in goals([make_row(device="cuda")], GOALS))
    assert network_report.network_goals([make_row(kept=0.7)]) == ""


def test_rows_of_different_dtypes_are_told_apart():
    rows = [make_row(), make_row(dtype="bfloat16")]
    table, summary = network_report.table(rows), network_report.summary(rows)
    assert "bfloat16" in table and "bfloat16" in summary and "clock" not in table


@pytest.mark.parametrize(
    "path", sorted((Path(network.__file__).parent / "results").glob("*-network*.json")), ids=lambda p: p.name
)
def test_committed_results_can_be_read_again(path):
    assert goals(REPORT.read(path)[0], GOALS)
