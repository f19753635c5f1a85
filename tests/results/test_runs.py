from __future__ import annotations

import numpy as np
import pytest

from mmad_cli.errors import DataError
from mmad_cli.results.runs import SampleScore, find_runs, load_runs, read_scores, write_scores


def test_find_and_load(make_run, tmp_path):
    for name in ("b", "a"):
        make_run().model_copy(update={"run_id": name}).to_disk(tmp_path / name)
    (tmp_path / "empty").mkdir()
    assert find_runs(tmp_path) == [tmp_path / "a", tmp_path / "b"]
    assert find_runs(tmp_path / "a") == [tmp_path / "a"]
    assert find_runs(tmp_path / "nowhere") == []
    twice = [tmp_path / "a", tmp_path / "a" / "summary.json", tmp_path / "b"]
    assert [run.run_id for run in load_runs(twice)] == ["a", "b"]


def test_scores_round_trip_is_exact(tmp_path):
    rows = [
        SampleScore("test/good/000", "good", 0, 0.1 + 0.2),
        SampleScore("test/a,b/001", "a,b", 1, float(np.float32(0.1))),
        SampleScore("test/combined/002", "combined", 1, 1e-300),
    ]
    path = tmp_path / "bagel" / "scores.csv"
    write_scores(path, rows)
    assert path.read_text().splitlines()[0] == "id,defect,label,image_score"
    assert read_scores(path) == rows


def test_scores_of_numpy_scalars_are_plain_numbers(tmp_path):
    path = tmp_path / "scores.csv"
    write_scores(path, [SampleScore("test/good/000", "good", np.int64(0), np.float32(0.5))])
    assert path.read_text().splitlines()[1] == "test/good/000,good,0,0.5"


def test_scores_must_be_finite(tmp_path):
    with pytest.raises(ValueError, match="test/good/000"):
        write_scores(tmp_path / "scores.csv", [SampleScore("test/good/000", "good", 0, float("nan"))])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "header"),
        ("id,label\n", "header"),
        ("id,defect,label,image_score\na,good,0\n", "line 2"),
        ("id,defect,label,image_score\na,good,0,x\n", "line 2"),
    ],
)
def test_malformed_scores_are_named(tmp_path, text, message):
    path = tmp_path / "scores.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_scores(path)


def test_missing_scores_are_named(tmp_path):
    with pytest.raises(DataError, match=r"scores\.csv"):
        read_scores(tmp_path / "scores.csv")
