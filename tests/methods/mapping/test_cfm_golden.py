"""CFM against stored runs of the published implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmad_cli.methods.cfm import networks
from mmad_cli.methods.cfm.method import DEFINITION, Cfm, CfmConfig
from mmad_cli.methods.cfm.networks import CfmLearner, mapping_errors
from mmad_cli.methods.mapping.config import POINTS, RGB
from mmad_cli.methods.mapping.scoring import SMOOTHING, smooth
from mmad_cli.metrics import all_metrics

NETWORKS = {"2Dto3D": "to_points", "3Dto2D": "to_rgb"}
COUNTS = {"base": 5_535_360, "big": 12_915_840}


def relative(got, expected):
    expected = np.asarray(expected, dtype=np.float64)
    return np.abs(np.asarray(got, dtype=np.float64) - expected).max() / np.abs(expected).max()


@pytest.fixture
def stored(golden_arrays):
    arrays = golden_arrays("cfm")
    return lambda folder: {
        name.removeprefix(f"{folder}/"): array for name, array in arrays.items() if name.startswith(f"{folder}/")
    }


@pytest.fixture
def learner(golden_state, golden_shapes):
    def build(depth="base"):
        made = CfmLearner({RGB: 768, POINTS: 1152}, depth, None)
        for direction, attribute in NETWORKS.items():
            name = f"CFM_{direction}" + ("" if depth == "base" else "_big")
            state = golden_state(name, golden_shapes["cfm"][name])
            getattr(made, attribute).load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
        return made

    return build


@pytest.mark.parametrize("depth", ["base", "big"])
def test_mappers(depth, learner, dense, stored):
    golden, features, made = stored("small"), dense(0, 56), learner(depth)
    for direction, attribute in NETWORKS.items():
        name = f"CFM_{direction}" + ("" if depth == "base" else "_big")
        inputs = features.rgb if direction == "2Dto3D" else features.points
        with torch.inference_mode():
            out = getattr(made, attribute)(inputs).numpy()
        expected = golden[f"forward/{name}/tok"]
        assert relative(out[golden["tok"]][:, ::8], expected) < 1e-4
        stats = [out.sum(dtype=np.float64), np.abs(out).sum(dtype=np.float64), np.linalg.norm(out.astype(np.float64))]
        np.testing.assert_allclose(stats[1:], golden[f"forward/{name}/stats"][1:3], rtol=1e-4)
    count = sum(p.numel() for module in made.groups.values() for p in module.parameters())
    assert count == COUNTS[depth] == sum(golden[f"count/CFM_{d}{'' if depth == 'base' else '_big'}"] for d in NETWORKS)


@pytest.mark.parametrize(
    ("run", "batches"),
    [
        pytest.param("train_bs2", [[0, 1]] * 5, marks=pytest.mark.slow),
        ("train_bs1", [[0], [1], [0], [1], [0]]),
    ],
)
def test_five_steps(run, batches, learner, dense, stored):
    golden, made = stored(f"small/{run}"), learner()
    samples = {index: dense(index, 56) for index in (0, 1)}
    parameters = {
        f"CFM_{name}": parameter for module in made.groups.values() for name, parameter in module.named_parameters()
    }
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimiser = torch.optim.Adam(parameters.values(), lr=1e-3)
    losses = []
    for number, batch in enumerate(batches):
        optimiser.zero_grad()
        losses.append(made.backward([samples[index] for index in batch])["mapping"])
        if number == 0:
            gradients = [parameters[name].grad for name in golden["grad_first/names"]]
            check_sums(gradients, golden["grad_first/sum_abs_l2"], 1e-4)
        optimiser.step()
    for direction in NETWORKS:
        assert relative([loss[direction] for loss in losses], golden[f"loss_{direction}"]) < 1e-4
    final = [parameters[name].detach() for name in golden["final/names"]]
    check_sums(final, golden["final/sum_abs_l2"], 1e-3)
    first = np.stack([tensor.reshape(-1)[:4].numpy() for tensor in final])
    assert relative(first, golden["final/first4"]) < 1e-3
    moved = [
        float((tensor - before[name]).double().norm())
        for name, tensor in zip(golden["final/names"], final, strict=True)
    ]
    assert relative(moved, golden["final/delta_l2"]) < 1e-3


def check_sums(tensors, expected, tolerance):
    """Sum of absolute values and length; the plain sum cancels, so it is judged by the former."""
    got = np.array([[float(f(t.double())) for f in (torch.sum, lambda v: v.abs().sum(), torch.norm)] for t in tensors])
    assert (np.abs(got - expected) <= tolerance * expected[:, [1, 1, 2]]).all()


@pytest.mark.slow
def test_inference_of_three_samples(learner, dense, golden_sample, stored, monkeypatch):
    golden, made, method = stored("full"), learner(), Cfm(CfmConfig())
    predictions, of_mapper = [], {}

    def recorded(mapper, inputs, targets):
        of_mapper[mapper] = mapping_errors(mapper, inputs, targets)
        return of_mapper[mapper]

    monkeypatch.setattr(networks, "mapping_errors", recorded)
    for index in (10, 11, 12):
        features = dense(index, 224)
        with torch.inference_mode():
            errors = method.errors(made, features)
            if index == 11:
                for name, mapper in (("cos_2d", made.to_rgb), ("cos_3d", made.to_points)):
                    whole = torch.zeros(224 * 224)
                    whole[features.valid] = of_mapper[mapper]
                    assert relative(whole.reshape(224, 224)[::8, ::8], golden[f"{index}/{name}_s8"]) < 1e-4
        smoothed, prediction = smooth(errors), method.scored(errors)
        assert relative(errors[::8, ::8], golden[f"{index}/comb_s8"]) < 1e-4
        assert relative(smoothed[::8, ::8], golden[f"{index}/blurred_s8"]) < 1e-4
        assert np.count_nonzero(smoothed) == golden[f"{index}/blur_nonzero_count"]
        assert smoothed.mean() == pytest.approx(golden[f"{index}/blur_mean_all"].item(), rel=1e-5)
        assert relative(prediction.anomaly_map[::8, ::8], golden[f"{index}/pixel_map_s8"]) < 1e-4
        for_aupro = prediction.anomaly_map * np.float32(prediction.aupro_scale)
        assert relative(for_aupro[::8, ::8], golden[f"{index}/aupro_map_s8"]) < 1e-4
        predictions.append(prediction)
        if index == 11:
            for number, expected in enumerate(golden["11/blur_steps_s8"], start=1):
                step = smooth(errors, SMOOTHING[:number])
                assert relative(step[::8, ::8], expected) < 1e-4
    scores = [prediction.image_score for prediction in predictions]
    np.testing.assert_allclose(scores, golden["image_scores"], rtol=1e-5)
    maps = [prediction.anomaly_map for prediction in predictions]
    values = all_metrics(
        golden["image_labels"],
        scores,
        [golden_sample(index, 224)["truth"].astype(bool) for index in (10, 11, 12)],
        maps,
        aupro_maps=[m * np.float32(p.aupro_scale) for m, p in zip(maps, predictions, strict=True)],
    ).values
    assert values["i_auroc"] == pytest.approx(golden["i_auroc"].item(), abs=1e-6)
    assert values["p_auroc"] == pytest.approx(golden["p_auroc"].item(), abs=1e-6)
    names = [f"aupro_{limit}_grid99" for limit in ("30", "10", "05", "01")]
    np.testing.assert_allclose([values[name] for name in names], golden["au_pro"], atol=1e-6)


@pytest.mark.slow
def test_loss_and_gradients_at_full_size(learner, dense, stored):
    golden, made = stored("full/loss"), learner()
    losses = made.backward([dense(0, 224)])["mapping"]
    for direction in NETWORKS:
        assert relative([losses[direction]], golden[f"loss_{direction}"]) < 1e-4
    parameters = {f"CFM_{name}": p for module in made.groups.values() for name, p in module.named_parameters()}
    check_sums([parameters[name].grad for name in golden["grad_first/names"]], golden["grad_first/sum_abs_l2"], 1e-4)


def test_published_numbers_are_those_of_the_checkpoints():
    assert (CfmConfig().epochs, CfmConfig().batch_size) == (250, 4)
    big = CfmConfig(variant="big")
    assert (big.epochs, big.batch_size) == (50, 2)
    assert CfmConfig(variant="big", epochs=3).epochs == 3
    assert DEFINITION.protocol == "cfm"
