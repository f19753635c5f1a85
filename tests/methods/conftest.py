"""Feature sets in memory for the tests of methods."""

import numpy as np
import pytest

from mmad_cli.methods.checks import GeneratedFeatures, GeneratedSample


def _sample(name, arrays):
    for feature in arrays.values():
        for array in feature.values():
            array.setflags(write=False)
    return GeneratedSample(name, arrays)


@pytest.fixture
def sample_of():
    """`sample_of(id, {feature: {array name: array}})`, arrays made read-only."""
    return _sample


@pytest.fixture
def network_set():
    """`network_set({output: channels}, count)`: outputs of a network with stride 2 per stage under `rgb`."""

    def make(channels, count, split="train", seed=0):
        random = np.random.default_rng([seed, len(split)])
        return GeneratedFeatures(
            [
                _sample(
                    f"{split}/good/{i:03d}",
                    {
                        "rgb": {
                            f"out{output}": random.random(
                                (width, 224 // 2 ** (output + 1), 224 // 2 ** (output + 1)), dtype=np.float32
                            )
                            for output, width in channels.items()
                        }
                    },
                )
                for i in range(count)
            ]
        )

    return make


@pytest.fixture
def random_resnet18(tmp_path, monkeypatch):
    """A ResNet-18 with random weights, always the same, in a weights folder of the test's own."""
    import torch
    from safetensors.torch import save_file

    from mmad_cli.backbones._timm import import_timm
    from mmad_cli.backbones.weights import import_file

    name = "resnet18.tv_in1k"
    monkeypatch.setenv("MMAD_WEIGHTS", str(tmp_path / "weights"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = import_timm().create_model(name, pretrained=False).state_dict()
    save_file(state, tmp_path / "random.safetensors")
    import_file(name, tmp_path / "random.safetensors")
