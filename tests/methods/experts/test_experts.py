"""Experts: cells of every kind of feature, the bank behind a score map, normalisers."""

from __future__ import annotations

import numpy as np
import pytest

from mmad_cli.errors import DataError
from mmad_cli.memory import BankConfig
from mmad_cli.methods.checks import GeneratedFeatures, GeneratedSample, generated_sample
from mmad_cli.methods.experts import Cells, Expert, Source, fit_normaliser, pseudo_samples, with_pseudo
from mmad_cli.pseudo import Augmentation

SOURCES = {
    "tokens": Source.image("rgb", "vit_base_patch8_224.dino"),
    "maps": Source.image("normals", "resnet18.tv_in1k", input="normals", outputs=(2, 3)),
    "fpfh": Source.fpfh(),
    "points": Source.point(),
}
ALL = BankConfig(coreset="all")


def sample(source: Source, name: str = "train/good/000") -> GeneratedSample:
    return generated_sample({source.name: source.spec}, name)


def fitted(source: Source, selection: BankConfig = ALL, count: int = 2, **options: object) -> Expert:
    expert = Expert(source, selection)
    train = GeneratedFeatures([sample(source, f"train/good/{i:03d}") for i in range(count)])
    expert.fit(train, stream=np.random.RandomState(0), **options)  # type: ignore[arg-type]
    return expert


@pytest.mark.parametrize("kind", SOURCES)
def test_cells_cover_the_grid(kind: str) -> None:
    source = SOURCES[kind]
    cells = source.cells(sample(source))
    assert cells.row.shape == (3136,)
    assert cells.row.max() == len(cells.rows) - 1
    assert cells.rows.dtype == np.float32
    assert source.of_points == source.standardise ^ True
    if source.of_points:
        # the disc of generated points has a quarter of the side as radius
        assert cells.filled.sum() == pytest.approx(np.pi * 14**2, rel=0.2)


def test_four_cells_share_a_token() -> None:
    source = SOURCES["tokens"]
    cells = source.cells(sample(source))
    block = cells.row.reshape(28, 2, 28, 2)
    assert (block == np.arange(784).reshape(28, 1, 28, 1)).all()


def test_rows_under_some_cells() -> None:
    cells = Cells(np.ones((3, 2), np.float32), np.arange(3136) % 3)
    chosen = np.zeros(3136, bool)
    chosen[[2, 5, 0]] = True
    used, place = cells.under(chosen)
    assert used.tolist() == [0, 2]
    assert used[place].tolist() == [0, 2, 2]


@pytest.mark.parametrize("kind", SOURCES)
def test_score_map_is_the_distance_to_the_nearest_row(kind: str) -> None:
    source = SOURCES[kind]
    expert = fitted(source)
    one = sample(source, "test/good/000")
    train = [source.cells(sample(source, f"train/good/{i:03d}")).rows for i in range(2)]
    bank = np.concatenate(train)
    mean, std = (bank.mean(), bank.std(ddof=1)) if source.standardise else (0.0, 1.0)
    cells = source.cells(one)
    query = (cells.rows - mean) / std
    expected = np.stack([np.sqrt(((query - row) ** 2).sum(1)) for row in (bank - mean) / std]).min(0)
    np.testing.assert_allclose(expert.score_map(one), expected[cells.row], rtol=1e-3, atol=1e-4)


def test_lookup_gives_prototypes_in_order_and_repeats_the_last_of_a_small_bank() -> None:
    source = SOURCES["tokens"]
    expert = fitted(source, BankConfig(count=3))
    found = expert.look_up(expert.cells(sample(source, "test/good/000")), 5)
    assert found.distances.shape == found.neighbours.shape == (784, 5)
    assert (np.diff(found.distances, axis=1) >= 0).all()
    assert (found.neighbours[:, 3:] == found.neighbours[:, 2:3]).all()
    again = np.linalg.norm(expert.prototypes(found.neighbours) - found.rows[:, None], axis=-1)
    np.testing.assert_allclose(again, found.distances, atol=1e-4)


