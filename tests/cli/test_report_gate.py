"""The gate: a planted regression, a missing category, tolerances from options and files, references, formats."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

RAW = ("--method", "btf", "--variant", "raw", "--device", "cpu", "--workers", "1")
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def run(mmad: Any, finished_runs: Path) -> Path:
    """A run on two categories, and the reference made from it."""
    (finished_runs / "whole").rename("run")
    assert mmad("report", "run", "--update-reference", "reference.json").code == 0
    return Path("run")


def plant(run: Path, category: str, metric: str, by: float) -> None:
    """Move one number of a run."""
    file = run / "summary.json"
    summary = json.loads(file.read_text())
    summary["categories"][category]["metrics"][metric] += by
    file.write_text(json.dumps(summary))


def status(mmad: Any, *options: object, format: str = "csv") -> tuple[int, str]:
    ended = mmad("report", "run", "--against", "reference.json", "--format", format, *options)
    return ended.code, ended.out


def test_a_planted_regression_is_caught_and_named(mmad: Any, run: Path) -> None:
    assert status(mmad)[0] == 0
    plant(run, "cube", "p_auroc", -0.02)
    code, out = status(mmad)
    assert code == 1
    lines = out.splitlines()
    assert lines[1].split(",")[2:4] == ["cube", "p_auroc"] and ",out," in lines[1]
    assert sum(",out," in line for line in lines) == 1
    ended = mmad("report", "run", "--against", "reference.json")
    assert ended.code == 1 and "1 out of tolerance" in ended.out
    assert re.search(r"cube +P-AUROC .* -0\.0200 +0\.005 +out", ended.out)
    assert status(mmad, "--tolerance", "p_auroc=0.03")[0] == 0
    assert status(mmad, "--metric", "i_auroc")[0] == 0
    assert status(mmad, "--category", "block")[0] == 0


def test_a_missing_category_ends_with_3_and_a_moved_number_goes_first(mmad: Any, run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    del summary["categories"]["block"]
    (run / "summary.json").write_text(json.dumps(summary))
    code, out = status(mmad)
    assert code == 3 and "block" in out and "no such category in the run" in out
    plant(run, "cube", "p_auroc", 0.02)
    assert status(mmad)[0] == 1


def test_a_failed_category_ends_with_3(mmad: Any, run: Path, tiny_dataset: Path) -> None:
    (tiny_dataset / "block" / "train" / "good" / "xyz" / "000.tiff").write_bytes(b"")
    assert mmad("evaluate", tiny_dataset, *RAW, "--out", "run").code == 3
    code, out = status(mmad)
    assert code == 3 and "000.tiff" in out


def test_tolerances_of_the_nearest_mmad_toml(mmad: Any, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(run, "cube", "p_auroc", -0.02)
    Path("mmad.toml").write_text("[tolerance]\np_auroc = 0.03\n")
    below = Path("a/b")
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    base = ("report", "../../run", "--against", "../../reference.json", "--format", "csv")
    ended = mmad(*base)
    assert ended.code == 0 and "mmad.toml" in ended.err
    assert mmad(*base, "--tolerance", "p_auroc=0.01").code == 1
    assert mmad(*base, "--tolerance", "0.001").code == 1
    Path("strict.toml").write_text("[tolerance]\ndefault = 0\n")
    assert mmad(*base, "--config", "strict.toml").code == 1
    Path("../mmad.toml").write_text("[tolerance]\np_aurok = 0.03\n")
    ended = mmad(*base)
    assert ended.code == 2 and "'p_aurok'" in ended.err and "'p_auroc'" in ended.err
    assert mmad("report", "../../run").code == 0, "without --against the file is not read"


@pytest.mark.parametrize("format", ["table", "markdown", "latex", "csv", "json", "junit"])
def test_every_format_keeps_the_exit_code(mmad: Any, run: Path, format: str) -> None:
    plant(run, "cube", "p_auroc", -0.02)
    code, out = status(mmad, format=format)
    assert code == 1 and "cube" in out
    assert status(mmad, "--output", "file", format=format) == (1, "")
    assert Path("file").read_text() == out or format == "table"
    assert status(mmad, "--output", "-", format=format) == (1, out)
    assert not Path("-").exists()


def test_junit_of_a_run(mmad: Any, run: Path) -> None:
    plant(run, "cube", "p_auroc", -0.02)
    root = ElementTree.fromstring(status(mmad, format="junit")[1].encode())
    assert (root.attrib["failures"], root.attrib["errors"]) == ("1", "0")
    (failed,) = [case for case in root.iter("testcase") if len(case)]
    assert failed.attrib["classname"].endswith(".cube") and failed.attrib["name"] == "p_auroc"


def test_update_reference_says_what_changed(mmad: Any, run: Path) -> None:
    before = json.loads(Path("reference.json").read_text())
    assert before["made_from"]["method"] == "btf"
    plant(run, "cube", "p_auroc", -0.02)
    ended = mmad("report", "run", "--update-reference", "reference.json")
    assert ended.code == 0
    assert re.search(r"written: reference.json, \d numbers? changed", ended.err)
    assert re.search(r"cube P-AUROC 0\.\d{4} -> 0\.\d{4} \(-0\.0200\)", ended.err)
    assert status(mmad, "--tolerance", "0")[0] == 0
    assert "no number changed" in mmad("report", "run", "--update-reference", "reference.json").err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--update-reference", "x.json", "--against", "run"), ("--against and --update-reference", "one of them")),
        (("--leaderboard", "--against", "run"), ("--against and --leaderboard", "one of them")),
        (("--update-reference", "run/summary.json"), ("--update-reference", "summary of a run")),
        (("--update-reference", "x.json", "--category", "cub"), ("--category", "'cub'", "'cube'")),
        (("--update-reference", "x.json", "--tolerance", "0.1"), ("--tolerance", "needs --against")),
        (("--config", "mmad.toml"), ("--config", "needs --against")),
        (("--against", "run", "--config", "nowhere.toml"), ("nowhere.toml", "cannot be read")),
        (("--format", "junit"), ("--format junit", "needs --against")),
        (("--format", "junt"), ("--format", "'junt'", "'junit'")),
        (("--include", "btf-readme"), ("--include", "needs --leaderboard")),
        (("--confidence", "0.9"), ("--confidence", "needs --leaderboard")),
        (("--leaderboard", "--confidence", "95"), ("--confidence 95", "between 0 and 1")),
        (("--leaderboard", "--include", "btf-readm"), ("--include", "'btf-readm'", "'btf-readme'")),
        (("--leaderboard", "--category", "cubes"), ("--category", "'cubes'", "'cube'")),
        (("--leaderboard", "--format", "junit"), ("--format junit",)),
        (("--leaderboard", "--format", "html"), ("--format html", "not for --leaderboard")),
    ],
    ids=lambda value: " ".join(value),
)
def test_wrong_options(mmad: Any, run: Path, options: Any, words: Any) -> None:
    ended = mmad("report", "run", *options)
    assert ended.code == 2
    assert all(word in ended.err for word in words), ended.err
    assert ended.out == "" and "Traceback" not in ended.err
    assert not Path("x.json").exists()


def test_a_reference_is_of_one_run(mmad: Any, run: Path) -> None:
    ended = mmad("report", "run", "runs/few-0", "--update-reference", "x.json")
    assert ended.code == 2 and "needs one run, got 2" in ended.err and not Path("x.json").exists()


def test_the_committed_gate_is_sound() -> None:
    """Its reference and tolerances can be read, and it checks every metric of both categories and the mean."""
    from mmad_cli.results.metric_names import METRICS
    from mmad_cli.results.reference import read_reference_file
    from mmad_cli.results.settings_file import read_tolerances

    folder = DOCS.parent / "ci"
    table = read_reference_file(folder / "btf-fpfh.json")
    assert set(table.rows) == {"flange", "hose"}
    assert all(set(row) == set(METRICS) for row in (*table.rows.values(), table.mean))
    assert read_tolerances(folder / "mmad.toml").default <= 0.005


def test_of_runs_that_are_not_named_those_that_print_is_about_are_compared(mmad: Any, finished_runs: Path) -> None:
    file = finished_runs / "whole" / "summary.json"
    summary = json.loads(file.read_text())
    summary["dataset"]["name"] = "mvtec3d"
    file.write_text(json.dumps(summary))
    ended = mmad("report", "--against", "btf-readme")
    assert ended.code == 3 and ended.out.count(" against btf-readme:raw") == 1
    assert "not compared: " in ended.err and "btf-readme is for another method, variant or dataset" in ended.err
    # one that is named is compared whatever it is
    assert " against btf-readme:raw" in mmad("report", "runs/few-0", "--against", "btf-readme:raw:raw").out
