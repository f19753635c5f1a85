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
