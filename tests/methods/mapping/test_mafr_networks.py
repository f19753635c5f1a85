"""MAFR's networks and losses: closed forms, published tensors, and the properties that the formulas imply."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from mmad_cli.errors import WeightsError
from mmad_cli.methods.mafr import losses, networks
from mmad_cli.methods.mafr.inference import residuals

COUNTS = {"encoder": 3_691_200, "rgb_decoder": 3_324_050, "point_decoder": 6_368_426}


def published_attention(attention, hidden):
    """The attention as published: on a map of one pixel, with pooling and a padded convolution."""
    image = hidden[:, :, None, None]
    fc = attention.channel_attention.fc
    pooled = [
        fc(pool(image, 1).flatten(1)) for pool in (functional.adaptive_avg_pool2d, functional.adaptive_max_pool2d)
    ]
    image = image * torch.sigmoid(pooled[0] + pooled[1])[:, :, None, None]
    planes = torch.cat([image.mean(1, keepdim=True), image.max(1, keepdim=True).values], 1)
    return (image * torch.sigmoid(attention.spatial_attention.conv(planes)))[:, :, 0, 0]


@pytest.fixture
def small():
    return networks.new_network(20, 34, seed=3).eval()


def test_parameter_counts_and_one_norm_per_network():
    with torch.device("meta"):
        network = networks.RestorationNetwork()
    for name, expected in COUNTS.items():
        module = network.get_submodule(name)
        assert sum(p.numel() for p in module.parameters()) == expected
        assert sum(isinstance(m, torch.nn.LayerNorm) for m in module.modules()) == 1
    assert sum(p.numel() for p in network.parameters()) == 13_383_676


def test_tensors_have_the_published_names_and_shapes(golden_shapes):
    with torch.device("meta"):
        published = networks.to_published(networks.RestorationNetwork().state_dict())
    expected = {f"{name}.{key}": shape for name, keys in golden_shapes["mafr"].items() for key, shape in keys.items()}
    assert {key: list(value.shape) for key, value in published.items()} == expected


def test_published_tensors_go_both_ways(small):
    published = networks.to_published(small.state_dict())
    again = networks.network_from_published(published, "some file")
    assert networks.from_published(published).keys() == small.state_dict().keys()
    for key, value in small.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=0)
    assert (again.rgb_channels, again.point_channels) == (20, 34)


def test_wrong_published_tensors_are_named(small):
    published = networks.to_published(small.state_dict())
    del published["decoder_3D.cbam.spatial_attention.conv.weight"]
    with pytest.raises(WeightsError, match=r"some file.*decoder_3D\.cbam\.spatial_attention\.conv\.weight"):
        networks.network_from_published(published, "some file")


@pytest.mark.parametrize("channels", [5, 48])
def test_attention_equals_the_published_one_on_one_pixel(channels):
    torch.manual_seed(0)
    attention, hidden = networks.Attention(channels).double(), torch.randn(30, channels, dtype=torch.float64)
    ours, theirs = attention(hidden), published_attention(attention, hidden)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    got, expected = (torch.autograd.grad(out.square().sum(), attention.parameters()) for out in (ours, theirs))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    taps = got[-1][0].clone()
    taps[:, 3, 3] = 0
    assert not taps.any()


def test_encoder_reads_rgb_before_points(small):
    rgb, points = torch.randn(4, 20), torch.randn(4, 34)
    joined = small.encoder.input_fc(torch.cat([rgb, points], 1))
    torch.testing.assert_close(small.encoder.mixed(rgb, points), joined)


def test_dropout_acts_in_training_only(small):
    rgb, points = torch.randn(50, 20), torch.randn(50, 34)
    torch.testing.assert_close(small(rgb, points), small(rgb, points), rtol=0, atol=0)
    small.train()
    assert not torch.equal(small(rgb, points)[0], small(rgb, points)[0])


def test_same_seed_same_network():
    one, two, other = (networks.new_network(6, 6, seed=seed) for seed in (1, 1, 2))
    weight = [n.encoder.input_fc.weight for n in (one, two, other)]
    assert torch.equal(weight[0], weight[1])
    assert not torch.equal(weight[0], weight[2])


def test_widths_below_one_are_refused():
    with pytest.raises(ValueError, match="at least 1, got 0 and 4"):
        networks.RestorationNetwork(0, 4)


def test_residuals_do_not_depend_on_tiles_and_normalise_nothing(small):
    rgb, points = torch.randn(50, 20), torch.randn(50, 34)
    restored = small(rgb, points)
    for tile in (7, 50, 1000):
        for got, ours, given in zip(residuals(small, rgb, points, tile=tile), restored, (rgb, points), strict=True):
            torch.testing.assert_close(got, (ours - given).square().sum(1).sqrt().detach())
    mixed = small.encoder.mixed(rgb, points)
    torch.testing.assert_close(residuals(small, rgb, points, mixed), residuals(small, rgb, points))
    assert [len(r) for r in residuals(small, rgb[:0], points[:0])] == [0, 0]


@pytest.mark.parametrize(
    ("rows", "tile", "message"), [(3, 5, r"rgb, points, mixed: .*got \[4, 3\]"), (4, 0, "tile: .*got 0")]
)
def test_residuals_refuse_what_they_cannot_compute(small, rows, tile, message):
    with pytest.raises(ValueError, match=message):
        residuals(small, torch.zeros(4, 20), torch.zeros(rows, 34), tile=tile)


def test_similarity_is_blind_to_scale_and_offset():
    torch.manual_seed(0)
    reference = torch.randn(60, 32)
    assert float(losses.similarity(3.0 * reference + 5.0, reference)) < 1e-6
    assert float(losses.similarity(-reference, reference)) == pytest.approx(4.0, rel=1e-5)


def test_similarity_is_two_less_twice_the_correlation():
    random = np.random.default_rng(0)
    one, other = (random.standard_normal((40, 25)) for _ in range(2))
    correlation = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(one, other, strict=True)])
    got = losses.similarity(torch.from_numpy(one), torch.from_numpy(other))
    assert float(got) == pytest.approx(2 - 2 * correlation, rel=1e-6)


def test_background_points_cost_one_each_at_first():
    network = networks.new_network(seed=115).eval()
    with torch.inference_mode():
        restored = network(torch.randn(40, 768), torch.zeros(40, 1152))[1]
        assert float(losses.similarity(restored, torch.zeros(40, 1152))) == pytest.approx(1.0, abs=1e-3)


def test_smoothness_reads_the_first_two_channels_only():
    torch.manual_seed(0)
    residual, guide = torch.randn(64, 6), torch.randn(64)
    changed = residual.clone()
    changed[:, 2:] += torch.randn(64, 4)
    assert torch.equal(losses.smoothness(residual, guide, 8), losses.smoothness(changed, guide, 8))
    changed[:, 1] *= 2
    assert not torch.equal(losses.smoothness(residual, guide, 8), losses.smoothness(changed, guide, 8))
    whole = losses.smoothness(residual, guide, 8, channels="all")
    pairs = [losses.smoothness(residual[:, i : i + 2], guide, 8) for i in (0, 2, 4)]
    torch.testing.assert_close(whole, torch.stack(pairs).mean())


def test_smoothness_by_hand():
    residual = torch.tensor([[0.0, 0.0], [1.0, 0.0], [4.0, 3.0], [9.0, 9.0]])
    guide = torch.tensor([0.0, 2.0, 0.0, 7.0])
    expected = 1.0 * np.exp(-2.0) + 4.0 + 3.0
    assert float(losses.smoothness(residual, guide, 2)) == pytest.approx(expected)


def test_census_of_a_constant_offset():
    side, offset = 12, -0.5
    averaged = losses._window_mean(torch.full((side, side, 2), offset))
    torch.testing.assert_close(averaged[3:-3, 3:-3], torch.full((6, 6, 2), offset))
    assert (averaged[:3].abs() < abs(offset)).all()
    torch.testing.assert_close(averaged[0, 0], torch.full((2,), offset * 16 / 49))
    share = (6 + 2 * (4 + 5 + 6) / 7) / side
    assert float(losses.census(torch.full((144, 2), offset), side)) == pytest.approx(0.5 * share**2, rel=1e-6)


def test_census_equals_the_difference_of_pooled_features_with_its_gradient():
    torch.manual_seed(0)
    side, channels = 9, 5
    reference = torch.randn(side * side, channels, dtype=torch.float64)
    restored = torch.randn_like(reference).requires_grad_()

    def pooled(rows):
        return functional.avg_pool2d(rows.T.reshape(1, channels, side, side), 7, stride=1, padding=3)

    ours = losses.census(restored - reference, side)
    theirs = (pooled(restored) - pooled(reference)).abs().mean()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, restored)[0] for loss in (ours, theirs)))


def test_masked_terms_see_valid_pixels_only():
    torch.manual_seed(0)
    restored, reference = torch.randn(100, 4), torch.randn(100, 4)
    valid = torch.zeros(10, 10, dtype=torch.bool)
    valid[2:8, 3:9] = True
    changed = torch.where(valid.reshape(-1, 1), restored, restored + 5)
    given = torch.where(valid.reshape(-1, 1), reference, reference)
    masked = [losses.modality_terms(r, given, 10, valid.reshape(-1)) for r in (restored, changed)]
    torch.testing.assert_close(masked[0], masked[1])
    everywhere = torch.ones(100, dtype=torch.bool)
    torch.testing.assert_close(
        losses.modality_terms(restored, reference, 10, everywhere), losses.modality_terms(restored, reference, 10)
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.similarity(torch.ones(3, 2), torch.ones(2, 2)), "restored, reference"),
        (lambda: losses.census(torch.ones(8, 2), 3), r"residual: .*9 rows"),
        (lambda: losses.smoothness(torch.ones(4, 1), torch.ones(4), 2), "residual, guide"),
        (lambda: losses.smoothness(torch.ones(4, 2), torch.ones(3), 2), "residual, guide"),
    ],
)
def test_losses_refuse_what_they_cannot_compute(call, message):
    with pytest.raises(ValueError, match=message):
        call()
