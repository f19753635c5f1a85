"""Features of pseudo anomalies through the stages: who gets one, from which donors, under which key."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from mmad_cli.backbones import FeatureSpec
from mmad_cli.datasets import open_dataset
from mmad_cli.errors import UsageError
from mmad_cli.preprocessing.config import PreprocessConfig
from mmad_cli.pseudo import PSEUDO_MASK, Augmentation
from mmad_cli.stages.donors import donor_pool
from mmad_cli.stages.features import FeatureJob, load_feature, pseudo_sample
from mmad_cli.stages.plan import Selection, clean_jobs, feature_jobs, select_samples
from mmad_cli.stages.preprocess import extract_category, preprocess_category
from mmad_cli.stages.preview import pseudo_preview
from mmad_cli.stages.session import Session
from mmad_cli.store import Store

PREPROCESSING = PreprocessConfig()


def make_jobs(
    session: Session, data: Path, selection: Selection | None = None, category: str = "block", **settings: object
) -> dict[str, dict[str, FeatureJob]]:
    dataset = open_dataset(data)
    specs = {"z": FeatureSpec.depth(), "z_pseudo": FeatureSpec.depth().augmented(Augmentation(**settings))}  # type: ignore[arg-type]
    samples = select_samples(session, dataset, category, selection or Selection())
    clean = clean_jobs(session, dataset, samples, PREPROCESSING)
    return feature_jobs(clean, specs, {}, donor_pool(session, dataset, clean, PREPROCESSING, specs))


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(store=Store(tmp_path / "store"), workers=1, device="cpu")


def test_training_samples_get_one_and_no_others(session: Session, tiny_dataset: Path) -> None:
    jobs = make_jobs(session, tiny_dataset)
    assert all(job.wanted for job in jobs["z"].values())
    assert {id_ for id_, job in jobs["z_pseudo"].items() if job.wanted} == {f"train/good/{i:03d}" for i in range(4)}
    limited = make_jobs(session, tiny_dataset, limit=3)
    assert sum(job.wanted for job in limited["z_pseudo"].values()) == 3
    preprocess_category(session, "block", {id_: job.clean for id_, job in jobs["z"].items()})
    report = extract_category(session, "block", jobs)
    assert report.failures == {}
    assert report.total == report.computed == 9 + 4


def test_the_feature_is_that_of_the_damaged_scan(session: Session, tiny_dataset: Path) -> None:
    jobs = make_jobs(session, tiny_dataset, pose="none")
    plain, pseudo = (dict(load_feature(jobs[n]["train/good/001"], "cpu", print)) for n in ("z", "z_pseudo"))
    assert PSEUDO_MASK not in plain
    mask = pseudo[PSEUDO_MASK]
    assert mask.dtype == bool
    assert mask.shape == (224, 224)
    changed = plain["z"] != pseudo["z"]
    assert mask.sum() > 50
    # mask and cloud are resized by different rules, so they may differ at the rim
    assert (changed & mask).sum() > 0.8 * mask.sum()


def test_the_key_says_what_the_value_depends_on(session: Session, tiny_dataset: Path) -> None:
    def key(sample: str = "train/good/000", **settings: object) -> str:
        return make_jobs(session, tiny_dataset, **settings)["z_pseudo"][sample].key  # type: ignore[arg-type]

    plain = make_jobs(session, tiny_dataset)["z"]["train/good/000"].key
    keys = {plain, key(), key(index=1), key(seed=1), key(pose="none"), key(bump_probability=1.0), key(donors="self")}
    assert len(keys) == 7
    assert key() == key(limit=2)
    few = make_jobs(session, tiny_dataset, Selection(shots=1))["z_pseudo"]
    only = next(id_ for id_, job in few.items() if job.wanted)
    assert few[only].key != key(only)


def test_two_scans_of_the_same_content_do_not_share_a_pseudo_anomaly(session: Session, tiny_dataset: Path) -> None:
    good = tiny_dataset / "block" / "train" / "good"
    for role, suffix in (("xyz", "tiff"), ("rgb", "png")):
        shutil.copy(good / role / f"000.{suffix}", good / role / f"009.{suffix}")
    jobs = make_jobs(session, tiny_dataset)
    assert jobs["z"]["train/good/000"].key == jobs["z"]["train/good/009"].key
    assert jobs["z_pseudo"]["train/good/000"].key != jobs["z_pseudo"]["train/good/009"].key


def test_plain_features_keep_their_keys(session: Session, tiny_dataset: Path) -> None:
    """A spec without pseudo anomalies must not know that they exist, or every store would be computed again."""
    canonical = FeatureSpec.depth().canonical()
    assert set(canonical) == {"backbone", "view", "input", "params"}
    assert FeatureSpec.depth().augmented(Augmentation()).plain == FeatureSpec.depth()
    assert FeatureSpec.depth().libraries() == ("numpy",)


def test_donors_are_training_scans_of_the_scope(session: Session, tiny_dataset: Path) -> None:
    everywhere, own, none = (
        make_jobs(session, tiny_dataset, donors=scope)["z_pseudo"] for scope in ("dataset", "category", "self")
    )
    for id_, job in everywhere.items():
        texture, surface = job.donors
        assert texture.ref.split == surface.ref.split == "train"
        assert texture.ref.category == "block"
        assert id_ not in (texture.ref.id, surface.ref.id if surface.ref.category == "block" else "")
    many = [make_jobs(session, tiny_dataset, index=k)["z_pseudo"] for k in range(3)]
    assert {job.donors[1].ref.category for jobs in many for job in jobs.values()} == {"block", "cube"}
    assert {job.donors[1].ref.category for job in own.values()} == {"block"}
    assert all(job.donors == () for job in none.values())


def test_few_shots_use_no_other_scan_of_their_category(session: Session, tiny_dataset: Path) -> None:
    jobs = make_jobs(session, tiny_dataset, Selection(shots=2))["z_pseudo"]
    trained = {job.clean.ref.id for job in jobs.values() if job.clean.ref.split == "train"}
    assert len(trained) == 2
    used = {donor.ref.id for job in jobs.values() for donor in job.donors if donor.ref.category == "block"}
    assert used <= trained
    single = make_jobs(session, tiny_dataset, Selection(shots=1), donors="category")["z_pseudo"]
    wanted = next(job for job in single.values() if job.wanted)
    assert pseudo_sample(wanted, print).mask.any()


def test_an_unreadable_category_gives_no_donors(session: Session, tiny_dataset: Path) -> None:
    shutil.rmtree(tiny_dataset / "cube" / "train" / "good" / "xyz")
    jobs = make_jobs(session, tiny_dataset)["z_pseudo"]
    assert {donor.ref.category for job in jobs.values() for donor in job.donors} == {"block"}


def test_workers_give_the_same_features(tiny_dataset: Path, tmp_path: Path) -> None:
    found = []
    for workers in (1, 2):
        with Session(store=Store(tmp_path / str(workers)), workers=workers, device="cpu") as session:
            jobs = make_jobs(session, tiny_dataset)
            extract_category(session, "block", {"z_pseudo": jobs["z_pseudo"]})
            found.append(load_feature(jobs["z_pseudo"]["train/good/002"], "cpu", print))
    for name in found[0]:
        np.testing.assert_array_equal(found[0][name], found[1][name])


def test_preview(session: Session, tiny_dataset: Path, tmp_path: Path) -> None:
    from PIL import Image

    output = tmp_path / "sheet.png"
    assert pseudo_preview(session, tiny_dataset, output, categories=("block",), count=2) == 2
    assert Image.open(output).size == (5 * 164, 2 * 164)
    with pytest.raises(UsageError, match="did you mean 'pose'"):
        pseudo_preview(session, tiny_dataset, output, settings={"pos": "none"})
    with pytest.raises(UsageError, match="--set pose"):
        pseudo_preview(session, tiny_dataset, output, settings={"pose": "upside down"})
