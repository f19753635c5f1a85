"""The GPU benchmark: its code runs on the CPU at small size, and it says what is missing without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What `--small` prints and writes."""
    file = tmp_path_factory.mktemp("gpu") / "gpu.json"
    done = run("--small", "--json", str(file))
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(file.read_text())


def rows_of(small: tuple[str, dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    found = [row for row in small[1]["rows"] if row["kind"] == kind]
    assert found, kind
    return found


def test_small_inputs_agree_with_the_usual_path(small: tuple[str, dict[str, Any]]) -> None:
    geometry = rows_of(small, "geometry")
    assert [row["same_as_cpu"] for row in geometry] == [True] * 4
    assert [row["largest_relative_difference"] for row in geometry[2:]] == [0, 0]
    assert max(row["largest_difference_to_cpu"] for row in rows_of(small, "search")) < 1e-4
    point, image = rows_of(small, "agreement")
    assert point["same_geometry"]
    assert max(point["largest_relative_difference"], image["largest_relative_difference"]) < 1e-4


def test_everything_is_measured(small: tuple[str, dict[str, Any]]) -> None:
    printed, written = small
    assert written["device"] == "cpu" and written["small"]
    measured = [row for row in written["rows"] if row["kind"] != "category"]
    assert all("peak_device_bytes" in row for row in measured)
    (bank,) = rows_of(small, "bank")
    assert bank["measured_picks"] == 300 and bank["bandwidth_floor_of_loop"] > 0
    chosen = {(row["bank"], row["dtype"]) for row in rows_of(small, "selection")}
    assert chosen == {(bank, dtype) for bank in ("points", "rgb", "fused") for dtype in ("float32", "float16")}
    extracted = {(row["what"], row["precision"]) for row in rows_of(small, "extraction")}
    assert extracted == {(what, kind) for what in ("point", "image") for kind in ("float32", "bfloat16")}
    assert all(row["scans_per_second"] > 0 for row in rows_of(small, "extraction"))
    assert [row["what"] for row in rows_of(small, "scoring")] == ["rows", "score", "machine"]
    assert "small inputs, no measurement" in printed and "Not in: reading and writing of files" in printed


def test_categories_add_up(small: tuple[str, dict[str, Any]]) -> None:
    *categories, every = rows_of(small, "category")
    assert len(categories) == 10
    # 4147 scans, 294 of them for validation
    assert (every["train"], every["test"]) == (2656, 1197)
    parts = ("image", "points", "rows", "selection", "fusion", "scoring")
    for row in (*categories, every):
        assert row["seconds"] == pytest.approx(sum(row[part] for part in parts))
        assert all(row[part] > 0 for part in parts)
        assert row["name"] in small[0]
    assert every["seconds"] == pytest.approx(sum(row["seconds"] for row in categories))
    (image,) = (row for row in rows_of(small, "extraction") if row["what"] == "image" and row["precision"] == "float32")
    assert every["image"] == pytest.approx((2656 + 1197) * image["seconds_per_scan"])


def test_a_long_selection_is_scaled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.bench_memory import low_rank_rows
    from benchmarks.gpu_category import selection_seconds
    from mmad_cli.memory import coreset

    monkeypatch.setattr(coreset, "_PROGRESS_SECONDS", 0)
    table = torch.from_numpy(low_rank_rows(4000, 32))
    begin = time.perf_counter()
    seconds, made = selection_seconds(table, 3000, "cpu", limit=0.0)
    assert made < 3000
    assert seconds > time.perf_counter() - begin