def test_the_foreground_bounds_the_bank() -> None:
    source = SOURCES["fpfh"]
    front = fitted(source, foreground=lambda one: source.cells(one).filled)
    assert front.size.rows == 2 * source.cells(sample(source)).filled.sum()
    assert front.bank_.rows_.any(axis=1).all()
    assert fitted(source).size.rows == 2 * 3136


def test_save_and_load(tmp_path) -> None:  # type: ignore[no-untyped-def]
    source = SOURCES["maps"]
    expert = fitted(source, BankConfig(fraction=0.1))
    expert.save(tmp_path)
    loaded = Expert(source, BankConfig(fraction=0.1))
    loaded.load(tmp_path)
    one = sample(source, "test/good/000")
    np.testing.assert_array_equal(loaded.score_map(one), expert.score_map(one))


def test_errors_name_the_sample() -> None:
    source = SOURCES["fpfh"]
    expert = fitted(source)
    with pytest.raises(DataError, match="test/good/007"):
        expert.score_map(GeneratedSample("test/good/007", {}))
    empty = {"fpfh": {"points": np.zeros((0, 33), np.float32), "pixel": np.zeros(0, np.int32)}}
    with pytest.raises(DataError, match="test/good/008"):
        expert.score_map(GeneratedSample("test/good/008", empty))
    narrow = {"fpfh": {"points": np.ones((1, 4), np.float32), "pixel": np.zeros(1, np.int32)}}
    with pytest.raises(DataError, match="test/good/009"):
        expert.score_map(GeneratedSample("test/good/009", narrow))
    with pytest.raises(DataError, match="no training samples"):
        fitted(source, count=0)
    with pytest.raises(DataError, match="foreground"):
        fitted(source, foreground=lambda _: np.zeros(3136, bool))


def test_pseudo_samples_are_read_under_the_plain_names() -> None:
    augmentations = [Augmentation(index=k, limit=5) for k in range(3)]
    specs = with_pseudo([SOURCES["tokens"], SOURCES["fpfh"]], augmentations)
    names = ["rgb", "rgb_pseudo0", "rgb_pseudo1", "rgb_pseudo2", "fpfh", *(f"fpfh_pseudo{k}" for k in range(3))]
    assert list(specs) == names
    train = GeneratedFeatures([generated_sample(specs, f"train/good/{i:03d}") for i in range(3)])
    made = pseudo_samples(train, augmentations)
    assert [(one.position, one.index) for one in made] == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1)]
    assert made[4]["rgb"] is train[1].arrays["rgb_pseudo1"]
    assert made[4].mask("fpfh").sum() > 100


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("quantile", (0.0, 1.99)), ("mean", (0.0, 1.0)), ("zscore", (1.0, np.sqrt(2001 / 6 * 4001 / 1000**2 - 1))),
     ("none", (0.0, 1.0))],
)  # fmt: skip
def test_normalisers(kind: str, expected: tuple[float, float]) -> None:
    scores = np.arange(2001) / 1000
    fitted_one = fit_normaliser(scores, kind)  # type: ignore[arg-type]
    assert (fitted_one.offset, fitted_one.scale) == pytest.approx(expected, rel=1e-3)
    np.testing.assert_allclose(fitted_one(scores), (scores - expected[0]) / expected[1], rtol=2e-3, atol=2e-3)


def test_a_quantile_of_scores_becomes_1() -> None:
    scores = np.random.default_rng(0).gamma(2, size=10_000)
    assert (fit_normaliser(scores)(scores) > 1).mean() == pytest.approx(0.005, abs=2e-4)


def test_normalisers_refuse_what_makes_no_sense() -> None:
    for arguments, name in [
        ((np.ones(3), "max"), "kind"), ((np.ones(0),), "scores"), ((np.array([1, np.nan]),), "scores"),
        ((np.ones(3), "quantile", 0.0), "quantile"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=name):
            fit_normaliser(*arguments)  # type: ignore[arg-type]
    assert fit_normaliser(np.zeros(5)).scale == 1.0
