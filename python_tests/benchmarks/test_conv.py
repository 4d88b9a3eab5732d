"""The benchmark harness: problem lines, masks, the summary's arithmetic, and that a wrong result is never timed."""

from __future__ import annotations

import csv
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import conv
import prunekernels as pk
from cases.benchmark_layers import SMALL, found, make_case, make_row
from harness import contender, timing
from harness.goals import goals
from harness.memory import peak_mb
from harness.options import FORMATS
from layers import report
from layers.baselines import BASELINES, DIRECTIONS, Compaction, Dense, Ours, UpperBound
from layers.case import Case
from layers.goals import GOALS
from layers.problems import SHAPES, Problem, live_count, load_suite, make_masks, suites

LINES = [line for path in SHAPES.glob("*.txt") for line in path.read_text().splitlines() if line and line[0] != "#"]
VARIED = ["n2c8h6w5k12r3s2p1g1", "n1c6h5k4r1s1p0g1", "n2c8h6k16r3s1p1g4", "n1c12h6k12r3s1p2g12d2", "n1c3h8k6r3s1p1g1"]
# Multiply-adds of one image in millions, convolutions only, as the papers and the usual counting tools give them.
LITERATURE = {"resnet50": 4087, "vgg16_cifar": 313, "resnet56_cifar": 125.5, "mobilenet_v2": 299.5}


