"""`mmad evaluate --seed` given several times: a run each, their folders, the table of mean and spread."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

RAW = ("--method", "btf", "--variant", "raw", "--device", "cpu", "--workers", "1")
SEEDS = ("--seed", "0", "--seed", "1", "--seed", "2")


@pytest.fixture
def data(tiny_dataset: Path) -> Path:
    """One category of nine scans."""
    shutil.rmtree(tiny_dataset / "cube")
    return tiny_dataset


def test_each_seed_is_a_run_and_their_spread_is_shown(mmad: Any, data: Path) -> None:
    ended = mmad("evaluate", data, *RAW, "--shots", "1", *SEEDS)
    assert ended.code == 0, ended.err
    assert "over 3 seeds" in ended.out
    runs = [json.loads(path.read_text()) for path in sorted(Path("runs").glob("*/summary.json"))]
    assert sorted(run["seed"] for run in runs) == [0, 1, 2]

    values = [run["categories"]["block"]["metrics"]["p_auroc"] for run in runs]
    assert len(set(values)) > 1, "each seed draws its own training sample"
    expected = f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
    for text in (ended.out, mmad("report").out, mmad("report", "-f", "markdown").out):
        assert expected in text[text.index("over 3 seeds") :]
    spread = json.loads(mmad("report", "-f", "json").out)["seeds"][0]["categories"]["block"]["p_auroc"]
    assert spread == pytest.approx({"mean": statistics.mean(values), "std": statistics.stdev(values), "n": 3})


def test_folders_and_json_of_several_seeds(mmad: Any, data: Path) -> None:
    ended = mmad("evaluate", data, *RAW, "--limit", "1", "--seed", "3", "--seed", "1", "--out", "out", "--json")
    assert ended.code == 0, ended.err
    printed = json.loads(ended.out)
    assert [run["seed"] for run in printed] == [3, 1]
    for run in printed:
        assert json.loads(Path(f"out/btf-raw-seed-{run['seed']}/summary.json").read_text()) == run
    assert sorted(path.name for path in Path("out").iterdir()) == ["btf-raw-seed-1", "btf-raw-seed-3"]


def test_one_seed_is_as_before(mmad: Any, data: Path) -> None:
    ended = mmad("evaluate", data, *RAW, "--limit", "1", "--seed", "3", "--seed", "3", "--out", "out", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["seed"] == 3
    assert Path("out/summary.json").is_file()
    assert json.loads(mmad("evaluate", data, *RAW, "--limit", "1", "--json").out)["seed"] == 0


def test_the_plan_names_the_seeds(mmad: Any, data: Path) -> None:
    lines = json.loads(mmad("evaluate", data, *RAW, *SEEDS, "--dry-run", "--json").out)
    assert {line["seed"] for line in lines} == {0, 1, 2}
    several = mmad("evaluate", data, *RAW, *SEEDS, "--dry-run").out
    assert "seed" in several and "at most about" in several
    one = mmad("evaluate", data, *RAW, "--dry-run").out
    assert "seed" not in one and "at most" not in one


def test_a_failed_category_of_any_seed_ends_with_3(mmad: Any, data: Path) -> None:
    ended = mmad("evaluate", data, *RAW, "--shots", "99", *SEEDS)
    assert ended.code == 3
    assert "over 0 of 3 seeds" in ended.out


def test_a_wrong_seed_among_several_starts_nothing(mmad: Any, data: Path) -> None:
    ended = mmad("evaluate", data, *RAW, "--seed", "0", "--seed", "-1")
    assert ended.code == 2
    assert "--seed -1" in ended.err
    assert not Path("runs").exists()
