"""Banks, switches and state of M3DM on generated features."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmad_cli.errors import DataError, UsageError, WeightsError
from mmad_cli.memory import limit as limits
from mmad_cli.memory import patch_distances, reweighted_score
from mmad_cli.memory.search import FlatIndex
from mmad_cli.methods import build_config, get_method
from mmad_cli.methods.anomaly_map import blur_pillow8, upsample
from mmad_cli.methods.base import DiskEstimate, SharedTraining
from mmad_cli.methods.checks import GeneratedFeatures, GeneratedSample, check_method, generated_sample, make_features
from mmad_cli.methods.m3dm.banks import BankPlan, Survey, plan_banks, selection
from mmad_cli.methods.m3dm.config import PARTS, M3DMConfig
from mmad_cli.methods.m3dm.patches import point_patches, rgb_patches
from mmad_cli.types import Sample

Make = Callable[..., Any]
Features = Callable[..., GeneratedFeatures]

NOTHING = GeneratedFeatures([])
THREE = "dino+point_mae+fusion"


def kept_for(config: M3DMConfig, n: int) -> list[int]:
    """Rows that the banks of n training samples keep."""
    plans: list[BankPlan] = []
    for name in config.parts:
        rows = n * (784 if name == "rgb" else 3136)
        survey = Survey(lambda: iter([]), rows, 1)
        plans.append(BankPlan(name, survey, selection(config, rows, plans[0].kept if plans else 0), 0.0, 1.0))
    return [plan.kept for plan in plans]


@pytest.mark.parametrize(
    ("variant", "chained", "own"),
    [
        ("dino", [19129], [19129]),
        ("point_mae", [76518], [76518]),
        ("fusion", [76518], [76518]),
        ("dino+point_mae", [76518, 7651], [76518, 19129]),
        (THREE, [76518, 7651, 7651], [76518, 19129, 76518]),
    ],
)
def test_bank_sizes_of_244_samples(variant: Any, chained: list[int], own: list[int]) -> None:
    assert kept_for(M3DMConfig(variant=variant), 244) == chained
    assert kept_for(M3DMConfig(variant=variant, coreset_count="own"), 244) == own


@pytest.mark.parametrize(
    ("modality", "variant", "score"),
    [
        ("rgb", "dino", "single_s"),
        ("xyz", "point_mae", "single_point_s"),
        ("xyz", "fusion", "single_fusion_s"),
        ("rgb", "dino+point_mae", "double_s"),
        ("xyz", "dino+point_mae", "double_s"),
        ("rgb", "dino+point_mae+add", "add_s"),
        ("xyz", THREE, "triple_s"),
    ],
)
def test_scale_and_weight_of_each_variant(scoring: Callable[..., Any], modality: str, variant: Any, score: str) -> None:
    """The image score with the constants of a variant equals the published one."""
    golden, config = scoring(modality), M3DMConfig(variant=variant)
    index = FlatIndex(golden["bank"].astype(np.float32))
    patches = golden["patch"].astype(np.float32)
    nearest, indices = patch_distances(patches, index)
    ours = reweighted_score(patches, index, nearest, indices, eps=config.weight_eps, scale=config.scale)
    assert ours == pytest.approx(float(golden[score]), rel=1e-4)


def test_moments_are_shared_or_of_each_bank(make_method: Make, features_for: Features) -> None:
    method = make_method(THREE, coreset_fraction=0.01)
    train = features_for(method, 2)
    points = np.concatenate([point_patches(sample) for sample in train]).astype(np.float64)
    rgb = np.concatenate([rgb_patches(sample)[0] for sample in train]).astype(np.float64)
    method.fit(train, NOTHING, seed=0)
    for bank in method.banks_.values():
        assert bank.mean_ == pytest.approx(points.mean(), rel=1e-6)
        assert bank.std_ == pytest.approx(rgb.std(ddof=1), rel=1e-6)
    method = make_method(THREE, coreset_fraction=0.01, norm="per_bank")
    method.fit(train, NOTHING, seed=0)
    assert method.banks_["points"].std_ == pytest.approx(points.std(ddof=1), rel=1e-6)
    assert method.banks_["rgb"].mean_ == pytest.approx(rgb.mean(), rel=1e-6)
    single = make_method("point_mae", coreset_fraction=0.01)
    single.fit(train, NOTHING, seed=0)
    assert (single.banks_["points"].mean_, single.banks_["points"].std_) == (0.0, 1.0)


def test_published_zero_row_is_no_background_patch(make_method: Make, features_for: Features) -> None:
    method = make_method(THREE, coreset_fraction=0.05)
    train = features_for(method, 1)
    method.fit(train, NOTHING, seed=0)
    rows, picks = method.banks_["points"].rows_, method.banks_["points"].picks_
    assert len(rows) == 156 + 1
    assert not rows[-1].any()
    assert picks[-1] == -1
    # the first pick is the empty corner of the first sample, shifted by the normalisation
    assert picks[0] == 0
    np.testing.assert_allclose(rows[0], -method.banks_["points"].mean_ / method.banks_["points"].std_, rtol=1e-5)


def test_filtered_zero_row_is_the_background_patch(make_method: Make, features_for: Features) -> None:
    method = make_method(THREE, coreset_fraction=0.05, zero_row="filtered")
    train = features_for(method, 1)
    filled = int((point_patches(train[0]) != 0).all(axis=1).sum())
    assert 0 < filled < 3136
    method.fit(train, NOTHING, seed=0)
    bank = method.banks_["points"]
    assert len(bank.rows_) == int(0.05 * filled) + 1
    np.testing.assert_array_equal(bank.rows_[-1], bank.normalise(np.zeros(6))[None][0])
    assert (bank.rows_[:-1] != bank.rows_[-1]).any(axis=1).all()
    assert bank.picks_[:-1].max() < filled


@pytest.mark.parametrize("step", ["fit", "load"])
def test_a_memory_limit_that_is_too_low_is_said_before_the_work(
    step: str, make_method: Make, features_for: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names a limit with which the same process goes on."""
    method, second = (make_method(THREE, coreset_fraction=0.05) for _ in range(2))
    train = features_for(method, 1)
    method.fit(train, NOTHING, seed=0)
    method.save(tmp_path)

    def work() -> None:
        if step == "fit":
            second.fit(train, NOTHING, seed=0)
        else:
            second.load(tmp_path)

    taken = limits.anonymous_memory()
    # nothing moves between the complaint and the second try
    monkeypatch.setattr(limits, "_taken", lambda: taken)
    try:
        limits.set_memory_limit(taken + (64 << 20), tmp_path / "work")
        with pytest.raises(UsageError, match=r"--memory-limit: \d+ MB is too low.*at least \d+ MB") as error:
            work()
        assert not hasattr(second, "banks_")
        limits.set_memory_limit(limits.parse_memory(str(error.value).split("at least ")[1]), tmp_path / "work")
        work()
    finally:
        limits.set_memory_limit(None)
    np.testing.assert_array_equal(second.banks_["points"].rows_, method.banks_["points"].rows_)


