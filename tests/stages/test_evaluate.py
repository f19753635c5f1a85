"""The whole line on a tiny dataset: results, caching, resuming, damage, failures, selection."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from mmad_cli.errors import DataError, UsageError
from mmad_cli.methods.btf import BTF
from mmad_cli.results.runs import read_scores
from mmad_cli.results.schema import RunResult
from mmad_cli.stages import api, features, predict, scoring, tasks
from mmad_cli.store import Store


def evaluate(data: Path, tmp_path: Path, **options: Any) -> tuple[RunResult, Path]:
    options = {"method": "btf", "variant": "raw", "device": "cpu", "out": tmp_path / "run", **options}
    return api.evaluate(data, store=tmp_path / "store", **options)


def content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def forbid(monkeypatch: pytest.MonkeyPatch, target: Any, name: str) -> None:
    def called(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt(f"{name} was called")

    monkeypatch.setattr(target, name, called)


def test_a_run_holds_what_the_contract_says(tiny_dataset: Path, tmp_path: Path) -> None:
    before = content(tiny_dataset)
    result, folder = evaluate(tiny_dataset, tmp_path, save_maps=True)
    assert content(tiny_dataset) == before
    assert list(result.categories) == ["block", "cube"]
    read = RunResult.from_disk(folder)
    assert read.model_dump() == result.model_dump()
    summary = json.loads((folder / "summary.json").read_text())
    for key in ("schema", "run_id", "created", "argv", "method", "dataset", "preprocessing", "weights", "environment"):
        assert key in summary
    assert summary["environment"]["device"] == "cpu"
    assert summary["environment"]["device_reason"] == "asked for with --device"
    assert summary["dataset"]["categories"]["block"] == {
        "train": 4, "validation": 1, "test_good": 2, "test_anomalous": 2
    }  # fmt: skip
    category = summary["categories"]["block"]
    assert category["status"] == "ok"
    assert category["n_train"] == 4
    assert category["n_test"] == 4
    assert category["bank"] == {"patches": {"rows": int(0.1 * 784 * 4), "dim": 64}}
    assert set(category["seconds"]) == {"preprocess", "extract", "fit", "predict", "metrics"}
    assert category["peak_rss_bytes"] > 10**7
    assert set(category["peak_rss_bytes_by_stage"]) == set(category["seconds"])
    peaks = category["peak_rss_bytes_by_stage"].values()
    assert all(10**7 < size <= 1.05 * category["peak_rss_bytes"] for size in peaks)
    assert all(value is None or 0 <= value <= 1 for value in category["metrics"].values())
    rows = read_scores(folder / "block" / "scores.csv")
    assert [row.id for row in rows] == [f"test/{d}/{i:03d}" for d in ("dent", "good") for i in range(2)]
    assert [row.label for row in rows] == [1, 1, 0, 0]
    maps = load_file(folder / "block" / "maps.safetensors")
    assert set(maps) == {row.id for row in rows}
    assert all(m.shape == (224, 224) and m.dtype == np.float32 and np.isfinite(m).all() for m in maps.values())


def test_ground_truth_is_read_while_the_method_scores(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    read, score = scoring.load_clean, BTF.predict
    monkeypatch.setattr(scoring, "load_clean", lambda job, notice: (events.append("truth"), read(job, notice))[1])

    def scored(self: BTF, sample: Any) -> Any:
        deadline = time.monotonic() + 10
        # the ground truth of the sample before is read without waiting for the last one
        while events.count("truth") < events.count("score") and time.monotonic() < deadline:
            time.sleep(0.001)
        events.append("score")
        return score(self, sample)

    monkeypatch.setattr(BTF, "predict", scored)
    evaluate(tiny_dataset, tmp_path, categories=["cube"])
    assert events == ["score", "truth"] * 4


def test_metrics_are_those_of_the_written_scores_and_maps(tiny_dataset: Path, tmp_path: Path) -> None:
    from sklearn.metrics import roc_auc_score

    result, folder = evaluate(tiny_dataset, tmp_path, save_maps=True, categories=["cube"])
    rows = read_scores(folder / "cube" / "scores.csv")
    expected = roc_auc_score([row.label for row in rows], [row.image_score for row in rows])
    assert result.categories["cube"].metrics["i_auroc"] == pytest.approx(expected, abs=1e-12)
    maps = load_file(folder / "cube" / "maps.safetensors")
    samples = {s.id: s for s in api.load_preprocessed(tiny_dataset, categories=["cube"], store=tmp_path / "store")}
    masks = np.stack([samples[row.id].mask for row in rows])
    stacked = np.stack([maps[row.id] for row in rows])
    assert result.categories["cube"].metrics["p_auroc"] == pytest.approx(
        roc_auc_score(masks.ravel(), stacked.ravel()), abs=1e-9
    )


def test_second_evaluate_computes_nothing_and_gives_the_same(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, folder = evaluate(tiny_dataset, tmp_path)
    before = content(folder)
    forbid(monkeypatch, tasks, "load_clean")
    forbid(monkeypatch, tasks, "extract_batch")
    forbid(monkeypatch, BTF, "fit")
    forbid(monkeypatch, BTF, "predict")
    second, _ = evaluate(tiny_dataset, tmp_path)
    assert second.model_dump(exclude={"argv"}) == first.model_dump(exclude={"argv"})
    assert content(folder) == before


def test_cached_evaluate_needs_no_heavy_library(tiny_dataset: Path, tmp_path: Path) -> None:
    evaluate(tiny_dataset, tmp_path)
    script = (
        "import sys; from mmad_cli.stages import api; "
        f"api.evaluate({str(tiny_dataset)!r}, method='btf', variant='raw', store={str(tmp_path / 'store')!r}, "
        f"out={str(tmp_path / 'run2')!r}); "
        "print([m for m in ('torch', 'open3d', 'sklearn', 'timm', 'faiss', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert (tmp_path / "run2" / "summary.json").is_file()


def test_an_interrupted_run_resumes_with_what_is_missing(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = evaluate(tiny_dataset, tmp_path / "other")
    scored: list[str] = []
    original = BTF.predict

    def stop_at_the_sixth(self: BTF, sample: Any) -> Any:
        scored.append(sample.id)
        if len(scored) == 6:
            raise KeyboardInterrupt
        return original(self, sample)

    monkeypatch.setattr(BTF, "predict", stop_at_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_dataset, tmp_path)
    partial = RunResult.from_disk(tmp_path / "run")
    assert list(partial.categories) == ["block"]
    assert partial.missing_categories == ["cube"]
    forbid(monkeypatch, BTF, "fit")
    forbid(monkeypatch, tasks, "extract_batch")
    result, _ = evaluate(tiny_dataset, tmp_path)
    # five were done: one category of four and the first sample of the next
    assert len(scored) == 6 + 3
    assert {n: c.metrics for n, c in result.categories.items()} == {
        n: c.metrics for n, c in expected.categories.items()
    }


def test_a_damaged_feature_is_named_and_computed_again(
    tiny_dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    expected, _ = evaluate(tiny_dataset, tmp_path)
    store = Store(tmp_path / "store")
    damaged = sorted((store.root / "extract" / "block").glob("*.safetensors"))[0]
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(bytes(data))
    assert [problem.path for problem in store.verify()] == [damaged]
    for stage in ("fit", "predict", "evaluate"):
        for path in sorted((store.root / stage / "block").rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
    notices: list[str] = []
    from mmad_cli.stages.evaluate import evaluate as run_stage
    from mmad_cli.stages.progress import SilentReporter
    from mmad_cli.stages.request import EvaluateRequest
    from mmad_cli.stages.session import Session

    class Listening(SilentReporter):
        def notice(self, message: str) -> None:
            notices.append(message)

    with Session(store=store, workers=1, device="cpu", reporter=Listening()) as session:
        result, _ = run_stage(session, EvaluateRequest(tiny_dataset, "btf", variant="raw", out=tmp_path / "run"))
    assert any(str(damaged) in message and "computed again" in message for message in notices)
    assert result.categories["block"].metrics == expected.categories["block"].metrics
    assert store.verify() == []


@pytest.mark.parametrize("stage", ["preprocess", "extract", "fit", "predict", "evaluate"])
def test_damage_in_any_stage_heals(tiny_dataset: Path, tmp_path: Path, stage: str) -> None:
    expected, _ = evaluate(tiny_dataset, tmp_path, categories=["block"])
    root = tmp_path / "store"
    for path in (root / stage).rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-5])
    later = ["preprocess", "extract", "fit", "predict", "evaluate"]
    for name in later[later.index(stage) + 1 :]:
        for path in sorted((root / name).rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
    result, _ = evaluate(tiny_dataset, tmp_path, categories=["block"])
    assert result.categories["block"].status == "ok"
    assert result.categories["block"].metrics == expected.categories["block"].metrics
    assert Store(root).verify() == []


def test_a_failing_category_is_recorded_and_the_others_go_on(tiny_dataset: Path, tmp_path: Path) -> None:
    broken = tiny_dataset / "block" / "test" / "dent" / "xyz" / "001.tiff"
    original = broken.read_bytes()
    broken.write_bytes(original[:1000])
    result, folder = evaluate(tiny_dataset, tmp_path)
    assert result.categories["block"].status == "failed"
    assert str(broken) in str(result.categories["block"].error)
    assert result.categories["cube"].status == "ok"
    assert RunResult.from_disk(folder).failed_categories == ["block"]
    broken.write_bytes(original)
    repaired, _ = evaluate(tiny_dataset, tmp_path)
    assert repaired.failed_categories == []


def test_an_unforeseen_error_of_a_method_costs_its_category_only(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = BTF.predict

    def fail_on_block(self: BTF, sample: Any) -> Any:
        if "block" in sample.jobs["z"].clean.ref.category:
            raise RuntimeError("out of luck")
        return original(self, sample)

    monkeypatch.setattr(BTF, "predict", fail_on_block)
    result, _ = evaluate(tiny_dataset, tmp_path)
    assert "out of luck" in str(result.categories["block"].error)
    assert result.categories["cube"].status == "ok"


def test_a_score_that_is_not_finite_is_a_failure(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmad_cli.methods.base import Prediction

    monkeypatch.setattr(BTF, "predict", lambda self, s: Prediction(np.zeros((224, 224), np.float32), float("nan")))
    result, _ = evaluate(tiny_dataset, tmp_path, categories=["block"])
    assert "not finite" in str(result.categories["block"].error)


def test_changed_raw_file_is_noticed(tiny_dataset: Path, tmp_path: Path, scan_maker: Any, scan_writer: Any) -> None:
    first, _ = evaluate(tiny_dataset, tmp_path)
    scan_writer(tiny_dataset / "block" / "train" / "good", "000", scan_maker(99), False)
    second, _ = evaluate(tiny_dataset, tmp_path)
    assert second.dataset.digest != first.dataset.digest
    assert second.run_id != first.run_id
    assert second.categories["block"].metrics != first.categories["block"].metrics
    assert second.categories["cube"] == first.categories["cube"]


def test_only_the_new_sample_is_computed(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scan_maker: Any, scan_writer: Any
) -> None:
    evaluate(tiny_dataset, tmp_path, categories=["block"])
    scan_writer(tiny_dataset / "block" / "train" / "good", "777", scan_maker(77), False)
    extracted: list[str] = []
    original = features.extract_batch

    def logged(jobs: Any, device: str, notice: Any) -> None:
        extracted.extend(job.clean.ref.id for job in jobs)
        original(jobs, device, notice)

    monkeypatch.setattr(tasks, "extract_batch", logged)
    evaluate(tiny_dataset, tmp_path, categories=["block"])
    assert extracted == ["train/good/777"]


def test_force_computes_again(tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(tiny_dataset, tmp_path, categories=["block"])
    calls: list[str] = []
    original = predict.fitted_method
    monkeypatch.setattr("mmad_cli.stages.evaluate.fitted_method", lambda *a: (calls.append("fit"), original(*a))[1])
    evaluate(tiny_dataset, tmp_path, categories=["block"])
    assert calls == []
    evaluate(tiny_dataset, tmp_path, categories=["block"], force=True)
    assert calls == ["fit"]


def test_workers_do_not_change_the_numbers(tiny_dataset: Path, tmp_path: Path) -> None:
    one, _ = evaluate(tiny_dataset, tmp_path / "a", workers=1)
    two, _ = evaluate(tiny_dataset, tmp_path / "b", workers=2)
    assert {n: c.metrics for n, c in one.categories.items()} == {n: c.metrics for n, c in two.categories.items()}
    assert one.run_id == two.run_id


def test_selection_is_seeded_and_said(tiny_dataset: Path, tmp_path: Path) -> None:
    shots, _ = evaluate(tiny_dataset, tmp_path, shots=2, seed=3)
    assert shots.categories["block"].n_train == 2
    assert not shots.comparable
    assert any("shots" in reason for reason in shots.not_comparable)
    again, _ = evaluate(tiny_dataset, tmp_path / "again", shots=2, seed=3)
    assert again.categories["block"].metrics == shots.categories["block"].metrics
    limited, _ = evaluate(tiny_dataset, tmp_path / "limited", limit=1)
    assert limited.categories["block"].n_train == 1
    assert limited.categories["block"].n_test == 2
    assert any("limit" in reason for reason in limited.not_comparable)
    first, folder = evaluate(tiny_dataset, tmp_path / "first", shots=2, seed=3, shot_choice="first")
    assert any("2 training samples per category, the first ones" in reason for reason in first.not_comparable)
    assert RunResult.from_disk(folder).shot_choice == "first" != RunResult.from_disk(tmp_path / "run").shot_choice
    assert len({shots.run_id, limited.run_id, first.run_id}) == 3
    with pytest.raises(UsageError, match="--shot-choice"):
        evaluate(tiny_dataset, tmp_path, shots=2, shot_choice="best")
    with pytest.raises(UsageError, match="--limit 0"):
        evaluate(tiny_dataset, tmp_path, limit=0)
    too_many, _ = evaluate(tiny_dataset, tmp_path / "many", shots=50)
    assert "--shots 50" in str(too_many.categories["block"].error)


def test_settings_enter_the_result(tiny_dataset: Path, tmp_path: Path) -> None:
    small, _ = evaluate(tiny_dataset, tmp_path, settings={"coreset_fraction": 0.02}, categories=["block"])
    assert small.categories["block"].bank["patches"].rows == int(0.02 * 784 * 4)
    assert any("coreset_fraction" in reason for reason in small.not_comparable)
    assert any("cube" in reason for reason in small.not_comparable)
    corrected, _ = evaluate(tiny_dataset, tmp_path / "c", recipe="corrected", categories=["block"])
    assert corrected.method.config["blur"] == "float"
    assert corrected.categories["block"].metrics != small.categories["block"].metrics


def test_full_resolution_uses_the_scan_size(tiny_dataset: Path, tmp_path: Path) -> None:
    small, _ = evaluate(tiny_dataset, tmp_path, categories=["block"])
    large, _ = evaluate(tiny_dataset, tmp_path / "full", categories=["block"], full_resolution=True)
    assert large.full_resolution
    assert large.categories["block"].metrics["i_auroc"] == small.categories["block"].metrics["i_auroc"]
    assert large.categories["block"].metrics["p_auroc"] == pytest.approx(
        small.categories["block"].metrics["p_auroc"], abs=0.05
    )
    assert large.categories["block"].metrics["p_auroc"] != small.categories["block"].metrics["p_auroc"]


def test_undefined_metrics_are_null_with_a_reason(tiny_dataset: Path, tmp_path: Path) -> None:
    import shutil

    shutil.rmtree(tiny_dataset / "block" / "test" / "dent")
    shutil.rmtree(tiny_dataset / "cube" / "test" / "good")
    result, _ = evaluate(tiny_dataset, tmp_path)
    no_defects, no_good = result.categories["block"], result.categories["cube"]
    assert no_defects.status == no_good.status == "ok"
    assert no_defects.metrics["i_auroc"] is None
    assert "anomal" in no_defects.metrics_null_reasons["i_auroc"]
    assert no_good.metrics["i_auroc"] is None
    assert no_good.metrics["p_auroc"] is not None
    assert result.mean["i_auroc"] is None


def test_category_without_test_or_train_fails_with_the_folder(tiny_dataset: Path, tmp_path: Path) -> None:
    import shutil

    shutil.rmtree(tiny_dataset / "block" / "test")
    shutil.rmtree(tiny_dataset / "cube" / "train")
    result, _ = evaluate(tiny_dataset, tmp_path)
    assert str(tiny_dataset / "block" / "test") in str(result.categories["block"].error)
    assert str(tiny_dataset / "cube" / "train" / "good") in str(result.categories["cube"].error)


def test_names_that_do_not_exist(tiny_dataset: Path, tmp_path: Path) -> None:
    for options, near in (
        ({"method": "btff"}, "'btf'"),
        ({"variant": "fpf"}, "'fpfh'"),
        ({"categories": ["blok"]}, "'block'"),
        ({"recipe": "offical"}, "'official'"),
        ({"settings": {"coreset_fractoin": 0.1}}, "'coreset_fraction'"),
    ):
        with pytest.raises(UsageError, match="did you mean") as caught:
            evaluate(tiny_dataset, tmp_path, **options)
        assert near in str(caught.value)
    with pytest.raises(UsageError, match="coreset_fraction"):
        evaluate(tiny_dataset, tmp_path, settings={"coreset_fraction": 7})
    with pytest.raises(DataError, match="no such folder"):
        evaluate(tmp_path / "nowhere", tmp_path)
    assert not (tmp_path / "run").exists()


def test_clean_scans_survive_the_store_exactly(tiny_dataset: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = list(api.load_preprocessed(tiny_dataset, "m3dm", False, store=store, categories=["block"]))
    second = list(api.load_preprocessed(tiny_dataset, "m3dm", False, store=store, categories=["block"]))
    small = list(api.load_preprocessed(tiny_dataset, "m3dm", store=store, categories=["block"]))
    assert len(first) == 9
    for a, b, c in zip(first, second, small, strict=True):
        np.testing.assert_array_equal(a.xyz, b.xyz)
        np.testing.assert_array_equal(a.rgb, b.rgb)
        np.testing.assert_array_equal(a.mask, b.mask)
        assert a.id == b.id == c.id
        assert c.rgb.shape == c.xyz.shape == (224, 224, 3)
    raw = list(api.load_preprocessed(tiny_dataset, "none", False, store=store, categories=["block"]))
    assert sum(s.xyz.any(-1).sum() for s in raw) > sum(s.xyz.any(-1).sum() for s in first)


def test_the_first_shots_are_those_of_the_first_names(tiny_dataset: Path, tmp_path: Path) -> None:
    from mmad_cli.datasets import open_dataset
    from mmad_cli.stages.plan import Selection, select_samples
    from mmad_cli.stages.session import Session

    with Session(Store(tmp_path / "store")) as session:
        chosen = [
            select_samples(
                session, open_dataset(tiny_dataset), "block", Selection(shots=2, seed=seed, shot_choice=which)
            )
            for seed, which in ((0, "first"), (1, "first"), (1, "random"))
        ]
    assert [[ref.stem for ref in samples.train] for samples in chosen[:2]] == [["000", "001"]] * 2
    assert chosen[2].train != chosen[1].train
