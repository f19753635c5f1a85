"""Anomaly maps of CMDR-IAD: every intermediate against the published code's numbers, and exactness of the shortcuts."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mmad_cli.devices import shared_tensor
from mmad_cli.methods.anomaly_map import bilinear_matrix
from mmad_cli.methods.base import Prediction
from mmad_cli.methods.cmdr_iad import inference
from mmad_cli.methods.cmdr_iad.config import PUBLISHED_NAMES, RGB_SMOOTHING, STREAMS, CmdrIadConfig, NetworkName
from mmad_cli.methods.cmdr_iad.inference import (
    Fusion,
    errors,
    fuse,
    gated_mapping,
    polyurethane_map,
    weighted_reconstruction,
)
from mmad_cli.methods.cmdr_iad.learner import CmdrLearner
from mmad_cli.methods.cmdr_iad.method import CmdrIad
from mmad_cli.methods.cmdr_iad.networks import (
    PointDecoder,
    load_tensors,
    new_networks,
)
from mmad_cli.methods.mapping.dense import DenseFeatures
from mmad_cli.methods.mapping.scoring import SMOOTHING, smooth
from mmad_cli.metrics import aupro, pixel_auroc
from mmad_cli.metrics.summary import all_metrics

Golden = Callable[[str], dict[str, np.ndarray]]

# published name of an error map -> the network that it is of
ERRORS: dict[str, NetworkName] = {
    "d_map2d": "points_to_rgb",
    "d_map3d": "rgb_to_points",
    "d_rec2d": "rgb_decoder",
    "d_rec3d": "point_decoder",
}


def close(found: Any, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(np.asarray(found), expected, atol=tolerance * np.abs(expected).max(), rtol=0)


def score_maps(foreground: np.ndarray, seed: int = 20417) -> list[np.ndarray]:
    """Four pseudo error maps (224, 224), in the order of the published generator."""
    random = np.random.Generator(np.random.PCG64(zlib.crc32(f"score_unit/{seed}".encode())))
    matrix, maps = bilinear_matrix(7, 224).astype(np.float64), []
    for _ in range(4):
        noise = random.random((224, 224))
        maps.append(np.where(foreground, 0.8 * noise + 0.8 * (matrix @ random.random((7, 7)) @ matrix.T), 0.0))
    return [values.astype(np.float32) for values in maps]


def test_published_gate_and_confidence(golden_arrays: Golden) -> None:
    expected = golden_arrays("cmdr_iad")
    foreground = np.unpackbits(expected["score_unit/foreground"]).reshape(224, 224).astype(bool)
    first, second, third, fourth = score_maps(foreground)
    mapping, reconstruction = gated_mapping(first, second), weighted_reconstruction(third, fourth)
    pairs = {
        "joint": mapping.joint,
        "local_std": mapping.deviation,
        "W_local": mapping.weight,
        "alpha": mapping.gate,
        "A_map": mapping.anomaly,
        "w2": reconstruction.rgb_weight,
        "w3": reconstruction.points_weight,
        "A_rec": reconstruction.anomaly,
    }
    for name, found in pairs.items():
        close(found[::8, ::8], expected[f"score_unit/{name}"])
        total, _, length, low, high = expected[f"score_unit/{name}_stats"]
        assert found.sum() == pytest.approx(total, rel=1e-4)
        assert np.sqrt((found**2).sum()) == pytest.approx(length, rel=1e-4)
        np.testing.assert_allclose([found.min(), found.max()], [low, high], rtol=1e-4)


def test_gate_of_a_constant_map() -> None:
    """Without spread the gate is sigmoid(4 j)."""
    found = gated_mapping(np.full((30, 30), 0.5), np.full((30, 30), 0.8))
    assert (found.deviation == 0).all()
    np.testing.assert_allclose(found.weight, 4)
    np.testing.assert_allclose(found.anomaly, 0.4 / (1 + np.exp(-1.6)))


def test_equal_errors_are_their_own_mean() -> None:
    errors_of_both = np.random.default_rng(0).random((10, 10)) * 2
    np.testing.assert_allclose(weighted_reconstruction(errors_of_both, errors_of_both).anomaly, errors_of_both, 1e-7)


def test_larger_reconstruction_error_counts_less() -> None:
    found = weighted_reconstruction(np.full((1, 1), 2.0), np.zeros((1, 1)))
    assert found.rgb_weight == pytest.approx(np.exp(-0.6))
    assert 0.35 < float(found.anomaly[0, 0]) / 2 < 0.5


def test_rgb_error_alone_is_smoothed_and_the_result_masked() -> None:
    random = np.random.default_rng(0)
    maps = {name: random.random((40, 40)) for name in ERRORS.values()}
    valid = random.random((40, 40)) < 0.5
    found = fuse(maps, valid)
    np.testing.assert_array_equal(found.rgb_smoothed, smooth(maps["rgb_decoder"], RGB_SMOOTHING))
    expected = weighted_reconstruction(found.rgb_smoothed, maps["point_decoder"])
    np.testing.assert_array_equal(found.reconstruction.anomaly, expected.anomaly)
    assert (found.fused[~valid] == 0).all() and (found.fused[valid] > 0).all()


def whole_map_errors(
    networks: dict[NetworkName, nn.Module], rgb: torch.Tensor, points: torch.Tensor, valid: torch.Tensor
) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, network in networks.items():
        one, other = ({"rgb": rgb, "points": points}[stream] for stream in STREAMS[name])
        with torch.inference_mode():
            predicted = nn.functional.normalize(network(one[None])[0], dim=1)
            found[name] = (predicted - nn.functional.normalize(other, dim=1)).norm(dim=1) * valid
    return found


def tiny(side: int) -> tuple[dict[NetworkName, nn.Module], torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    networks = new_networks(6, 9, side)
    for network in networks.values():
        network.train()
        for name, buffer in network.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer += 0.3 * torch.rand_like(buffer)
        network.eval().requires_grad_(False)
    return networks, torch.randn(side * side, 6), torch.randn(side * side, 9)


@pytest.mark.parametrize("side", [8, 16, 24])
@pytest.mark.parametrize("region", ["blob", "corner", "scattered", "all", "one"])
def test_errors_equal_those_of_whole_maps(monkeypatch: pytest.MonkeyPatch, side: int, region: str) -> None:
    """What is left out does not matter, whichever pixels are valid and however it is cut into tiles."""
    monkeypatch.setattr(inference, "_PIXEL_TILE", 13)
    monkeypatch.setattr(inference, "_WINDOW_TILE", 2)
    monkeypatch.setattr(inference, "_POSITION_TILE", 20)
    networks, rgb, points = tiny(side)
    valid = torch.zeros(side, side, dtype=torch.bool)
    match region:
        case "blob":
            valid[side // 2 : side // 2 + 3, 2:5] = True
        case "corner":
            valid[-2:, :2] = True
        case "scattered":
            valid = torch.rand(side, side) < 0.1
            valid[1, 1] = True
        case "all":
            valid[:] = True
        case "one":
            valid[3, 4] = True
    valid = valid.view(-1)
    points = points * valid[:, None]
    found, expected = errors(networks, rgb, points, valid), whole_map_errors(networks, rgb, points, valid)
    for name in networks:
        torch.testing.assert_close(found[name], expected[name], atol=2e-5, rtol=1e-4)
        assert (found[name][~valid] == 0).all()


def test_point_features_outside_the_valid_mask_still_count() -> None:
    """A pixel whose channels sum to zero is not valid but is seen by the point decoder."""
    networks, rgb, points = tiny(8)
    valid = torch.rand(64) < 0.5
    found, expected = errors(networks, rgb, points, valid), whole_map_errors(networks, rgb, points, valid)
    torch.testing.assert_close(found["point_decoder"], expected["point_decoder"], atol=1e-5, rtol=1e-4)


def test_nothing_valid_is_nowhere_anomalous() -> None:
    networks, rgb, points = tiny(8)
    valid = torch.zeros(64, dtype=torch.bool)
    assert all(not found.any() for found in errors(networks, rgb, points, valid).values())


def test_stream_that_no_network_needs_may_be_missing() -> None:
    networks, rgb, _ = tiny(8)
    valid = torch.ones(64, dtype=torch.bool)
    found = errors({"rgb_decoder": networks["rgb_decoder"]}, rgb, None, valid)
    assert list(found) == ["rgb_decoder"]
    with pytest.raises(ValueError, match="points: needed"):
        errors(networks, rgb, None, valid)


def test_other_networks_are_refused() -> None:
    with pytest.raises(TypeError, match="Linear for rgb_decoder"):
        errors({"rgb_decoder": nn.Linear(2, 2)}, torch.zeros(4, 2), None, torch.ones(4, dtype=torch.bool))


@pytest.fixture(scope="module")
def full_size(golden_state: Any, golden_shapes: Any) -> dict[NetworkName, nn.Module]:
    """The networks at full size with the deterministic weights, in evaluation mode."""
    networks = new_networks(side=224, dropout=0.0)
    for name, network in networks.items():
        state = golden_state(PUBLISHED_NAMES[name], golden_shapes["cmdr_224"][PUBLISHED_NAMES[name]])
        load_tensors(network.eval().requires_grad_(False), {k: torch.from_numpy(v) for k, v in state.items()}, name)
    return networks


@pytest.mark.slow
def test_published_point_decoder_at_full_size(
    golden_arrays: Golden, golden_sample: Any, full_size: dict[NetworkName, nn.Module]
) -> None:
    """The one network that is another at full size."""
    expected = golden_arrays("cmdr_iad")
    with torch.inference_mode():
        out = full_size["point_decoder"](shared_tensor(golden_sample(0, 224)["xyz"])[None])[0]
    close(out[expected["full/tok"]], expected["full/eval/Dec3D/rows"])
    total, magnitude, length, *ends = expected["full/eval/Dec3D/stats"]
    values = out.double()
    # the sum is a difference of large numbers: measured by the sum of magnitudes
    assert float(values.sum()) == pytest.approx(total, abs=1e-4 * magnitude)
    assert float(values.abs().sum()) == pytest.approx(magnitude, rel=1e-4)
    assert float(values.norm()) == pytest.approx(length, rel=1e-4)
    close([float(values.min()), float(values.max())], np.array(ends))


@pytest.mark.slow
def test_published_inference(
    golden_arrays: Golden,
    golden_sample: Any,
    dense: Callable[[int, int], DenseFeatures],
    full_size: dict[NetworkName, nn.Module],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three samples at full size, from features to metrics: mask, every intermediate map at every 8th pixel, scores."""
    expected = golden_arrays("cmdr_iad")
    joined: list[tuple[dict[NetworkName, np.ndarray], Fusion]] = []

    def recorded(maps: dict[NetworkName, np.ndarray], valid: np.ndarray) -> Fusion:
        joined.append((maps, fuse(maps, valid)))
        return joined[-1][1]

    monkeypatch.setattr(inference, "fuse", recorded)
    method, learner = CmdrIad(CmdrIadConfig()), CmdrLearner(full_size)
    predictions, masks = [], []
    for index in (10, 11, 12):
        features = dense(index, 224)
        background = np.unpackbits(expected[f"infer/{index}/background"])[: 224 * 224].astype(bool)
        np.testing.assert_array_equal(~features.valid.numpy(), background)
        fused = method.errors(learner, features)
        predictions.append(method.scored(fused))
        masks.append(golden_sample(index, 224)["truth"] > 0)
        check_intermediates(*joined[-1], smooth(fused, SMOOTHING), predictions[-1], expected, f"infer/{index}")
    scores = [prediction.image_score for prediction in predictions]
    close(scores, expected["infer/image_scores"])
    maps = [prediction.anomaly_map for prediction in predictions]
    aupro_maps = [m * np.float32(p.aupro_scale) for m, p in zip(maps, predictions, strict=True)]
    values = all_metrics(expected["infer/image_labels"], scores, masks, maps, aupro_maps=aupro_maps).values
    assert values["i_auroc"] == pytest.approx(float(expected["infer/i_auroc"]), abs=1e-6)
    assert values["p_auroc"] == pytest.approx(float(expected["infer/p_auroc"]), abs=1e-6)
    names = [f"aupro_{limit}_grid99" for limit in ("30", "10", "05", "01")]
    np.testing.assert_allclose([values[name] for name in names], expected["infer/au_pro"], atol=1e-6)


