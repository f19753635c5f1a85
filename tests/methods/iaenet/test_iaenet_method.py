"""The ensemble on generated features: every fusion against what it should make of the experts' scores."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mmad_cli.errors import DataError, UsageError
from mmad_cli.methods import build_config, get_method
from mmad_cli.methods.anomaly_map import blur_float, upsample
from mmad_cli.methods.checks import GeneratedFeatures, GeneratedSample, generated_sample
from mmad_cli.methods.experts import fit_normaliser
from mmad_cli.methods.iaenet.config import IAENetConfig
from mmad_cli.methods.iaenet.joiners import Importance
from mmad_cli.methods.iaenet.method import IAENet
from mmad_cli.methods.iaenet.noise import with_noise

BASE = {
    "experts": ("image", "fpfh"),
    "rgb_backbone": "resnet18.tv_in1k",
    "rgb_outputs": (2, 3),
    "coreset_fraction": 0.02,
    "pseudo_per_sample": 1,
    "epochs": 1,
    "g2sf_epochs": 1,
    "g2sf_batch_share": 1.0,
    "g2sf_consistency_share": 0.05,
}


def data(method: IAENet, split: str, count: int) -> GeneratedFeatures:
    """The same arrays for every fusion: all have the features of the one that reads most."""
    config = method.config.model_copy(update={"variant": "iaf_s"})
    specs = {name: s for name, s in IAENet(config).features().items() if split == "train" or s.augmentation is None}
    return GeneratedFeatures([generated_sample(specs, f"{split}/good/{i:03d}") for i in range(count)])


def fitted(variant: str, **settings: object) -> IAENet:
    method = IAENet(IAENetConfig(variant=variant, **{**BASE, **settings}))  # type: ignore[arg-type]
    method.fit(data(method, "train", 2), data(method, "validation", 2), seed=0)
    return method


def unseen(method: IAENet) -> GeneratedSample:
    (sample,) = data(method, "test", 1)
    return sample  # type: ignore[return-value]


def on_one_scale(method: IAENet, sample: GeneratedSample) -> tuple[np.ndarray, np.ndarray]:
    """Scores (2, 3136) over the 99.5 % quantile of the validation foreground, by the experts' own maps; foreground."""
    experts = method.panel.experts_
    front = experts[1].cells(sample).filled
    scores = []
    for expert in experts:
        good = [expert.score_map(one)[experts[1].cells(one).filled] for one in data(method, "validation", 2)]
        level = np.quantile(np.concatenate(good).astype(np.float64), 0.995)
        scores.append(np.where(front, expert.score_map(sample) / level, 0))
    return np.stack(scores), front


@pytest.mark.parametrize("variant", ["mean", "max", "product"])
def test_rules_on_one_scale(variant: str) -> None:
    method = fitted(variant)
    sample = unseen(method)
    u, front = on_one_scale(method, sample)
    cells = {"mean": u.mean(0), "max": u.max(0), "product": u.prod(0)}[variant]
    prediction = method.predict(sample)
    np.testing.assert_allclose(
        prediction.anomaly_map, blur_float(upsample(cells.astype(np.float32), 56)), rtol=1e-4, atol=1e-5
    )
    expected = u[:, front].max(1).prod() if variant == "product" else cells[front].max()
    assert prediction.image_score == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("variant", "weights"), [("iaf_s", "softmax"), ("iaf_s", "scaled"), ("iaf_f", "sigmoid")])
