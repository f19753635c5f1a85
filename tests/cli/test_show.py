"""`mmad show`: one picture of one sample, and what it says when there is none."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

RAW = ("--method", "btf", "--variant", "raw", "--device", "cpu", "--workers", "1")


@pytest.fixture
def run(finished_runs: Path) -> Path:
    return finished_runs / "whole"


def size(file: str) -> tuple[int, int]:
    with Image.open(file) as picture:
        assert picture.format == "PNG"
        return picture.size


def test_a_picture_of_a_sample(mmad: Any, run: Path) -> None:
    ended = mmad("show", run, "test/dent/000", "--category", "cube", "--output", "new/dent.png")
    assert (ended.code, ended.out) == (0, ""), ended.err
    assert "written: new/dent.png" in ended.err
    assert size("new/dent.png")[0] > 4 * 320
    assert mmad("show", run / "summary.json", "test/good/001", "-c", "Cube").code == 0
    assert size("cube-test-good-001.png")[0] > 4 * 320


def test_the_newest_run_that_has_the_sample_is_taken(mmad: Any, finished_runs: Path) -> None:
    for folder, year in (("whole", 2030), ("few-0", 2020), ("few-1", 2040)):
        file = finished_runs / folder / "summary.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "created": f"{year}-01-01T00:00:00Z"}))
    for category in ("block", "cube"):
        scores = finished_runs / "few-1" / category / "scores.csv"
        scores.write_text(scores.read_text().replace("test/dent/001", "test/dent/777"))
    ended = mmad("show", "test/dent/001", "-c", "cube", "-o", "x.png")
    assert ended.code == 0 and "run: runs/whole" in ended.err, ended.err
    ended = mmad("show", "test/dent/000", "-c", "cube", "-o", "x.png")
    assert ended.code == 0 and "run: runs/few-1" in ended.err
    ended = mmad("show", "test/dent/00", "-c", "cube")
    assert ended.code == 2 and "'test/dent/000'" in ended.err


def test_a_picture_in_the_terminal(mmad: Any, run: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    ended = mmad("show", run, "test/dent/000", "-c", "cube", "--terminal")
    assert ended.code == 0 and not list(Path.cwd().glob("*.png")), ended.err
    plain = re.sub(r"\x1b\[[0-9;]*m", "", ended.out)
    assert "image score" in plain and "anomaly map" in plain
    blocks = [line for line in plain.splitlines() if line.startswith("▀")]
    assert len(blocks) == 13 and {len(line) for line in blocks} == {4 * 26 + 3}
    assert mmad("show", run, "test/dent/000", "-c", "cube", "-t", "-o", "x.png").code == 2


def test_without_maps_or_without_scans(
    mmad: Any, run: Path, tiny_dataset: Path, monkeypatch: Any, tmp_path: Path
) -> None:
    options = ("test/dent/000", "--category", "cube", "--output", "x.png")
    monkeypatch.delenv("MMAD_DATA")
    moved = tmp_path / "moved"
    tiny_dataset.rename(moved)
    ended = mmad("show", run, *options)
    assert ended.code == 0 and "No pictures of the samples" in ended.err and "mmad show --data DATA" in ended.err
    only_map = size("x.png")[0]
    assert mmad("show", run, *options, "--data", moved).code == 0
    assert size("x.png")[0] > only_map
    (run / "cube" / "maps.safetensors").unlink()
    ended = mmad("show", run, *options, "--data", moved)
    assert ended.code == 0 and "No anomaly maps of cube" in ended.err
    shutil.rmtree(moved)
    ended = mmad("show", run, *options)
    assert ended.code == 2 and "nothing to show of cube test/dent/000" in ended.err and "--save-maps" in ended.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("RUN", "test/dent/009", "-c", "cube"), ("SAMPLE", "'test/dent/009'", "'test/dent/000'")),
        (("RUN", "dent/000"), ("SAMPLE", "'dent/000'", "'test/dent/000'")),
        (("RUN", "test/dent/000"), ("block, cube", "--category")),
        (("RUN", "test/dent/000", "-c", "cub"), ("--category", "'cub'", "'cube'")),
        (("RUN", "test/dent/000", "-c", "cube", "-o", "runs"), ("--output runs", "is a folder")),
        (("RUN", "test/dent/000", "-c", "cube", "--data", "nowhere"), ("nowhere",)),
        (("nowhere", "test/dent/000"), ("nowhere", "summary.json")),
        (("RUN",), ("SAMPLE", "is missing after the run folder")),
        (("RUN", "test/dent/000", "test/dent/001"), ("SAMPLE", "one test sample")),
    ],
    ids=lambda value: " ".join(value),
)
def test_wrong_names(mmad: Any, run: Path, arguments: Any, words: Any) -> None:
    ended = mmad("show", *(run if argument == "RUN" else argument for argument in arguments))
    if "--data" in arguments:
        # the map is in the run: it is shown alone, and the line says why
        assert ended.code == 0
    else:
        assert ended.code == 2 and not list(Path.cwd().glob("*.png"))
    assert all(word in ended.err for word in words), ended.err
    assert "Traceback" not in ended.err


def test_a_failed_category_has_no_picture(mmad: Any, tiny_dataset: Path) -> None:
    (tiny_dataset / "block" / "train" / "good" / "xyz" / "000.tiff").write_bytes(b"")
    assert mmad("evaluate", tiny_dataset, *RAW, "--out", "run").code == 3
    ended = mmad("show", "run", "test/dent/000", "--category", "block")
    assert ended.code == 2 and "block failed" in ended.err
    shown = mmad("show", "run", "test/dent/000", "--data", tiny_dataset)
    assert shown.code == 0 and "cube-test-dent-000.png" in shown.err, "the other category has one"
