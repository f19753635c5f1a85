"""A step in its published form and in ours, timed in turns in one process; a bar is judged on the worst turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

TURNS = 3

Row = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """What every turn must keep: a ratio of at least, seconds of at most, a figure (in the unit of its row) of at most.

    `also` names a further condition that the row checks itself.
    """

    ratio: float | None = None
    seconds: float | None = None
    figure: float | None = None
    also: str = ""

    def text(self, unit: str = "") -> str:
        parts = [
            f"<= {self.seconds:g} s" if self.seconds is not None else "",
            f">= {self.ratio:g}x" if self.ratio is not None else "",
            f"<= {self.figure:g} {unit}" if self.figure is not None else "",
            self.also,
        ]
        return ", ".join(part for part in parts if part)


NO_BAR = Bar()


class Turns(NamedTuple):
    """Seconds of every turn, and what the last one gave."""

    published: list[float]
    ours: list[float]
    theirs: Any
    result: Any


def turns_of(quick: bool) -> int:
    """A quick run is no measurement and takes one turn."""
    return 1 if quick else TURNS


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds on the clock, and the result."""
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result


def in_turns(published: Callable[[], Any], ours: Callable[[], Any], turns: int, scale: float = 1.0) -> Turns:
    """Both forms alternating. `scale`: what the published form's seconds are multiplied by when it does a part only."""
    theirs = result = None
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(turns):
        taken, theirs = timed(published)
        seconds[0].append(taken * scale)
        taken, result = timed(ours)
        seconds[1].append(taken)
    return Turns(*seconds, theirs, result)


def row(
    name: str,
    ours: Sequence[float],
    published: Sequence[float] = (),
    *,
    bar: Bar = NO_BAR,
    figures: Sequence[float] = (),
    unit: str = "",
    holds: bool = True,
    note: str = "",
    **more: Any,
) -> Row:
    """One line of the table.

    ours, published: seconds of the turns; a single published value stands for all turns. figures: what is measured
    where it is not time, larger is worse. holds: whether the results are what they must be; without, the row is missed.
    more: further entries of the JSON.
    """
    theirs = list(published) * len(ours) if len(published) == 1 else list(published)
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)] if theirs else []
    met = [holds]
    if bar.ratio is not None:
        met.append(bool(ratios) and min(ratios) >= bar.ratio)
    if bar.seconds is not None:
        met.append(max(ours) <= bar.seconds)
    if bar.figure is not None:
        met.append(bool(figures) and max(figures) <= bar.figure)
    text = bar.text(unit)
    return {
        "name": name,
        "published_seconds": _spread(published, worst=min),
        "ours_seconds": _spread(ours, worst=max),
        "ratio": _spread(ratios, worst=min),
        "figure": _spread(figures, worst=max),
        "unit": unit,
        "bar": text,
        "met": all(met) if text or not holds else None,
        "note": note,
        **more,
    }


def _spread(values: Sequence[float], worst: Callable[[Sequence[float]], float]) -> dict[str, Any] | None:
    """Median, worst and all values; the spread is the range over the median."""
    if not values:
        return None
    middle = median(values)
    spread = (max(values) - min(values)) / middle if middle else 0.0
    return {"median": middle, "worst": worst(values), "spread": spread, "values": list(values)}


HEADING = f"{'what':<82} {'published':>10} {'ours':>10} {'ratio':>7} {'worst':>7} {'spread':>6}  bar"


def line(row: Row) -> str:
    """A row as text: medians, then the worst turn and the spread of what the bar is about."""
    kind = next((key for key in ("figure", "ratio", "ours_seconds") if row[key]), None)
    unit = {"figure": " " + row["unit"], "ratio": "x"}.get(kind or "", " s")
    told = row[kind] if kind else None
    seconds = [f"{row[key]['median']:.3g} s" if row[key] else "" for key in ("published_seconds", "ours_seconds")]
    middle, worst = (f"{told[key]:.3g}{unit}" if told else "" for key in ("median", "worst"))
    spread = f"{told['spread']:.0%}" if told and len(told["values"]) > 1 else ""
    verdict = "" if row["met"] is None else ("met" if row["met"] else "MISSED")
    text = (
        f"{row['name']:<82} {seconds[0]:>10} {seconds[1]:>10} {middle:>7} {worst:>7} {spread:>6}  "
        f"{row['bar']} {verdict}"
    ).rstrip()
    return text + (f"\n    {row['note']}" if row["note"] else "")
