"""A cost at growing sizes: the exponent of its growth, whether it is as stated, and plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

# of panels in a figure, so that letters stay legible in the width of a page
COLUMNS = 2


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Slope of log cost over log size by least squares. Raises ValueError for fewer than two sizes or values <= 0."""
    if len(sizes) < 2 or min(*sizes, *costs) <= 0:
        raise ValueError("an exponent needs two sizes and positive values at least")
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


@dataclass
class Curve:
    """Costs at growing sizes, and between which exponents they are to grow.

    values: of every size, those of all turns. beside: further lines by name, one value per size (no verdict).
    """

    name: str
    figure: str
    title: str
    size: str
    unit: str
    expected: str
    least: float
    most: float
    sizes: list[float] = field(default_factory=list)
    values: list[list[float]] = field(default_factory=list)
    beside: dict[str, list[float]] = field(default_factory=dict)

    def measure(self, size: float, call: Callable[[], float], turns: int) -> None:
        """Add a size with what `call` returns in each turn."""
        self.sizes.append(size)
        self.values.append([call() for _ in range(turns)])

    @property
    def medians(self) -> list[float]:
        return [median(values) for values in self.values]

    @property
    def exponent(self) -> float:
        return exponent(self.sizes, self.medians)

    @property
    def met(self) -> bool:
        return self.least <= self.exponent <= self.most

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "exponent": self.exponent, "met": self.met}

    @classmethod
    def of(cls, record: dict[str, Any]) -> Curve:
        return cls(**{key: value for key, value in record.items() if key not in ("exponent", "met")})

    def lines(self, judged: bool = True) -> list[str]:
        """The curve as text: sizes, medians and ranges, then the exponent and the verdict."""
        rows = [f"{self.title} [{self.unit}]"]
        for at, values in enumerate(self.values):
            beside = "".join(f"  {name} {line[at]:.3g}" for name, line in self.beside.items())
            told = f"{median(values):.4g} ({min(values):.4g} to {max(values):.4g})"
            rows.append(f"  {self.size} {self.sizes[at]:>9g}: {told}{beside}")
        verdict = ": as stated" if self.met else ": NOT AS STATED"
        span = f"{self.least:g} to {self.most:g}"
        text = f"  grows with exponent {self.exponent:.2f}, stated {span} ({self.expected})"
        return [*rows, text + (verdict if judged else "")]


def plot(curves: Sequence[Curve], folder: Path) -> list[Path]:
    """One SVG per figure name, a panel per curve; text stays text, so files are small and letters sharp."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "mmad",
        "font.family": "sans-serif",
        "font.size": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10.5,
        "axes.titlelocation": "left",
        "figure.facecolor": "white",
        "legend.frameon": False,
        "legend.fontsize": 8.5,
    }
    written = []
    folder.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(curve.figure for curve in curves):
        panels = [curve for curve in curves if curve.figure == name]
        with mpl.rc_context(style):
            across, down = min(len(panels), COLUMNS), -(-len(panels) // COLUMNS)
            drawing, axes = pyplot.subplots(down, across, figsize=(3.8 * across, 3.2 * down), squeeze=False)
            for axis, curve in zip_longest(axes.flat, panels):
                if curve is None:
                    axis.set_axis_off()
                else:
                    _panel(axis, curve)
            drawing.tight_layout(w_pad=2, h_pad=2)
            path = folder / f"scaling-{name}.svg"
            drawing.savefig(path, metadata={"Date": None, "Creator": None})
            pyplot.close(drawing)
        written.append(path)
    return written


def _panel(axis: Any, curve: Curve) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    middle = curve.medians
    below = [m - min(values) for m, values in zip(middle, curve.values, strict=True)]
    above = [max(values) - m for m, values in zip(middle, curve.values, strict=True)]
    label = f"measured, exponent {curve.exponent:.2f}"
    axis.errorbar(curve.sizes, middle, [below, above], fmt="o-", color="#2b5fb4", ms=5, lw=1.8, capsize=3, label=label)
    for (name, line), colour in zip(curve.beside.items(), ("#c2571a", "#7a7a7a"), strict=False):
        axis.plot(curve.sizes, line, "--", color=colour, lw=1.4, label=name)
    axis.set_xscale("log")
    axis.set_yscale("log")
    plain = FuncFormatter(lambda value, _: f"{value:g}" if value < 1e4 else f"{value / 1000:g} k")
    axis.set_xticks(curve.sizes)
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_formatter(plain)
        ticks.set_minor_formatter(NullFormatter())
    axis.minorticks_off()
    low, high = axis.get_ylim()
    decades = np.log10(high / low)
    axis.yaxis.set_major_locator(LogLocator(subs=range(1, 10) if decades < 0.7 else (1, 2, 5) if decades < 2 else (1,)))
    axis.set_title(curve.title)
    axis.set_xlabel(curve.size)
    axis.set_ylabel(curve.unit)
    axis.grid(color="#e4e4e4", lw=0.7)
    axis.set_axisbelow(True)
    # room for the legend
    axis.set_ylim(low, high * (high / low) ** (0.12 * (1 + len(curve.beside))))
    handles, labels = axis.get_legend_handles_labels()
    # lines with error bars come last by themselves
    axis.legend([handles[-1], *handles[:-1]], [labels[-1], *labels[:-1]], loc="upper left", handlelength=1.6)
