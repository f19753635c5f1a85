"""BTF: parts of the feature, scores against the stored run of the published code, recipes."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmad_cli.backbones import create
from mmad_cli.errors import DataError
from mmad_cli.methods import build, build_config, get_method
from mmad_cli.methods.btf import hog_patches, raw_block_patches, raw_row_patches, sift_patches
from mmad_cli.methods.checks import GeneratedFeatures
from mmad_cli.types import Sample

GOLDEN = Path(__file__).parents[1] / "golden"
BTF_METHOD = get_method("btf")
TRAIN, TEST = range(5), range(5, 13)


def make(variant=None, recipe="official", **settings):
    return build(BTF_METHOD, build_config(BTF_METHOD, variant, recipe, settings))


def load(name):
    with np.load(GOLDEN / name) as arrays:
        return {key: arrays[key] for key in arrays.files}


@pytest.fixture(scope="module")
def golden():
    return load("btf_fpfh.npz")


@pytest.fixture(scope="module")
def masks():
    return load("inputs.npz")["gt"][list(TEST)].astype(bool)


@pytest.fixture(scope="module")
def scans():
    inputs = load("inputs.npz")
    return [
        Sample(
            category="generated",
            split=str(inputs["split"][i]),
            defect=str(inputs["kind"][i]),
            stem=str(inputs["name"][i]),
            rgb=inputs["rgb"][i],
            xyz=inputs["xyz"][i],
            mask=inputs["gt"][i].astype(bool),
        )
        for i in range(13)
    ]


@pytest.fixture(scope="module")
def clouds(scans):
    """FPFH of the 13 scans as a method reads them."""
    from mmad_cli.methods.checks import GeneratedSample

    backbone = create(make("fpfh").features()["fpfh"])
    features = backbone.extract(scans)
    return [GeneratedSample(scan.id, {"fpfh": arrays}) for scan, arrays in zip(scans, features, strict=True)]


def fitted(clouds, **settings):
    method = make("fpfh", **settings)
    method.fit(GeneratedFeatures(clouds[:5]), GeneratedFeatures([]), seed=0)
    return method


@pytest.mark.slow
class TestStoredRun:
    """End to end on the generated scans, from the cloud to the metrics."""

    def test_patches(self, clouds, golden):
        patches = make("fpfh").patches(clouds[0])
        scale = np.abs(golden["fpfh/patch"]).max()
        np.testing.assert_allclose(patches, golden["fpfh/patch"], rtol=0, atol=1e-6 * scale)

    def test_bank_rows(self, clouds, golden):
        rows = np.concatenate([make("fpfh").patches(cloud) for cloud in clouds[:5]])
        assert list(rows.shape) == golden["coreset_from_shape"].tolist()
        scale = np.abs(golden["bank"]).max()
        np.testing.assert_allclose(rows[::8], golden["bank_before_stride8"], rtol=0, atol=1e-6 * scale)
        np.testing.assert_allclose(rows[golden["coreset_idx"]], golden["bank"], rtol=0, atol=1e-6 * scale)

    def test_scores_with_the_stored_selection(self, clouds, golden):
        from mmad_cli.memory import MemoryBank

        method = make("fpfh")
        rows = np.concatenate([method.patches(cloud) for cloud in clouds[:5]])
        kept = rows[golden["coreset_idx"]]
        method.bank_ = MemoryBank.from_rows(kept)
        for place, cloud in enumerate(clouds[5:]):
            prediction = method.predict(cloud)
            assert prediction.image_score == pytest.approx(golden["image_scores"][place], rel=1e-3)
            maximum = golden["map_max"][place]
            assert prediction.anomaly_map.max() == pytest.approx(maximum, rel=1e-3)
            difference = np.abs(prediction.anomaly_map[::4, ::4] - golden["map_stride4"][place])
            assert difference.max() <= 2 * maximum / 255

    def test_own_selection(self, clouds, golden, masks):
        from mmad_cli.metrics import aupro, image_auroc, pixel_auroc

        method = fitted(clouds)
        assert method.banks()["patches"].rows == 392
        predictions = [method.predict(cloud) for cloud in clouds[5:]]
        scores = np.array([prediction.image_score for prediction in predictions])
        maps = np.stack([prediction.anomaly_map for prediction in predictions])
        np.testing.assert_allclose(scores, golden["image_scores"], rtol=0.05)
        labels = golden["image_labels"]
        assert image_auroc(labels, scores) == pytest.approx(float(golden["image_rocauc"]), abs=0.02)
        assert pixel_auroc(masks, maps) == pytest.approx(float(golden["pixel_rocauc"]), abs=0.02)
        assert aupro(masks, maps, 0.3, 100) == pytest.approx(float(golden["au_pro"]), abs=0.02)

    def test_published_selection_is_reproduced(self, clouds, golden):
        picks = fitted(clouds).bank_.picks_
        agree = np.isin(picks, golden["coreset_idx"]).mean()
        assert agree > 0.95

    def test_stable_form_is_the_same_score(self, clouds):
        exact, stable = fitted(clouds), make("fpfh", score_form="stable")
        stable.bank_ = exact.bank_
        for cloud in clouds[5:]:
            score = stable.predict(cloud).image_score
            assert score == pytest.approx(exact.predict(cloud).image_score, rel=1e-6)

    def test_corrected_switches_keep_the_metrics(self, clouds, golden, masks):
        """A selection in float32 moves single image scores through their weight, but not what they rank."""
        from mmad_cli.metrics import aupro, image_auroc

        method = fitted(clouds, coreset_dtype="float32", blur="float", score_form="stable")
        predictions = [method.predict(cloud) for cloud in clouds[5:]]
        scores = np.array([prediction.image_score for prediction in predictions])
        maps = np.stack([prediction.anomaly_map for prediction in predictions])
        assert image_auroc(golden["image_labels"], scores) == pytest.approx(1.0, abs=0.02)
        assert aupro(masks, maps, 0.3, 100) == pytest.approx(float(golden["au_pro"]), abs=0.02)


def disc_cloud(side=224, radius=50):
    y, x = np.mgrid[:side, :side] - side / 2
    return np.flatnonzero(x * x + y * y < radius * radius).astype(np.int32)


def cloud_sample(sample_of, name, seed, count=33):
    pixel = disc_cloud()
    points = np.random.default_rng(seed).random((len(pixel), count)).astype(np.float32) * 100
    return sample_of(name, {"fpfh": {"points": points, "pixel": pixel}})


def test_weight_is_the_published_formula(sample_of):
    """Image score from the distances by hand, largest patch distance re-weighted by the nearest row's neighbours."""
    method = make("fpfh")
    train = GeneratedFeatures([cloud_sample(sample_of, f"train/good/{i}", i) for i in range(2)])
    method.fit(train, GeneratedFeatures([]), seed=0)
    test = cloud_sample(sample_of, "test/good/0", 9)
    bank, patches = method.bank_.rows_.astype(np.float64), method.patches(test).astype(np.float64)
    distances = np.linalg.norm(patches[:, None] - bank[None], axis=-1)
    worst = distances.min(axis=1).argmax()
    largest, nearest = distances[worst].min(), distances[worst].argmin()
    around = np.argsort(np.linalg.norm(bank - bank[nearest], axis=1), kind="stable")[1:3]
    weight = 1 - np.exp(largest / 33**0.5) / np.exp(distances[worst, around] / 33**0.5).sum()
    assert method.predict(test).image_score == pytest.approx(weight * largest, rel=1e-4)


