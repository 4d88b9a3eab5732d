"""Tables and plots of README.md and docs/ show what the committed results files hold."""

import importlib.util
import json
import re
import sys

import pytest

from cases.pages import ROOT, name_of


def _load():
    spec = importlib.util.spec_from_file_location("docs_results", ROOT / "docs" / "results.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / "docs"))  # as for a script of that folder
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "docs"))
    return module


results = _load()
PAGES = [page for page in results.pages() if "<!-- table:" in page.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tables_are_the_results_files(page):
    """Should it fail, `python docs/results.py` fills the tables anew."""
    text = page.read_text()
    assert results.filled(text) == text


def test_every_table_is_shown():
    shown = {name for page in PAGES for name in re.findall(r"<!-- table: (\w+) -->", page.read_text())}
    assert shown == set(results.TABLES)


@pytest.mark.parametrize("name", results.PLOTS)
def test_plots_are_the_results_files(name, tmp_path):
    """The numbers that a plot writes beside its lines, and the points of the lines."""
    pytest.importorskip("matplotlib")
    results.PLOTS[name](tmp_path / name)
    committed = (ROOT / "docs" / "assets" / name).read_text()
    assert _seen((tmp_path / name).read_text()) == _seen(committed)
    assert _seen(committed)


def _seen(svg):
    """Texts with a digit, and how many points each line has: what does not depend on matplotlib's version."""
    texts = re.findall(r">([^<>]*\d[^<>]*)</text>", svg)
    return sorted(texts), svg.count("<use ")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_page_names_its_results_files(page):
    """A reader of a table finds the file it comes from."""
    named = re.findall(r"((?:benchmarks/results|wheels)/[\w.-]+?)\.(?:json|md)", page.read_text())
    assert named
    assert all((ROOT / f"{name}.json").is_file() or name.endswith("notes") for name in named)


def test_a_wrong_number_is_noticed():
    page = ROOT / "README.md"
    text = page.read_text()
    found = re.search(r"\| fp32 \| 0.5 \| ([\d.]+) \|", text)
    wrong = text.replace(found[0], found[0].replace(found[1], "9.99"), 1)
    assert results.filled(wrong) == text != wrong


def test_readme_prose_quotes_the_table():
    """The one number in README's running text."""
    said = re.search(
        r"slower\s+than\s+dense\s+\(([\d.]+)\s+for\s+MobileNetV2\s+in\s+bf16\s+at\s+keep\s+ratio\s+0.95\)",
        (ROOT / "README.md").read_text(),
    )
    row = next(
        r
        for r in results.training_rows()
        if (r["network"], r["dtype"], r["kept"]) == ("mobilenet_v2", "bfloat16", 0.95)
    )
    assert said[1] == f"{results.fastest_dense(row) / row['masked_ms']:.2f}"


def test_results_files_are_json():
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert files and all(json.loads(file.read_text())["rows"] for file in files)
