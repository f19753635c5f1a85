"""The verdict on a bar, and what a benchmark run writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.turns import Bar, in_turns, line, row

ROOT = Path(__file__).parents[2]


def test_both_forms_alternate_and_a_part_is_scaled():
    calls: list[str] = []
    turns = in_turns(lambda: calls.append("published"), lambda: calls.append("ours"), 3, scale=1e6)
    assert calls == ["published", "ours"] * 3
    assert min(turns.published) > max(turns.ours)


def test_a_bar_is_judged_on_the_worst_turn():
    published, ours = [10.0, 10.0, 10.0], [1.0, 1.0, 2.0]
    made = row("step", ours, published, bar=Bar(ratio=6))
    assert made["ratio"]["median"] == 10
    assert made["ratio"]["worst"] == 5
    assert made["ratio"]["spread"] == pytest.approx(0.5)
    assert made["met"] is False
    assert row("step", ours, published, bar=Bar(ratio=5))["met"] is True
    assert row("step", ours, published, bar=Bar(seconds=1.5))["met"] is False
    assert row("step", ours, published, bar=Bar(seconds=2))["met"] is True


def test_a_ratio_belongs_to_one_turn():
    assert row("step", [1.0, 4.0], [10.0, 40.0])["ratio"]["values"] == [10, 10]


def test_figures_have_bars_too():
    assert row("memory", [1.0], figures=[5.0, 7.0], unit="GB", bar=Bar(figure=6))["met"] is False
    made = row("memory", [1.0], figures=[5.0, 6.0], unit="GB", bar=Bar(figure=6))
    assert made["met"] is True
    assert "6 GB" in line(made)


def test_a_wrong_result_misses_any_bar_and_without_one_too():
    assert row("step", [1.0], [100.0], bar=Bar(ratio=2), holds=False)["met"] is False
    assert row("step", [1.0], holds=False)["met"] is False
    assert row("step", [1.0])["met"] is None
    assert "MISSED" in line(row("step", [1.0], [100.0], bar=Bar(ratio=2), holds=False))


def test_a_bar_of_a_ratio_needs_a_published_form():
    assert row("step", [1.0], bar=Bar(ratio=2))["met"] is False


def test_a_run_writes_machine_and_rows(tmp_path: Path):
    command = [sys.executable, "-m", "benchmarks", "--quick", "--only", "store", "--only", "metrics"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "bench.json")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    # 1: a bar is missed, which a busy machine may do
    assert done.returncode in (0, 1), done.stderr
    record = json.loads((tmp_path / "bench.json").read_text())
    assert record["failed"] == []
    assert record["benchmarks"].keys() == {"store", "metrics"}
    assert all(0 <= cost["others"] <= 1 and cost["seconds"] > 0 for cost in record["benchmarks"].values())
    assert record["machine"]["cores"] >= 1
    assert {"torch", "numpy", "faiss", "open3d"} <= record["machine"]["libraries"].keys()
    assert {item["benchmark"] for item in record["rows"]} == {"store", "metrics"}
    assert all(item["name"] in done.stdout for item in record["rows"])
    agreeing = [item for item in record["rows"] if item["benchmark"] == "metrics"]
    assert all("apart" in item["note"] for item in agreeing)
