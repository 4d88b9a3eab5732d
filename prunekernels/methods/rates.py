"""Rates by layer, from patterns of names."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase

from ..graph import Group
from .arguments import expect, is_share

SHOWN = 4  # names of a list, before it is cut short


def rates_of_layers(op: str, rates: object, layers: Collection[str], left_out: Mapping[str, str]) -> dict[str, float]:
    """By name, the rates of the layers that a pattern matches; of several patterns the last one counts.

    Args:
        op: The method's name, for errors.
        rates: By pattern, as of fnmatch, a rate; or None.
        layers: Names of the layers that are pruned.
        left_out: By name, why other layers are not.
    """
    if rates is None:
        return {}
    expect(op, isinstance(rates, Mapping), "rates", "a dict of rates by pattern", repr(rates))
    found: dict[str, float] = {}
    for pattern, rate in rates.items():  # type: ignore[attr-defined]
        expect(op, isinstance(pattern, str), "rates", "names or patterns of layers", repr(pattern))
        expect(op, is_share(rate) and rate != 1, "rates", f"numbers in [0, 1), for {pattern!r} as well", repr(rate))
        matched = [name for name in layers if fnmatchcase(name, pattern)]
        if not matched:
            others = {name: why for name, why in left_out.items() if fnmatchcase(name, pattern)}
            got = f"{pattern!r}, which matches none of {_names(layers)}"
            if others:
                reasons = "; ".join(f"{name}: {why}" for name, why in others.items())
                got = f"{pattern!r}, which matches only layers that are left out ({reasons})"
            expect(op, False, "rates", "names or patterns of layers that are pruned", got)
        found |= dict.fromkeys(matched, rate)
    return found


def rates_of_units(op: str, rates: Mapping[str, float], units: Sequence[Group], rate: float) -> list[float | None]:
    """By unit, the rate that its layers have; None: that of the others.

    Args:
        op: The method's name, for errors.
        rates: By layer, as rates_of_layers returns them.
        units: Filters that are pruned together, and so need one rate.
        rate: That of the others.
    """
    found: list[float | None] = []
    for unit in units:
        given = {name: rates.get(name) for name in unit.layers}
        first, of_first = next(iter(given.items()))
        other = next((name for name, value in given.items() if value != of_first), None)
        if other is not None:
            got = f"{_told(of_first, rate)} for {first} and {_told(given[other], rate)} for {other}"
            expected = f"one rate for filters that are pruned together (those of {_names(given)})"
            expect(op, False, "rates", expected, got)
        found.append(of_first)
    return found


def _told(given: float | None, rate: float) -> str:
    return f"rate={rate}" if given is None else str(given)


def _names(names: Collection[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(list(names)[:SHOWN]) + more
