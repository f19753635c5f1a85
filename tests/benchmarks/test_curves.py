"""Exponents of growth, their verdict, and plots."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.curves import Curve, exponent, plot


def quadratic(least: float = 1.9, most: float = 2.1) -> Curve:
    curve = Curve("rows", "coreset", "Coreset", "rows N", "seconds", "N x N", least, most)
    for size in (10.0, 20.0, 40.0):
        curve.measure(size, lambda size=size: 3e-4 * size**2, 3)
    curve.beside = {"loop": [1.0, 4.0, 16.0]}
    return curve


@pytest.mark.parametrize("power", [-1.0, 0.0, 1.5, 2.0])
def test_exponent_of_a_power_law(power):
    sizes = [5.0, 10.0, 40.0]
    assert exponent(sizes, [7 * size**power for size in sizes]) == pytest.approx(power)


@pytest.mark.parametrize(("sizes", "costs"), [([1.0], [1.0]), ([1.0, 2.0], [0.0, 1.0])])
def test_no_exponent(sizes, costs):
    with pytest.raises(ValueError, match="two sizes and positive values"):
        exponent(sizes, costs)


def test_verdict_and_record():
    curve = quadratic()
    assert curve.exponent == pytest.approx(2)
    assert curve.met
    assert not quadratic(most=1.95).met
    assert not quadratic(least=2.05).met
    assert curve.lines()[-1].endswith(": as stated")
    assert quadratic(most=1.95).lines()[-1].endswith(": NOT AS STATED")
    record = json.loads(json.dumps(curve.record()))
    assert record["exponent"] == pytest.approx(2)
    assert Curve.of(record) == curve


def test_outliers_among_the_turns_do_not_decide():
    curve = quadratic()
    curve.values[0][0] = 50.0
    assert curve.met


def test_plots_are_small_and_labelled(tmp_path: Path):
    other = quadratic()
    other.figure = "search"
    written = plot([quadratic(), quadratic(), other], tmp_path)
    assert [path.name for path in written] == ["scaling-coreset.svg", "scaling-search.svg"]
    for path in written:
        text = path.read_text()
        assert len(text) < 60_000
        for label in ("Coreset", "rows N", "seconds", "exponent 2.00", "loop"):
            assert label in text
    assert plot([other], tmp_path / "again")[0].read_bytes() == written[1].read_bytes()
