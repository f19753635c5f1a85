"""Methods whose fit is a training: interrupted and continued, recorded, taken out of the store and put back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from mmad_cli.errors import UsageError
from mmad_cli.methods.btf import BTF, DEFINITION
from mmad_cli.methods.mapping.config import TrainerConfig
from mmad_cli.methods.mapping.trainer import train
from mmad_cli.results.schema import RunResult
from mmad_cli.stages import api
from mmad_cli.stages.pictures import RunPictures
from mmad_cli.stages.session import Session
from mmad_cli.store import Store

EPOCHS = 4


class _Learner:
    def __init__(self) -> None:
        self.network = nn.Linear(1, 1)

    @property
    def groups(self) -> dict[str, nn.Module]:
        return {"scale": self.network}

    def backward(self, batch: Any) -> dict[str, dict[str, float]]:
        rows = torch.tensor(batch, dtype=torch.float32)[:, None]
        loss = ((self.network(rows) - 3 * rows) ** 2).mean()
        loss.backward()
        return {"scale": {"square": float(loss.detach())}}


class _Data:
    def __init__(self, levels: list[float], stop_at: int) -> None:
        self.levels, self.stop_at, self.batches = levels, stop_at, 0

    def __len__(self) -> int:
        return len(self.levels)

    def batch(self, indices: Any) -> list[Any]:
        if self.stop_at and self.batches == self.stop_at:
            raise KeyboardInterrupt
        self.batches += 1
        return [self.levels[index] for index in indices]


class Scaled(BTF):
    """BTF with a factor on its image scores that is trained on the mean depth of the samples."""

    stop_at = 0
    batches: ClassVar[list[int]] = []

    def fit(self, train: Any, validation: Any, *, seed: int, progress: Any = None) -> None:
        self.fit_resumable(train, validation, seed=seed, folder=None, progress=progress)

    def fit_resumable(self, samples: Any, validation: Any, *, seed: int, folder: Any, progress: Any = None) -> None:
        super().fit(samples, validation, seed=seed)
        data = _Data([float(np.abs(sample["z"]["z"]).mean()) for sample in samples], self.stop_at)
        torch.manual_seed(seed)
        self.learner = _Learner()
        try:
            self.curves = train(
                self.learner, data, TrainerConfig(epochs=EPOCHS, rate=0.1), seed=seed, folder=folder, progress=progress
            )
        finally:
            type(self).batches.append(data.batches)

    def losses(self) -> dict[str, list[float]]:
        return self.curves

    def predict(self, sample: Any) -> Any:
        plain = super().predict(sample)
        factor = float(self.learner.network.weight.detach())
        return replace(plain, image_score=plain.image_score * factor, aupro_scale=1 / (1 + plain.image_score))

    def save(self, folder: Path) -> None:
        super().save(folder)
        torch.save([self.learner.network.state_dict(), self.curves], folder / "network.pt")

    def load(self, folder: Path) -> None:
        super().load(folder)
        self.learner = _Learner()
        state, self.curves = torch.load(folder / "network.pt", weights_only=True)
        self.learner.network.load_state_dict(state)


@pytest.fixture(autouse=True)
def scaled(monkeypatch: pytest.MonkeyPatch) -> type[Scaled]:
    definition = replace(DEFINITION, name="scaled", build=lambda config, device: Scaled(config, device))
    monkeypatch.setattr("mmad_cli.methods.get_method", lambda name: definition)
    monkeypatch.setattr(Scaled, "batches", [])
    return Scaled


@pytest.fixture
def evaluate(tiny_dataset: Path, tmp_path: Path) -> Callable[..., RunResult]:
    def run(name: str, **options: Any) -> RunResult:
        options = {"variant": "raw", "device": "cpu", "store": tmp_path / f"{name}-store", **options}
        return api.evaluate(tiny_dataset, method="scaled", out=tmp_path / name, categories=["cube"], **options)[0]

    return run


@pytest.mark.parametrize("stop_at", [2, 6, 13])
def test_an_interrupted_training_goes_on_to_the_same_result(
    evaluate: Callable[..., RunResult],
    tmp_path: Path,
    scaled: type[Scaled],
    monkeypatch: pytest.MonkeyPatch,
    stop_at: int,
) -> None:
    evaluate("whole")
    monkeypatch.setattr(scaled, "stop_at", stop_at)
    with pytest.raises(KeyboardInterrupt):
        evaluate("cut")
    monkeypatch.setattr(scaled, "stop_at", 0)
    result = evaluate("cut")
    # four samples make four batches an epoch; finished epochs are not repeated
    assert scaled.batches == [16, stop_at, 16 - stop_at // 4 * 4]
    assert (tmp_path / "cut/cube/scores.csv").read_text() == (tmp_path / "whole/cube/scores.csv").read_text()
    assert len(result.categories["cube"].training["scale/square"]) == EPOCHS
    assert not list((tmp_path / "cut-store/work").iterdir())
    # a training of which a part was done earlier is no measure of how long one takes
    measured = (Store(tmp_path / "cut-store").root / "timings.json").read_text()
    assert ('"fit' in measured) == (stop_at < 4)


def test_losses_are_in_the_run(evaluate: Callable[..., RunResult], tmp_path: Path) -> None:
    curve = evaluate("run").categories["cube"].training["scale/square"]
    assert len(curve) == EPOCHS and curve[-1] < curve[0]
    assert RunResult.from_disk(tmp_path / "run").categories["cube"].training == {"scale/square": curve}
    assert evaluate("run").categories["cube"].training == {"scale/square": curve}


def test_aupro_reads_the_scaled_maps(
    evaluate: Callable[..., RunResult], scaled: type[Scaled], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_scale = evaluate("scaled").categories["cube"].metrics
    monkeypatch.setattr(scaled, "predict", lambda self, sample: replace(BTF.predict(self, sample)))
    plain = evaluate("plain").categories["cube"].metrics
    assert with_scale["aupro_30"] != plain["aupro_30"]
    assert with_scale["p_auroc"] == plain["p_auroc"]


def test_saved_maps_know_what_aupro_multiplies_them_by(evaluate: Callable[..., RunResult], tmp_path: Path) -> None:
    result = evaluate("run", save_maps=True)
    with safe_open(str(tmp_path / "run/cube/maps.safetensors"), framework="np") as file:
        scales = json.loads(file.metadata()["aupro_scale"])
        assert set(scales) == set(file.keys()) and all(0 < scale < 1 for scale in scales.values())
    with Session(Store(tmp_path / "empty-store")) as session:
        pictures = RunPictures(session, result, tmp_path / "run", tmp_path / "nowhere")
        found = pictures.anomaly_map("cube", next(iter(scales)))
    assert found is not None and found.aupro_scale == next(iter(scales.values()))


def test_a_fitted_state_goes_out_and_comes_back(
    tiny_dataset: Path, evaluate: Callable[..., RunResult], tmp_path: Path, scaled: type[Scaled]
) -> None:
    options = {"variant": "raw", "device": "cpu", "store": tmp_path / "fit-store"}
    api.fit(tiny_dataset, method="scaled", export=tmp_path / "states", **options)
    assert sorted(path.name for path in (tmp_path / "states").iterdir()) == ["block", "cube"]
    expected = evaluate("own")
    trained = len(scaled.batches)
    result = evaluate("imported", checkpoints=tmp_path / "states")
    assert len(scaled.batches) == trained
    assert (tmp_path / "imported/cube/scores.csv").read_text() == (tmp_path / "own/cube/scores.csv").read_text()
    assert result.categories["cube"].metrics == expected.categories["cube"].metrics
    assert any("checkpoints" in reason for reason in result.not_comparable)
    # another state is another run of the fit, in the same store
    network = tmp_path / "states/cube/network.pt"
    state, curves = torch.load(network, weights_only=True)
    state["weight"] *= 2
    torch.save([state, curves], network)
    evaluate("imported", checkpoints=tmp_path / "states")
    assert (tmp_path / "imported/cube/scores.csv").read_text() != (tmp_path / "own/cube/scores.csv").read_text()


def test_states_that_do_not_fit_are_refused(
    tiny_dataset: Path, evaluate: Callable[..., RunResult], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"--checkpoints.*is not a folder"):
        evaluate("none", checkpoints=tmp_path / "nowhere")
    (tmp_path / "states").mkdir()
    with pytest.raises(UsageError, match=r"--checkpoints.*no folder 'cube'"):
        evaluate("none", checkpoints=tmp_path / "states")
    (tmp_path / "states/cube").mkdir()
    (tmp_path / "states/cube/something").write_text("else")
    result = evaluate("none", checkpoints=tmp_path / "states")
    assert result.categories["cube"].status == "failed"
    assert "not a fitted state" in str(result.categories["cube"].error)
    with pytest.raises(UsageError, match=r"--export.*holds something else"):
        api.fit(tiny_dataset, method="scaled", variant="raw", device="cpu", export=tmp_path / "states")
    assert (tmp_path / "states/cube/something").read_text() == "else"
