"""Draws the plots of docs/assets and fills the tables of README.md and docs/ from the committed results files.

    python docs/results.py

A table stands in a page between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a function of this file. The tests
compare what is committed with what this file makes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import wire_plan
from plots import PLOTS
from result_rows import (
    ADAPTATION,
    BLOCKS,
    DETECTION,
    DTYPES,
    EVIDENCE,
    FILTERS,
    FILTERS_BF16,
    INDEPENDENT,
    KERNELS,
    MASK_CHANGE,
    MODELS,
    MORE_NAMES,
    NAMES,
    NEW_SHAPES,
    OPTIMIZERS,
    ROOT,
    WHOLE_RUN,
    WIRE,
    Row,
    fastest_dense,
    load,
    method_rows,
    network_rows,
    training_rows,
)  # fmt: skip

ASSETS = ROOT / "docs" / "assets"


# ---- tables


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _networks(rows: Iterable[Row]) -> str:
    head = ("network", "masks", "keep ratio", "masked mode", "live mode", "small network")
    cells = [
        (NAMES[r["network"]], r["masks"], r["kept"], *(ratio(r[mode]) for mode in ("masked", "live", "small")))
        for r in rows
    ]
    return markdown(head, cells)


def networks_ratios() -> str:
    return _networks(network_rows("train"))


def networks_infer() -> str:
    return _networks(network_rows("infer"))


def _forms(forms: Sequence[str]) -> list[tuple[object, ...]]:
    """Of each training row, the speed-ups of these forms over the fastest dense."""
    cells: list[tuple[object, ...]] = []
    for row in training_rows():
        dense = fastest_dense(row)
        ratios = [ratio(None if row[f"{form}_ms"] is None else dense / row[f"{form}_ms"]) for form in forms]
        which = f"{DTYPES.get(row['fastest_dense'], row['fastest_dense'])}, {dense:.0f} ms"
        cells.append((MORE_NAMES[row["network"]], DTYPES[row["dtype"]], row["kept"], which, *ratios))
    return cells


def networks_short() -> str:
    """Training steps over the fastest dense, of each mode and of the small network."""
    head = ("network", "dtype", "keep ratio", "masked mode", "live mode", "compacted mode", "small network")
    return markdown(head, [(*row[:3], *row[4:]) for row in _forms(("masked", "live", "compacted", "small"))])


def networks_train() -> str:
    """The same with compiled forms, and which dense was the fastest."""
    head = ("network", "dtype", "keep ratio", "fastest dense", "masked", "live", "compacted", "compacted, compiled",
            "small", "small, compiled")  # fmt: skip
    return markdown(head, _forms(("masked", "live", "compacted", "compacted_compile", "small", "small_compile")))


def networks_of_small() -> str:
    """The same rows, as shares of the small network's speed."""
    head = ("network", "dtype", "keep ratio", "live", "compacted", "both compiled", "best mode", "best mode is")
    columns = ("of_limit", "compacted_of_small", "compiled_of_small", "best_of_small")
    names = {"compiled": "compacted, compiled"}
    cells = [
        (MORE_NAMES[r["network"]], DTYPES[r["dtype"]], r["kept"], *(ratio(r[c]) for c in columns),
         names.get(r["best"], r["best"]))
        for r in training_rows()
    ]  # fmt: skip
    return markdown(head, cells)


def mask_changes() -> str:
    head = ("network", "mode", "counts", "change, ms", "first step, ms", "later step, ms", "costs, in steps")
    columns = ("change_ms", "first_ms", "later_ms")
    cells = [
        (MORE_NAMES[r["network"]], r["mode"], r["change"], *(f"{r[c]:.1f}" for c in columns), ratio(r["extra_steps"]))
        for r in load(MASK_CHANGE)["rows"]
    ]
    return markdown(head, cells)


def whole_runs() -> str:
    head = ("network", "mode", "over dense", "as its phases predict", "share of that")
    columns = ("vs_dense", "predicted_vs_dense", "of_prediction")
    cells = [(MORE_NAMES[r["network"]], r["mode"], *(ratio(r[c]) for c in columns)) for r in load(WHOLE_RUN)["rows"]]
    return markdown(head, cells)


def networks_independent() -> str:
    return _networks(network_rows("train", INDEPENDENT))


