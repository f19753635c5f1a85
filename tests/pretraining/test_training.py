"""The training of the built-in networks: losses, schedule, resuming, and that it repeats what was logged."""

from __future__ import annotations

import itertools
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from mmad_cli.backbones.builtin import HERE
from mmad_cli.errors import UsageError, WeightsError
from mmad_cli.pretraining.config import Network, PointsConfig, RgbConfig, TrainingConfig, committed, read_config
from mmad_cli.pretraining.contrast import contrast_loss, separation
from mmad_cli.pretraining.training import (
    LogLine,
    deviations,
    export,
    initial,
    learning_rate,
    read_log,
    shipped_log,
    step_generator,
    task,
    train,
    write_log,
)

NETWORKS: tuple[Network, ...] = ("rgb", "points")
SMALL: dict[Network, TrainingConfig] = {
    "rgb": RgbConfig(steps=4, horizon=4, warmup=1, canvas=64, fresh=1, pool=2, crop=48, crops=4, anchors=8, altered=16),
    "points": PointsConfig(steps=4, horizon=4, warmup=1, patches=2, groups=32, group_size=16, altered=16),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_first_steps_have_the_logged_losses(network: Network) -> None:
    config = committed(network)
    _, log = train(task(network, config), config, stop=3)
    found = deviations(log, shipped_log(network))
    assert found["steps"] == 3
    assert found["outside"] == 0, found


@pytest.mark.slow
@pytest.mark.skipif("MMAD_LONG_TESTS" not in os.environ, reason="takes minutes; MMAD_LONG_TESTS=1 runs it")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("network", NETWORKS)
def test_200_steps_have_the_logged_losses(network: Network) -> None:
    config = committed(network)
    _, log = train(task(network, config), config, stop=200)
    found = deviations(log, shipped_log(network))
    assert found["steps"] == 200
    assert found["outside"] == 0, found


@pytest.mark.parametrize("network", NETWORKS)
def test_the_log_is_that_of_the_committed_training(network: Network) -> None:
    config, log = committed(network), shipped_log(network)
    assert [line.step for line in log] == list(range(config.steps))
    first, last = (np.mean([line.loss for line in part]) for part in (log[:20], log[-20:]))
    assert last < 0.8 * first


@pytest.mark.parametrize("network", NETWORKS)
def test_another_seed_is_out_of_tolerance(network: Network) -> None:
    config = SMALL[network]
    _, log = train(task(network, config), config)
    other = config.model_copy(update={"seed": 1})
    _, different = train(task(network, other), other)
    assert deviations(log, log) == {"steps": 4, "largest": 0.0, "outside": 0}
    assert deviations(different, log)["outside"] > 0


@pytest.mark.parametrize("network", NETWORKS)
def test_an_interrupted_training_ends_as_one_in_one_go(network: Network, tmp_path: Path) -> None:
    config = SMALL[network]
    what = task(network, config)
    whole, log = train(what, config)
    train(what, config, folder=tmp_path, stop=2)
    resumed, resumed_log = train(what, config, folder=tmp_path)
    assert export(resumed) == export(whole)
    assert [line.loss for line in resumed_log] == [line.loss for line in log]
    assert [line.step for line in read_log(tmp_path / "log.csv")] == [0, 1, 2, 3]


def test_a_foreign_or_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    config = SMALL["rgb"]
    train(task("rgb", config), config, folder=tmp_path, stop=1)
    other = config.model_copy(update={"rate": 0.1})
    with pytest.raises(WeightsError, match="another configuration"):
        train(task("rgb", other), other, folder=tmp_path)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"no tensors")
    with pytest.raises(WeightsError, match="damaged"):
        train(task("rgb", config), config, folder=tmp_path)


def test_schedule() -> None:
    config = TrainingConfig(steps=100, horizon=100, warmup=10, cooldown=20, rate=1.0)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[55] == pytest.approx(0.5)
    # the straight line begins 20 steps before the end
    assert rates[80] == pytest.approx(0.5 * (1 + math.cos(math.pi * 70 / 90)))
    assert rates[90] == pytest.approx(0.25 * (1 + math.cos(math.pi * 80 / 90)))
    assert all(later <= sooner for sooner, later in itertools.pairwise(rates[10:]))


def test_steps_draw_from_streams_of_their_own() -> None:
    def draw(seed: int, step: int) -> list[float]:
        return torch.rand(3, generator=step_generator(seed, step)).tolist()

    assert draw(0, 5) == draw(0, 5)
    assert draw(0, 5) != draw(0, 6) != draw(1, 6)


def test_contrast_loss_is_the_written_out_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    anchors, positives, altered = (
        torch.nn.functional.normalize(torch.randn(n, 4, generator=generator), dim=1) for n in (5, 5, 3)
    )
    owner = torch.tensor([0, 0, 1, 1, 2])
    expected = []
    for i in range(5):
        candidates = [positives[i], *(positives[j] for j in range(5) if owner[j] != owner[i]), *altered]
        logits = np.array([float(anchors[i] @ other) / 0.2 for other in candidates])
        expected.append(np.log(np.exp(logits).sum()) - logits[0])
    found = contrast_loss(anchors, positives, altered, owner, torch.tensor([0, 1, 1]), 0.2)
    assert float(found) == pytest.approx(np.mean(expected), rel=1e-5)


def test_separation_is_the_area_under_the_roc_curve() -> None:
    generator = torch.Generator().manual_seed(0)
    anchors, positives, twins = (torch.randn(40, 3, generator=generator) for _ in range(3))
    where = torch.rand(40, generator=generator) < 0.4
    distances = ((anchors - positives) ** 2).sum(1), ((anchors - twins) ** 2).sum(1)[where]
    labels = np.repeat([0, 1], [40, int(where.sum())])
    assert float(separation(anchors, positives, twins, where)) == pytest.approx(
        roc_auc_score(labels, torch.cat(distances).numpy())
    )
    assert math.isnan(float(separation(anchors, positives, twins, torch.zeros(40, dtype=torch.bool))))


def test_log_round_trip(tmp_path: Path) -> None:
    log = [LogLine(step, 5.0 - 0.1 * step, 0.5) for step in range(20)]
    write_log(tmp_path / "log.csv", log)
    assert read_log(tmp_path / "log.csv") == [LogLine(i.step, round(i.loss, 6), 0.5) for i in log]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"rate": -1}', "rate"),
        ('{"speed": 1}', "speed"),
        ("[", "file"),
    ],
)
def test_a_wrong_configuration_names_file_and_field(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=words) as caught:
        read_config("points", path)
    assert "own.json" in str(caught.value)


@pytest.mark.parametrize("network", NETWORKS)
def test_shipped_weights_tell_altered_places_better_than_random_ones(network: Network) -> None:
    """On steps whose data no training has seen."""
    from safetensors.torch import load_file

    config = committed(network)
    what = task(network, config)
    random = initial(what, 0).eval()
    shipped = initial(what, 0).eval()
    shipped.load_state_dict(
        {name: value.float() for name, value in load_file(HERE / f"builtin_{network}.safetensors").items()},
        strict=False,
    )
    losses, told = {}, {}
    for name, weights in (("shipped", shipped), ("random", random)):
        with torch.inference_mode():
            found = [what.loss(weights, step, step_generator(config.seed, step)) for step in range(10**6, 10**6 + 4)]
        losses[name], told[name] = (float(torch.stack(part).mean()) for part in zip(*found, strict=True))
    assert losses["shipped"] < 0.8 * losses["random"]
    assert told["shipped"] > told["random"] + 0.05
