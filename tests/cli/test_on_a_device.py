"""Whole commands on a GPU, pretended where there is none: same numbers, and what they say about it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmad_cli.stages import features
from tests.pretended_cuda import pretended_cuda

BUILTIN = ("--method", "m3dm", "--backbones", "builtin", "--set", "groups=64", "--set", "group_size=16")
ONE = ("--category", "block", "--limit", "2")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _networks_of_no_other_test() -> None:
    """A process keeps its networks on the device, and what batches fit there."""
    features._backbone.cache_clear()


def test_numbers_do_not_depend_on_the_device(
    mmad: Callable[..., Any], tiny_dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(device: str, store: str) -> tuple[str, dict[str, Any]]:
        where = ("--device", device, "--store", tmp_path / store, "--out", tmp_path / f"{store}-{device}")
        ended = mmad("evaluate", tiny_dataset, *BUILTIN, *ONE, *where)
        assert ended.code == 0, ended.err
        return ended.err, summary(where[-1])

    _, expected = run("cpu", "a")
    with pretended_cuda() as device:
        _, found = run("cuda", "b")
        assert device.operations > 500
        again = run("cpu", "b")[1]
    assert found["mean"] == pytest.approx(expected["mean"], abs=1e-6)
    assert found["environment"]["device"] == "cuda (Pretended GPU)"
    # what the one has stored serves the other
    assert again["mean"] == found["mean"] and again["environment"]["device"] == found["environment"]["device"]

    # little memory costs time only
    features._backbone.cache_clear()
    assert not caplog.text
    with pretended_cuda(12 << 20) as device:
        said, found = run("auto", "c")
        assert device.operations > 500
    assert found["mean"] == pytest.approx(expected["mean"], abs=1e-6)
    assert "device: cuda (torch sees Pretended GPU)" in said
    assert found["environment"]["device_reason"] == "torch sees Pretended GPU"
    for notice in ("going on with batches of", "going on on the CPU"):
        assert notice in caplog.text


def test_a_gpu_with_no_memory_for_a_network_is_said(mmad: Callable[..., Any], tiny_dataset: Path) -> None:
    with pretended_cuda(1 << 16):
        ended = mmad("evaluate", tiny_dataset, *BUILTIN, *ONE, "--device", "cuda")
    assert ended.code == 3
    assert "too little free memory" in ended.err and "--device cpu" in ended.err
