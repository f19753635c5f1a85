"""Golden numbers of M3DM, the stand-in weights that they were made with, and small feature sets."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmad_cli.methods import build_config, get_method
from mmad_cli.methods.checks import GeneratedFeatures, GeneratedSample, generated_sample
from mmad_cli.types import Sample

GOLDEN = Path(__file__).parents[2] / "golden"

# layers whose stand-in values are scaled, since the point networks see raw metres
_GAINS = {
    "encoder.first_conv.0.weight": 1000.0,
    "encoder.second_conv.3.weight": 3.0,
    "pos_embed.0.weight": 20.0,
    "pos_embed.2.weight": 0.05,
}
# name in the registry -> name in the golden file
_NETWORKS = {
    "vit_base_patch8_224.dino": "vit_base_patch8_224_dino",
    "point_mae": "point_mae",
    "point_bert": "point_bert",
    "m3dm_uff": "uff",
}


@functools.cache
def _arrays(file: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / file) as arrays:
        return {name: arrays[name] for name in arrays.files}


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """Golden arrays of M3DM below a folder, by the rest of their names."""
    return lambda folder: {
        name.removeprefix(f"{folder}/"): array
        for name, array in _arrays("m3dm.npz").items()
        if name.startswith(f"{folder}/")
    }


@pytest.fixture(scope="session")
def scoring() -> Callable[[str], dict[str, np.ndarray]]:
    """Golden patches, banks and scores of one modality."""
    return lambda which: {
        name.split("/")[1]: array
        for name, array in _arrays("memory.npz").items()
        if name.startswith(f"scoring_{which}/")
    }


def _stand_in(key: str, shape: tuple[int, ...]) -> Any:
    """Normal values seeded by the CRC-32 of the tensor's name, scaled by what it is."""
    import torch

    leaf = key.rsplit(".", 1)[-1]
    if leaf in ("num_batches_tracked", "queue_ptr"):
        return torch.full(shape, int(leaf == "num_batches_tracked"), dtype=torch.int64)
    values = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(shape)
    if leaf == "running_var":
        values = 1 + 0.1 * np.abs(values)
    elif leaf == "weight" and len(shape) == 1:
        values = 1 + 0.02 * values
    elif leaf == "weight":
        gain = next((gain for end, gain in _GAINS.items() if key.endswith(end)), 1.0)
        values = gain * values / np.sqrt(float(np.prod(shape[1:])))
    else:
        values = 0.02 * values
    return torch.from_numpy(values.astype(np.float32))


def _stand_ins(name: str) -> dict[str, Any]:
    arrays = _arrays("point_vit.npz")
    keys, shapes = (arrays[f"checkpoint/{_NETWORKS[name]}/{part}"] for part in ("keys", "shapes"))
    sizes = [tuple(int(n) for n in str(shape).split(",") if n) for shape in shapes]
    return {str(key): _stand_in(str(key), size) for key, size in zip(keys, sizes, strict=True)}


@pytest.fixture(scope="session")
def uff_tensors() -> dict[str, Any]:
    """Tensors of the fusion block that the golden numbers were made with."""
    return _stand_ins("m3dm_uff")


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`weights(name)`: a weights folder that holds the golden stand-in of that name."""
    root = tmp_path_factory.mktemp("weights")

    @functools.cache
    def install(name: str) -> Path:
        import torch

        from mmad_cli.backbones.weights import import_file

        tensors = _stand_ins(name)
        wrapped = {"m3dm_uff": {"model": tensors}, "vit_base_patch8_224.dino": tensors}
        path = tmp_path_factory.mktemp("published") / f"{name}.pth"
        torch.save(wrapped.get(name, {"base_model": tensors}), path)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MMAD_WEIGHTS", str(root))
            import_file(name, path)
        path.unlink()
        return root

    return install


@pytest.fixture(scope="session")
def golden_samples(weights: Callable[[str], Path]) -> Callable[..., list[GeneratedSample]]:
    """`golden_samples(method)`: the 13 golden scans with the features that a method asks for; 5 are for training."""
    inputs = _arrays("inputs.npz")
    scans = [
        Sample(
            "golden",
            str(inputs["split"][i]),  # type: ignore[arg-type]
            str(inputs["kind"][i]),
            str(inputs["name"][i]),
            inputs["rgb"][i],
            inputs["xyz"][i],
            inputs["gt"][i] > 0,
        )
        for i in range(len(inputs["xyz"]))
    ]

    @functools.cache
    def extract(spec: Any) -> list[Any]:
        from mmad_cli.backbones import create

        for name in spec.weights_names():
            root = weights(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MMAD_WEIGHTS", str(root))
            return list(create(spec).extract(scans))

    def make(method: Any) -> list[GeneratedSample]:
        features = {name: extract(spec) for name, spec in method.features().items()}
        return [
            GeneratedSample(scan.id, {name: values[i] for name, values in features.items()})
            for i, scan in enumerate(scans)
        ]

    return make


@pytest.fixture(scope="session")
def golden_masks() -> np.ndarray:
    """Masks of the golden test samples."""
    return _arrays("inputs.npz")["gt"][5:] > 0


@pytest.fixture
def make_method() -> Callable[..., Any]:
    """`make_method(variant, recipe, field=value)`: an unfitted M3DM, without the published fusion block by default."""

    def make(variant: str | None = None, recipe: str = "official", **settings: Any) -> Any:
        definition = get_method("m3dm")
        return definition.build(build_config(definition, variant, recipe, {"uff": "concat", **settings}), "cpu")

    return make


@pytest.fixture
def features_for() -> Callable[..., GeneratedFeatures]:
    """`features_for(method, count, split)`: generated features with few channels."""

    def make(method: Any, count: int, split: str = "train") -> GeneratedFeatures:
        specs = method.features()
        return GeneratedFeatures([generated_sample(specs, f"{split}/good/{i:03d}") for i in range(count)])

    return make
