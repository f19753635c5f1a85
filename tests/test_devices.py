"""What happens when a device runs out of memory, on devices that are made up."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from mmad_cli import devices
from mmad_cli.devices import Batches, elements_that_fit, free_memory, is_out_of_memory, or_on_cpu
from mmad_cli.errors import unforeseen


def exhausted() -> RuntimeError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.5 GiB")


def test_the_cpu_has_no_limit() -> None:
    assert free_memory("cpu") is None
    assert elements_that_fit("cpu", 1 << 24, 4) == 1 << 24


@pytest.mark.parametrize(
    ("free", "elements"),
    [(80 << 30, 1 << 26), (2 << 30, 1 << 26), ((2 << 30) - 1, 1 << 25), (1 << 30, 1 << 25), (0, 1 << 16)],
)
def test_tiles_are_halved_until_they_fit(monkeypatch: pytest.MonkeyPatch, free: int, elements: int) -> None:
    monkeypatch.setattr(devices, "free_memory", lambda device: free)
    assert elements_that_fit("cuda", 1 << 26, 4) == elements


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(exhausted())
    assert is_out_of_memory(RuntimeError("Error in StandardGpuResources: cudaMalloc error out of memory [2]"))
    assert not is_out_of_memory(RuntimeError("device-side assert triggered"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_the_cpu_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    def compute(device: str) -> str:
        if device != "cpu":
            raise exhausted()
        return device

    assert or_on_cpu(compute, "cuda", "search") == "cpu"
    assert "search: no memory left on cuda" in caplog.text
    assert or_on_cpu(lambda device: device, "cuda", "search") == "cuda"


@pytest.mark.parametrize("error", [RuntimeError("device-side assert"), ValueError("rows")])
def test_other_errors_stay(error: Exception) -> None:
    def compute(device: str) -> str:
        raise error

    with pytest.raises(type(error), match=str(error)):
        or_on_cpu(compute, "cuda", "search")


def test_on_the_cpu_there_is_nothing_to_fall_back_to() -> None:
    calls = []

    def compute(device: str) -> str:
        calls.append(device)
        raise exhausted()

    with pytest.raises(torch.OutOfMemoryError):
        or_on_cpu(compute, "cpu", "search")
    assert calls == ["cpu"]


@pytest.mark.parametrize(
    ("room", "sizes"), [(9, [4, 4, 2, 4]), (3, [4, 2, 2, 2, 2, 2, 2, 2]), (1, [4, 2, *14 * [1]]), (0, [4, 2, 1])]
)
def test_batches_shrink_for_good(caplog: pytest.LogCaptureFixture, room: int, sizes: list[int]) -> None:
    asked, on_cpu = [], []

    def compute(items: Sequence[int]) -> list[int]:
        asked.append(len(items))
        if len(items) > room:
            raise exhausted()
        return [item * item for item in items]

    def slowly(items: Sequence[int]) -> list[int]:
        on_cpu.append(len(items))
        return [item * item for item in items]

    batches: Batches[int, int] = Batches(4, "features", lambda: slowly)
    assert batches.run(range(10), compute) == [item * item for item in range(10)]
    assert batches.run(range(4), compute) == [0, 1, 4, 9]
    assert asked == sizes
    assert ("batches of" in caplog.text) == (room < 4)
    assert on_cpu == ([] if room else 14 * [1])
    assert ("features: too little memory on the device, going on on the CPU" in caplog.text) == (not room)


def test_no_room_for_a_single_item_and_no_other_device() -> None:
    def compute(items: Sequence[int]) -> list[int]:
        raise exhausted()

    batches: Batches[int, int] = Batches(4, "features", None)
    with pytest.raises(torch.OutOfMemoryError):
        batches.run(range(3), compute)
    assert batches.run([], compute) == []


def test_another_error_is_not_taken_for_that() -> None:
    def compute(items: Sequence[int]) -> list[int]:
        raise RuntimeError("shapes do not fit")

    batches: Batches[int, int] = Batches(4, "features", lambda: list)
    with pytest.raises(RuntimeError, match="shapes"):
        batches.run(range(3), compute)


def test_the_error_says_what_to_do() -> None:
    assert unforeseen(exhausted()).endswith("free it of other programs, or use --device cpu")