def test_without_training_the_fusion_is_the_mean(variant: str, weights: str) -> None:
    method, mean = fitted(variant, epochs=0, weights=weights), fitted("mean")
    sample = unseen(method)
    one, other = method.predict(sample), mean.predict(sample)
    assert one.image_score == pytest.approx(other.image_score, rel=1e-5)
    np.testing.assert_allclose(one.anomaly_map, other.anomaly_map, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", ["iaf_s", "iaf_f"])
def test_trained_weights_join_the_scores(variant: str) -> None:
    method = fitted(variant, epochs=2, rate=1e-2)
    sample = unseen(method)
    u, front = on_one_scale(method, sample)
    fusion = method.joiner_
    assert isinstance(fusion, Importance)
    weights = fusion.weights(sample, method.panel.scan(sample))
    assert weights.shape == (front.sum(), 2)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    assert np.ptp(weights[:, 0]) > 0
    cells = np.zeros(3136)
    cells[front] = (weights * u[:, front].T).sum(1)
    prediction = method.predict(sample)
    assert prediction.image_score == pytest.approx(cells.max(), rel=1e-5)
    assert set(method.losses()) >= {"fusion/det", "fusion/str"}


def test_weights_of_a_whole_scan_are_one_set() -> None:
    method = fitted("iaf_s", level="image", rate=1e-2)
    sample = unseen(method)
    fusion = method.joiner_
    assert isinstance(fusion, Importance)
    weights = fusion.weights(sample, method.panel.scan(sample))
    assert np.ptp(weights, axis=0).max() < 1e-6
    assert weights[0, 0] != pytest.approx(0.5, abs=1e-6)


def test_an_expert_alone() -> None:
    for variant, place in (("image", 0), ("fpfh", 1)):
        method = fitted(variant, single_score="max")
        sample = unseen(method)
        front = method.panel.experts_[1].cells(sample).filled
        scores = np.where(front, method.panel.experts_[place].score_map(sample), 0)
        assert method.predict(sample).image_score == pytest.approx(scores.max(), rel=1e-5)
        # PatchCore's weight is at least a half and below 1
        reweighted = fitted(variant).predict(sample).image_score
        assert 0.5 * scores.max() <= reweighted < scores.max()
        assert method.losses() == {}
        assert not any(spec.augmentation for spec in method.features().values())


def test_one_class_weights() -> None:
    from sklearn.linear_model import SGDOneClassSVM

    method = fitted("ocsvm")
    sample = unseen(method)
    experts = method.panel.experts_
    good = list(data(method, "validation", 2))
    fronts = [experts[1].cells(one).filled for one in good]
    factors = np.array([0.1, 1.0])
    rows = [
        np.stack([e.score_map(one)[front] for e in experts], axis=1) for one, front in zip(good, fronts, strict=True)
    ]
    coefficients = [
        SGDOneClassSVM(nu=0.5, max_iter=1000, random_state=42).fit(table * factors).coef_.ravel()
        for table in (np.stack([part.max(0) for part in rows]).astype(float), np.concatenate(rows).astype(float))
    ]
    front = experts[1].cells(sample).filled
    scores = np.stack([e.score_map(sample) for e in experts]) * front * factors[:, None]
    prediction = method.predict(sample)
    assert prediction.image_score == pytest.approx(float(coefficients[0] @ scores.max(1)), rel=1e-3)
    expected = blur_float(upsample((coefficients[1] @ scores).astype(np.float32), 56))
    np.testing.assert_allclose(prediction.anomaly_map, expected, rtol=1e-2, atol=1e-4 * expected.max())


def test_aligned_maximum() -> None:
    method = fitted("aligned_max")
    sample = unseen(method)
    experts = method.panel.experts_
    front = experts[1].cells(sample).filled
    moments = []
    for expert in experts:
        good = [expert.score_map(one)[experts[1].cells(one).filled] for one in data(method, "validation", 2)]
        values = np.concatenate(good).astype(np.float64)
        moments.append((values.mean(), values.std()))
    # the 3D expert is the reference
    factor = moments[1][1] / moments[0][1]
    image, points = (np.where(front, expert.score_map(sample), 0) for expert in experts)
    cells = np.maximum(factor * (image - moments[0][0]) + moments[1][0], points)[front]
    assert method.predict(sample).image_score == pytest.approx(max(cells.max(), 0), rel=1e-4)


def test_g2sf_without_training_is_half_the_sum_in_its_units() -> None:
    method = fitted("g2sf", g2sf_epochs=0)
    sample = unseen(method)
    units = method.joiner_.units  # type: ignore[attr-defined]
    front = method.panel.experts_[1].cells(sample).filled
    maps = [expert.score_map(sample) / unit for expert, unit in zip(method.panel.experts_, units, strict=True)]
    expected = np.where(front, 0.5 * maps[0] + 0.5 * maps[1], 0).max()
    assert method.predict(sample).image_score == pytest.approx(expected, rel=1e-4)
    assert fitted("g2sf").losses()["g2sf/validation"]


def test_normalisers() -> None:
    good = np.random.default_rng(0).gamma(2, 1, (2, 500))
    for kind in ("mean", "zscore", "none"):
        method = fitted("mean", normaliser=kind)
        scales = method.joiner_.normalisers  # type: ignore[attr-defined]
        assert len(scales) == 2
        assert (scales[0].scale == 1) == (kind == "none")
    assert fit_normaliser(good[0]).scale == pytest.approx(np.quantile(good[0], 0.995))
    # undamaged patches of pseudo anomalies instead of validation samples
    method = IAENet(IAENetConfig(variant="mean", **{**BASE, "normaliser_on": "pseudo"}))  # type: ignore[arg-type]
    assert not method.needs_validation
    method.fit(data(method, "train", 2), GeneratedFeatures([]), seed=0)
    assert np.isfinite(method.predict(unseen(method)).image_score)


def test_validation_samples_are_asked_for() -> None:
    method = IAENet(IAENetConfig(variant="mean", **BASE))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="validation/good"):
        method.fit(data(method, "train", 1), GeneratedFeatures([]), seed=0)


def test_background_is_scored_where_asked_for() -> None:
    method, plain = fitted("mean", background="uniform"), fitted("mean")
    sample = unseen(method)
    assert method.predict(sample).anomaly_map[:8, :8].min() > 0
    assert plain.predict(sample).anomaly_map[:8, :8].max() == 0
    # the image score is of the foreground
    assert method.predict(sample).image_score == plain.predict(sample).image_score