@pytest.fixture(autouse=True)
def one_thread():
    """Faster for problems this small; and the harness sets the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("line", LINES)
def test_every_line_survives_parse_and_format(line):
    assert Problem.parse(line).format() == line


@pytest.mark.parametrize("line", ["n2c4h6w5k4r3s2p1g2d2", "n1c1h1k1r1s1p0g1"])
def test_unnamed_line_survives(line):
    problem = Problem.parse(line)
    assert problem.format() == problem.shape == line and problem.times == 1


def test_defaults_of_a_line():
    assert Problem.parse('n1c4h6k8r3 "a*2"') == Problem(1, 4, 6, 6, 8, 3, 1, 0, 1, 1, "a", 2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("n1c4h6", "malformed"),
        ('n1c4h6k8r3 "a*b"', "malformed"),
        ("n0c4h6k8r3", "at least 1"),
        ("n1c4h6k8r3s0", "at least 1"),
        ("n1c4h6k8r3g3", "groups must divide"),
        ("n1c4h2k8r3", "empty output"),
    ],
)
def test_bad_lines_are_refused(line, message):
    with pytest.raises(ValueError, match=message):
        Problem.parse(line)


@pytest.mark.parametrize("name", LITERATURE)
def test_suites_have_the_multiply_adds_of_the_literature(name):
    assert sum(p.macs * p.times for p in load_suite(name)) / 1e6 == pytest.approx(LITERATURE[name], rel=0.02)


@pytest.mark.parametrize("name", suites())
def test_names_are_unique_and_carry_the_suite(name):
    names = [p.name for p in load_suite(name)]
    assert len(set(names)) == len(names) and all(n.startswith(f"{name}:") for n in names)


def test_output_size_is_that_of_conv2d():
    for line in VARIED:
        p = Problem.parse(line)
        y = torch.nn.functional.conv2d(torch.zeros(p.x_shape), torch.zeros(p.weight_shape), **p.conv_args)
        assert y.shape == p.out_shape


@pytest.mark.parametrize("kept", [0.01, 0.3, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("side", ["both", "out", "in"])
def test_filter_masks_have_exact_counts(side, kept):
    p = Problem.parse("n1c24h4k40r3s1p1g1")
    masks = make_masks(p, "filter", side, kept)
    assert masks.live_filters.sum() == (live_count(40, kept) if side != "in" else 40)
    assert masks.live_inputs(1).sum() == (live_count(24, kept) if side != "out" else 24)
    assert (masks.filter is None, masks.input is None, masks.kernel) == (side == "in", side == "out", None)


@pytest.mark.parametrize("kept", [0.1, 0.5, 1.0])
def test_kernel_masks_have_exact_counts(kept):
    masks = make_masks(Problem.parse("n1c24h4k40r3s1p1g2"), "kernel", "both", kept)
    assert masks.kernel.shape == (40, 12) and masks.kernel.sum() == masks.pairs.sum() == live_count(480, kept)


def test_grouped_masks_are_even_and_depthwise_ones_agree():
    p = Problem.parse("n1c16h4k32r3s1p1g4")
    masks = make_masks(p, "filter", "both", 0.5)
    assert masks.filter.view(4, 8).sum(1).tolist() == [4] * 4 and masks.input.view(4, 4).sum(1).tolist() == [2] * 4
    masks = make_masks(Problem.parse("n1c16h4k32r3s1p1g16"), "filter", "both", 0.5)
    assert torch.equal(masks.filter.view(16, 2).any(1), masks.input) and masks.input.sum() == 8


def test_masks_follow_the_seed():
    p = Problem.parse("n1c24h4k40r3s1p1g1")
    a, b, c = (make_masks(p, "filter", "both", 0.5, seed).filter for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_an_image_is_not_pruned_and_gets_no_gradient():
    p = Problem.parse("n1c3h8k8r3s1p1g1")
    masks = make_masks(p, "filter", "both", 0.5)
    assert masks.input is None and masks.live_filters.sum() == 4
    assert Ours(Case.make(p, masks, torch.float32, "cpu"), "fwd+bwd", "nchw").outputs == ["y", "grad_w"]


@pytest.mark.parametrize("direction", ["fwd", "grad_weight", "fwd+bwd"])
@pytest.mark.parametrize("pattern_side", ["filter both", "filter out", "filter in", "kernel -"])
@pytest.mark.parametrize("line", VARIED)
def test_all_agree_with_the_reference(line, pattern_side, direction):
    case = make_case(line, *pattern_side.split())
    for kind, layout in conv.entries(case, direction, "both"):
        kind(case, direction, layout).check()


def test_upper_bound_and_compaction_do_the_live_work_only():
    case = make_case("n1c16h4k32r3s1p1g4")
    bound = UpperBound(case, "fwd+bwd", "nchw")
    assert bound.w.shape == (16, 2, 3, 3) and bound.x.shape[1] == 8
    assert bound.zeros == [(1, 16, 4, 4), (1, 8, 4, 4)]
    assert not case.small.ragged and make_case("n1c16h4k32r3s1p1g1", "kernel").small.ragged
    depthwise = make_case("n1c12h6k12r3s1p1g12").small
    assert depthwise.groups == 6 and depthwise.taps is None


WRONG = {
    "scaled": lambda y: y * 1.01,
    "nan": lambda y: y * float("nan"),
    "shape": lambda y: y[:, 1:],
    "dead": lambda y: torch.where(y == 0, 1e-20, y),
    "gradient": lambda y: 2 * y - y.detach(),
}


@pytest.mark.parametrize(("spoil", "direction"), [(s, "fwd" if s != "gradient" else "fwd+bwd") for s in WRONG])
def test_a_wrong_result_is_never_timed(monkeypatch, spoil, direction):
    true = pk.masked_conv2d

    monkeypatch.setattr(pk, "masked_conv2d", lambda *args, **kwargs: WRONG[spoil](true(*args, **kwargs)))
    monkeypatch.setattr(contender, "interleaved", lambda *_: pytest.fail("timed"))
    with pytest.raises(SystemExit, match="test:small.*ours"):
        conv.main(["--problem", SMALL, "--direction", direction])


def spoil_compaction(monkeypatch, error):
    def forward(self):
        if error is not None:
            raise error
        return self.w.new_zeros(self.problem.out_shape)

    monkeypatch.setattr(Compaction, "forward", forward)


@pytest.mark.parametrize("error", [None, RuntimeError("out of something")])
def test_a_baseline_that_fails_is_left_out_and_the_run_goes_on(monkeypatch, tmp_path, capsys, error):
    spoil_compaction(monkeypatch, error)
    argv = ["--problem", SMALL, "--kept", "0.5", "1", "--direction", "fwd", "--rounds", "1"]
    assert conv.main([*argv, "--json", str(tmp_path / "r.json")]) == 0
    written = report.read_rows(tmp_path / "r.json")
    assert [(r.compaction_ms, r.vs_compaction) for r in written] == [(None, None)] * 2
    assert all(r.limit_ms and r.masked_dense_ms and "compaction/nchw" not in r.quartiles for r in written)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: n1c8h6k8")]
    assert len(warnings) == 4 and all("compaction" in line and "left out" in line for line in warnings)
    assert all(str(error or "is wrong") in line for line in warnings)


def test_without_dense_there_is_no_row(monkeypatch, capsys):
    monkeypatch.setattr(Dense, "forward", lambda self: self.w.new_zeros(self.problem.out_shape))
    monkeypatch.setattr(contender, "interleaved", lambda *_: pytest.fail("timed"))
    assert conv.main(["--problem", SMALL, "--direction", "fwd"]) == 1
    assert "no rows" in capsys.readouterr().err


def test_the_plan_is_asked_last_and_for_the_fastest_layout(monkeypatch):
    asked = []

    def choose(*_, dtype, memory_format, **__):
        asked.append((dtype, memory_format))
        return "dense"

    monkeypatch.setattr(pk.plan, "choose", choose)

    def timed(runs, *_):
        assert not asked
        return {key: timing.Timing(1.0 if key.endswith("channels_last") else 2.0, 1, 1, 1) for key in runs}

    monkeypatch.setattr(contender, "interleaved", timed)
    assert conv.main(["--problem", SMALL]) == 0
    assert asked == [(torch.float32, torch.channels_last)] * 3


def test_every_plan_of_the_package_can_be_asked_for(capsys):
    with pytest.raises(SystemExit):
        conv.main(["--help"])
    text = capsys.readouterr().out
    assert "--plan {" + ",".join(pk.plan.PLANS) + "}" in text


def test_interleaved_runs_all_equally_often():
    calls = {"a": 0, "b": 0}

    def run(name):
        calls[name] += 1

    timings = timing.interleaved({name: lambda name=name: run(name) for name in calls}, "cpu", 0)
    assert calls == dict.fromkeys(calls, timing.WARMUPS + timing.MIN_ROUNDS)
    assert all(t.low <= t.median <= t.high and t.rounds == timing.MIN_ROUNDS for t in timings.values())


@pytest.mark.parametrize("rounds", [1, 3, 70])
def test_rounds_can_be_forced(rounds):
    assert timing.interleaved({"a": lambda: None}, "cpu", 0, rounds)["a"].rounds == rounds


def test_summary_weights_by_multiplicity_and_counts_losses():
    rows = [make_row(), make_row(name="slow", times=3, ms=4.0, compaction_ms=3.96), make_row(kept=0.9, limit_ms=None)]
    summary, other = report.summarise(rows)
    assert summary.vs_dense == pytest.approx((2 * 0.5**3) ** 0.25)
    assert (summary.worst, summary.worst_ratio) == ("slow", 0.125)
    assert (summary.problems, summary.lost_to_dense, summary.lost_to_compaction) == (2, 1, 0)
    assert (other.of_limit, other.worst_ratio, other.vs_sparseprop) == (None, 2.0, None)


@pytest.mark.parametrize(
    ("speedups", "expected"),
    [
        ({0.9: 0.5, 0.5: 2.0}, 0.7),
        ({0.9: 1.1, 0.5: 2.0}, 0.9),
        ({0.9: 0.5, 0.5: 0.9}, None),
        ({0.9: 0.5, 0.5: 1.0}, 0.5),
    ],
)
def test_break_even(speedups, expected):
    assert report.break_even(speedups) == (None if expected is None else pytest.approx(expected))


def test_goals_of_filters():
    full = dict(direction="fwd+bwd", dense_ms=4.0)
    rows = [
        make_row(**full, name="good", kept=0.7, ms=1.0, limit_ms=0.9),
        make_row(**full, name="poor", kept=0.3, ms=1.0, limit_ms=0.4, times=3),
        make_row(**full, name="lost", kept=0.95, ms=5.0, side="out", limit_ms=0.1),
        make_row(name="forward", kept=0.5, ms=9.0, limit_ms=0.1),
    ]
    said = found(rows)
    assert len(said) == 4
    mean = said["filters in and out: share of limit, mean >= 0.85"]
    assert mean.reached == pytest.approx((0.9 * 0.4**3) ** 0.25) and mean.margin == pytest.approx(mean.reached / 0.85)
    assert (mean.goal[-12:], mean.rows, mean.failing, mean.verdict) == ("kept 0.7 0.3", 2, 1, "missed")
    each = said["filters in and out: share of limit, each >= 0.6"]
    assert (each.reached, each.failing_most, each.verdict) == (0.4, "poor kept 0.3: 0.40", "missed")
    dense = said["filters: over dense, each >= 0.98"]
    assert (dense.reached, dense.rows, dense.failing_most) == (0.8, 3, "lost out kept 0.95: 0.80")
    overhead = said["overhead: time over dense's, each <= 1.02"]
    assert (overhead.reached, overhead.margin, overhead.rows) == (1.25, pytest.approx(1.02 / 1.25), 1)
    assert all(f.verdict == "holds" and f.failing_most == "-" for f in goals(rows[:1], GOALS))


def test_goals_of_kernels_look_at_3x3_only():
    full = dict(mask="kernel", side="-", direction="fwd+bwd", limit_ms=None, problem="n1c8h6k8r3s1p1g1")
    rows = [
        make_row(**full, kept=0.5, ms=2.5),
        make_row(**full, name="b", kept=0.5, ms=1.0),
        make_row(**full, kept=0.15, ms=0.5, sparseprop_ms=2.0),
        make_row(**full | {"problem": "n1c8h6k8r1s1p0g1"}, kept=0.15, ms=9.0),
    ]
    said = found(rows)
    assert len(said) == 3
    even = said["kernels 3x3: over dense, mean >= 1"]
    assert even.reached == pytest.approx((0.8 * 2) ** 0.5) and (even.verdict, even.failing) == ("holds", 1)
    assert said["kernels 3x3: over dense, mean >= 3"].margin == pytest.approx(4 / 3)
    assert said["kernels 3x3: over SparseProp, mean >= 5"].margin == pytest.approx(0.8)


def test_goal_of_memory_and_no_goal_without_rows():
    rows = [make_row(direction="fwd+bwd", kept=0.6, ours_peak_mb=m, dense_peak_mb=10.0) for m in (10.9, 12.0, 5.0)]
    memory = found(rows)["peak memory over dense's, each <= 1.1"]
    assert (memory.reached, memory.rows, memory.failing) == (1.2, 3, 1)
    assert goals([make_row()], GOALS) == [] and report.layer_goals([make_row()]) == ""


def test_at_most_three_failing_problems_are_named_the_worst_first():
    rows = [make_row(direction="fwd+bwd", name=f"p{i}", kept=0.8, ms=3.0 + i) for i in range(5)]
    goal = found(rows)["filters: over dense, each >= 0.98"]
    assert goal.failing == 5 and goal.failing_most == "p4 kept 0.8: 0.29, p3 kept 0.8: 0.33, p2 kept 0.8: 0.40"


def test_peak_of_memory_is_the_highest_sum_of_allocations():
    def run():
        first = torch.ones(1_000_000)
        second = first + 1
        del first
        return second, torch.ones(250_000)

    assert peak_mb(run) == peak_mb(run) == pytest.approx(8, rel=1e-3)


def test_memory_is_counted_where_asked_for(tmp_path):
    file = tmp_path / "r.json"
    argv = ["--suite", "tiny", "--limit-problems", "1", "--rounds", "1", "--memory", "--json", str(file)]
    assert conv.main(argv) == 0
    body = json.loads(file.read_text())
    (row,) = body["rows"]
    assert row["ours_peak_mb"] > 0.4 and row["dense_peak_mb"] > 0.4  # y and grad_x have 0.2 MB each
    assert row["of_dense_peak"] == row["ours_peak_mb"] / row["dense_peak_mb"]
    assert [g["reached"] for g in body["goals"] if g["goal"].startswith("peak memory")] == [row["of_dense_peak"]]


def test_many_sides_and_the_plot_of_many_files(tmp_path, capsys):
    filters, kernels, image = (str(tmp_path / name) for name in ("f.json", "k.json", "p.png"))
    argv = ["--suite", "tiny", "--limit-problems", "1", "--rounds", "1", "--kept", "0.5", "0.15"]
    assert conv.main([*argv, "--side", "out", "in", "out", "--json", filters]) == 0
    assert conv.main([*argv, "--side", "out", "in", "--mask", "kernel", "--json", kernels]) == 0
    sides = [(r.side, r.kept, r.live_k) for r in report.read_rows(Path(filters))]
    assert sides == [("out", 0.5, 16), ("out", 0.15, 5), ("in", 0.5, 32), ("in", 0.15, 32)]
    assert [(r.side, r.kept) for r in report.read_rows(Path(kernels))] == [("-", 0.5), ("-", 0.15)]
    if find_spec("matplotlib") is None:
        return
    capsys.readouterr()
    assert conv.main(["--plot-from", filters, kernels, "--plot", image]) == 0
    png, printed = Path(image).read_bytes(), capsys.readouterr().out
    assert png.startswith(b"\x89PNG") and int.from_bytes(png[16:20], "big") == 1200  # the width
    assert "filters: over dense" in printed and "kernels 3x3" in printed and printed.endswith(f"plot: {image}\n")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [{"problem": "p"}]}'])
def test_what_is_no_results_file_is_refused(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match="r.json: no results file"):
        report.read_rows(tmp_path / "r.json")


FILES = (Path(conv.__file__).parent / "results").glob("*.json")
RESULTS = [p for p in FILES if "benchmarks/conv.py" in json.loads(p.read_text())["header"]["command"]]


@pytest.mark.parametrize("path", sorted(RESULTS), ids=lambda p: p.name)
def test_committed_results_can_be_read_again(path):
    assert goals(report.read_rows(path), GOALS)


def test_command_line_end_to_end(tmp_path, capsys):
    files = {name: tmp_path / f"r.{name}" for name in ("json", "csv", "md", "png")}
    where = ["--json", files["json"], "--csv", files["csv"], "--md", files["md"]]
    if plotted := find_spec("matplotlib") is not None:
        where += ["--plot", files["png"]]
    argv = ["--problem", SMALL, "--kept", "0.5", "1", "--direction", "all", "--seconds", "0", *map(str, where)]
    assert conv.main([*argv, "--threads", "1"]) == 0
    body = json.loads(files["json"].read_text())
    assert body["header"]["threads"] == 1 and "--kept 0.5 1" in body["header"]["command"]
    assert {(r["direction"], r["kept"]) for r in body["rows"]} == {(d, k) for d in DIRECTIONS for k in (0.5, 1.0)}
    assert all(r["times"] == 2 and r["ms"] > 0 and r["limit_ms"] > 0 for r in body["rows"])
    assert set(body["rows"][0]["quartiles"]) == {
        f"{family}/{layout}"
        for family in ("ours", "dense", "masked_dense", "compaction", "limit")
        for layout in FORMATS
    }
    assert len(body["summary"]) == 8 and len(body["break_even"]) == 4
    with files["csv"].open() as file:
        assert len(list(csv.DictReader(file))) == 8
    printed = capsys.readouterr().out
    assert "| test:small |" in files["md"].read_text() and "vs_dense" in printed
    assert printed.splitlines()[-1] == (f"plot: {files['png']}" if plotted else f"md: {files['md']}")
    assert not plotted or files["png"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "nothing to run"),
        (["--suite", "nope"], "unknown suite 'nope'"),
        (["--problem", "n1c2"], "malformed problem line 'n1c2'"),
        (["--suite", "tiny", "--kept", "0"], "--kept"),
        (["--suite", "tiny", "--kept", "0.5", "1.5"], "--kept"),
        (["--suite", "tiny", "--kept", "nan"], "--kept"),
        (["--suite", "tiny", "--threads", "0"], "--threads"),
        (["--suite", "tiny", "--seconds", "-1"], "--seconds"),
        (["--suite", "tiny", "--rounds", "0"], "--rounds"),
        (["--suite", "tiny", "--side", "both", "up"], "--side"),
        (["--suite", "tiny", "--plan", "none"], "--plan"),
        (["--plot-from", "r.json"], "--plot-from"),
        (["--plot-from", "r.json", "--plot", "r.png", "--suite", "tiny"], "--plot-from"),
        (["--plot-from", "/no/such/r.json", "--plot", "r.png"], "/no/such/r.json: no results file"),
        (["--suite", "tiny", "--direction", "sideways"], "--direction"),
        (["--suite", "tiny", "--mask", "filter", "rows"], "--mask"),
        (["--suite", "tiny", "--block", "64"], "expected filters x channels such as 64x16, got '64'"),
        (["--suite", "tiny", "--block", "0x16"], "--block"),
        (["--suite", "tiny", "--batch", "nope=4"], "unknown suite 'nope'"),
        (["--suite", "tiny", "--batch", "tiny=0"], "--batch"),
        (["--suite", "tiny", "--minutes", "0"], "--minutes"),
        (["--suite", "tiny", "--baselines", "dense"], "--baselines"),
        (["--suite", "tiny", "--rivals", "dense"], "--rivals"),
        (["--suite", "tiny", "--dtype", "float64"], "--dtype"),
        (["--suite", "tiny", "--resume"], "--resume goes on with a --json file"),
        (["--suite", "tiny", "--json", "/dev/null"], "cannot write /dev/null"),
        (["--suite", "tiny", "--json", "/no/such/folder/r.json"], "cannot write /no/such/folder/r.json"),
    ],
)
def test_bad_arguments_end_with_one_line_and_code_2(argv, message, capsys, monkeypatch):
    monkeypatch.setattr(conv.command, "run", lambda *_: pytest.fail("ran"))
    with pytest.raises(SystemExit) as stopped:
        conv.main(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1


def test_the_old_name_of_an_option_is_understood(capsys):
    args, _ = conv.parse(["--suite", "tiny", "--rivals", "limit"])
    assert args.contenders == ["limit"] and capsys.readouterr().err == "warning: --rivals is now --baselines\n"


def test_help_names_every_suite(capsys):
    with pytest.raises(SystemExit) as stopped:
        conv.main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and all(name in text for name in suites())


def test_contenders_have_different_names():
    assert len({c.family for c in (*BASELINES, Ours)}) == len(BASELINES) + 1
