"""Every code block of README.md, CONTRIBUTING.md and docs/ runs, and what the pages name exists."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import warnings
from functools import cache

import pytest
import torch
import torch.distributed.run

from cases.pages import PAGES, ROOT, blocks, name_of
from prunekernels import cli

SHELL = ("bash", "sh", "shell", "console")
SHOWN = ("", "text", "cpp")  # not code, or code that a page's Python blocks compile
WITH_PYTHON = [page for page in PAGES if any(b.language == "python" for b in blocks(page))]
SETTINGS = [(page, block) for page in PAGES for block in blocks(page) if block.language == "yaml"]
LIBRARIES = {
    f"docs/integrations/{name}.md": (name,)
    for name in ("lightning", "ultralytics", "accelerate", "timm", "torchvision")
}
LIBRARIES["docs/integrations/transformers.md"] = ("transformers", "accelerate")
COMMANDS = [
    (name_of(page), block.line + number, command)
    for page in PAGES
    for block in blocks(page)
    if block.language in SHELL
    for number, command in enumerate(block.text.splitlines(), 1)
    if command.split("#")[0].strip()
]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """In order, in one namespace, in a folder that holds the page's titled blocks as files."""
    for library in LIBRARIES.get(name_of(page), ()):
        pytest.importorskip(library, reason=f"needs {library}: pip install prunekernels[{page.stem}]")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict = {"__name__": "__main__"}
    for block in blocks(page):
        if block.title:
            (tmp_path / block.title).write_text(block.text)
        if block.language == "python" and block.reason is None:
            code = "\n" * block.line + block.text  # so that a traceback names the page's own line
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(compile(code, str(page), "exec"), names)


@pytest.mark.parametrize("page,block", SETTINGS, ids=lambda value: getattr(value, "stem", None))
def test_settings_are_those_of_train(page, block, tmp_path):
    """YAML blocks are files for train --config."""
    pytest.importorskip("yaml")
    (tmp_path / "run.yaml").write_text(block.text)
    asked = cli._parser().parse_args(["train", "--config", str(tmp_path / "run.yaml")])
    settings = cli._with_file(asked.parser, {"config": asked.config})
    assert settings["options"] and settings["method"]


def test_languages():
    """A fence in a language that no test looks at would hide what it holds."""
    found = {(name_of(page), block.language) for page in PAGES for block in blocks(page)}
    unknown = sorted(pair for pair in found if pair[1] not in ("python", "yaml", *SHELL, *SHOWN))
    assert not unknown


def test_few_blocks_are_not_run():
    skipped = [(name_of(page), block.reason) for page in PAGES for block in blocks(page) if block.reason]
    assert len(skipped) <= 3, skipped
    assert all(len(reason.split()) >= 3 for _, reason in skipped)


def test_every_fence_is_found():
    """The reader of blocks misses none."""
    for page in PAGES:
        assert len(re.findall(r"^\s*```", page.read_text(), flags=re.M)) == 2 * len(blocks(page)), name_of(page)


# ---- shell


@pytest.mark.parametrize("page, line, command", COMMANDS)
def test_command_exists(page, line, command):
    """Programs, targets, files and options; the commands themselves take too long or need a GPU."""
    for part in command.split("#")[0].split("&&"):
        words = [word for word in shlex.split(part) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
        _check(words)


def _check(words):
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
        assert {word for word in rest if "=" not in word} <= set(targets)
    elif program == "pip":
        assert rest[0] == "install"
        extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
        asked = {name for word in rest for name in re.findall(r"^\.\[(.+)\]$", word)}
        assert asked <= set(re.findall(r"^(\w+) = ", extras, flags=re.M))
    elif program == "torchrun":
        asked = torch.distributed.run.get_args_parser().parse_args(rest)
        _check(["python", *(["-m"] if asked.module else []), asked.training_script, *asked.training_script_args])
    elif program == "python" and rest[:2] == ["-m", "prunekernels"]:
        _check_options(rest[3:], _help_of(rest[2]))
    elif program == "python" and rest[:2] == ["-m", "pytest"]:
        assert all((ROOT / word.split("::")[0]).exists() for word in rest[2:] if word.startswith("python_tests"))
    elif program == "python":
        assert (ROOT / rest[0]).is_file()
        _check_options(rest[1:], _script_help(rest[0]))
    else:
        assert (ROOT / program).is_file(), f"no test knows the program {program}"
        _check_options(rest, (ROOT / program).read_text())


def _help_of(command):
    parsers = next(a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    return parsers.choices[command].format_help()


@cache
def _script_help(script):
    if "parse_args" not in (ROOT / script).read_text() and not script.startswith("benchmarks"):
        return ""
    return subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def _check_options(words, text):
    missing = [word for word in words if word.startswith("--") and not re.search(rf"{word}\b", text)]
    assert not missing


# ---- names in running text

PATH = re.compile(r"`((?:csrc|prunekernels|benchmarks|python_tests|docs|examples)/[\w./-]*)`")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_files_exist(page):
    named = PATH.findall(page.read_text())
    assert not [path for path in named if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    targets = re.findall(r"\]\(([^)#\s]+)", text)
    assert not [t for t in targets if "://" not in t and not (page.parent / t).exists()]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_are_readable(page):
    """No line squeezing; tables may be wider."""
    lines = page.read_text().splitlines()
    assert not [line for line in lines if len(line) > 120 and not line.startswith(("|", "<"))]
