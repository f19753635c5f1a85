"""PatchCore step by step against independent literal forms; the published code has no stored arrays here."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from mmad_cli.errors import UsageError
from mmad_cli.methods import build, build_config, get_method
from mmad_cli.methods.checks import GeneratedFeatures
from mmad_cli.methods.patchcore import locally_aware_patches, reweighting, unfold

PATCHCORE = get_method("patchcore")


def make(recipe="official", **settings):
    return build(PATCHCORE, build_config(PATCHCORE, None, recipe, settings))


def literal_patches(maps, pretrain_dim, target_dim):
    """The description in its own order: unfold, interpolate every plane, pool per layer, stack, pool."""
    reference = maps[0].shape[1]
    layers = []
    for one in maps:
        channels, side, _ = one.shape
        tensor = torch.from_numpy(one).double()[None]
        planes = F.unfold(tensor, 3, padding=1).reshape(channels * 9, 1, side, side)
        if side != reference:
            planes = F.interpolate(planes, size=(reference, reference), mode="bilinear", align_corners=False)
        flat = planes.reshape(channels * 9, reference * reference).T
        layers.append(F.adaptive_avg_pool1d(flat[None], pretrain_dim)[0])
    stacked = torch.stack(layers, dim=1).reshape(reference * reference, -1)
    return F.adaptive_avg_pool1d(stacked[None], target_dim)[0].numpy()


def random_maps(*shapes):
    random = np.random.default_rng(0)
    return [random.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize(
    ("shapes", "pretrain_dim", "target_dim"),
    [
        ([(512, 28, 28), (1024, 14, 14)], 1024, 1024),
        ([(128, 28, 28), (256, 14, 14)], 1024, 1024),
        ([(6, 56, 56), (12, 28, 28), (24, 14, 14)], 40, 30),
        ([(20, 28, 28)], 64, 64),
        ([(5, 7, 7), (3, 3, 3)], 100, 7),
    ],
)
def test_patches_equal_the_literal_order(shapes, pretrain_dim, target_dim):
    maps = random_maps(*shapes)
    patches = locally_aware_patches(maps, pretrain_dim, target_dim)
    assert patches.dtype == np.float32
    np.testing.assert_allclose(patches, literal_patches(maps, pretrain_dim, target_dim), atol=2e-6)


def test_unfold_equals_torch():
    (one,) = random_maps((4, 9, 7))
    expected = F.unfold(torch.from_numpy(one)[None], 3, padding=1)[0].numpy()
    np.testing.assert_array_equal(unfold(one), expected)


def test_unfold_takes_odd_windows_only():
    with pytest.raises(ValueError, match="size must be odd, got 2"):
        unfold(np.zeros((1, 4, 4), np.float32), 2)


def test_no_maps_is_an_error():
    with pytest.raises(ValueError, match="at least one feature map"):
        locally_aware_patches([])


SMALL = {"pretrain_dim": 20, "target_dim": 16, "projection_dim": 8}


def literal_prediction(bank, patches, neighbours=1):
    squared = ((patches[:, None].astype(np.float64) - bank[None].astype(np.float64)) ** 2).sum(-1)
    scores = np.sort(squared, axis=1)[:, :neighbours].mean(axis=1)
    patch_map = torch.from_numpy(scores.reshape(1, 1, 28, 28))
    full = F.interpolate(patch_map, size=(224, 224), mode="bilinear", align_corners=False)[0, 0].numpy()
    return scores, gaussian_filter(full, sigma=4)


@pytest.mark.parametrize("neighbours", [1, 5])
def test_scores_and_maps_by_brute_force(network_set, neighbours):
    method = make(neighbours=neighbours, **SMALL)
    train, test = network_set({2: 6, 3: 8}, 3), network_set({2: 6, 3: 8}, 2, "test")
    method.fit(train, GeneratedFeatures([]), seed=0)
    bank = method.bank_.rows_
    all_rows = np.concatenate([method.patches(sample) for sample in train])
    assert bank.shape == (int(0.1 * 3 * 784), 16)
    # the bank keeps rows of the training samples, not their projections
    assert all((all_rows == row).all(axis=1).any() for row in bank)
    for sample in test:
        prediction = method.predict(sample)
        scores, anomaly_map = literal_prediction(bank, method.patches(sample), neighbours)
        assert prediction.image_score == pytest.approx(scores.max(), rel=1e-4)
        np.testing.assert_allclose(prediction.anomaly_map, anomaly_map, rtol=1e-3, atol=1e-5)


def test_plain_distance_is_the_root_of_the_squared(network_set):
    train, test = network_set({2: 6, 3: 8}, 2), network_set({2: 6, 3: 8}, 1, "test")
    scores = []
    for distance in ("squared", "plain"):
        method = make(distance=distance, **SMALL)
        method.fit(train, GeneratedFeatures([]), seed=0)
        scores.append(method.predict(test[0]).image_score)
    assert scores[0] == pytest.approx(scores[1] ** 2, rel=1e-5)


def test_identity_keeps_every_row_and_training_images_score_zero(network_set):
    method = make(coreset="identity", **SMALL)
    train = network_set({2: 6, 3: 8}, 2)
    method.fit(train, GeneratedFeatures([]), seed=0)
    assert method.banks()["patches"].rows == 2 * 784
    prediction = method.predict(train[1])
    assert prediction.image_score == 0
    assert not prediction.anomaly_map.any()


@pytest.mark.parametrize("coreset", ["approximate", "greedy", "random"])
def test_selection_by_seed(network_set, coreset):
    train = network_set({2: 6, 3: 8}, 2)
    rows = []
    for seed in (0, 0, 1):
        method = make(coreset=coreset, **SMALL)
        method.fit(train, GeneratedFeatures([]), seed=seed)
        rows.append(method.bank_.rows_)
    np.testing.assert_array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[0], rows[2])
    assert len(np.unique(rows[0], axis=0)) == len(rows[0])


def test_three_outputs_use_the_grid_of_the_first(network_set):
    method = make(rgb_outputs=[1, 2, 3], coreset_fraction=0.01, **SMALL)
    method.fit(network_set({1: 3, 2: 4, 3: 5}, 1), GeneratedFeatures([]), seed=0)
    assert method.banks()["patches"].rows == 31
    prediction = method.predict(network_set({1: 3, 2: 4, 3: 5}, 1, "test")[0])
    assert prediction.anomaly_map.shape == (224, 224)


def test_reweighting_is_the_equation_of_the_paper():
    distances = np.array([2.0, 2.5, 4.0])
    expected = 1 - np.exp(2.0) / np.exp(distances).sum()
    assert reweighting(2.0, distances) == pytest.approx(expected)
    # the plain form overflows here
    assert reweighting(2000.0, np.array([2000.0, 2000.0])) == pytest.approx(0.5)
    assert 0 <= reweighting(0.0, np.array([0.0, 3000.0])) <= 1


def test_reweighted_image_score(network_set):
    train, test = network_set({2: 6, 3: 8}, 2), network_set({2: 6, 3: 8}, 1, "test")
    method = make(scoring="reweighted", distance="plain", **SMALL)
    method.fit(train, GeneratedFeatures([]), seed=0)
    patches, bank = method.patches(test[0]).astype(np.float64), method.bank_.rows_.astype(np.float64)
    distances = np.linalg.norm(patches[:, None] - bank[None], axis=-1)
    worst = distances.min(axis=1).argmax()
    nearest = distances[worst].argmin()
    around = np.argsort(np.linalg.norm(bank - bank[nearest], axis=1), kind="stable")[:3]
    weight = 1 - np.exp(distances[worst, nearest]) / np.exp(distances[worst, around]).sum()
    expected = weight * distances[worst, nearest]
    assert method.predict(test[0]).image_score == pytest.approx(expected, rel=1e-4)


def test_recipes_differ_in_the_view():
    assert make().view == "crop"
    assert make().features()["rgb"].view == "crop"
    assert make("corrected").view == "resize"
    assert make("corrected").features()["rgb"].view == "resize"
    assert make().features()["rgb"].weights_names() == ["wide_resnet50_2.tv_in1k"]


def test_memory_estimate_of_the_published_run():
    # 784 rows per image projected to 128 channels, a tenth of them kept with 1024
    rows = 784 * 244
    assert make().memory_estimate(244) == pytest.approx(4 * (1.3 * rows * 128 + 0.2 * rows * 1024), rel=0.01)


def test_a_single_output_can_be_set():
    assert make(rgb_outputs=2).config.rgb_outputs == (2,)


@pytest.mark.parametrize(
    "settings", [{"coreset_fraction": 0}, {"neighbours": 0}, {"view": "middle"}, {"rgb_outputs": []}]
)
def test_impossible_settings_are_usage_errors(settings):
    with pytest.raises(UsageError, match=f"--set {next(iter(settings))}"):
        make(**settings)
