"""`mmad report --leaderboard` on real runs: intervals, seeds, published rows."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_runs_seeds_and_intervals(mmad: Any, finished_runs: Path) -> None:
    ended = mmad("report", "--leaderboard", "--format", "csv")
    assert ended.code == 0, ended.err
    found = {(row["seeds"], row["metric"]): row for row in rows(ended.out)}
    whole, few = found["0", "p_auroc"], found["0 1", "p_auroc"]
    summary = json.loads((finished_runs / "whole" / "summary.json").read_text())
    assert float(whole["value"]) == summary["mean"]["p_auroc"]
    assert whole["modality"] == "3D" and float(whole["low"]) < float(whole["value"]) < float(whole["high"])
    assert few["std"] and not few["low"], "no maps were saved"
    assert found["0", "i_auroc"]["low"] and found["0 1", "i_auroc"]["low"]
    table = mmad("report", "--leaderboard").out
    assert "95 % interval" in table and "save-maps" in table
    assert "most rows here have" in table


def test_intervals_repeat_and_follow_the_confidence(mmad: Any, finished_runs: Path) -> None:
    def width(*options: str) -> float:
        ended = mmad(
            "report", finished_runs / "whole", "--leaderboard", "--metric", "aupro_30", "--format", "csv", *options
        )
        (row,) = rows(ended.out)
        return float(row["high"]) - float(row["low"])

    assert width() == width("--confidence", "0.95") > width("--confidence", "0.5") > 0


def test_categories_and_published_rows(mmad: Any, finished_runs: Path) -> None:
    ended = mmad("report", "--leaderboard", "--category", "cube", "--metric", "i_auroc", "--format", "json")
    (board,) = json.loads(ended.out)
    assert (board["category"], board["metrics"]) == ("cube", ["i_auroc"])
    ended = mmad("report", "--leaderboard", "--include", "btf-readme:fpfh", "--format", "json")
    datasets = [board["dataset"] for board in json.loads(ended.out)]
    assert datasets == ["folder", "mvtec3d"]
    ended = mmad("report", "--leaderboard", "--include", "all", "--format", "json")
    assert [board["dataset"] for board in json.loads(ended.out)] == ["folder"]


def test_published_rows_alone(mmad: Any) -> None:
    ended = mmad("report", "--leaderboard", "--include", "btf-readme", "--include", "m3dm-paper")
    assert ended.code == 0 and "0.945" in ended.out and "btf-readme:raw" in ended.out
    assert mmad("report", "--leaderboard").code == 2
    every = mmad("report", "--leaderboard", "--include", "all", "--format", "latex", "--output", "all.tex")
    assert every.code == 0 and Path("all.tex").read_text().startswith("% needs")


def test_a_leaderboard_needs_nothing_heavy(finished_runs: Path) -> None:
    code = (
        "import sys; from mmad_cli.cli.app import run;"
        "code = run(['report', '--leaderboard', '--metric', 'i_auroc', '--output', 'board.txt']);"
        "sys.exit(code or bool({'torch', 'open3d', 'timm', 'faiss'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path.cwd()).returncode == 0