def test_zero_rows_are_removed_for_the_projection(make_method: Make, features_for: Features) -> None:
    method = make_method("point_mae", rm_zero_for_project=True)
    train = features_for(method, 2)
    filled = sum(int((point_patches(sample) != 0).all(axis=1).sum()) for sample in train)
    method.fit(train, NOTHING, seed=0)
    rows = method.banks_["points"].rows_
    assert len(rows) == int(0.1 * filled) + 1
    assert (rows[:-1] != 0).all()
    assert not rows[-1].any()
    method = make_method("point_mae")
    method.fit(train, NOTHING, seed=0)
    assert len(method.banks_["points"].rows_) == int(0.1 * 2 * 3136)


def test_bank_without_any_filled_row_is_the_zero_row() -> None:
    config = M3DMConfig(variant="point_mae", rm_zero_for_project=True, norm="per_bank")
    (plan,) = plan_banks(config, {"points": (lambda: iter([np.empty((0, 3), np.float32)]), 1)})
    assert (plan.kept, plan.mean, plan.std) == (0, 0.0, 1.0)


def test_sample_limits(make_method: Make, features_for: Features) -> None:
    method = make_method(THREE, coreset_fraction=1.0, max_sample=2, asy_memory_bank=1)
    train = features_for(method, 4)
    method.fit(train, NOTHING, seed=0)
    # the published loop takes one sample more than it is told
    sizes = {name: size.rows for name, size in method.banks().items()}
    assert sizes == {"points": 3136 + 1, "rgb": 3 * 784, "fused": 3136}
    exact = make_method("dino", coreset_fraction=1.0, max_sample=2, max_sample_extra=False)
    exact.fit(train, NOTHING, seed=0)
    assert exact.banks()["rgb"].rows == 2 * 784


