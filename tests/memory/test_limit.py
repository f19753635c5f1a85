"""A memory limit changes where banks lie, not what they hold."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mmad_cli.errors import StoreError, UsageError
from mmad_cli.memory import BankConfig, FlatIndex, MemoryBank
from mmad_cli.memory import limit as limits
from mmad_cli.memory.search import _TiledFaissSearcher
from mmad_cli.metrics import all_metrics
from mmad_cli.metrics.ranking import rank_pixels
from mmad_cli.stages.session import Session
from mmad_cli.store import Store


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


def test_a_bank_that_does_not_fit_is_joined_with_a_row_in_a_file(limited: Path) -> None:
    rows = limits.bounded_empty((60_000, 400))
    rows[:] = np.arange(1, 60_001)[:, None]
    rows[7, 3] = 0
    bank = MemoryBank()
    bank.rows_, bank.picks_ = rows, np.arange(60_000)
    before = limits.anonymous_memory()
    bank.add_row(np.full((1, 400), -1, np.float32), where=lambda some: (some != 0).all(axis=1))
    assert limits.anonymous_memory() - before < 30 << 20
    assert isinstance(bank.rows_, np.memmap)
    np.testing.assert_array_equal(bank.rows_[:, 3], [*range(1, 8), *range(9, 60_001), -1])
    np.testing.assert_array_equal(bank.picks_, [*range(7), *range(8, 60_000), -1])
    bank.add_row(np.zeros((1, 400), np.float32))
    assert (len(bank.rows_), bank.picks_[-1], bank.index.nearest(np.zeros((1, 400)))[1].item()) == (60_001, -1, 60_000)


def test_tiles_shrink_and_no_room_is_a_clear_error(tmp_path: Path) -> None:
    assert limits.tile_elements() == 1 << 24
    limits.set_memory_limit(limits.anonymous_memory() + (64 << 20), tmp_path)
    assert (1 << 18) <= limits.tile_elements() < 1 << 22
    limits.set_memory_limit(10**7, tmp_path)
    try:
        with pytest.raises(UsageError, match=r"--memory-limit: 10 MB is too low: this process holds \d+ MB.*at least"):
            limits.fits(1)
    finally:
        limits.set_memory_limit(None)


def test_pixel_metrics_are_the_same_below_a_limit(limited: Path) -> None:
    random = np.random.default_rng(0)
    masks = np.zeros((20, 200, 200), bool)
    masks[::2, 40:60, 30:70] = True
    maps = random.random(masks.shape, dtype=np.float32) + 0.5 * masks
    labels, scores = masks.any((1, 2)), maps.max((1, 2))
    assert isinstance(rank_pixels(masks, maps, limits.bounded_empty).normal, np.memmap)
    bounded = all_metrics(labels, scores, masks, maps, empty=limits.bounded_empty)
    assert bounded.values == all_metrics(labels, scores, masks, maps).values


def test_what_long_work_needs_is_asked_for_before(tmp_path: Path) -> None:
    limits.require_memory(10**12)
    limits.set_memory_limit(limits.anonymous_memory() + (300 << 20), tmp_path)
    try:
        limits.require_memory(100 << 20)
        with pytest.raises(UsageError, match=r"too low: this process holds \d+ MB already.*at least \d+ MB") as error:
            limits.require_memory(400 << 20)
        limits.set_memory_limit(limits.parse_memory(str(error.value).split("at least ")[1]), tmp_path)
        limits.require_memory(400 << 20)
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


WHOLE = """
import hashlib, sys
from pathlib import Path
import numpy as np
from mmad_cli.memory.limit import set_memory_limit
from mmad_cli.methods import build_config, get_method

class Scan:
    def __init__(self, number):
        self.id, self.number = f"{number:03d}", number
    def __getitem__(self, name):
        rows = np.random.default_rng(self.number).standard_normal((784, 768), dtype=np.float32)
        return {"tokens": rows, "grid": np.array([28, 28], np.int32)}

class Scans(list):
    def __init__(self, count):
        super().__init__(map(Scan, range(count)))

folder, limit = Path(sys.argv[1]), int(sys.argv[2])
set_memory_limit(limit or None, folder)
definition = get_method("m3dm")
config = build_config(definition, "dino", "official", {"coreset_fraction": 1.0})
definition.build(config, "cpu").fit(Scans(2), Scans(0), seed=0)
method = definition.build(config, "cpu")
method.fit(Scans(36), Scans(0), seed=0)
method.save(folder)
method = definition.build(config, "cpu")
method.load(folder)
scored = method.predict(Scan(999))
print(scored.image_score, hashlib.sha256(scored.anomaly_map.tobytes()).hexdigest())
"""


def whole(folder: Path, limit: int) -> tuple[str, int]:
    """What a process prints that fits M3DM, stores it, loads it and scores; and its peak, seen from outside."""
    folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", WHOLE, str(folder), str(limit)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, limits._anonymous(process.pid) or 0)
        time.sleep(0.005)
    assert process.returncode == 0
    return process.communicate()[0], peak


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory of other processes is read from /proc")
def test_a_whole_fit_stays_below_the_limit_with_the_same_scores(tmp_path: Path) -> None:
    """A bank of 87 MB, which is held twice while it is searched."""
    limit = 380_000_000
    free, without = whole(tmp_path / "free", 0)
    bounded, within = whole(tmp_path / "bounded", limit)
    assert bounded == free
    assert within < limit < without


def test_workers_take_part_in_the_limit(tmp_path: Path) -> None:
    assert limits.workers_that_fit(8, None) == 8
    found = [limits.workers_that_fit(4, size) for size in (10**8, 6 * 10**8, 10**9, 10**11)]
    assert found == [1, 1, 2, 4]
    with Session(Store(tmp_path), 4, memory_limit=10**9) as session:
        assert (session.pool_workers(100), session.pool_workers(2)) == (2, 1)


def test_what_workers_hold_is_counted(tmp_path: Path) -> None:
    limits.set_memory_limit(10**12, tmp_path)
    try:
        alone = limits.memory_left()
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            # its modules take some memory
            pool.submit(limits.anonymous_memory).result()
            together = limits.memory_left()
    finally:
        limits.set_memory_limit(None)
    assert alone is not None
    assert together is not None
    assert alone - together > 5 << 20


def test_many_arrays_in_a_row_leave_a_reserve(tmp_path: Path) -> None:
    limits.set_memory_limit(limits.anonymous_memory() + (400 << 20), tmp_path)
    try:
        arrays = []
        for _ in range(20):
            arrays.append(limits.bounded_empty((20 << 18,)))
            arrays[-1][:] = 1.0
        left = limits.memory_left()
    finally:
        limits.set_memory_limit(None)
    assert left is not None
    assert left > 100 << 20
    assert {isinstance(array, np.memmap) for array in arrays} == {True, False}