def test_rgb_and_fpfh_side_by_side(sample_of, network_set):
    rgb = network_set({2: 5, 3: 7}, 1)[0]
    cloud = cloud_sample(sample_of, "train/good/000", 1)
    both = sample_of("train/good/000", {**rgb.arrays, **cloud.arrays})
    patches = make().patches(both)
    assert patches.shape == (784, 5 + 7 + 33)
    np.testing.assert_array_equal(patches[:, :12], make("rgb").patches(rgb))
    np.testing.assert_array_equal(patches[:, 12:], make("fpfh").patches(cloud))
    tensors = [torch.from_numpy(rgb["rgb"][name].copy())[None] for name in ("out2", "out3")]
    literal = [F.adaptive_avg_pool2d(F.avg_pool2d(one, 3, 1), 28)[0].flatten(1).T for one in tensors]
    np.testing.assert_allclose(patches[:, :12], torch.cat(literal, 1).numpy(), atol=1e-6)


def test_projected_features_fit_and_repeat(network_set):
    """1536 channels: the coreset is chosen on projected rows, the bank keeps all channels."""
    train = network_set({2: 200, 3: 150}, 2)
    rows = []
    for _ in range(2):
        method = make("rgb", coreset_dtype="float32", coreset_fraction=0.02)
        method.fit(train, GeneratedFeatures([]), seed=0)
        rows.append(method.bank_.rows_)
    assert rows[0].shape == (31, 350)
    np.testing.assert_array_equal(rows[0], rows[1])
    np.testing.assert_array_equal(rows[0][0], method.patches(train[0])[0])