def test_projections_share_one_stream(make_method: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Points, RGB and fused bank draw from one stream in turn, or each from `random_state` when that is set."""
    from mmad_cli.memory import MemoryBank

    streams: list[tuple[int, np.random.RandomState]] = []
    original = MemoryBank.fit

    def fit(self: Any, blocks: Any, rows: int, channels: int, random_state: Any = None, **others: Any) -> Any:
        streams.append((channels, random_state))
        return original(self, blocks, rows, channels, random_state=random_state, **others)

    monkeypatch.setattr(MemoryBank, "fit", fit)
    method = make_method(THREE, coreset_fraction=0.01)
    train = GeneratedFeatures([generated_sample(method.features(), "train/good/000")])
    method.fit(train, NOTHING, seed=7)
    assert [channels for channels, _ in streams] == [6, 6, 12]
    assert len({id(stream) for _, stream in streams}) == 1
    streams.clear()
    make_method(THREE, coreset_fraction=0.01, random_state=0).fit(train, NOTHING, seed=7)
    assert len({id(stream) for _, stream in streams}) == 3


def test_added_scores_are_the_sum_of_both_banks(make_method: Make, features_for: Features) -> None:
    method = make_method("dino+point_mae+add", coreset_fraction=0.02)
    method.fit(features_for(method, 2), NOTHING, seed=0)
    sample = features_for(method, 1, "test")[0]
    scores = method.bank_scores(sample)
    prediction = method.predict(sample)
    assert prediction.image_score == pytest.approx(scores[0].image_score + scores[1].image_score)
    np.testing.assert_allclose(prediction.anomaly_map, scores[0].anomaly_map + scores[1].anomaly_map)


def test_decision_fusion_is_an_inner_product_with_the_lambdas(make_method: Make, features_for: Features) -> None:
    method = make_method("dino+point_mae", coreset_fraction=0.02, rgb_s_lambda=0.3, rgb_smap_lambda=0.2)
    method.fit(features_for(method, 2), NOTHING, seed=0)
    sample = features_for(method, 1, "test")[0]
    points, rgb = method.bank_scores(sample)
    fusion, prediction = method.fusion_, method.predict(sample)
    expected = fusion.image[0] * points.image_score + fusion.image[1] * 0.3 * rgb.image_score
    assert prediction.image_score == pytest.approx(expected, rel=1e-6)
    joined = fusion.pixel[0] * points.anomaly_map + fusion.pixel[1] * 0.2 * rgb.anomaly_map
    np.testing.assert_allclose(prediction.anomaly_map, joined, rtol=1e-5)


def test_decision_fusion_learns_from_the_validation_split(make_method: Make, features_for: Features) -> None:
    method = make_method("dino+point_mae", coreset_fraction=0.02, dlf_fit="validation")
    train, validation = features_for(method, 2), features_for(method, 2, "validation")
    assert method.needs_validation
    method.fit(train, validation, seed=0)
    learned = method.fusion_.image
    with pytest.warns(UserWarning, match="no validation samples"):
        method.fit(train, NOTHING, seed=0)
    fallen_back = method.fusion_.image
    from_train = make_method("dino+point_mae", coreset_fraction=0.02)
    assert not from_train.needs_validation
    from_train.fit(train, validation, seed=0)
    np.testing.assert_array_equal(fallen_back, from_train.fusion_.image)
    assert not np.array_equal(learned, fallen_back)


def test_fixed_weights_learn_nothing(make_method: Make, features_for: Features) -> None:
    """For a few shots: the weights, with which scores and maps are multiplied before, are taken once more."""
    settings = {"coreset_fraction": 0.02, "dlf_fit": "fixed", "rgb_s_lambda": 0.2, "xyz_smap_lambda": 3.0}
    method = make_method("dino+point_mae", **settings)
    assert not method.needs_validation
    method.fit(features_for(method, 1), NOTHING, seed=0)
    np.testing.assert_array_equal(method.fusion_.image, [1.0, 0.2])
    np.testing.assert_array_equal(method.fusion_.pixel, [3.0, 0.1])
    (sample,) = features_for(method, 1, "test")
    points, rgb = method.bank_scores(sample)
    predicted = method.predict(sample)
    assert predicted.image_score == pytest.approx(points.image_score + 0.04 * rgb.image_score, rel=1e-6)
    joined = 9 * points.anomaly_map + 0.01 * rgb.anomaly_map
    np.testing.assert_allclose(predicted.anomaly_map, joined, rtol=1e-5)


def test_full_banks_do_not_lose_the_scores(make_method: Make, features_for: Features) -> None:
    """With all rows kept, training samples score exactly 0 and there is nothing to learn from."""
    method = make_method("dino+point_mae", coreset_fraction=1.0, distances="direct")
    with pytest.warns(UserWarning, match="fixed weights"):
        method.fit(features_for(method, 1), NOTHING, seed=0)
    np.testing.assert_array_equal(method.fusion_.image, [1.0, 0.1])
    assert method.predict(features_for(method, 1, "test")[0]).image_score > 0


def test_full_banks_teach_the_rounding_of_published_distances(make_method: Make, features_for: Features) -> None:
    method = make_method("dino+point_mae", coreset_fraction=1.0)
    train = features_for(method, 1)
    with pytest.warns(UserWarning, match="rounding noise"):
        method.fit(train, NOTHING, seed=0)
    assert (method.fusion_.image > 0).all() and (method.fusion_.image < 0.01).all()
    # the point features have few channels, and the noise grows with them
    assert 0 < method.bank_scores(train[0])[1].anomaly_map.max() < 0.1
    assert method.predict(features_for(method, 1, "test")[0]).image_score > 0


@pytest.mark.parametrize(("recipe", "distances"), [("official", "expanded"), ("corrected", "direct")])
def test_distances_of_the_recipes(make_method: Make, recipe: str, distances: str) -> None:
    assert make_method(recipe=recipe).config.distances == distances


def test_progress_is_one_count(make_method: Make, features_for: Features) -> None:
    method = make_method(THREE, coreset_fraction=0.02)
    told: list[tuple[int, int]] = []
    method.fit(features_for(method, 2), NOTHING, seed=0, progress=lambda done, total: told.append((done, total)))
    assert len({total for _, total in told}) == 1
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == told[-1][1]


def test_trained_fusion_block_passes_the_common_checks() -> None:
    settings = {"uff_steps": 2, "uff_batch": 2, "coreset_fraction": 0.02}
    check_method(get_method("m3dm"), variant="fusion", recipe="corrected", settings=settings)


def test_official_training_of_the_block_uses_scrambled_pairs(make_method: Make, features_for: Features) -> None:
    method = make_method("fusion", uff="retrained")
    sample = features_for(method, 1)[0]
    points, rgb = method._training_pair(sample)
    tokens = sample["rgb"]["tokens"]
    np.testing.assert_array_equal(rgb.numpy()[800], tokens[(4 * (800 - 784) + 1) % 784])
    aligned = make_method("fusion", uff="retrained", uff_pairs="aligned")._training_pair(sample)[1]
    np.testing.assert_array_equal(aligned.numpy()[56 + 3], tokens[1])
    assert points.shape == (3136, 6)


def test_shared_training_is_declared_where_it_is_needed(make_method: Make) -> None:
    for variant in PARTS:
        for source in ("released", "retrained", "concat"):
            method = make_method(variant, uff=source)
            fuses = "fused" in PARTS[variant]
            assert isinstance(method, SharedTraining)
            assert method.needs_shared() == (fuses and source == "retrained")
            assert method.weights_names() == (["m3dm_uff"] if fuses and source == "released" else [])


def test_block_that_is_not_trained_is_an_error(make_method: Make, features_for: Features, tmp_path: Path) -> None:
    method = make_method("fusion", uff="retrained")
    with pytest.raises(RuntimeError, match="fit_shared"):
        method.fit(features_for(method, 1), NOTHING, seed=0)
    with pytest.raises(RuntimeError, match="fit_shared"):
        method.save_shared(tmp_path)
    with pytest.raises(DataError, match="no training samples"):
        method.fit_shared({"one": NOTHING}, seed=0, folder=tmp_path)


def test_missing_published_block_says_how_to_get_it(make_method: Make, features_for: Features) -> None:
    method = make_method("fusion", uff="released")
    with pytest.raises(WeightsError, match="m3dm_uff"):
        method.fit(features_for(method, 1), NOTHING, seed=0)


def test_block_made_for_other_channels_is_an_error(
    make_method: Make, features_for: Features, weights: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMAD_WEIGHTS", str(weights("m3dm_uff")))
    method = make_method("fusion", uff="released")
    with pytest.raises(
        UsageError, match=r"rgb_backbone=vit_base_patch8_224\.dino: .* 6 channels, .* takes 768.*concat"
    ):
        method.fit(features_for(method, 1), NOTHING, seed=0)
    sample = features_for(method, 1)[0]
    wide = {**sample["rgb"], "tokens": np.ones((784, 768), np.float32)}
    with pytest.raises(DataError, match="takes 1152 point channels, the features have 6"):
        method.fit(GeneratedFeatures([GeneratedSample(sample.id, {**sample.arrays, "rgb": wide})]), NOTHING, seed=0)


@pytest.mark.parametrize(("count", "grid"), [(700, (28, 25)), (700, (28, 28)), (784, (56, 14))])
def test_rgb_tokens_that_are_no_square_grid_are_an_error(make_method: Make, count: int, grid: tuple[int, int]) -> None:
    rgb = {"tokens": np.ones((count, 4), np.float32), "grid": np.array(grid, np.int32)}
    with pytest.raises(DataError, match=rf"train/good/000: {count} RGB tokens on a grid of {grid[0]} x {grid[1]}"):
        sample = GeneratedSample("train/good/000", {"rgb": rgb})
        make_method("dino").fit(GeneratedFeatures([sample]), NOTHING, seed=0)


def with_grid(side: int) -> Callable[..., Any]:
    """Generated features whose RGB tokens are on side x side."""

    def make(specs: Mapping[str, Any], sample_id: str) -> Any:
        arrays = make_features(specs, sample_id)
        if "rgb" in arrays:
            tokens = np.resize(arrays["rgb"]["tokens"], (side * side, 6))
            # repeated tokens must not make equal rows
            tokens = (tokens * np.linspace(1, 2, side * side, dtype=np.float32)[:, None]).astype(np.float32)
            arrays["rgb"] = {"tokens": tokens, "grid": np.array([side, side], np.int32)}
        return arrays

    return make


@pytest.mark.parametrize(("variant", "side"), [("dino", 14), ("dino", 64), (THREE, 37)])
def test_other_grids_pass_the_common_checks(variant: str, side: int) -> None:
    settings = {"uff": "concat", "coreset_fraction": 0.02}
    check_method(get_method("m3dm"), with_grid(side), variant=variant, settings=settings)


def test_banks_of_another_grid(make_method: Make) -> None:
    method = make_method(THREE, coreset_fraction=1.0, norm="per_bank", zero_row="filtered")
    train = [generated_sample(method.features(), f"train/good/{i}", with_grid(37)) for i in range(2)]
    with pytest.warns(UserWarning, match="rounding noise"):
        method.fit(GeneratedFeatures(train), NOTHING, seed=0)
    sizes = {name: size.rows for name, size in method.banks().items()}
    assert (sizes["rgb"], sizes["fused"]) == (2 * 37 * 37, 2 * 3136)
    # patch (1, 0) of 56 x 56 averages the cells of rows 0 and 1 in column 0: floor(37 / 56) to ceil(74 / 56) - 1
    tokens = train[0]["rgb"]["tokens"]
    fused = method._rows("fused", train[0])
    np.testing.assert_allclose(fused[56, 6:], (tokens[0] + tokens[37]) / 2, rtol=1e-5)


def test_scrambled_pairs_exist_for_the_published_grid_only(make_method: Make) -> None:
    method = make_method("fusion", uff="retrained", rgb_size=112)
    sample = generated_sample(method.features(), "train/good/0", with_grid(14))
    with pytest.raises(UsageError, match=r"uff_pairs=scrambled.*28 x 28.*rgb_size=112 gives 14 x 14.*aligned"):
        method.fit_shared({"one": GeneratedFeatures([sample])}, seed=0)
    aligned = make_method("fusion", uff="retrained", rgb_size=112, uff_pairs="aligned")
    points, rgb = aligned._training_pair(sample)
    assert (len(points), len(rgb)) == (3136, 3136)
    np.testing.assert_array_equal(rgb.numpy()[56 * 5 + 9], sample["rgb"]["tokens"][14 * 1 + 2])


def test_vit_of_another_patch_size_from_image_to_map(
    make_method: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A ViT of 16-pixel patches at 160 pixels: 10 x 10 tokens, from scans of yet another size."""
    import torch
    from safetensors.torch import save_file

    from mmad_cli.backbones import create
    from mmad_cli.backbones._timm import import_timm
    from mmad_cli.backbones.weights import import_file

    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    monkeypatch.setenv("MMAD_WEIGHTS", str(tmp_path / "weights"))
    torch.manual_seed(0)
    save_file(import_timm().create_model(name, pretrained=False).state_dict(), tmp_path / "random.safetensors")
    import_file(name, tmp_path / "random.safetensors")
    method = make_method("dino", rgb_backbone=name, rgb_size=160)
    random = np.random.default_rng(0)
    scans = [
        Sample(
            "one",
            "train",
            "good",
            f"{i:03d}",
            random.integers(0, 256, (120, 90, 3), np.uint8),
            np.ones((120, 90, 3), np.float32),
            np.zeros((120, 90), bool),
        )
        for i in range(3)
    ]
    arrays = create(method.features()["rgb"]).extract(scans)
    samples = [GeneratedSample(scan.id, {"rgb": one}) for scan, one in zip(scans, arrays, strict=True)]
    method.fit(GeneratedFeatures(samples[:2]), NOTHING, seed=0)
    assert (method.banks()["rgb"].rows, method.banks()["rgb"].dim) == (20, 192)
    bank = method.banks_["rgb"]
    patches = bank.normalise(arrays[2]["tokens"])
    nearest = np.linalg.norm(patches[:, None] - bank.rows_[None], axis=2).min(axis=1)
    prediction = method.predict(samples[2])
    assert prediction.anomaly_map.shape == (224, 224)
    step = 2 * nearest.max() / 255
    np.testing.assert_allclose(prediction.anomaly_map, blur_pillow8(upsample(nearest, 10)), atol=step)


def test_state_of_another_variant_is_refused(make_method: Make, features_for: Features, tmp_path: Path) -> None:
    method = make_method("dino+point_mae+add", coreset_fraction=0.02)
    method.fit(features_for(method, 1), NOTHING, seed=0)
    method.save(tmp_path)
    with pytest.raises(DataError, match="fit again"):
        make_method("dino+point_mae").load(tmp_path)
    with pytest.raises(RuntimeError, match="not fitted"):
        make_method("dino").banks()


def test_memory_of_244_samples_is_estimated_below_six_gigabytes(make_method: Make) -> None:
    estimate = make_method(THREE).memory_estimate(244)
    # the projected rows of the point bank alone
    assert 765184 * 334 * 4 < estimate < 6e9
    assert make_method(THREE).memory_estimate(401) == make_method(THREE).memory_estimate(5000)
    small = make_method("dino", rgb_backbone="vit_small_patch14_dinov2.lvd142m")
    large = make_method("dino", rgb_backbone="vit_small_patch14_dinov2.lvd142m", rgb_size=518)
    assert small.memory_estimate(244) < large.memory_estimate(244)


@pytest.mark.parametrize(
    "settings",
    [{}, {"coreset_count": "own"}, {"coreset_fraction": 1.0, "dlf_fit": "fixed"}, {"asy_memory_bank": 1}],
    ids=["chained", "own", "all", "asy"],
)
def test_size_of_the_saved_state_is_estimated(
    make_method: Make, features_for: Features, settings: dict[str, Any]
) -> None:
    method = make_method(THREE, **settings)
    assert isinstance(method, DiskEstimate)
    method.fit(features_for(method, 2), NOTHING, seed=0)
    saved = {name: bank.rows_.shape[0] for name, bank in method.banks_.items()}
    # generated features have fewer channels, so the rows are compared; the zero row is not counted
    rows = {"points": saved["points"] - 1, "rgb": saved["rgb"], "fused": saved["fused"]}
    channels = {"points": 1152, "rgb": 768, "fused": 1920}
    expected = sum(count * (4 * channels[name] + 8) for name, count in rows.items())
    assert method.disk_estimate(2) == expected
    network = make_method(THREE, **settings, uff="released")
    assert network.disk_estimate(2) == expected + 4 * 15_840_896


def test_features_of_a_variant(make_method: Make) -> None:
    assert set(make_method("dino").features()) == {"rgb"}
    assert set(make_method("point_mae").features()) == {"points"}
    specs = make_method(THREE, point_backbone="point_bert", groups=256, group_size=64, point_bn="eval").features()
    assert specs["points"].backbone == "point_bert"
    assert {"groups": 256, "group_size": 64, "point_bn": "eval"}.items() <= specs["points"].params.items()
    assert specs["rgb"].params["outputs"] is None
    assert specs["rgb"].params["size"] == 224
    assert make_method("dino", rgb_size=518).features()["rgb"].params["size"] == 518
    half = make_method(THREE, precision="bfloat16").features()
    assert {spec.params["precision"] for spec in specs.values()} == {"float32"}
    assert {spec.params["precision"] for spec in half.values()} == {"bfloat16"}
    corrected = make_method(THREE, "corrected").features()
    assert corrected["points"].params["xyz_resize"] == "center"
    assert corrected["points"].params["idw"] == "direct"
    assert corrected["rgb"].params["norm"] == "model"


@pytest.mark.parametrize("field", ["coreset_fraction=0", "ocsvm_nu=2", "zero_row=maybe", "fps_skip=1"])
def test_settings_that_cannot_be_are_usage_errors(field: str) -> None:
    name, value = field.split("=")
    with pytest.raises(UsageError, match=name):
        build_config(get_method("m3dm"), None, "official", {name: value})


def test_building_the_method_imports_no_torch() -> None:
    code = (
        "import sys; from mmad_cli.methods import get_method, build_config; d = get_method('m3dm'); "
        "m = d.build(build_config(d, None, 'official', {}), 'cpu'); m.features(); m.weights_names(); m.needs_shared(); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'sklearn', 'faiss', 'open3d')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
