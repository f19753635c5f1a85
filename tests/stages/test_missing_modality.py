"""Test samples that lack their image or their cloud: refused, or scored by what is left where the method can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmad_cli.datasets import open_dataset
from mmad_cli.datasets.check import check_dataset
from mmad_cli.datasets.mvtec3d import Mvtec3dDataset
from mmad_cli.errors import DataError
from mmad_cli.results.schema import RunResult
from mmad_cli.stages import api
from mmad_cli.stages.pictures import RunPictures
from mmad_cli.stages.session import Session
from mmad_cli.store import Store

NO_IMAGE, NO_CLOUD = "test/dent/001", "test/good/000"


@pytest.fixture
def incomplete(tiny_dataset: Path) -> Path:
    (tiny_dataset / "cube/test/dent/rgb/001.png").unlink()
    (tiny_dataset / "cube/test/good/xyz/000.tiff").unlink()
    return tiny_dataset


def evaluate(data: Path, folder: Path, **options: Any) -> tuple[RunResult, Path]:
    settings = {"epochs": 1, "pixels_per_step": 64, **options.pop("settings", {})}
    return api.evaluate(
        data,
        method="cmdr_iad",
        recipe="fast",
        backbones="builtin",
        settings=settings,
        categories=["cube"],
        store=folder / "store",
        out=folder / "run",
        device="cpu",
        workers=1,
        **options,
    )


def test_such_samples_are_errors_unless_asked_for(incomplete: Path) -> None:
    dataset = open_dataset(incomplete)
    assert isinstance(dataset, Mvtec3dDataset)
    with pytest.raises(DataError, match=r"rgb/001\.png is missing"):
        dataset.samples("cube")
    assert not check_dataset(incomplete).usable
    listing = dataset.with_incomplete().list_samples("cube")
    assert {ref.id: ref.missing for ref in listing.refs if ref.missing} == {NO_IMAGE: ("rgb",), NO_CLOUD: ("3d",)}
    assert [finding.level for finding in listing.findings] == ["warning", "warning"]


def test_training_samples_and_ground_truth_are_never_done_without(incomplete: Path) -> None:
    (incomplete / "cube/train/good/rgb/000.png").unlink()
    (incomplete / "cube/test/dent/gt/000.png").unlink()
    dataset = open_dataset(incomplete)
    assert isinstance(dataset, Mvtec3dDataset)
    errors = [f.message for f in dataset.with_incomplete().list_samples("cube").findings if f.level == "error"]
    assert ["rgb/000.png" in errors[0], "gt/000.png" in errors[1], len(errors)] == [True, True, 2]


def test_what_is_missing_is_black_or_empty(incomplete: Path) -> None:
    dataset = open_dataset(incomplete)
    assert isinstance(dataset, Mvtec3dDataset)
    dataset = dataset.with_incomplete()
    refs = {ref.id: ref for ref in dataset.samples("cube")}
    image, cloud = (dataset.read(refs[id_]) for id_ in (NO_CLOUD, NO_IMAGE))
    assert image.rgb.any() and not image.xyz.any() and image.xyz.shape == image.rgb.shape
    assert cloud.xyz.any() and not cloud.rgb.any() and cloud.mask.any()


@pytest.mark.slow
def test_the_run_says_what_was_scored_by_one_modality(incomplete: Path, tmp_path: Path) -> None:
    result, folder = evaluate(incomplete, tmp_path, save_maps=True)
    notes = {NO_IMAGE: "scored by 3D alone, RGB is missing", NO_CLOUD: "scored by RGB alone, 3D is missing"}
    category = result.categories["cube"]
    assert category.status == "ok" and category.n_test == 4
    assert category.sample_notes == notes
    assert any("2 of 4 test samples of cube" in reason for reason in result.not_comparable)
    # from the store, and from the folder
    again, _ = evaluate(incomplete, tmp_path)
    assert again.categories["cube"].sample_notes == notes == RunResult.from_disk(folder).categories["cube"].sample_notes
    with Session(Store(tmp_path / "store")) as session:
        scene = RunPictures(session, result, folder, incomplete).scene("cube", NO_IMAGE)
    assert scene is not None and not np.asarray(scene.rgb).any()


def test_it_can_be_refused(incomplete: Path, tmp_path: Path) -> None:
    result, _ = evaluate(incomplete, tmp_path, settings={"missing_modality": "error"})
    assert result.categories["cube"].status == "failed"
    assert "rgb/001.png is missing" in str(result.categories["cube"].error)
