"""benchmarks/conv.py: what is timed, that a wrong result never is, and its command line."""

from __future__ import annotations

import csv
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import conv
import prunekernels as pk
from cases.benchmark_layers import SMALL, VARIED, make_case
from harness import contender, timing
from harness.memory import peak_mb
from harness.options import FORMATS
from layers import compiled as layers_compiled
from layers import report
from layers.baselines import BASELINES, DIRECTIONS, Compaction, Dense, Ours, UpperBound
from layers.case import Case
from layers.masks import make_masks
from layers.options import parse
from layers.problems import Problem, suites


@pytest.fixture(autouse=True)
def one_thread():
    """Faster for problems this small; and the harness sets the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def rows_compiled_by(monkeypatch, tmp_path, compiled, *argv):
    """The rows and the header's word on dense of a run of two problems, with a function in torch.compile's place."""
    monkeypatch.setattr(layers_compiled, "compiled", compiled)
    file = tmp_path / "r.json"
    two = ["--problem", SMALL, "--problem", "n1c8h6k16r1s1p0g1", "--rounds", "1", "--baselines", "limit"]
    assert conv.main([*two, "--compile-seconds", "60", *argv, "--json", str(file)]) == 0
    return report.read_rows(file), json.loads(file.read_text())["header"]["dense"]


def test_dense_is_compiled_once_for_all_masks(monkeypatch, tmp_path):
    made = []

    def compiled(function):
        made.append(function)
        return function

    rows, about = rows_compiled_by(monkeypatch, tmp_path, compiled, "--kept", "0.9", "0.5", "--direction", "all")
    assert len(made) == 8  # problems, layouts, forward alone and with both gradients
    assert about == "eager and compiled, 8 forms in 0 s"
    assert all((r.dense_compile_ms is not None) == (r.direction in ("fwd", "fwd+bwd")) for r in rows)
    assert all(r.dense_again_ms is None and "dense+compile/nchw" in r.quartiles for r in rows if r.dense_compile_ms)


def test_without_a_compiler_dense_is_eager(monkeypatch, tmp_path, capsys):
    def fails(*_):
        raise RuntimeError("no compiler\nfound")

    rows, about = rows_compiled_by(monkeypatch, tmp_path, lambda function: fails)
    assert [(r.dense_compile_ms, r.fastest_dense) for r in rows] == [(None, "eager")] * 2
    assert about.endswith("then eager alone, since compiling failed: RuntimeError: no compiler")
    assert all("n1c8h6k8" in line for line in capsys.readouterr().err.splitlines() if line.startswith("warning"))


def test_a_wrong_compiled_result_leaves_out_one_problem(monkeypatch, tmp_path):
    def compiled(function):
        return lambda x, w: function(x, w) * (1 + (w.shape[0] == 8))

    rows, about = rows_compiled_by(monkeypatch, tmp_path, compiled)
    assert [r.dense_compile_ms is None for r in rows] == [True, False] and "failed" not in about


def test_compiling_ends_when_its_time_is_over(monkeypatch, tmp_path):
    options = ("--compile-seconds", "1e-9")
    rows, about = rows_compiled_by(monkeypatch, tmp_path, lambda function: function, "--kept", "0.9", "0.5", *options)
    assert [r.dense_compile_ms is None for r in rows] == [False, False, True, True]
    assert about.endswith("2 forms in 0 s; then eager alone, since the time to compile was over")


@pytest.mark.slow
def test_dense_by_torch_compile(tmp_path):
    file = tmp_path / "r.json"
    argv = ["--problem", "n1c8h6k8r1s1p0g1", "--rounds", "1", "--layout", "nchw", "--compile-seconds", "60"]
    assert conv.main([*argv, "--json", str(file)]) == 0
    (row,), header = report.read_rows(file), json.loads(file.read_text())["header"]
    assert row.dense_compile_ms > 0 and header["dense"].startswith("eager and compiled, 2 forms")


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
    assert calls == dict.fromkeys(calls, 1 + timing.WARMUPS + timing.MIN_ROUNDS)  # one to settle plans
    assert all(t.low <= t.median <= t.high and t.rounds == timing.MIN_ROUNDS for t in timings.values())


@pytest.mark.parametrize("rounds", [1, 3, 70])
def test_rounds_can_be_forced(rounds):
    assert timing.interleaved({"a": lambda: None}, "cpu", 0, rounds)["a"].rounds == rounds


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


def test_command_line_end_to_end(tmp_path, capsys):
    files = {name: tmp_path / f"r.{name}" for name in ("json", "csv", "md", "png")}
    where = ["--json", files["json"], "--csv", files["csv"], "--md", files["md"]]
    if plotted := find_spec("matplotlib") is not None:
        where += ["--plot", files["png"]]
    argv = ["--problem", SMALL, "--kept", "0.5", "1", "--direction", "all", "--seconds", "0", *map(str, where)]
    assert conv.main([*argv, "--threads", "1"]) == 0
    body = json.loads(files["json"].read_text())
    assert body["header"]["dense"] == "eager"
    assert body["header"]["threads"] == 1 and "--kept 0.5 1" in body["header"]["command"]
    assert {(r["direction"], r["kept"]) for r in body["rows"]} == {(d, k) for d in DIRECTIONS for k in (0.5, 1.0)}
    assert all(r["times"] == 2 and r["ms"] > 0 and r["limit_ms"] > 0 for r in body["rows"])
    assert set(body["rows"][0]["quartiles"]) == {
        f"{family}/{layout}"
        for family in ("ours", "dense", "dense_again", "masked_dense", "compaction", "limit")
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


@pytest.mark.parametrize(("name", "full"), [("bf16", "bfloat16"), ("fp32", "float32"), ("float16", "float16")])
def test_short_names_of_dtypes(name, full):
    assert parse(["--suite", "tiny", "--dtype", name])[0].dtype == full