def test_raw_patches_as_published_and_as_blocks():
    z = np.arange(224 * 224, dtype=np.float32).reshape(224, 224)
    rows, blocks = raw_row_patches(z), raw_block_patches(z)
    assert rows.shape == blocks.shape == (784, 64)
    np.testing.assert_array_equal(rows[3], z[0, 192:].tolist() + z[1, :32].tolist())
    np.testing.assert_array_equal(blocks[28 * 2 + 5], z[16:24, 40:48].ravel())


def test_hog_of_a_ramp_has_one_orientation():
    ramp = np.repeat(np.arange(224, dtype=np.float32)[None], 224, axis=0)
    patches = hog_patches(ramp)
    assert patches.shape == (784, 8)
    middle = patches[28 * 14 + 14]
    assert np.count_nonzero(middle > 1e-3) == 1


def test_sift_is_the_descriptor_pooled():
    from kornia.feature import DenseSIFTDescriptor

    z = np.random.default_rng(0).random((224, 224)).astype(np.float32)
    with torch.inference_mode():
        maps = DenseSIFTDescriptor()(torch.from_numpy(z)[None, None])
        literal = F.adaptive_avg_pool2d(F.avg_pool2d(maps, 3, 1), 28)[0].flatten(1).T.numpy()
    patches = sift_patches(z)
    assert patches.shape == (784, 128)
    np.testing.assert_allclose(patches, literal, atol=1e-5)


@pytest.mark.parametrize("variant", ["raw", "hog", "sift"])
def test_an_empty_depth_image_names_the_sample(sample_of, variant):
    sample = sample_of("test/hole/007", {"z": {"z": np.zeros((224, 224), np.float32)}})
    with pytest.raises(DataError, match="test/hole/007: no valid 3D points"):
        make(variant).patches(sample)


def test_values_that_are_not_finite_name_the_sample(sample_of):
    points = np.full((3, 33), np.nan, np.float32)
    sample = sample_of("test/hole/007", {"fpfh": {"points": points, "pixel": np.arange(3, dtype=np.int32)}})
    with pytest.raises(DataError, match=r"test/hole/007.*not finite"):
        make("fpfh").patches(sample)


def test_features_of_another_shape_name_the_sample(sample_of):
    samples = [cloud_sample(sample_of, "train/good/0", 0), cloud_sample(sample_of, "train/good/1", 1, count=32)]
    with pytest.raises(DataError, match="train/good/1: patches have shape"):
        make("fpfh").fit(GeneratedFeatures(samples), GeneratedFeatures([]), seed=0)


def test_features_asked_for():
    both = make().features()
    assert set(both) == {"rgb", "fpfh"}
    assert both["rgb"].weights_names() == ["wide_resnet50_2.racm_in1k"]
    assert both["rgb"].params["outputs"] == [2, 3]
    assert both["fpfh"].params["normal_radius"] == pytest.approx(0.1)
    assert both["fpfh"].params["feature_radius"] == pytest.approx(0.25)
    depth = make("depth").features()["depth"]
    assert (depth.input, depth.params["norm"]) == ("depth", "none")
    assert set(make("hog").features()) == set(make("sift").features()) == {"z"}


def test_recipes_are_sets_of_switches():
    official, corrected = make().config, make(recipe="corrected").config
    changed = {name for name, value in official if getattr(corrected, name) != value}
    assert changed == {"coreset_dtype", "blur", "xyz_resize", "raw_patches", "rgb_norm", "score_form"}
    assert make(recipe="corrected").features()["fpfh"].params["xyz_resize"] == "center"


def test_memory_estimate_of_the_published_run():
    # 191 296 rows projected to 300 channels, a tenth of them kept with 1569
    rows = 784 * 244
    assert make().memory_estimate(244) == pytest.approx(4 * (1.3 * rows * 300 + 0.2 * rows * 1569), rel=0.01)


def test_depth_feature_is_the_z_image(scans):
    (features,) = create(make("raw").features()["z"]).extract(scans[:1])
    np.testing.assert_array_equal(features["z"], scans[0].xyz[..., 2])
    assert features["z"].dtype == np.float32
