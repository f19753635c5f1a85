"""MAFR's training and scoring: what the switches change, and what must not change anything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmad_cli.methods import build_config, get_method
from mmad_cli.methods.checks import GeneratedFeatures, generated_sample
from mmad_cli.methods.mafr.config import MafrConfig
from mmad_cli.methods.mafr.learner import MafrLearner, window
from mmad_cli.methods.mafr.method import DEFINITION, Mafr
from mmad_cli.methods.mapping.config import POINTS, RGB
from mmad_cli.methods.mapping.dense import DenseFeatures
from mmad_cli.methods.mapping.method import NETWORKS_FILE

CHANNELS = {RGB: 6, POINTS: 10}
SIDE = 16


def features(seed=0, side=SIDE):
    random = torch.Generator().manual_seed(seed)
    valid = torch.zeros(side, side, dtype=torch.bool)
    valid[3:-2, 4:-3] = True
    points = torch.randn(side * side, CHANNELS[POINTS], generator=random) * valid.reshape(-1, 1)
    return DenseFeatures(torch.randn(side * side, CHANNELS[RGB], generator=random), points, valid.reshape(-1), side)


def learner(**settings):
    torch.manual_seed(5)
    return MafrLearner(CHANNELS, MafrConfig(**{"dropout": 0.0, **settings}))


def gradients(made):
    return [parameter.grad for parameter in made.network.parameters()]


def method(**settings):
    return Mafr(MafrConfig(**{"grid": 32, "epochs": 2, **settings}))


def samples(made, count=2, split="train"):
    return GeneratedFeatures([generated_sample(made.features(), f"{split}/good/{i:03d}") for i in range(count)])


def test_a_batch_is_the_mean_of_its_images():
    both, single = learner(), learner()
    losses = both.backward([features(0), features(1)])["restoration"]
    parts = [single.backward([features(index)])["restoration"] for index in (0, 1)]
    for name, value in losses.items():
        assert value == pytest.approx(np.mean([part[name] for part in parts]), rel=1e-5)
    torch.testing.assert_close(gradients(both), [gradient / 2 for gradient in gradients(single)])


def test_total_is_the_weighted_sum_of_six_terms():
    weights = {"similarity_weight": 2.0, "smoothness_weight": 0.0, "census_weight": 0.5}
    plain = learner().backward([features()])["restoration"]
    weighted = learner(**weights).backward([features()])["restoration"]
    assert len(plain) == 7
    terms = {name: value for name, value in plain.items() if name != "total"}
    assert plain["total"] == pytest.approx(sum(terms.values()), rel=1e-6)
    expected = sum(weights[f"{name.split('_')[0]}_weight"] * value for name, value in terms.items())
    assert weighted["total"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("mask", ["none", "valid"])
def test_recomputing_activations_changes_no_gradient(mask):
    held, again = learner(loss_mask=mask), learner(loss_mask=mask, recompute_tile=37)
    losses = [made.backward([features()])["restoration"] for made in (held, again)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(gradients(held), gradients(again))


def test_background_counts_unless_masked():
    changed = features()
    changed.rgb[~changed.valid] += 3.0
    for mask, same in (("none", False), ("valid", True)):
        one, other = (learner(loss_mask=mask).backward([f])["restoration"]["total"] for f in (features(), changed))
        assert (one == pytest.approx(other, rel=1e-6)) is same


def test_smoothness_channels_change_that_term_only():
    two, every = (
        learner(smoothness_channels=which).backward([features()])["restoration"] for which in ("first_two", "all")
    )
    changed = {name for name in two if two[name] != pytest.approx(every[name], rel=1e-6)}
    assert changed == {"smoothness_rgb", "smoothness_points", "total"}


def test_window_is_a_square_of_the_image_with_a_valid_pixel():
    whole = features()
    number = torch.arange(SIDE * SIDE, dtype=torch.float32)[:, None]
    numbered = DenseFeatures(number.expand(-1, 2), number.expand(-1, 3), whole.valid, SIDE)
    torch.manual_seed(0)
    corners = set()
    for _ in range(40):
        cut = window(numbered, 5)
        assert (cut.side, cut.rgb.shape, cut.points.shape, cut.valid.shape) == (5, (25, 2), (25, 3), (25,))
        first = int(cut.rgb[0, 0])
        expected = first + (torch.arange(5)[:, None] * SIDE + torch.arange(5)).reshape(-1)
        assert torch.equal(cut.points[:, 2].long(), expected)
        assert torch.equal(cut.valid, whole.valid[expected])
        assert cut.valid.any()
        corners.add(first)
    assert len(corners) > 10
    assert window(whole, SIDE) is whole


def test_a_window_without_a_valid_pixel_in_the_image_is_drawn_anywhere():
    empty = DenseFeatures(torch.ones(64, 2), torch.zeros(64, 2), torch.zeros(64, dtype=torch.bool), 8)
    assert window(empty, 3).rgb.shape == (9, 2)


def test_errors_of_tokens_are_those_of_pixels():
    made = method(epochs=1)
    made.fit(samples(made), samples(made), seed=0)
    for sample in samples(made, split="test"):
        with torch.inference_mode():
            from_tokens = made.sample_errors(made.learner_, made.reader.tokens(sample))
            from_pixels = made.errors(made.learner_, made.reader(sample))
        assert from_pixels.max() > 0
        np.testing.assert_allclose(from_tokens, from_pixels, rtol=0, atol=1e-5 * from_pixels.max())


class InterruptedTrainingError(Exception):
    """What stops a training in a test."""


def test_an_interrupted_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    whole, broken, again = (method(epochs=3) for _ in range(3))
    data = samples(whole)
    whole.fit(data, data, seed=4)
    steps, backward = [], MafrLearner.backward

    def stopping(self, batch):
        steps.append(len(batch))
        if len(steps) == 4:
            raise InterruptedTrainingError
        return backward(self, batch)

    with monkeypatch.context() as patch, pytest.raises(InterruptedTrainingError):
        patch.setattr(MafrLearner, "backward", stopping)
        broken.fit_resumable(data, data, seed=4, folder=tmp_path)
    assert any(tmp_path.iterdir())
    again.fit_resumable(data, data, seed=4, folder=tmp_path)
    one, other = (made.learner_.network.state_dict() for made in (whole, again))
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    assert whole.losses() == again.losses()


def test_saved_networks_have_the_published_names(tmp_path):
    made = method(epochs=1)
    made.fit(samples(made), samples(made), seed=0)
    made.save(tmp_path)
    names = {key.split("/")[1] for key in load_file(tmp_path / NETWORKS_FILE)}
    assert "decoder_2D.cbam.spatial_attention.conv.weight" in names
    assert {name.split(".")[0] for name in names} == {"fusion_encoder", "decoder_2D", "decoder_3D"}


def test_losses_fall(tmp_path):
    made = method(epochs=8, window=16, dropout=0.0)
    made.fit(samples(made), samples(made), seed=0)
    curve = made.losses()["restoration/total"]
    assert len(curve) == 8
    assert np.mean(curve[-2:]) < np.mean(curve[:2])


def test_memory_estimate_grows_with_pixels_and_shrinks_with_recomputing():
    official = method(grid=224).memory_estimate(244)
    assert 8e9 < official < 12e9
    assert method(grid=224, recompute_tile=4096).memory_estimate(244) < 0.6 * official
    assert method(grid=56, window=14).memory_estimate(244) < 2e9


def test_recipes():
    assert get_method("mafr") is DEFINITION
    official, corrected, fast = (build_config(DEFINITION, None, recipe, {}) for recipe in DEFINITION.recipes)
    assert (official.epochs, official.grid, official.window, official.loss_mask) == (100, 224, None, "none")
    assert (corrected.loss_mask, corrected.normaliser, corrected.epochs) == ("valid", "none", 100)
    assert (fast.grid, fast.window) == (56, 14)
