"""Methods on a GPU find what they find on the CPU; on a real one they pass the common checks.

The pretended GPU computes with the kernels of the CPU, so what differs is the path through the code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmad_cli.methods import get_method, method_names
from mmad_cli.methods.base import Method, MethodDefinition, Prediction, SharedTraining
from mmad_cli.methods.checks import GeneratedFeatures, check_method, generated_sample
from mmad_cli.methods.registry import build_config
from tests.methods.small import SMALL
from tests.pretended_cuda import pretended_cuda

CASES = [
    ("btf", "fpfh", {}),
    ("cfm", "base", {}),
    ("cmdr_iad", "rgb+3d", {}),
    ("cmdr_iad", "polyurethane", {}),
    ("g2sf", "cnn+fpfh", {}),
    ("iaenet", "iaf_s", {}),
    ("iaenet", "iaf_f", {}),
    ("iaenet", "ocsvm", {}),
    ("m3dm", "dino+point_mae+fusion", {}),
    ("m3dm", "dino+point_mae+fusion", {"uff": "retrained", "uff_epochs": 1, "uff_warmup_epochs": 0}),
    ("mafr", "rgb+3d", {}),
    ("patchcore", "rgb", {}),
]


def test_every_method_is_here() -> None:
    assert {name for name, _, _ in CASES} == set(method_names())


def recipe_of(definition: MethodDefinition) -> str:
    return "fast" if "fast" in definition.recipes else "official"


def learned(name: str, variant: str, settings: dict[str, Any], device: str, folder: Path) -> list[Prediction]:
    """Predictions of two samples, from a state that was fitted, saved and loaded on the device."""
    definition = get_method(name)
    config = build_config(definition, variant, recipe_of(definition), {**SMALL.get(name, {}), **settings})

    def built() -> Method:
        return definition.build(config, device)

    specs = built().features()
    plain = {key: spec for key, spec in specs.items() if spec.augmentation is None}
    train = GeneratedFeatures([generated_sample(specs, f"train/good/{i:03d}") for i in range(2)])
    validation = GeneratedFeatures([generated_sample(plain, "validation/good/000")])
    method = built()
    if isinstance(method, SharedTraining) and method.needs_shared():
        method.fit_shared({"one": train}, seed=3, folder=folder)
    method.fit(train, validation, seed=0)
    (folder / "state").mkdir()
    method.save(folder / "state")
    loaded = built()
    if isinstance(loaded, SharedTraining) and loaded.needs_shared():
        (folder / "shared").mkdir()
        method.save_shared(folder / "shared")  # type: ignore[attr-defined]
        loaded.load_shared(folder / "shared")
    loaded.load(folder / "state")
    return [loaded.predict(generated_sample(plain, f"test/good/{i:03d}")) for i in range(2)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(("name", "variant", "settings"), CASES)
def test_the_device_changes_no_prediction(name: str, variant: str, settings: dict[str, Any], tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        (tmp_path / device).mkdir()
    expected = learned(name, variant, settings, "cpu", tmp_path / "cpu")
    with pretended_cuda() as pretended:
        found = learned(name, variant, settings, "cuda", tmp_path / "cuda")
    assert pretended.operations > 0
    # biases in front of batch normalisation have rounding for a gradient, and the first step of Adam is its sign
    tolerance = 2e-3 if name == "cmdr_iad" else 1e-4
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.anomaly_map, theirs.anomaly_map, rtol=tolerance, atol=1e-5)
        np.testing.assert_allclose(ours.image_score, theirs.image_score, rtol=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("name", "variant", "settings"), CASES)
def test_common_checks_on_a_gpu(name: str, variant: str, settings: dict[str, Any]) -> None:
    definition, small = get_method(name), {**SMALL.get(name, {}), **settings}
    check_method(definition, variant=variant, recipe=recipe_of(definition), settings=small, device="cuda")
