"""A training that is killed in an epoch goes on from that epoch, to the same weights as one that is left alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mmad_cli.methods.checks import GeneratedFeatures, generated_sample
from mmad_cli.methods.mapping import trainer
from mmad_cli.methods.mapping.method import NETWORKS_FILE, MappingMethod
from mmad_cli.methods.mapping.trainer import CHECKPOINT
from mmad_cli.methods.registry import build_config, get_method

EPOCHS, SAMPLES, KILLED_IN = 3, 2, 1
# networks for narrow features are small
NARROW = {"rgb_backbone": "builtin_rgb", "point_backbone": "builtin_points"}
SETTINGS: dict[str, dict[str, Any]] = {
    "cfm": {"batch_size": 2, "pixels_per_step": 64},
    "mafr": {"window": 8},
    "cmdr_iad": {"pixels_per_step": 64},
}


def trained(name: str, folder: Path | None, progress: Any = None) -> MappingMethod:
    definition = get_method(name)
    config = build_config(definition, None, "official", {"grid": 16, "epochs": EPOCHS, **NARROW, **SETTINGS[name]})
    method = definition.build(config, "cpu")
    assert isinstance(method, MappingMethod)
    samples = [generated_sample(method.features(), f"train/good/{i:03d}") for i in range(SAMPLES)]
    method.fit_resumable(GeneratedFeatures(samples), GeneratedFeatures([]), seed=5, folder=folder, progress=progress)
    return method


def stop_in_epoch(done: int, total: int) -> None:
    """Tell the other process when the first batch of that epoch is done, and wait to be killed."""
    if done == KILLED_IN * (total // EPOCHS) + 1:
        print("in the epoch", flush=True)
        sys.stdin.read()


@pytest.mark.parametrize("name", list(SETTINGS))
def test_killed_training(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "_PROGRESS_SECONDS", -1)
    work = tmp_path / "work"
    work.mkdir()
    command = [sys.executable, str(Path(__file__)), name, str(work)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in the epoch\n"
        process.kill()
    assert (work / CHECKPOINT).is_file()
    told: list[tuple[int, int]] = []
    resumed = trained(name, work, lambda done, total: told.append((done, total)))
    steps = told[-1][1] // EPOCHS
    assert [done for done, _ in told] == list(range(KILLED_IN * steps + 1, EPOCHS * steps + 1))
    whole = trained(name, None)
    assert resumed.losses() == whole.losses()
    for method, place in ((resumed, "resumed"), (whole, "whole")):
        (tmp_path / place).mkdir()
        method.save(tmp_path / place)
    assert (tmp_path / "resumed" / NETWORKS_FILE).read_bytes() == (tmp_path / "whole" / NETWORKS_FILE).read_bytes()
    assert list(work.iterdir()) == []


if __name__ == "__main__":
    trainer._PROGRESS_SECONDS = -1
    trained(sys.argv[1], Path(sys.argv[2]), stop_in_epoch)
