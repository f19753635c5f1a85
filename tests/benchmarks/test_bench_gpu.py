"""The GPU benchmark: its code runs on the CPU at small size, and it says what is missing without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 2
    assert "no GPU" in done.stderr


def test_small_inputs_agree_with_the_usual_path(tmp_path: Path) -> None:
    done = run("--small", "--json", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [row["same_as_cpu"] for row in rows if "same_as_cpu" in row] == [True]
    differences = [row["largest_difference_to_cpu"] for row in rows if "largest_difference_to_cpu" in row]
    assert len(differences) == 2
    assert max(differences) < 1e-4