class TestNoise:
    def test_it_says_nothing_and_has_the_usual_size(self) -> None:
        method = fitted("mean")
        scan = method.panel.scan(unseen(method))
        noisy = with_noise(scan, 0, "")
        np.testing.assert_array_equal(noisy.scores[1], scan.scores[1])
        assert noisy.looks[1] is scan.looks[1]
        before, after = scan.scores[0][scan.front], noisy.scores[0][scan.front]
        assert np.median(after) == pytest.approx(np.median(before), rel=0.2)
        assert abs(np.corrcoef(before, after)[0, 1]) < 0.2
        assert (np.diff(noisy.looks[0].distances, axis=1) >= -1e-6).all()
        np.testing.assert_allclose(noisy.looks[0].distances[noisy.looks[0].row, 0], after)
        assert not np.array_equal(after, with_noise(scan, 0, "1").scores[0][scan.front])
        np.testing.assert_array_equal(after, with_noise(scan, 0, "").scores[0][scan.front])
        assert not noisy.scores[0][~scan.front].any()

    def test_scans_of_other_categories_with_the_same_name_have_other_noise(self) -> None:
        method = fitted("mean")
        scan = method.panel.scan(unseen(method))
        look = scan.looks[0]
        other = replace(scan, looks=(replace(look, distances=look.distances * np.float32(2)), *scan.looks[1:]))
        first, second = (with_noise(one, 0, "").scores[0][scan.front] for one in (scan, other))
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.2

    def test_from_the_start_or_in_test_scans_only(self) -> None:
        plain, always, late = (
            fitted("mean", **settings)
            for settings in ({}, {"noise_expert": "image"}, {"noise_expert": "image", "noise_when": "test"})
        )
        scales = [method.joiner_.normalisers for method in (plain, always, late)]  # type: ignore[attr-defined]
        assert scales[0] == scales[2]
        assert scales[0][0] != scales[1][0]
        assert scales[0][1] == scales[1][1]
        sample = unseen(plain)
        assert len({method.predict(sample).image_score for method in (plain, always, late)}) == 3


class TestConfiguration:
    def test_what_the_image_expert_sees(self) -> None:
        for mode, name in {"normal": "normals", "depth": "relief", "rgb": "rgb"}.items():
            specs = IAENet(IAENetConfig(mode2d=mode)).features()  # type: ignore[arg-type]
            assert specs["image"].input == name
            assert specs["image"].params["model"] == "vit_base_patch8_224.dino"
        default = IAENet(IAENetConfig())
        assert set(default.panel.looks()["look"]) == {"image", "fpfh", "points"}
        assert default.features()["points"].params["groups"] == 512

    def test_published_nothing_but_our_design(self) -> None:
        config = IAENetConfig()
        assert (config.loss_det, config.loss_col, config.loss_str, config.loss_imp, config.loss_bal) == (
            1, 1, 1, 0.5, 0.01,
        )  # fmt: skip
        assert (config.quantile, config.temperature, config.epochs, config.pseudo_samples) == (0.995, 0.5, 50, 400)

    @pytest.mark.parametrize(
        ("variant", "settings", "message"),
        [
            ("points", {"experts": ["image", "fpfh"]}, "points"),
            ("g2sf", {"experts": ["fpfh", "points"]}, "g2sf"),
            ("iaf_s", {"experts": ["fpfh", "fpfh"]}, "different"),
            ("iaf_f", {"level": "image"}, "iaf_s"),
            ("mean", {"experts": ["fpfh"], "noise_expert": "image"}, "noise_expert"),
        ],
    )
    def test_what_does_not_go_together(self, variant: str, settings: dict[str, object], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            build_config(get_method("iaenet"), variant, "official", settings)

    def test_the_word_none_can_be_set(self) -> None:
        """It reads as no value, which these switches do not have."""
        from mmad_cli.methods import parse_settings

        settings = parse_settings(["pose=none", "normaliser=none", "rgb_outputs=none"])
        config = build_config(get_method("iaenet"), None, "official", settings)
        assert isinstance(config, IAENetConfig)
        assert (config.pose, config.normaliser, config.rgb_outputs) == ("none", "none", None)

    def test_it_is_called_a_re_design_and_has_no_row_of_a_paper(self) -> None:
        from mmad_cli.results.reference import list_references

        assert get_method("iaenet").label == "iaenet (re-design after the abstract)"
        assert get_method("g2sf").label == "g2sf"
        assert not [reference for reference in list_references() if "iaenet" in reference.method.lower()]

    def test_saved_state_of_another_variant_is_refused(self, tmp_path) -> None:  # type: ignore[no-untyped-def]
        fitted("mean").save(tmp_path)
        with pytest.raises(DataError, match="fit again"):
            IAENet(IAENetConfig(variant="max", **BASE)).load(tmp_path)  # type: ignore[arg-type]
