"""The common checks that every method must pass, for the built-in ones and for those of third parties.

    from mmad_cli.methods.checks import check_method
    check_method(DEFINITION)

Features are generated from the method's own `FeatureSpec`s; a method on a backbone that is not known here
hands in its own `make_features`. A failed check raises `MethodCheckError`, which says what was expected and
what came.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmad_cli.errors import DataError
from mmad_cli.methods.base import (
    MAP_SIZE,
    BankSize,
    DropsModality,
    Method,
    MethodDefinition,
    Prediction,
    SampleFeatures,
    SharedTraining,
)
from mmad_cli.methods.registry import build_config

if TYPE_CHECKING:
    from mmad_cli.backbones.specs import FeatureSpec

Arrays = dict[str, NDArray[Any]]

# (features needed, sample id) -> arrays by feature name
MakeFeatures = Callable[[Mapping[str, "FeatureSpec"], str], Mapping[str, Arrays]]

TRAIN_COUNT = 2
TEST_COUNT = 2
TINY_CHANNELS = 6
TINY_GROUPS = 64


class MethodCheckError(AssertionError):
    """A method broke the protocol."""


@dataclass(frozen=True)
class GeneratedSample:
    """Features of one sample in memory."""

    id: str
    arrays: Mapping[str, Mapping[str, NDArray[Any]]]

    def __getitem__(self, name: str) -> Mapping[str, NDArray[Any]]:
        return self.arrays[name]


@dataclass(frozen=True)
class GeneratedFeatures:
    """Features of several samples in memory."""

    samples: Sequence[SampleFeatures]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> SampleFeatures:
        return self.samples[index]

    def __iter__(self) -> Iterator[SampleFeatures]:
        return iter(self.samples)


def make_features(specs: Mapping[str, FeatureSpec], sample_id: str) -> dict[str, Arrays]:
    """Random but plausible arrays for known backbones, a function of the sample id only.

    timm outputs (6 channels each, grid as of a network with stride 2 per stage), timm tokens (28 x 28, 6
    channels), FPFH of a disc of points, a Z image of the same disc, tokens of 64 point groups on the same disc
    (6 channels); features of pseudo anomalies with the mask of a smaller disc. Raises ValueError for another backbone.
    """
    random = np.random.default_rng(zlib.crc32(sample_id.encode()))
    return {name: _arrays(spec, random) for name, spec in sorted(specs.items())}


def generated_sample(
    specs: Mapping[str, FeatureSpec], sample_id: str, make: MakeFeatures = make_features
) -> GeneratedSample:
    """A sample of generated features; arrays are read-only, as those from the store are."""
    arrays = make(specs, sample_id)
    for feature in arrays.values():
        for array in feature.values():
            array.setflags(write=False)
    return GeneratedSample(sample_id, arrays)


def check_method(
    definition: MethodDefinition,
    make: MakeFeatures = make_features,
    *,
    variant: str | None = None,
    recipe: str = "official",
    settings: Mapping[str, Any] | None = None,
    device: str = "cpu",
) -> None:
    """Run every check on one variant and recipe of a method; MethodCheckError at the first that fails."""
    bench = _Bench(definition, make, variant, recipe, dict(settings or {}), device)
    for check in CHECKS:
        check(bench)


@dataclass(frozen=True)
class _Bench:
    """A method under test and the data to test it on."""

    definition: MethodDefinition
    make: MakeFeatures
    variant: str | None
    recipe: str
    settings: dict[str, Any]
    device: str
    shared: list[Method] = field(default_factory=list)
    learned: list[tempfile.TemporaryDirectory[str]] = field(default_factory=list)
    made: dict[str, GeneratedSample] = field(default_factory=dict)

    def built(self) -> Method:
        config = build_config(self.definition, self.variant, self.recipe, self.settings)
        return self.definition.build(config, self.device)

    def unfitted(self) -> Method:
        """A method that has what it learns across categories, as a stage hands it to a category."""
        method = self.built()
        if isinstance(method, SharedTraining) and method.needs_shared():
            if not self.learned:
                self.learned.append(self.learn_shared())
            method.load_shared(Path(self.learned[0].name))
        return method

    def learn_shared(self) -> tempfile.TemporaryDirectory[str]:
        """Train across two categories and save; the folder lives as long as what is returned."""
        method = self.built()
        if not isinstance(method, SharedTraining):
            raise self.fail("needs_shared() without the other functions of SharedTraining")
        folder: tempfile.TemporaryDirectory[str] = tempfile.TemporaryDirectory()
        with tempfile.TemporaryDirectory() as checkpoints:
            method.fit_shared({"one": self.train(1), "two": self.train()}, seed=3, folder=Path(checkpoints))
        method.save_shared(Path(folder.name))
        return folder

    def samples(self, split: str, count: int) -> list[GeneratedSample]:
        specs = self.built().features()
        if split != "train":
            # the stages make pseudo anomalies of training samples only
            specs = {name: spec for name, spec in specs.items() if spec.augmentation is None}
        return [self._sample(specs, f"{split}/good/{i:03d}") for i in range(count)]

    def _sample(self, specs: Mapping[str, FeatureSpec], sample_id: str) -> GeneratedSample:
        if sample_id not in self.made:
            self.made[sample_id] = generated_sample(specs, sample_id, self.make)
        return self.made[sample_id]

    def train(self, count: int = TRAIN_COUNT) -> GeneratedFeatures:
        return GeneratedFeatures(self.samples("train", count))

    def validation(self, count: int = 2) -> GeneratedFeatures:
        return GeneratedFeatures(self.samples("validation", count))

    def test(self) -> list[GeneratedSample]:
        return self.samples("test", TEST_COUNT)

    def fit(self, count: int = TRAIN_COUNT, seed: int = 0) -> Method:
        method = self.unfitted()
        method.fit(self.train(count), self.validation(), seed=seed)
        return method

    def fit_with(self, sample: GeneratedSample) -> None:
        train = GeneratedFeatures([*self.train().samples, sample])
        self.unfitted().fit(train, self.validation(), seed=0)

    def fitted(self) -> Method:
        """Fitted once; what the checks share must not be fitted again."""
        if not self.shared:
            self.shared.append(self.fit())
        return self.shared[0]

    def fail(self, message: str) -> MethodCheckError:
        name = f"{self.definition.name}, variant {self.variant or self.definition.default_variant}"
        return MethodCheckError(f"{name}: {message}")


def check_output(bench: _Bench) -> None:
    """Maps are finite float32 (224, 224), scores are finite Python floats; inputs are read-only arrays."""
    method = bench.fitted()
    for sample in bench.test():
        prediction = method.predict(sample)
        anomaly_map = prediction.anomaly_map
        if anomaly_map.dtype != np.float32 or anomaly_map.shape != (MAP_SIZE, MAP_SIZE):
            raise bench.fail(f"anomaly_map must be float32 (224, 224), got {anomaly_map.dtype} {anomaly_map.shape}")
        if not np.isfinite(anomaly_map).all():
            raise bench.fail("anomaly_map must be finite, got NaN or infinite values")
        if not isinstance(prediction.image_score, float) or not np.isfinite(prediction.image_score):
            raise bench.fail(f"image_score must be a finite float, got {prediction.image_score!r}")


def check_samples_differ(bench: _Bench) -> None:
    """Different samples get different maps and scores: the features reach the result."""
    method = bench.fitted()
    first, second = (method.predict(sample) for sample in bench.test()[:2])
    if first.image_score == second.image_score or np.array_equal(first.anomaly_map, second.anomaly_map):
        raise bench.fail("two different samples got the same score or map")


def check_same_seed(bench: _Bench) -> None:
    """Two fits with one seed give the same scores, whatever the global random streams hold."""
    expected = _predictions(bench.fitted(), bench.test())
    # not a seed: the fit before may have begun with that one
    np.random.random()
    _expect_equal(bench, "two fits with the same seed", expected, _predictions(bench.fit(), bench.test()))


def check_shared_training(bench: _Bench) -> None:
    """What is learned across categories is the same for the same seed, whatever the global random streams hold."""
    method = bench.built()
    if not isinstance(method, SharedTraining) or not method.needs_shared():
        return
    expected = _predictions(bench.fitted(), bench.test())
    np.random.random()
    with bench.learn_shared() as folder:
        method.load_shared(Path(folder))
    method.fit(bench.train(), bench.validation(), seed=0)
    _expect_equal(
        bench, "two trainings across categories with the same seed", expected, _predictions(method, bench.test())
    )


def check_refit(bench: _Bench) -> None:
    """A second fit of the same object forgets the first."""
    expected = _predictions(bench.fitted(), bench.test())
    method = bench.fit(count=1, seed=5)
    method.fit(bench.train(), bench.validation(), seed=0)
    _expect_equal(bench, "a second fit of one object", expected, _predictions(method, bench.test()))


def check_order(bench: _Bench) -> None:
    """A prediction does not depend on what was predicted before."""
    method = bench.fitted()
    test = bench.test()
    backwards = _predictions(method, test[::-1])[::-1]
    _expect_equal(bench, "predicting in another order", _predictions(method, test), backwards)


def check_round_trip(bench: _Bench) -> None:
    """A saved and loaded method gives identical scores and sizes, and a loaded one can be saved again."""
    method = bench.fitted()
    expected = _predictions(method, bench.test())
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        method.save(Path(first))
        loaded = bench.unfitted()
        loaded.load(Path(first))
        loaded.save(Path(second))
        again = bench.unfitted()
        again.load(Path(second))
    for copy in (loaded, again):
        _expect_equal(bench, "a saved and loaded method", expected, _predictions(copy, bench.test()))
        if copy.banks() != method.banks():
            raise bench.fail(f"banks() must be {method.banks()} after loading, got {copy.banks()}")


def check_banks(bench: _Bench) -> None:
    """Bank sizes are positive; memory is estimated in bytes and does not fall with the sample count."""
    method = bench.fitted()
    for name, size in method.banks().items():
        if not isinstance(size, BankSize) or size.rows < 1 or size.dim < 1:
            raise bench.fail(f"banks()[{name!r}] must be a BankSize of positive sizes, got {size!r}")
    few, many = method.memory_estimate(1), method.memory_estimate(100)
    if not isinstance(few, int) or not 0 <= few <= many:
        raise bench.fail(f"memory_estimate must be bytes that grow with samples, got {few!r} for 1, {many!r} for 100")


def check_one_training_image(bench: _Bench) -> None:
    """One training image is enough."""
    prediction = bench.fit(count=1).predict(bench.test()[0])
    if not np.isfinite(prediction.anomaly_map).all() or not np.isfinite(prediction.image_score):
        raise bench.fail("one training image must give finite scores")


def check_no_training_image(bench: _Bench) -> None:
    """No training image is a DataError."""
    method = bench.unfitted()
    try:
        method.fit(bench.train(0), bench.validation(0), seed=0)
    except DataError:
        return
    raise bench.fail("fit without training samples must raise DataError, got no error")


def check_missing_modality(bench: _Bench) -> None:
    """A sample without one of the features is a DataError that names the sample, in fit and in predict.

    A method that scores such samples by what is left must say so in a note.
    """
    for feature, spec in bench.unfitted().features().items():
        sample = bench.samples("train", TRAIN_COUNT + 1)[-1]
        partial = GeneratedSample(sample.id, {k: v for k, v in sample.arrays.items() if k != feature})
        what = f"without feature {feature!r}"
        if _drops_missing(bench.fitted()):
            if not bench.fitted().predict(partial).note:
                raise bench.fail(f"a prediction of a sample {what} must have a note")
        elif spec.augmentation is None:
            _expect_data_error(bench, partial, what, bench.fitted().predict)
        _expect_data_error(bench, partial, what, bench.fit_with)


def check_empty_cloud(bench: _Bench) -> None:
    """A sample whose point features are empty is a DataError that names the sample, or scored with a note."""
    sample = bench.test()[0]
    for feature, arrays in sample.arrays.items():
        if "points" in arrays or "pixel" in arrays:
            empty = {name: array[:0] for name, array in arrays.items()}
            without = GeneratedSample(sample.id, {**sample.arrays, feature: empty})
            if not _drops_missing(bench.fitted()):
                _expect_data_error(bench, without, "without points", bench.fitted().predict)
            elif not bench.fitted().predict(without).note:
                raise bench.fail("a prediction of a sample without points must have a note")


def _drops_missing(method: Method) -> bool:
    return isinstance(method, DropsModality) and method.drops_missing


def check_features(bench: _Bench) -> None:
    """Declared features are `FeatureSpec`s that do not change, and the view is one of the two."""
    from mmad_cli.backbones.specs import FeatureSpec

    method = bench.unfitted()
    specs = method.features()
    if not specs or not all(isinstance(spec, FeatureSpec) for spec in specs.values()):
        raise bench.fail(f"features() must name FeatureSpecs, got {specs!r}")
    if bench.unfitted().features() != specs:
        raise bench.fail("features() must be the same for the same configuration")
    if method.view not in ("resize", "crop"):
        raise bench.fail(f"view must be 'resize' or 'crop', got {method.view!r}")


def check_definition(bench: _Bench) -> None:
    """Every variant has a modality; both recipes exist and fit the configuration."""
    definition = bench.definition
    if definition.default_variant not in definition.variants:
        raise bench.fail(f"default_variant {definition.default_variant!r} is not among the variants")
    if set(definition.modalities) != set(definition.variants):
        raise bench.fail("modalities must name every variant once")
    for recipe in ("official", "corrected"):
        for variant in definition.variants:
            build_config(definition, variant, recipe, {})


CHECKS: tuple[Callable[[_Bench], None], ...] = (
    check_definition,
    check_features,
    check_output,
    check_samples_differ,
    check_same_seed,
    check_shared_training,
    check_refit,
    check_order,
    check_round_trip,
    check_banks,
    check_one_training_image,
    check_no_training_image,
    check_missing_modality,
    check_empty_cloud,
)


def _predictions(method: Method, samples: Sequence[SampleFeatures]) -> list[Prediction]:
    return [method.predict(sample) for sample in samples]


def _expect_equal(bench: _Bench, what: str, expected: list[Prediction], got: list[Prediction]) -> None:
    for one, other in zip(expected, got, strict=True):
        if one.image_score != other.image_score:
            raise bench.fail(f"{what} must give the same scores, got {one.image_score} and {other.image_score}")
        if not np.array_equal(one.anomaly_map, other.anomaly_map):
            raise bench.fail(f"{what} must give the same maps; they differ")


def _expect_data_error(
    bench: _Bench, sample: GeneratedSample, what: str, call: Callable[[GeneratedSample], object]
) -> None:
    try:
        call(sample)
    except DataError as error:
        if sample.id not in str(error):
            raise bench.fail(f"the error of a sample {what} must name {sample.id}, got: {error}") from error
        return
    raise bench.fail(f"a sample {what} must raise DataError, got no error")


def _arrays(spec: FeatureSpec, random: np.random.Generator) -> Arrays:
    if spec.augmentation is None:
        return _plain_arrays(spec, random)
    from mmad_cli.pseudo import PSEUDO_MASK

    return {**_plain_arrays(spec, random), PSEUDO_MASK: _disc(MAP_SIZE / 16)}


def _plain_arrays(spec: FeatureSpec, random: np.random.Generator) -> Arrays:
    if spec.backbone == "timm":
        outputs = spec.params["outputs"]
        return _tokens(random) if outputs is None else {f"out{i}": _output(i, random) for i in outputs}
    if spec.backbone == "fpfh":
        return _histograms(random)
    if spec.backbone == "depth":
        return {"z": _depth(random)}
    if spec.backbone in ("point_mae", "point_bert", "builtin_points"):
        return _point_tokens(random, spec.params["size"])
    raise ValueError(f"no generated features for backbone {spec.backbone!r}; hand in make_features")


def _output(index: int, random: np.random.Generator) -> NDArray[np.float32]:
    side = MAP_SIZE // 2 ** (index + 1)
    return np.maximum(random.standard_normal((TINY_CHANNELS, side, side), dtype=np.float32), 0)


def _tokens(random: np.random.Generator) -> Arrays:
    tokens = random.standard_normal((784, TINY_CHANNELS), dtype=np.float32)
    return {"tokens": tokens, "grid": np.array([28, 28], dtype=np.int32)}


def _disc(radius: float = MAP_SIZE / 4, size: int = MAP_SIZE) -> NDArray[np.bool_]:
    y, x = np.mgrid[:size, :size] - size / 2
    inside: NDArray[np.bool_] = x * x + y * y < radius**2
    return inside


def _histograms(random: np.random.Generator) -> Arrays:
    pixel = np.flatnonzero(_disc()).astype(np.int32)
    # three histograms of eleven bins, each of sum 100
    bins = random.gamma(2.0, size=(len(pixel), 3, 11))
    points = (100 * bins / bins.sum(axis=2, keepdims=True)).reshape(len(pixel), 33)
    return {"points": points.astype(np.float32), "pixel": pixel}


def _point_tokens(random: np.random.Generator, size: int) -> Arrays:
    from mmad_cli.alignment.interpolation import nearest_centres

    pixel = np.flatnonzero(_disc(size / 4, size)).astype(np.int32)
    points = np.stack([pixel % size, pixel // size, random.normal(500, 1, len(pixel))], axis=1) * 1e-3
    centres = random.choice(points, TINY_GROUPS, replace=False)
    neighbours, weights = nearest_centres(points, centres)
    return {
        "tokens": random.standard_normal((TINY_GROUPS, TINY_CHANNELS), dtype=np.float32),
        "centres": centres.astype(np.float32),
        "pixel": pixel,
        "neighbours": neighbours.astype(np.int16),
        "weights": weights.astype(np.float32),
    }


def _depth(random: np.random.Generator) -> NDArray[np.float32]:
    surface = 0.5 + 0.01 * random.standard_normal((MAP_SIZE, MAP_SIZE), dtype=np.float32)
    return np.where(_disc(), surface, np.float32(0)).astype(np.float32)
