"""Tokens to pixels: against stored features of the published code and the reference operations of PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation

from mmad_cli.alignment.interpolation import nearest_centres
from mmad_cli.errors import DataError
from mmad_cli.methods.cfm.method import Cfm, CfmConfig
from mmad_cli.methods.checks import GeneratedFeatures, GeneratedSample
from mmad_cli.methods.mapping.config import POINTS, RGB
from mmad_cli.methods.mapping.dense import DenseReader, DenseSet, upsampled


@pytest.fixture
def sample(golden_assembly):
    """A scan of 224 x 224 with the golden tokens."""

    def build(side=224, centres=1024, form="direct"):
        inputs = golden_assembly(side, centres)
        pixel = np.flatnonzero((inputs["cloud"] != 0).all(axis=1))
        points = inputs["cloud"][pixel]
        neighbours, weights = nearest_centres(points, points[inputs["chosen"]], form)
        features = {POINTS: {"tokens": inputs["tokens"], "pixel": pixel, "neighbours": neighbours, "weights": weights}}
        if len(inputs["rgb"]):
            features[RGB] = {"tokens": inputs["rgb"], "grid": np.array([28, 28])}
        return GeneratedSample("train/good/000", features)

    return build


def relative(got, expected):
    return np.abs(np.asarray(got, dtype=np.float64) - expected).max() / np.abs(expected).max()


def test_stored_features_are_reproduced(sample, golden_arrays):
    golden = golden_arrays("cfm")
    dense = DenseReader()(sample())
    chosen = golden["assembly/tok"]
    assert relative(dense.points[chosen][:, ::8], golden["assembly/points"]) < 1e-5
    assert relative(dense.rgb[chosen][:, ::8], golden["assembly/rgb"]) < 1e-5
    nonzero = np.unpackbits(golden["assembly/nonzero"])[: 224 * 224].astype(bool)
    np.testing.assert_array_equal(dense.valid.numpy(), nonzero)


def test_polyurethane_grid_is_reproduced(sample, golden_arrays):
    golden = golden_arrays("cfm")
    dense = DenseReader(side=96, cloud_size=96, streams=(POINTS,))(sample(96, 96, "expanded"))
    got = dense.points[golden["assembly/poly_tok"]][:, ::8].numpy()
    off = np.abs(got - golden["assembly/poly"]) / np.abs(golden["assembly/poly"]).max()
    # stored with the published expansion, whose rounding near a centre is kept
    assert off.max() < 1e-5
    assert dense.rgb is None and dense.points.shape == (96 * 96, 1152)


def test_the_published_expansion_deviates_as_stored(sample, golden_arrays):
    golden = golden_arrays("cfm")
    direct, official = golden["assembly/points"], golden["assembly/official"]
    got = DenseReader()(sample(form="expanded")).points[golden["assembly/tok"]][:, ::8].numpy()
    # rounding near a centre is all that is left of some distances
    assert np.abs(got - direct).max() > 1e-2
    assert relative(got, official) < 1e-5


def test_rgb_is_upsampled_as_pytorch_does():
    tokens = torch.randn(28 * 28, 5)
    expected = torch.nn.functional.interpolate(
        tokens.T.reshape(1, 5, 28, 28), size=(224, 224), mode="bilinear", align_corners=False
    )
    got = upsampled(tokens, 28, 224)
    assert torch.allclose(got, expected.reshape(5, -1).T, atol=1e-5)


def test_points_outside_the_support_are_exactly_zero_and_the_rim_is_two_pixels(sample):
    made = sample()
    dense = DenseReader(channel_sum=False)(made)
    filled = np.zeros(224 * 224, dtype=bool)
    filled[made[POINTS]["pixel"]] = True
    near = binary_dilation(filled.reshape(224, 224), np.ones((5, 5), dtype=bool))
    valid = dense.valid.numpy().reshape(224, 224)
    assert valid[filled.reshape(224, 224)].all()
    assert not valid[~near].any()
    assert not dense.points.numpy()[~valid.ravel()].any()


def test_a_pixel_whose_channels_cancel_is_invalid_as_published(golden_sample):
    sample = golden_sample(0, 56)
    points = torch.from_numpy(sample["xyz"].copy())
    assert not bool(points.sum(dim=1)[sample["cancel"]] != 0)
    assert bool((points != 0).any(dim=1)[sample["cancel"]])


def test_tokens_are_kept_within_a_limit(sample):
    reads = []

    class Counted(GeneratedFeatures):
        def __getitem__(self, index):
            reads.append(index)
            return super().__getitem__(index)

    made = Counted([sample(), sample()])
    reader = DenseReader(side=56)
    once = DenseSet(made, reader)
    first = once[0]
    assert torch.equal(first.points, once[0].points) and reads == [0]
    reads.clear()
    never = DenseSet(made, reader, cache_bytes=0)
    never.batch([0, 1, 0])
    assert reads == [0, 1, 0]
    reads.clear()
    one = DenseSet(made, reader, cache_bytes=reader.tokens(made.samples[0]).nbytes)
    one.batch([0, 1, 0, 1])
    assert reads == [0, 1, 1]


def test_a_grid_that_is_not_square_is_refused(sample):
    made = sample()
    broken = GeneratedSample("test/bent/007", {**made.arrays, RGB: {"tokens": made[RGB]["tokens"], "grid": [14, 56]}})
    with pytest.raises(DataError, match=r"test/bent/007.*14 x 56"):
        DenseReader()(broken)


@pytest.mark.parametrize("channel_sum", [True, False])
def test_valid_pixels_are_those_of_the_whole_grid(sample, channel_sum):
    made, reader = sample(), DenseReader(channel_sum=channel_sum)
    dense, pixels = reader(made), reader.valid_pixels(reader.tokens(made))
    np.testing.assert_array_equal(pixels.index.numpy(), np.flatnonzero(dense.valid.numpy()))
    assert torch.allclose(pixels.rgb, dense.rgb[dense.valid], atol=1e-5)
    assert torch.equal(pixels.points, dense.points[dense.valid])
    weight = torch.randn(7, 768), torch.randn(7, 1152)
    assert torch.allclose(pixels.rgb_mapped(weight[0]), dense.rgb[dense.valid] @ weight[0].T, atol=1e-3)
    assert torch.allclose(pixels.points_mapped(weight[1]), dense.points[dense.valid] @ weight[1].T, atol=1e-3)


def test_cfm_scores_the_same_from_tokens_and_from_the_whole_grid(sample):
    method = Cfm(CfmConfig(grid=56))
    torch.manual_seed(0)
    learner = method.build_learner({RGB: 768, POINTS: 1152})
    tokens = method.reader.tokens(sample())
    with torch.inference_mode():
        whole, fast = method.errors(learner, method.reader.assemble(tokens)), method.sample_errors(learner, tokens)
    assert whole.shape == fast.shape == (56, 56)
    assert relative(fast, whole) < 1e-5
