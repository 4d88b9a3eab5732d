"""The tables of docs/distributed.md: bytes as counted in a few processes, and what follows from them for many GPUs."""

from __future__ import annotations

import math
from collections.abc import Iterator

from result_rows import MORE_NAMES, Row

GPUS = (8, 64, 256, 1024)
LINK = 12.5e9  # bytes a second that a GPU sends: 100 Gbit/s
MESSAGE, TCP_MESSAGE = 20e-6, 100e-6  # seconds of a message, however short: between GPUs, by TCP between hosts
AGREEMENT = 16  # bytes that ranks compare
SCORE = 8  # bytes of a filter's score
FORMS = ("ddp", "hook", "compacted")
KEPT = 0.5  # of the table of what happens seldom

Cells = Iterator[tuple[object, ...]]


def ring(given: float, ranks: int) -> float:
    """Bytes that a rank sends in an all_reduce of so many by a ring."""
    return 2 * (ranks - 1) / ranks * given


def ring_seconds(given: float, ranks: int, message: float = MESSAGE) -> float:
    """Its time at most: 2 (n - 1) messages one behind the other, and the bytes over the link."""
    return 2 * (ranks - 1) * message + ring(given, ranks) / LINK


def tree_seconds(given: float, ranks: int) -> float:
    """The same by a tree: a sum goes up and comes down, the bytes of one behind the other."""
    return 2 * math.log2(ranks) * MESSAGE + 2 * given / LINK


def by_network(rows: list[Row]) -> Iterator[tuple[str, float, dict[str, Row]]]:
    """Network, keep ratio and the row of each form."""
    for network, kept in dict.fromkeys((row["network"], row["kept"]) for row in rows):
        found = {row["form"]: row for row in rows if (row["network"], row["kept"]) == (network, kept)}
        yield MORE_NAMES[network], kept, found


def counted(rows: list[Row]) -> Cells:
    for network, kept, forms in by_network(rows):
        given = [megabytes(forms[form]["gradient_bytes"]) for form in FORMS]
        sent = [megabytes(forms[form]["wire_bytes"]) for form in FORMS]
        yield network, kept, *given, *sent, megabytes(forms["ddp"]["buffer_wire_bytes"])


def planned(rows: list[Row]) -> Cells:
    """Of a step, what a GPU sends without the hook and with it, and how long that takes."""
    for network, kept, forms in by_network(rows):
        pair = [forms[form]["gradient_bytes"] for form in ("ddp", "hook")]
        sent = [" / ".join(megabytes(ring(given, n)) for given in pair) for n in GPUS]
        times = [[ring_seconds(given, GPUS[0]) for given in pair]]
        times += [[seconds(given, GPUS[-1]) for given in pair] for seconds in (ring_seconds, tree_seconds)]
        yield network, kept, *sent, *(" / ".join(map(milliseconds, each)) for each in times)


def seldom(rows: list[Row]) -> Cells:
    """Of a change of masks and an epoch's end."""
    for network, kept, forms in by_network(rows):
        if kept != KEPT:
            continue
        row = forms["hook"]
        for n in GPUS:
            scores = SCORE * row["filters"]
            yield (
                network, n, f"{ring(AGREEMENT, n):.0f} B", milliseconds(ring_seconds(AGREEMENT, n, TCP_MESSAGE)),
                f"{ring(scores, n) / 1e3:.0f} kB", milliseconds(ring_seconds(scores, n)),
                f"{forms['compacted']['change_bytes'] / 1e3:.1f} kB", megabytes(row["checkpoint_bytes"]),
                megabytes(forms["compacted"]["small_bytes"]),
            )  # fmt: skip


def megabytes(count: float) -> str:
    return f"{count / 1e6:.3g}"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


TABLES = {  # by name: the head, and the cells of rows
    "wire_counted": (
        ("network", "keep ratio", "given: DDP", "hook", "compacted", "sent: DDP", "hook", "compacted", "buffers"),
        counted,
    ),
    "wire_planned": (
        ("network", "keep ratio", *(f"MB, {n} GPUs" for n in GPUS), f"ms, {GPUS[0]} GPUs", f"ms, {GPUS[-1]} GPUs",
         "ms, as a tree"),
        planned,
    ),
    "wire_seldom": (
        ("network", "GPUs", "masks are compared", "ms", "scores", "ms", "DDP wraps anew", "checkpoint, MB",
         "small network, MB"),
        seldom,
    ),
}  # fmt: skip
