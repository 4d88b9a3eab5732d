"""The code blocks of README.md and docs/, and what a reader of them has at hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r'(<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>\w*)(?: title="(?P<title>[^"]+)")?\n'
                   r"(?P<text>.*?)^```$", flags=re.S | re.M)  # fmt: skip


class Block(NamedTuple):
    """A fenced block. title: the file that a reader saves it as; reason: why it is not run."""

    language: str
    title: str | None
    text: str
    reason: str | None
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(m["language"], m["title"], m["text"], m["reason"], text.count("\n", 0, m.start("text")))
        for m in FENCE.finditer(text)
    ]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()
