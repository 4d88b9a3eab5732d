"""Sensitivity: what pruning each layer alone costs, as numbers, tables, a picture and rates to prune with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any, NamedTuple

from ..inspect.observe import text_table


class Row(NamedTuple):
    """A layer, or layers that are pruned together.

    Attributes:
        layers: Their names.
        filters: How many filters they have, those that meet counted once.
        dead: By rate, how many of these are dead.
        values: By rate, the measure.
        saved: By rate, the share of the network's multiply-adds that is saved.
    """

    layers: tuple[str, ...]
    filters: int
    dead: tuple[int, ...]
    values: tuple[float, ...]
    saved: tuple[float, ...]


@dataclass(frozen=True, repr=False)
class Sensitivity:
    """What pruning each layer alone costs; print it to see a table.

    Args:
        measure: "accuracy", "metric" (more is better) or "loss" (less is better).
        base: Its value with the network as it is.
        tried: The rates.
        rows: A Row for each layer or group.
        images: How many images were evaluated.
        left_out: By name, the layers that are not pruned, and why.

    Examples:
        >>> from prunekernels.methods.sensitivity_table import Row
        >>> stem = Row(("stem",), 8, (2, 4), (0.89, 0.71), (0.1, 0.2))
        >>> others = Row(("a", "b"), 8, (2, 4), (0.9, 0.88), (0.2, 0.4))
        >>> found = pk.methods.Sensitivity("accuracy", 0.9, (0.25, 0.5), (stem, others), 1000, {})
        >>> print(found)
        accuracy as it is: 0.9000 of 1000 images
        layer  filters    0.25     0.5
        stem         8  0.8900  0.7100
        a, b         8  0.9000  0.8800
        >>> found.rates(drop=0.02)
        {'stem': 0.25, 'a': 0.5, 'b': 0.5}
    """

    measure: str
    base: float
    tried: tuple[float, ...]
    rows: tuple[Row, ...]
    images: int
    left_out: Mapping[str, str]

    def rates(self, drop: float = 0.01) -> dict[str, float]:
        """The highest rate of each layer at which the measure gets worse by at most `drop`.

        Each layer was pruned alone: with all of them pruned at these rates the network loses more than `drop`.

        Args:
            drop: By how much accuracy (or the metric) may fall, or the loss may rise.

        Returns:
            By layer name, a rate; 0 where the lowest one that was tried costs more.
        """
        if not drop >= 0:
            raise ValueError(f"Sensitivity.rates: drop: expected a number, at least 0, got {drop}")
        found: dict[str, float] = {}
        for row in self.rows:
            fits = [
                rate
                for rate, value in zip(self.tried, row.values, strict=True)
                if self._cost(value) <= drop + 1e-9  # 0.9 - 0.89 is more than 0.01
            ]
            found |= dict.fromkeys(row.layers, max(fits, default=0.0))
        return found

    def table(self) -> str:
        """The table in Markdown: the measure by layer and rate, and the share of multiply-adds saved in brackets."""
        head = ["layer", "filters", *(f"{rate:g}" for rate in self.tried)]
        lines = [head, ["---"] * len(head), *(self._cells(row, True) for row in self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for json.dump."""
        return asdict(self) | {
            "tried": list(self.tried),
            "rows": [{name: _listed(value) for name, value in row._asdict().items()} for row in self.rows],
            "left_out": dict(self.left_out),
        }

    def plot(self, path: str | PathLike[str]) -> None:
        """Draws the table: a row for each layer, a column for each rate, the darker the worse. Needs matplotlib.

        Args:
            path: The picture to write; the suffix says of which kind.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            expected = 'expected matplotlib: pip install "prunekernels[cli]"'
            raise ImportError(f"Sensitivity.plot: {expected}; got: {error}") from error
        costs = [[self._cost(value) for value in row.values] for row in self.rows]
        worst = max(map(max, costs))
        size = (2.5 + 0.75 * len(self.tried), 1.3 + 0.28 * len(self.rows))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        axes.imshow(costs, cmap="Oranges", vmin=0, vmax=max(worst, 1e-9), aspect="auto")
        for i, row in enumerate(self.rows):
            for j, value in enumerate(row.values):
                dark = costs[i][j] > 0.6 * worst
                axes.text(j, i, f"{value:.3f}", ha="center", va="center", size=8, color="w" if dark else "k")
        axes.set_xticks(range(len(self.tried)), [f"{rate:g}" for rate in self.tried])
        axes.set_yticks(range(len(self.rows)), [_name(row) for row in self.rows], size=8)
        axes.set(xlabel="share of the layer's filters that is pruned, of this layer alone")
        axes.set_title(f"{self.measure}, {self.base:.3f} as it is", size=10)
        figure.savefig(path, dpi=110)

    def __str__(self) -> str:
        head = ["layer", "filters", *(f"{rate:g}" for rate in self.tried)]
        table = text_table(head, [self._cells(row, False) for row in self.rows])
        return f"{self.measure} as it is: {self.base:.4f} of {self.images} images\n{table}"

    __repr__ = __str__

    def _cost(self, value: float) -> float:
        """How much worse than base."""
        return value - self.base if self.measure == "loss" else self.base - value

    def _cells(self, row: Row, with_saved: bool) -> list[str]:
        saved = [f" ({share:.0%})" if with_saved else "" for share in row.saved]
        values = [f"{value:.4f}{more}" for value, more in zip(row.values, saved, strict=True)]
        return [_name(row), str(row.filters), *values]


def _name(row: Row) -> str:
    """The layers; of many the first and how many more."""
    return ", ".join(row.layers) if len(row.layers) < 3 else f"{row.layers[0]} and {len(row.layers) - 1} more"


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
