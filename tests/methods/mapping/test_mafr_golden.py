"""MAFR against stored runs of the published implementation."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from mmad_cli.methods.mafr import networks
from mmad_cli.methods.mafr.config import MafrConfig
from mmad_cli.methods.mafr.inference import residuals
from mmad_cli.methods.mafr.learner import MafrLearner
from mmad_cli.methods.mafr.losses import modality_terms
from mmad_cli.methods.mafr.method import DEFINITION, Mafr
from mmad_cli.methods.mapping.config import POINTS, RGB
from mmad_cli.methods.mapping.scoring import SMOOTHING, smooth
from mmad_cli.metrics import all_metrics

# stored name of a loss term -> ours
TERMS = {
    f"loss_{theirs}_{dimension}": f"{ours}_{stream}"
    for theirs, ours in (("sim", "similarity"), ("smooth", "smoothness"), ("census", "census"))
    for dimension, stream in (("2D", RGB), ("3D", POINTS))
}
NO_DROPOUT = MafrConfig(dropout=0.0)


def relative(got, expected):
    expected = np.asarray(expected, dtype=np.float64)
    return np.abs(np.asarray(got, dtype=np.float64) - expected).max() / np.abs(expected).max()


def statistics(tensor):
    values = tensor.detach().double()
    return [float(values.sum()), float(values.abs().sum()), float(values.norm())]


def check_sums(tensors, expected, tolerance):
    """Sum of absolute values and length; the plain sum cancels, so it is judged by the former."""
    got = np.array([statistics(tensor) for tensor in tensors])
    assert (np.abs(got - expected) <= tolerance * expected[:, [1, 1, 2]] + 1e-9).all()


@pytest.fixture
def stored(golden_arrays):
    arrays = golden_arrays("mafr")
    return lambda folder: {
        name.removeprefix(f"{folder}/"): array for name, array in arrays.items() if name.startswith(f"{folder}/")
    }


@pytest.fixture(scope="session")
def published_tensors(golden_state, golden_shapes):
    return {
        f"{name}.{key}": torch.from_numpy(value)
        for name, keys in golden_shapes["mafr"].items()
        for key, value in golden_state(name, keys).items()
    }


@pytest.fixture
def learner(published_tensors):
    made = MafrLearner({RGB: 768, POINTS: 1152}, NO_DROPOUT)
    made.network.load_state_dict(networks.from_published(published_tensors))
    return made


def parameters_of(learner):
    return networks.to_published(dict(learner.network.named_parameters()))


def text(names):
    return [name.decode() for name in names]


def five_steps(learner, samples):
    """Losses of five steps on samples 0, 1, 0, 1, 0, in the stored order of terms."""
    optimiser = torch.optim.Adam(learner.network.parameters(), lr=1e-3)
    losses = []
    for number in range(5):
        optimiser.zero_grad()
        losses.append(learner.backward([samples[number % 2]])["restoration"])
        optimiser.step()
    return [[loss[name] for name in (*TERMS.values(), "total")] for loss in losses]


def test_forward_and_every_hidden_layer(learner, dense, stored):
    golden, features, network = stored("small"), dense(0, 56), learner.network
    calls: dict[str, list[torch.Tensor]] = {}

    def record(name, module, inputs, output):
        calls.setdefault(name, []).append(output)

    for theirs, ours in networks.PUBLISHED_NETWORKS.items():
        for name, module in network.get_submodule(ours).named_modules():
            module.register_forward_hook(functools.partial(record, f"{theirs}/{name}".rstrip("/")))
    with torch.inference_mode():
        restored = network(features.rgb, features.points)
        # what the closed forms do without calling the module of that name
        calls["fusion_encoder/input_fc"] = [network.encoder.mixed(features.rgb, features.points)]
        for theirs, decoder in (("decoder_2D", network.rgb_decoder), ("decoder_3D", network.point_decoder)):
            gated = calls[f"{theirs}/cbam.channel_attention"][0]
            calls[f"{theirs}/cbam.spatial_attention.conv"] = [decoder.cbam.spatial_attention.gate(gated)]
            # the published code runs the perceptron on two poolings of the same vector
            for name in ("fc.0", "fc.2"):
                calls[f"{theirs}/cbam.channel_attention.{name}"] *= 2
    rows = golden["tok_hidden"]
    compared = 0
    for key in golden:
        if not key.startswith("forward/hidden/") or not key.endswith("/tok"):
            continue
        name, call = key.removeprefix("forward/hidden/").removesuffix("/tok").rsplit("/call", 1)
        output = calls[name][int(call) - 1]
        assert relative(output[rows][:, ::8].numpy(), golden[key]) < 1e-4, key
        expected = golden[key.replace("/tok", "/stats")]
        np.testing.assert_allclose(statistics(output)[1:], expected[1:3], rtol=1e-4, err_msg=key)
        compared += 1
    assert compared == 37
    fused = calls["fusion_encoder/output_fc"][0]
    outputs = {"fusion_embedding": fused, "restored_2D": restored[0], "restored_3D": restored[1]}
    for name, output in outputs.items():
        assert relative(output[golden["tok"]][:, ::8].numpy(), golden[f"forward/{name}/tok"]) < 1e-4
        expected = golden[f"forward/{name}/stats"]
        np.testing.assert_allclose(statistics(output)[1:], expected[1:3], rtol=1e-4)
        np.testing.assert_allclose([float(output.min()), float(output.max())], expected[3:], rtol=1e-4)


def test_parameter_counts(learner, stored):
    golden = stored("small/param_count")
    for theirs, ours in networks.PUBLISHED_NETWORKS.items():
        assert sum(p.numel() for p in learner.network.get_submodule(ours).parameters()) == golden[theirs]


@pytest.mark.parametrize("stream", ["rgb", "xyz"])
@pytest.mark.parametrize("term", ["similarity", "smoothness", "census"])
def test_each_term_and_its_gradient(stream, term, golden_sample, stored):
    golden = stored(f"small/loss_unit/{term}/{stream}")
    reference, restored = (torch.from_numpy(golden_sample(index, 56)[stream].copy()) for index in (0, 1))
    value = modality_terms(restored.requires_grad_(), reference, 56)[term]
    (gradient,) = torch.autograd.grad(value, restored)
    assert float(value.detach()) == pytest.approx(golden["value"].item(), rel=1e-4)
    rows = stored("small")["tok_hidden"]
    # rows where every difference is zero have no gradient: the scale is the whole gradient's maximum
    difference = np.abs(gradient[rows][:, ::8].numpy() - golden["grad_tok"]).max()
    assert difference < 1e-4 * np.abs(golden["grad_stats"][3:]).max()
    check_sums([gradient], golden["grad_stats"][None, :3], 1e-4)


@pytest.mark.parametrize(("run", "index"), [("train", 0), pytest.param("sample1", 1, marks=pytest.mark.slow)])
def test_loss_and_gradients(run, index, learner, dense, stored):
    golden = stored(f"small/{run}")
    losses = learner.backward([dense(index, 56)])["restoration"]
    got = [losses[name] for name in (*TERMS.values(), "total")]
    np.testing.assert_allclose(got, golden["losses"][0], rtol=1e-4)
    parameters = parameters_of(learner)
    gradients = [parameters[name].grad for name in text(golden["grad_first/names"])]
    check_sums(gradients, golden["grad_first/sum_abs_l2"], 1e-4)
    first = np.stack([tensor.reshape(-1)[:4].numpy() for tensor in gradients])
    assert relative(first, golden["grad_first/first4"]) < 1e-4


@pytest.mark.slow
def test_five_steps_and_inference_after_them(learner, dense, stored):
    golden = stored("small/train")
    before = {name: parameter.detach().clone() for name, parameter in parameters_of(learner).items()}
    losses = five_steps(learner, [dense(0, 56), dense(1, 56)])
    np.testing.assert_allclose(losses[0], golden["losses"][0], rtol=1e-4)
    np.testing.assert_allclose(losses, golden["losses"], rtol=1e-3)
    names, parameters = text(golden["final/names"]), parameters_of(learner)
    final = [parameters[name].detach() for name in names]
    check_sums(final, golden["final/sum_abs_l2"], 1e-3)
    first = np.stack([tensor.reshape(-1)[:4].numpy() for tensor in final])
    assert relative(first, golden["final/first4"]) < 1e-3
    moved = [float((tensor - before[name]).double().norm()) for name, tensor in zip(names, final, strict=True)]
    assert relative(moved, golden["final/delta_l2"]) < 1e-3

    trained, method = stored("full/infer_after_training"), Mafr(NO_DROPOUT)
    errors = method.errors(learner, dense(11, 224))
    assert relative(errors[::8, ::8], trained["11/comb_s8"]) < 1e-3
    assert relative(smooth(errors)[::8, ::8], trained["11/blurred_s8"]) < 1e-3
    assert method.scored(errors).image_score == pytest.approx(trained["image_score_11"].item(), rel=1e-3)


@pytest.mark.slow
def test_loss_at_full_size(learner, dense, stored):
    golden, features = stored("full"), dense(0, 224)
    with torch.inference_mode():
        terms = {name: float(value) for name, value in learner.terms(features).items()}
        restored = learner.network(*(stream[golden["tok"]] for stream in features.both()))
    got = [terms[name] for name in TERMS.values()]
    np.testing.assert_allclose([*got, sum(got)], golden["losses"], rtol=1e-4)
    for name, output in zip(("restored_2D", "restored_3D"), restored, strict=True):
        assert relative(output[:, ::8].numpy(), golden[f"forward/{name}/tok"]) < 1e-4


@pytest.mark.slow
def test_inference_of_three_samples(learner, dense, golden_sample, stored):
    golden, method = stored("full/infer"), Mafr(NO_DROPOUT)
    network, predictions = learner.network.eval(), []
    eighth = (torch.arange(0, 224, 8)[:, None] * 224 + torch.arange(0, 224, 8)[None, :]).reshape(-1)
    for index in (10, 11, 12):
        features = dense(index, 224)
        background = np.unpackbits(golden[f"{index}/background"]).astype(bool)
        np.testing.assert_array_equal(~features.valid.numpy(), background)
        errors = method.errors(learner, features)
        of_each = residuals(network, *(stream[eighth] for stream in features.both()))
        for name, residual in zip(("residual_2D", "residual_3D"), of_each, strict=True):
            assert relative(residual.reshape(28, 28).numpy(), golden[f"{index}/{name}_s8"]) < 1e-4
        smoothed, prediction = smooth(errors), method.scored(errors)
        assert relative(errors[::8, ::8], golden[f"{index}/comb_s8"]) < 1e-4
        assert relative(smoothed[::8, ::8], golden[f"{index}/blurred_s8"]) < 1e-4
        assert np.count_nonzero(smoothed) == golden[f"{index}/blur_nonzero_count"]
        assert smoothed.mean() == pytest.approx(golden[f"{index}/blur_mean_all"].item(), rel=1e-4)
        reached = smoothed[smoothed != 0].mean()
        assert reached == pytest.approx(golden[f"{index}/blur_mean_nonzero"].item(), rel=1e-4)
        assert relative(prediction.anomaly_map[::8, ::8], golden[f"{index}/pixel_map_s8"]) < 1e-4
        for_aupro = prediction.anomaly_map * np.float32(prediction.aupro_scale)
        assert relative(for_aupro[::8, ::8], golden[f"{index}/aupro_map_s8"]) < 1e-4
        if index == 11:
            for number, expected in enumerate(golden["11/blur_steps_s8"], start=1):
                assert relative(smooth(errors, SMOOTHING[:number])[::8, ::8], expected) < 1e-4
        predictions.append(prediction)
    scores = [prediction.image_score for prediction in predictions]
    np.testing.assert_allclose(scores, golden["image_scores"], rtol=1e-4)
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


def test_published_settings():
    config = MafrConfig()
    assert (config.epochs, config.batch_size, config.rate, config.dropout) == (100, 1, 1e-3, 0.1)
    assert DEFINITION.protocol == "cfm"