def networks_memory() -> str:
    forms = ("dense", "masked", "live", "compacted")
    cells = [
        (MORE_NAMES[r["network"]], DTYPES[r["dtype"]], r["kept"], *(f"{r[f'{form}_peak_mb']:.0f}" for form in forms))
        for r in training_rows()
    ]
    return markdown(("network", "dtype", "keep ratio", "dense", "masked mode", "live mode", "compacted mode"), cells)


def _layer_summary(name: str, what: str) -> list[tuple[object, ...]]:
    return [
        (what, DTYPES[s.get("dtype", "float32")], s["kept"], s["problems"], ratio(s["vs_dense"]),
         ratio(s["vs_compaction"]), ratio(s["vs_sparseprop"]), ratio(s["of_limit"]), s["lost_to_dense"])
        for s in load(name)["summary"]
    ]  # fmt: skip


def layers_summary() -> str:
    head = ("masks", "dtype", "keep ratio", "layers", "over dense", "over compaction", "over SparseProp",
            "of the upper bound", "layers slower than dense")  # fmt: skip
    files = ((FILTERS, "filters, inputs"), (FILTERS_BF16, "filters, inputs"),
             (NEW_SHAPES, "filters, inputs: RegNet, EfficientNet"), (KERNELS, "single kernels"),
             (BLOCKS[0], "blocks of 16 x 32 kernels"), (BLOCKS[1], "blocks of 4 x 4 kernels"))  # fmt: skip
    return markdown(head, [row for name, what in files for row in _layer_summary(name, what)])


def layers_goals() -> str:
    """The goals, held or missed, as the results files say."""
    files = (FILTERS_BF16, NEW_SHAPES, KERNELS, *BLOCKS)
    names = ("bf16", "fp32, RegNet and EfficientNet", "fp32", "bf16, 16 x 32", "bf16, 4 x 4")
    head = ("of", "goal", "target", "reached", "layers that fail", "verdict")
    cells = [
        (what, g["goal"], g["target"], ratio(g["reached"]), f"{g['failing']} of {g['rows']}", g["verdict"])
        for name, what in zip(files, names, strict=True)
        for g in load(name)["goals"]
    ]
    return markdown(head, cells)


def _layers(name: str, columns: Sequence[str], head: Sequence[str], wanted: Callable[[Row], bool]) -> str:
    rows = [r for r in load(name)["rows"] if wanted(r)]
    cells = [(r["name"], r["kept"], r["plan"], *(ratio(r[column]) for column in columns)) for r in rows]
    return markdown(("layer", "keep ratio", "plans", *head), cells)


OVER = ("over dense", "over compaction")


def layers_filters() -> str:
    columns = ("vs_dense", "vs_compaction", "of_limit")
    return _layers(FILTERS, columns, (*OVER, "of the upper bound"), lambda r: True)


def layers_filters_bf16() -> str:
    columns = ("vs_dense", "vs_compaction", "of_limit")
    return _layers(FILTERS_BF16, columns, (*OVER, "of the upper bound"), lambda r: True)


def layers_new_shapes() -> str:
    columns = ("vs_dense", "vs_compaction", "of_limit")
    return _layers(NEW_SHAPES, columns, (*OVER, "of the upper bound"), lambda r: True)


def layers_losing() -> str:
    """Rows slower than dense, and those of few live filters that reach less than 0.8 of the upper bound."""
    columns = ("vs_dense", "vs_compaction", "of_limit")
    head = (*OVER, "of the upper bound")
    return _layers(FILTERS, columns, head, lambda r: r["vs_dense"] < 1 or (r["kept"] <= 0.5 and r["of_limit"] < 0.8))


def layers_kernels() -> str:
    columns = ("vs_dense", "vs_compaction", "vs_sparseprop")
    return _layers(KERNELS, columns, (*OVER, "over SparseProp"), lambda r: True)


def layers_blocks() -> str:
    """Both sizes of blocks."""
    rows = [row for name in BLOCKS for row in load(name)["rows"]]
    cells = [
        (r["name"], r["side"], r["kept"], ratio(r["density"]), r["plan"], ratio(r["vs_dense"]),
         ratio(r["vs_dense"] * r["density"]))
        for r in rows
    ]  # fmt: skip
    return markdown(("layer", "block", "keep ratio", "density", "plans", "over dense", "times density"), cells)


