"""Start-up and repetition: `mmad --help`, and a second `evaluate` of an unchanged run, as the user types them.

The form to compare with is the same command without what makes it quick: importing the numeric libraries first, and
the first evaluate.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MMAD = [sys.executable, "-m", "mmad_cli"]
HEAVY = "import torch, open3d, sklearn, faiss; from mmad_cli.cli import main; main()"


def seconds(command: list[str], environment: dict[str, str], repeats: int = 1) -> float:
    """Shortest wall time of a command that must succeed."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run(command, env=environment, check=True, capture_output=True)
        best = min(best, time.perf_counter() - start)
    return best


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Rows with name, repo_seconds, ours_seconds, ratio, bar, ok, note."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {**os.environ, "MMAD_STORE": str(folder / "store"), "COLUMNS": "100"}
        helped = seconds([*MMAD, "--help"], environment, 3)
        heavy = seconds([sys.executable, "-c", HEAVY, "--help"], environment)
        data = folder / "data"
        counts = ["--train", "4", "--validation", "0", "--test-good", "2", "--test-defect", "1"]
        seconds([*MMAD, "synth", str(data), "--category", "biscuit", *counts], environment)
        evaluate = [*MMAD, "evaluate", str(data), "--method", "btf", "--variant", "fpfh", "--out", str(folder / "run")]
        first = seconds(evaluate, environment)
        before = json.loads((folder / "run" / "summary.json").read_text())
        second = seconds(evaluate, environment, 3)
        after = json.loads((folder / "run" / "summary.json").read_text())
    same = before["categories"] == after["categories"]
    return [
        _row("mmad --help, against importing the libraries first", heavy, helped, "<= 0.5 s", helped <= 0.5),
        _row("second evaluate, against the first", first, second, "<= 3 s, nothing computed", second <= 3 and same),
    ]


def _row(name: str, repo: float, ours: float, bar: str, ok: bool) -> dict[str, Any]:
    return {
        "name": name,
        "repo_seconds": repo,
        "ours_seconds": ours,
        "ratio": repo / ours,
        "bar": bar,
        "ok": ok,
        "note": "",
    }
