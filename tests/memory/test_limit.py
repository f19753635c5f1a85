"""A memory limit changes where banks lie, not what they hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mmad_cli.errors import StoreError, UsageError
from mmad_cli.memory import BankConfig, FlatIndex, MemoryBank
from mmad_cli.memory import limit as limits
from mmad_cli.memory.search import _TiledFaissSearcher


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[Path]:
    """Room for small arrays only."""
    limits.set_memory_limit(limits.anonymous_memory() + (64 << 20), tmp_path / "work")
    yield tmp_path
    limits.set_memory_limit(None)


def make_bank() -> tuple[MemoryBank, np.ndarray]:
    rows = np.random.default_rng(0).normal(size=(30_000, 400)).astype(np.float32)
    blocks = [rows[i : i + 3000] for i in range(0, len(rows), 3000)]
    bank = MemoryBank(BankConfig(fraction=0.9, coreset="random"))
    return bank.fit(lambda: iter(blocks), len(rows), 400, random_state=0), rows


def test_sizes_are_read() -> None:
    assert [limits.parse_memory(text) for text in ("4GB", "500M", "2e9", "1.5 GiB")] == [
        4 * 10**9, 5 * 10**8, 2 * 10**9, 15 * 10**8
    ]  # fmt: skip
    for text in ("", "lots", "-1GB", "0"):
        with pytest.raises(UsageError, match="--memory-limit"):
            limits.parse_memory(text)


def test_banks_and_searches_are_the_same_below_a_limit(tmp_path: Path) -> None:
    free, rows = make_bank()
    expected = free.nearest(rows[:300], 3)
    free.save(tmp_path / "bank.safetensors")
    # the arrays above stay; what comes now has 64 MB
    limits.set_memory_limit(limits.anonymous_memory() + (64 << 20), tmp_path / "work")
    try:
        blocks = [rows[i : i + 3000] for i in range(0, len(rows), 3000)]
        bank = MemoryBank(free.config).fit(lambda: iter(blocks), len(rows), 400, random_state=0)
        loaded = MemoryBank.load(tmp_path / "bank.safetensors")
        for one in (bank, loaded):
            assert isinstance(one.rows_, np.memmap)
            assert isinstance(one.index._searcher, _TiledFaissSearcher)
            np.testing.assert_array_equal(one.rows_, free.rows_)
            np.testing.assert_array_equal(one.picks_, free.picks_)
            found = one.nearest(rows[:300], 3)
            np.testing.assert_array_equal(found[1], expected[1])
            np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    finally:
        limits.set_memory_limit(None)


def test_what_does_not_fit_is_no_anonymous_memory(limited: Path) -> None:
    before = limits.anonymous_memory()
    array = limits.bounded_empty((50_000, 500))
    array[:] = 1.0
    assert limits.anonymous_memory() - before < 20 << 20
    assert array.nbytes == 100_000_000
    # the file has no name any more, so nothing is left behind
    assert list((limited / "work").iterdir()) == []


def test_tiles_shrink_and_no_room_is_a_clear_error(tmp_path: Path) -> None:
    assert limits.tile_elements() == 1 << 24
    limits.set_memory_limit(limits.anonymous_memory() + (64 << 20), tmp_path)
    assert (1 << 18) <= limits.tile_elements() < 1 << 22
    limits.set_memory_limit(10**7, tmp_path)
    try:
        with pytest.raises(UsageError, match=r"--memory-limit: 10 MB, and this process holds \d+ MB already.*at least"):
            limits.fits(1)
    finally:
        limits.set_memory_limit(None)


def test_a_full_disk_is_said(limited: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(limits.os, "posix_fallocate", full)
    with pytest.raises(StoreError, match=r"no room for 0\.1 GB"):
        limits.bounded_empty((50_000, 500))


def test_without_a_limit_rows_are_in_memory() -> None:
    assert not isinstance(FlatIndex(np.eye(4, dtype=np.float32)).rows, np.memmap)