def methods_short() -> str:
    """Rate 0.5: three methods at duty 0.1, SFP to the letter of its paper, and a method that costs time."""
    wanted = [("ghfp", 0.1), ("pgp", 0.1), ("sfp", 0.1), ("sfp", 1), ("coarse-pruning", 0.1)]
    tables = [method_rows(arch, 0.5) for arch in ("resnet20", "vgg_small")]
    rows: list[tuple[object, ...]] = [("dense training", *_accuracy_and_time([table[0] for table in tables]))]
    for method, duty in wanted:
        found = [_method(table, method, duty) for table in tables]
        rows.append((f"`{method}` (duty {duty})", *_accuracy_and_time(found)))
    head = ("method", "ResNet-20: accuracy in %", "speed-up", "VGG-small: accuracy in %", "speed-up")
    return markdown(head, rows)


def _method(rows: Iterable[Row], method: str, duty: float) -> Row:
    return next(r for r in rows if (r["method"], r["duty"], r["clip"]) == (method, duty, None))


def _accuracy_and_time(rows: Iterable[Row]) -> list[str]:
    return [ratio(row[key]) for row in rows for key in ("accuracy", "vs_dense")]


def _methods(arch: str) -> str:
    clips = {None: "default", True: "on", False: "off"}
    rows = [
        (r["method"], rate, r["duty"], clips[r["clip"]], ratio(r["accuracy"]), ratio(r["spread"]),
         ratio(r["vs_dense"]), ratio(r["multiply_adds"]), ratio(r["latency_64"]))
        for rate in (0.3, 0.5, 0.7)
        for r in method_rows(arch, rate)[1:]
    ]  # fmt: skip
    head = ("method", "rate", "duty", "clip", "accuracy in %", "spread", "training, over dense",
            "multiply-adds", "small network, over dense")  # fmt: skip
    return markdown(head, rows)


def methods_resnet20() -> str:
    return _methods("resnet20")


def methods_vgg_small() -> str:
    return _methods("vgg_small")


def _comparison(name: str) -> str:
    """A table as the script printed it: PGP beside dense and scratch."""
    columns = ("score", "spread", "seconds", "multiply_adds", "parameters")
    head = ("training", load(name)["measure"], "spread", "time", "multiply-adds", "parameters")
    return markdown(head, [(r["run"], *(ratio(r[c]) for c in columns)) for r in load(name)["summary"]])


def pgp_detection() -> str:
    return _comparison(DETECTION)


def pgp_adaptation() -> str:
    return _comparison(ADAPTATION)


def optimizers() -> str:
    """Geometric means over the networks."""
    rows = load(OPTIMIZERS)["rows"]
    cells = []
    for optimizer in ("sgd", "adamw"):
        for kept in (1.0, 0.9, 0.5, 0.3):
            of_these = [r for r in rows if r["optimizer"] == optimizer and r["kept"] == kept]
            means = [math.exp(sum(math.log(r[key]) for r in of_these) / len(of_these))
                     for key in ("vs_foreach", "vs_fused", "of_small")]  # fmt: skip
            cells.append((optimizer, kept, *map(ratio, means)))
    head = (
        "optimizer",
        "keep ratio",
        "over torch's foreach",
        "over torch's fused",
        "share of the small network's speed",
    )
    return markdown(head, cells)


def _evidence(arch: str) -> str:
    """Each method at its defaults beside its baselines, at rate 0.5."""
    rows = [r for r in load(EVIDENCE)["summary"] if r["arch"] == arch and r["kind"] in ("dense", "method")]
    cells = [
        ("dense training" if r["kind"] == "dense" else f"`{r['method']}`", f"{r['accuracy']:.2f}", ratio(r["vs_dense"]),
         _points(r["over_scratch"]), _points(r["over_scratch_time"]), _points(r["over_literal"]),
         _or_dash(r["time_of_literal"]), _or_dash(r["came_back"]), ratio(r["multiply_adds"]))
        for r in rows
    ]  # fmt: skip
    head = ("run", "accuracy in %", "speed-up", "over scratch", "over scratch-time", "over literal",
            "time, of literal", "came back", "multiply-adds")  # fmt: skip
    return markdown(head, cells)


