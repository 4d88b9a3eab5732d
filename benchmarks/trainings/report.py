"""How methods.py shows and stores its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from harness.report import Report
from trainings.goals import goals_text, verdicts
from trainings.rows import TrainingRow
from trainings.summary import summarise, tables


def trainings_report(duty: float) -> Report:
    """duty: of the rows that the goals are about."""

    def summary(rows: Sequence[TrainingRow], markdown: bool) -> str:
        return tables(summarise(rows), markdown)

    def goals(rows: Sequence[TrainingRow], markdown: bool) -> str:
        return goals_text(summarise(rows), duty, markdown)

    def findings(rows: Sequence[TrainingRow]) -> dict[str, Any]:
        summaries = summarise(rows)
        return {"goals": [asdict(v) for v in verdicts(summaries, duty)], "summary": [asdict(s) for s in summaries]}

    return Report("Methods benchmark", TrainingRow, no_table, summary, goals, findings, details=())


def no_table(rows: Sequence[TrainingRow], markdown: bool) -> str:
    """The rows of single seeds are in the JSON file alone."""
    return ""
