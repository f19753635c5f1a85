"""Every registered method passes the common checks, and the checks find methods that do not."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmad_cli.errors import DataError
from mmad_cli.methods import get_method, method_names
from mmad_cli.methods.base import BankSize, MethodConfig, MethodDefinition, Prediction
from mmad_cli.methods.checks import MethodCheckError, check_method
from tests.methods.small import SMALL

# dense SIFT takes a quarter of a second per image, the four networks of CMDR-IAD a second to train
SLOW = {("btf", "sift"), ("cmdr_iad", "rgb+3d"), ("iaenet", "iaf_f"), ("iaenet", "g2sf")}
# recipes differ in how long is trained only
ONE_RECIPE = {"iaenet"}

CASES = [
    pytest.param(
        name,
        variant,
        recipe,
        id=f"{name}-{variant}-{recipe}",
        marks=[pytest.mark.slow] if (name, variant) in SLOW else [],
    )
    for name in method_names()
    for variant in get_method(name).variants
    for recipe in (["official"] if (name, variant) in SLOW or name in ONE_RECIPE else get_method(name).recipes)
]


@pytest.mark.parametrize(("name", "variant", "recipe"), CASES)
def test_common_checks(name, variant, recipe):
    check_method(get_method(name), variant=variant, recipe=recipe, settings=SMALL.get(name, {}))


class ToyConfig(MethodConfig):
    variant: str = "rgb"


class Toy:
    """Scores by the mean of the first output against the training mean: the least that passes."""

    view = "resize"

    def __init__(self, config, device):
        self.config = config

    def features(self):
        from mmad_cli.backbones.specs import FeatureSpec

        return {"rgb": FeatureSpec.timm("resnet18.tv_in1k", outputs=[2])}

    def level(self, sample):
        if "rgb" not in sample.arrays:
            raise DataError(f"{sample.id}: no image")
        return sample["rgb"]["out2"].mean(axis=0).repeat(8, 0).repeat(8, 1).astype(np.float32)

    def fit(self, train, validation, *, seed, progress=None):
        if len(train) == 0:
            raise DataError("no training samples")
        self.mean_ = np.mean([self.level(sample) for sample in train], axis=0)

    def predict(self, sample):
        difference = np.abs(self.level(sample) - self.mean_)
        return Prediction(difference, float(difference.max()))

    def banks(self):
        return {"mean": BankSize(1, 1)}

    def save(self, folder):
        np.save(Path(folder) / "mean.npy", self.mean_)

    def load(self, folder):
        self.mean_ = np.load(Path(folder) / "mean.npy")

    def memory_estimate(self, n_train):
        return n_train


DEFINITION = MethodDefinition(
    name="toy",
    title="Toy",
    version=1,
    config=ToyConfig,
    build=Toy,
    variants={"rgb": "image"},
    default_variant="rgb",
    modalities={"rgb": "RGB"},
    protocol="none",
    recipes={"official": {}, "corrected": {}},
    source="none",
)


def test_a_sound_method_of_a_third_party_passes():
    check_method(DEFINITION)


class WrongType(Toy):
    def predict(self, sample):
        prediction = super().predict(sample)
        return Prediction(prediction.anomaly_map.astype(np.float64), prediction.image_score)


class Constant(Toy):
    def predict(self, sample):
        self.level(sample)
        return Prediction(np.zeros((224, 224), np.float32), 0.0)


class GlobalRandom(Toy):
    def fit(self, train, validation, *, seed, progress=None):
        super().fit(train, validation, seed=seed)
        self.mean_ = self.mean_ + np.random.random(self.mean_.shape).astype(np.float32)


class Remembers(Toy):
    def predict(self, sample):
        prediction = super().predict(sample)
        self.mean_ = self.mean_ + np.float32(0.01)
        return prediction


class KeepsFirstFit(Toy):
    def fit(self, train, validation, *, seed, progress=None):
        if not hasattr(self, "mean_"):
            super().fit(train, validation, seed=seed)


class LosesState(Toy):
    def load(self, folder):
        super().load(folder)
        self.mean_ = np.round(self.mean_, 2)


class WritesInput(Toy):
    def level(self, sample):
        super().level(sample)
        sample["rgb"]["out2"][:] = 0


class Silent(Toy):
    def level(self, sample):
        return super().level(sample) if "rgb" in sample.arrays else np.zeros((224, 224), np.float32)


class Nameless(Toy):
    def level(self, sample):
        if "rgb" not in sample.arrays:
            raise DataError("no image")
        return super().level(sample)


class NeedsTwo(Toy):
    def fit(self, train, validation, *, seed, progress=None):
        super().fit(train, validation, seed=seed)
        self.mean_ = self.mean_ / np.float32(len(train) - 1)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (WrongType, "anomaly_map must be float32"),
        (Constant, "two different samples"),
        (GlobalRandom, "same seed"),
        (Remembers, "same scores"),
        (KeepsFirstFit, "second fit"),
        (LosesState, "saved and loaded"),
        (Silent, "must raise DataError"),
        (Nameless, "must name train/good/002"),
        (NeedsTwo, "one training image"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_broken_method_is_found_out(method, message):
    with pytest.raises(MethodCheckError, match=message):
        check_method(replace(DEFINITION, build=method))


def test_a_method_that_writes_into_its_input_is_found_out():
    with pytest.raises(ValueError, match="read-only"):
        check_method(replace(DEFINITION, build=WritesInput))