def _points(found: dict[str, Any] | None) -> str:
    """A mean difference with its standard error, and p of the paired t."""
    if found is None:
        return "-"
    if found["error"] is None:
        return f"{found['mean']:+.2f}"
    return f"{found['mean']:+.2f} ± {found['error']:.2f} (p {found['p_t']:.2g})"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else ratio(value)


def methods_resnet20_evidence() -> str:
    return _evidence("resnet20")


def methods_vgg_small_evidence() -> str:
    return _evidence("vgg_small")


def methods_goals() -> str:
    """The goals, held or missed, as the results file says."""
    head = ("goal", "network", "reached", "verdict", "seeds")
    return markdown(head, [[row[name] for name in head] for row in load(EVIDENCE)["goals"]])


def models() -> str:
    """Networks of public libraries, and what became of them."""
    head = ("network", "library", "masked layers", "masked groups", "live", "full width", "compacted", "small network",
            "multiply-adds left", "ONNX", "Torch-Pruning", "its multiply-adds left")  # fmt: skip
    cells = []
    for r in load(MODELS)["rows"]:
        said = {what: "yes" if answer == "yes" else "no" for what, answer in r["answers"].items()}
        cells.append(
            (f"`{r['model']}`", r["library"], f"{r['converted']} of {r['layers']}",
             "no" if r["groups"] is None else f"{r['pruned_groups']} of {r['groups']}", said.get("live", "no"),
             ", ".join(f"{name} {count}" for name, count in r["fallbacks"].items()), said.get("compacted", "no"),
             r["form"] or "no", ratio(r["left"]), said.get("onnx", "no"), said["torch_pruning"],
             ratio(r["torch_pruning_left"]))
        )  # fmt: skip
    return markdown(head, cells)


def models_reasons() -> str:
    """What is not "yes" in the table of models, and why."""
    names = {"torch_pruning": "Torch-Pruning", "onnx": "ONNX", "shrink": "small network"}
    cells = [
        (f"`{r['model']}`", names.get(what, what), re.sub(r"\x1b\[\d+m", "", answer).replace("|", "\\|"))
        for r in load(MODELS)["rows"]
        for what, answer in r["answers"].items()
        if answer != "yes"
    ]
    return markdown(("network", "what", "why"), cells)


def _wire(head: Sequence[str], cells: Callable[[list[Row]], Iterable[Sequence[object]]]) -> str:
    return markdown(head, cells(load(WIRE)["rows"]))


def versions() -> str:
    """Releases of torch and Python, and what the tests said."""
    head = ("PyTorch", "Python", "extension", "tests", "passed", "failed", "skipped", "CPU", "commit")
    cells = [
        (r["torch"], r["python"], r["extension"] or "none", f"{_tests(r)}; {r['cases']}",
         *(r[name] for name in head[4:7]), r["cpu"], r["commit"])
        for r in load("versions", ROOT / "wheels")["rows"]
    ]  # fmt: skip
    return markdown(head, cells)


def _tests(row: Row) -> str:
    """Which of them were run, in words."""
    left_out = f" but {', '.join(row['without'])}" if row["without"] else ""
    return (", ".join(row["tests"]) or "all") + left_out


TABLES: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (
        networks_short, networks_train, networks_of_small, networks_ratios, mask_changes, whole_runs,
        networks_infer, networks_independent, networks_memory, layers_summary,
        layers_goals, layers_filters, layers_filters_bf16, layers_new_shapes, layers_losing, layers_kernels,
        layers_blocks, methods_short, methods_resnet20,
        methods_vgg_small, optimizers, pgp_detection, pgp_adaptation,
        methods_resnet20_evidence, methods_vgg_small_evidence, methods_goals, models, models_reasons,
        versions,
    )
} | {name: partial(_wire, *table) for name, table in wire_plan.TABLES.items()}  # fmt: skip


def filled(text: str) -> str:
    """A page with every table made anew."""
    block = re.compile(r"(<!-- table: (\w+) -->).*?(<!-- end -->)", flags=re.S)
    return block.sub(lambda m: f"{m[1]}\n\n{TABLES[m[2]]()}\n\n{m[3]}", text)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> None:
    for name, draw in PLOTS.items():
        draw(ASSETS / name)
    for page in pages():
        text = page.read_text()
        if (new := filled(text)) != text:
            page.write_text(new)


if __name__ == "__main__":
    main()
