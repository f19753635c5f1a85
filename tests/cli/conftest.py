"""Running the command line: in this process with captured output, or as a real process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Ended:
    """How a command line ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def mmad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Runs `mmad ...` in this process, from an empty working directory."""
    from mmad_cli.cli.app import run

    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)

    def call(*arguments: object) -> Ended:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        output = capfd.readouterr()
        return Ended(code, output.out, output.err)

    return call


@pytest.fixture
def mmad_process() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `mmad ...` as a process of its own; keywords go to `subprocess.run`, `env` adds to the environment."""

    def call(*arguments: object, env: dict[str, str] | None = None, **options: Any) -> Any:
        options = {"capture_output": True, "text": True, "timeout": 120, **options}
        prefix = options.pop("prefix", [sys.executable])
        command = [*prefix, "-m", "mmad_cli", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        for name in [name for name, value in environment.items() if value == "(unset)"]:
            del environment[name]
        return subprocess.run(command, env=environment, check=False, **options)

    return call


@pytest.fixture(scope="session")
def _finished(_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders on the tiny dataset: `whole` with maps, `few-0` and `few-1` with two shots under two seeds."""
    from mmad_cli.stages.api import evaluate

    place = tmp_path_factory.mktemp("finished")
    options: dict[str, Any] = {"method": "btf", "variant": "raw", "device": "cpu", "store": place / "store"}
    evaluate(_tiny, **options, save_maps=True, out=place / "runs" / "whole")
    for seed in (0, 1):
        evaluate(_tiny, **options, shots=2, seed=seed, out=place / "runs" / f"few-{seed}")
    return place / "runs"


@pytest.fixture
def finished_runs(mmad: Any, _finished: Path, _tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of these runs under `runs`, with their dataset in $MMAD_DATA and an empty store."""
    monkeypatch.setenv("MMAD_DATA", str(_tiny))
    return Path(shutil.copytree(_finished, "runs"))