def check_intermediates(
    maps: dict[NetworkName, np.ndarray],
    joined: Fusion,
    smoothed: np.ndarray,
    prediction: Prediction,
    expected: dict[str, np.ndarray],
    prefix: str,
) -> None:
    intermediates: dict[str, Any] = {name: maps[network] for name, network in ERRORS.items()}
    intermediates |= {
        "d_rec2d_blur": joined.rgb_smoothed,
        "joint": joined.mapping.joint,
        "local_std": joined.mapping.deviation,
        "W_local": joined.mapping.weight,
        "alpha": joined.mapping.gate,
        "A_map": joined.mapping.anomaly,
        "w2": joined.reconstruction.rgb_weight,
        "w3": joined.reconstruction.points_weight,
        "A_rec": joined.reconstruction.anomaly,
        "fused": joined.fused,
        "blurred": smoothed,
        "pixel_map": prediction.anomaly_map,
        "aupro_map": prediction.anomaly_map * prediction.aupro_scale,
    }
    for name, values in intermediates.items():
        close(values[::8, ::8], expected[f"{prefix}/{name}"])
    assert np.count_nonzero(smoothed) == expected[f"{prefix}/blur_nonzero_count"]
    assert smoothed.mean() == pytest.approx(float(expected[f"{prefix}/blur_mean_all"]), rel=1e-5)
    if f"{prefix}/fused_blur_steps" in expected:
        for steps, windows, start in (
            (expected[f"{prefix}/rec2d_blur_steps"], RGB_SMOOTHING, maps["rgb_decoder"]),
            (expected[f"{prefix}/fused_blur_steps"], SMOOTHING, joined.fused),
        ):
            for count, step in enumerate(steps, start=1):
                close(smooth(start, windows[:count])[::8, ::8], step)


