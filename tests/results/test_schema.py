from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from mmad_cli import files
from mmad_cli.errors import DataError, StoreError
from mmad_cli.results.schema import CategoryResult, RunResult, compute_mean, json_schema, json_schema_text

DOCS = Path(__file__).parents[2] / "docs"


def ok(**metrics: float | None) -> CategoryResult:
    return CategoryResult(status="ok", metrics=metrics)


def test_stored_result_reads_and_survives_a_round_trip(stored_summary, tmp_path):
    run = RunResult.from_disk(stored_summary)
    assert run.categories["tire"].error == "killed: out of memory"
    assert run.environment.scikit_learn == "1.6.1"
    assert run.categories["cable_gland"].metrics["p_auroc"] == 0.955

    run.to_disk(tmp_path)
    again = RunResult.from_disk(tmp_path)
    assert again == RunResult.from_disk(tmp_path / "summary.json") == run
    before, after = json.loads(stored_summary.read_text()), json.loads((tmp_path / "summary.json").read_text())
    assert after["added_by_a_later_version"] == {"kept": True}
    assert after["categories"]["cable_gland"]["added_by_a_later_version"] == 1
    for key in ("schema", "run_id", "argv", "seed", "shots", "limit", "comparable", "not_comparable"):
        assert after[key] == before[key]
    for key in ("method", "dataset", "preprocessing"):
        assert after[key] == before[key]
    # runs that were written before this was recorded do not have it
    assert after["environment"] == {**before["environment"], "device_reason": None}


def test_every_key_of_the_contract_is_written(make_run):
    data = json.loads(make_run({"bagel": {"i_auroc": 0.5}}).to_json())
    assert set(data) >= {
        "schema",
        "run_id",
        "created",
        "argv",
        "method",
        "dataset",
        "preprocessing",
        "weights",
        "environment",
        "seed",
        "shots",
        "limit",
        "comparable",
        "not_comparable",
        "categories",
        "mean",
    }
    assert set(data["environment"]) >= {
        "mmad",
        "git",
        "python",
        "platform",
        "device",
        "torch",
        "timm",
        "faiss",
        "open3d",
        "numpy",
        "scikit-learn",
    }
    assert set(data["categories"]["bagel"]) >= {
        "status",
        "error",
        "metrics",
        "n_train",
        "n_test",
        "bank",
        "seconds",
        "peak_rss_bytes",
        "peak_vram_bytes",
    }
    assert data["schema"] == "mmad.run/1"


def test_published_json_schema_is_current():
    published = DOCS / "run.schema.json"
    assert published.read_text() == json_schema_text(), "run: python -m mmad_cli.results.schema docs/run.schema.json"
    assert json_schema()["properties"]["schema"]["const"] == "mmad.run/1"


def test_stored_result_fits_the_json_schema_keys(stored_summary):
    data = json.loads(stored_summary.read_text())
    required = json_schema()["required"]
    written_since = {"full_resolution", "mean_counts", "mean_notes"}
    assert set(required) - written_since <= set(data) | {"schema"}


def test_mean_is_unweighted_and_says_what_it_leaves_out():
    categories = {
        "a": CategoryResult(status="ok", metrics={"i_auroc": 1.0, "p_ap": 0.25}, n_test=1000),
        "b": CategoryResult(status="ok", metrics={"i_auroc": 0.0, "p_ap": None}, n_test=1),
        "c": CategoryResult(status="failed", error="no memory"),
    }
    mean = compute_mean(categories)
    assert mean.values == {"i_auroc": 0.5, "p_ap": 0.25}
    assert mean.counts == {"i_auroc": 2, "p_ap": 1}
    assert "2 of 3" in mean.notes["i_auroc"] and "failed: c" in mean.notes["i_auroc"]
    assert "not defined for b" in mean.notes["p_ap"]


def test_mean_without_gaps_has_no_notes_and_without_values_is_null():
    assert compute_mean({"a": ok(x=0.5), "b": ok(x=0.25)}).notes == {}
    mean = compute_mean({"a": ok(x=None), "b": ok(x=None)})
    assert mean.values == {"x": None} and mean.counts == {"x": 0}
    assert compute_mean({}).values == {}


def test_null_metrics_always_have_a_reason_and_failures_an_error():
    assert ok(i_auroc=None).metrics_null_reasons["i_auroc"]
    assert CategoryResult(status="failed").error


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_metrics_are_never_nan(value):
    with pytest.raises(ValidationError):
        ok(i_auroc=value)


def test_a_reason_makes_a_run_not_comparable(make_run):
    run = make_run()
    assert run.comparable
    run.mark_not_comparable("limit 2")
    run.mark_not_comparable("limit 2")
    assert not run.comparable and run.not_comparable == ["limit 2"]
    assert not make_run(not_comparable=["shots 1"]).comparable


def test_set_category_keeps_the_mean_current(make_run):
    run = make_run({"a": {"i_auroc": 0.5}})
    run.set_category("b", ok(i_auroc=1.0))
    assert run.mean == {"i_auroc": 0.75}
    run.set_category("b", CategoryResult(status="failed", error="x"))
    assert run.mean == {"i_auroc": 0.5} and run.failed_categories == ["b"]


def test_missing_categories(stored_run):
    del stored_run.categories["bagel"]
    assert stored_run.missing_categories == ["bagel"]


def test_writing_brings_the_mean_up_to_date(make_run, tmp_path):
    run = make_run({"a": {"i_auroc": 0.5}})
    run.categories["b"] = ok(i_auroc=1.0)
    assert RunResult.from_disk(run.to_disk(tmp_path / "new" / "folder")).mean == {"i_auroc": 0.75}


def test_an_interrupted_write_keeps_the_earlier_file(make_run, tmp_path, monkeypatch):
    make_run({"a": {"i_auroc": 0.5}}).to_disk(tmp_path)
    before = (tmp_path / "summary.json").read_bytes()

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_run({"a": {"i_auroc": 0.9}}).to_disk(tmp_path)
    assert (tmp_path / "summary.json").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


def test_the_file_is_complete_before_it_gets_its_name(make_run, tmp_path, monkeypatch):
    seen = []
    replace = Path.replace

    def spy(self: Path, target: Path) -> Path:
        seen.append((self.parent, target, json.loads(self.read_text())["run_id"]))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", spy)
    make_run().to_disk(tmp_path)
    assert seen == [(tmp_path, tmp_path / "summary.json", "run-1")]


def test_a_full_disk_is_a_store_error(make_run, tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StoreError, match="no space left"):
        make_run().to_disk(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unusual_names_and_texts_are_written(make_run, tmp_path):
    run = make_run({"[red]": {"i_auroc": 0.5}, "零件": {"i_auroc": 0.5}})
    run.argv = ["--set", "x=\n"]
    run.set_category("c", CategoryResult(status="failed", error="no file named caf\udce9"))
    assert RunResult.from_disk(run.to_disk(tmp_path)) == run


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "no 'schema' key"),
        ('{"schema": "mmad.run/2"}', "mmad.run/2"),
        ('{"schema": "mmad.run/1"}', "run_id"),
        ("\xff", "not valid JSON"),
    ],
)
def test_unusable_files_are_named(tmp_path, text, message):
    file = tmp_path / "summary.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=message) as caught:
        RunResult.from_disk(tmp_path)
    assert str(file) in str(caught.value)


def test_missing_run_is_named(tmp_path):
    with pytest.raises(DataError, match="no such run result"):
        RunResult.from_disk(tmp_path / "nowhere")
