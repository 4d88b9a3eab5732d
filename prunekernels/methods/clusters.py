"""Clusterings: which filters of a layer are to become one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Clustering = Callable[[Tensor, int, torch.Generator], Tensor]

RESTARTS, ROUNDS = 10, 100


def even(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Clusters of neighbours, of sizes that differ by at most one. Returns int64 [rows]: the cluster of each row."""
    return torch.arange(len(rows)) * count // max(1, len(rows))


def kmeans(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means of the flattened rows: the best of ten runs from centres drawn far apart. No cluster is empty.

    Works on the rows' inner products, so that a round costs rows^2 x count, whatever the size of a filter.
    Returns int64 [rows]: the cluster of each row.
    """
    x = rows.detach().cpu().double().flatten(1)
    x = x - x.mean(0)
    gram = x @ x.T
    runs = [_lloyd(gram, _far_apart(gram, count, generator)) for _ in range(RESTARTS if count < len(rows) else 1)]
    return min(runs, key=lambda run: run[0])[1]


CLUSTERINGS: dict[str, Clustering] = {"kmeans": kmeans, "even": even}


def _far_apart(gram: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next centre is a row, drawn by its squared distance to the nearest centre. int64 [rows]."""
    squares = gram.diagonal()
    nearest, ids = torch.full_like(squares, torch.inf), torch.zeros(len(gram), dtype=torch.long)
    for c in range(count):
        odds = torch.ones_like(squares) if c == 0 else nearest
        if not bool(odds.sum() > 0):  # every row lies on a centre; _without_empty fills the clusters that are left
            break
        centre = int(torch.multinomial(odds, 1, generator=generator))
        distance = (squares - 2 * gram[centre] + squares[centre]).clamp(min=0)
        distance[centre] = 0
        ids[distance < nearest] = c
        nearest = torch.minimum(nearest, distance)
    return _without_empty(ids, count, nearest)


def _lloyd(gram: Tensor, ids: Tensor) -> tuple[float, Tensor]:
    """Lloyd's iteration. Returns the sum of squared distances to the clusters' means, and the clusters."""
    count = int(ids.max()) + 1
    for _ in range(ROUNDS):
        distance = _distances(gram, ids, count)
        nearest, new = distance.min(1)
        own = distance.gather(1, ids[:, None]).flatten()
        new = torch.where(nearest < own, new, ids)  # on a tie a row stays where it is, so that the loop ends
        new = _without_empty(new, count, nearest)
        if torch.equal(new, ids):
            break
        ids = new
    own = _distances(gram, ids, count).gather(1, ids[:, None])
    return float(own.sum()), ids


def _distances(gram: Tensor, ids: Tensor, count: int) -> Tensor:
    """[rows, count]: each row's squared distance to each cluster's mean."""
    share = torch.zeros(len(ids), count, dtype=gram.dtype)
    share[torch.arange(len(ids)), ids] = 1
    share /= share.sum(0).clamp(min=1)
    to_mean = gram @ share
    return gram.diagonal()[:, None] - 2 * to_mean + (share * to_mean).sum(0)


def _without_empty(ids: Tensor, count: int, distance: Tensor) -> Tensor:
    """Moves to each empty cluster the row farthest from its mean, out of a cluster with other rows."""
    ids, distance = ids.clone(), distance.clone()
    for c in range(count):
        sizes = torch.bincount(ids, minlength=count)
        if sizes[c] == 0:
            lonely = sizes[ids] < 2
            row = int(distance.masked_fill(lonely, -torch.inf).argmax())
            ids[row], distance[row] = c, 0
    return ids