@pytest.fixture(scope="module")
def chunk_decoder(golden_state: Any, golden_shapes: Any) -> Callable[[], PointDecoder]:
    """The network for polyurethane with the deterministic weights, without dropout."""
    name = "FeatureDecoder_9216"
    state = golden_state(name, golden_shapes["cmdr_polyurethane"][name])

    def build() -> PointDecoder:
        decoder = PointDecoder(9216, dropout=0.0)
        load_tensors(decoder, {key: torch.from_numpy(value) for key, value in state.items()}, name)
        return decoder

    return build


def chunk(golden_sample: Any, index: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    sample = golden_sample(index, 96)
    points = torch.from_numpy(np.array(sample["xyz"]))
    return points, points.sum(dim=1) != 0, sample["truth"] > 0


def check_chunk(
    decoder: PointDecoder,
    golden_sample: Any,
    expected: dict[str, np.ndarray],
    prefix: str,
    index: int,
    tolerance: float = 1e-4,
) -> tuple[np.ndarray, np.ndarray]:
    """Anomaly map and ground truth of a chunk, after comparing what leads to the map."""
    points, valid, truth = chunk(golden_sample, index)
    background = np.unpackbits(expected[f"pu/infer/{index}/background"])[: valid.numel()].astype(bool)
    np.testing.assert_array_equal(~valid.numpy(), background)
    found = errors({"point_decoder": decoder}, None, points, valid)["point_decoder"].view(96, 96).numpy()
    close(found[::4, ::4], expected[f"{prefix}/{index}/dist"], tolerance)
    close(smooth(found, (5,))[::4, ::4], expected[f"{prefix}/{index}/blurred"], tolerance)
    anomaly = polyurethane_map(found)
    close(anomaly[::4, ::4], expected[f"{prefix}/{index}/norm_map"], tolerance)
    score = expected[f"{prefix}/image_scores"][index - 10]
    assert anomaly.max() == pytest.approx(float(score), rel=tolerance)
    return anomaly, truth


def assert_forward(decoder: PointDecoder, batch: torch.Tensor, expected: dict[str, np.ndarray], prefix: str) -> None:
    with torch.no_grad():
        out = decoder(batch)
    for index in range(len(batch)):
        close(out[index, expected["pu/tok"], ::2], expected[f"{prefix}/{index}/rows"])
        total, magnitude, length, *_ = expected[f"{prefix}/{index}/stats"]
        assert float(out[index].double().sum()) == pytest.approx(total, abs=1e-4 * magnitude)
        assert float(out[index].double().norm()) == pytest.approx(length, rel=1e-4)


def test_published_polyurethane_network(
    golden_arrays: Golden, golden_sample: Any, chunk_decoder: Callable[[], PointDecoder]
) -> None:
    """Forward of two chunks in evaluation mode, and the inference of a third one."""
    expected, decoder = golden_arrays("cmdr_iad"), chunk_decoder().eval().requires_grad_(False)
    batch = torch.stack([chunk(golden_sample, index)[0] for index in (0, 1)])
    assert_forward(decoder, batch, expected, "pu/eval")
    check_chunk(decoder, golden_sample, expected, "pu/infer", 11)


@pytest.mark.slow
def test_published_polyurethane_training(
    golden_arrays: Golden, golden_sample: Any, chunk_decoder: Callable[[], PointDecoder]
) -> None:
    """Inference and metrics of three chunks, five steps on a batch of two, inference again."""
    expected, decoder = golden_arrays("cmdr_iad"), chunk_decoder().eval()
    found = [check_chunk(decoder, golden_sample, expected, "pu/infer", index) for index in (10, 11, 12)]
    maps, masks = (np.stack(parts) for parts in zip(*found, strict=True))
    assert pixel_auroc(masks, maps) == pytest.approx(float(expected["pu/infer/p_auroc"]), abs=1e-6)
    rates = [aupro(masks, maps, limit=limit, grid=99) for limit in (0.3, 0.1, 0.05, 0.01)]
    np.testing.assert_allclose(rates, expected["pu/infer/au_pro"], atol=1e-6)
    batch = [DenseFeatures(None, *chunk(golden_sample, index)[:2], 96) for index in (0, 1)]
    assert_forward(
        chunk_decoder().train(), torch.stack([chunk(golden_sample, i)[0] for i in (0, 1)]), expected, "pu/train"
    )
    optimiser = torch.optim.AdamW(decoder.train().parameters(), lr=1e-3)
    learner, losses = CmdrLearner({"point_decoder": decoder}), []
    for _ in range(5):
        optimiser.zero_grad()
        losses.append(learner.backward(batch)["point_decoder"]["cosine"])
        optimiser.step()
    np.testing.assert_allclose(losses, expected["pu/losses"], rtol=1e-3)
    decoder.eval().requires_grad_(False)
    for index in (10, 11, 12):
        check_chunk(decoder, golden_sample, expected, "pu/infer_after_training", index, 1e-3)


def test_map_of_a_chunk_without_error_is_zero() -> None:
    assert not polyurethane_map(np.zeros((12, 12))).any()
