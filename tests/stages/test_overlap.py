"""Reading ahead and writing behind: the order, the bounds, the failures, and that results do not depend on it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmad_cli.backbones import FeatureSpec
from mmad_cli.datasets import open_dataset
from mmad_cli.errors import StoreError
from mmad_cli.preprocessing.config import PreprocessConfig
from mmad_cli.stages import features
from mmad_cli.stages.features import FeatureJob, StoredFeatures, StoredSample, load_feature
from mmad_cli.stages.overlap import Behind, read_ahead
from mmad_cli.stages.plan import Selection, clean_jobs, feature_jobs, select_samples
from mmad_cli.stages.session import Session
from mmad_cli.stages.tasks import ExtractTask, extract_here, pays_beside
from mmad_cli.store import Store, open_store
from mmad_cli.types import Sample


def test_one_item_is_read_ahead_and_no_more() -> None:
    begun: list[int] = []
    threads = set()

    def read(item: int) -> int:
        begun.append(item)
        threads.add(threading.current_thread())
        return 10 * item

    seen = []
    for item, value in read_ahead(range(5), read):
        seen.append((item, value.result()))
        deadline = time.monotonic() + 10
        while len(begun) < min(item + 2, 5) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert begun == list(range(min(item + 2, 5)))
    assert seen == [(i, 10 * i) for i in range(5)]
    assert threading.current_thread() not in threads
    assert not any(thread.is_alive() for thread in threads)


def test_what_reading_raises_comes_with_its_own_item() -> None:
    def read(item: int) -> int:
        return 6 // item

    results: list[Any] = []
    for _, value in read_ahead([2, 0, 3], read):
        error = value.exception()
        results.append(type(error) if error else value.result())
    assert results == [3, ZeroDivisionError, 2]


def test_a_pass_that_is_left_early_ends_its_thread() -> None:
    before = threading.active_count()
    for item, _ in read_ahead([1, 2, 3], lambda item: item):
        if item == 2:
            break
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.001)
    assert threading.active_count() == before


def test_pieces_are_done_in_order_with_at_most_one_waiting() -> None:
    done: list[int] = []
    free = threading.Event()

    def slow(number: int) -> None:
        free.wait(10)
        done.append(number)

    with Behind() as behind:
        behind.hand_over(lambda: slow(0))
        assert done == []
        free.set()
        for number in range(1, 4):
            behind.hand_over(lambda number=number: slow(number))  # type: ignore[misc]
            assert done[:number] == list(range(number))
    assert done == [0, 1, 2, 3]


def test_a_piece_that_fails_is_told_at_the_next_or_at_the_end() -> None:
    def fail() -> None:
        raise StoreError("disk full")

    with pytest.raises(StoreError, match="disk full"), Behind() as behind:
        behind.hand_over(fail)
        behind.hand_over(lambda: None)
        pytest.fail("the failure was not told")
    with pytest.raises(StoreError, match="disk full"), Behind() as behind:
        behind.hand_over(fail)
    # what went wrong in the work itself is not hidden by it
    with pytest.raises(ValueError, match="first"), Behind() as behind:
        behind.hand_over(fail)
        raise ValueError("first")


@pytest.fixture
def jobs(tiny_dataset: Path, tmp_path: Path) -> list[FeatureJob]:
    with Session(store=Store(tmp_path / "store"), workers=1, device="cpu") as session:
        dataset = open_dataset(tiny_dataset)
        samples = select_samples(session, dataset, "block", Selection())
        clean = clean_jobs(session, dataset, samples, PreprocessConfig())
        return list(feature_jobs(clean, {"z": FeatureSpec.depth()}, {})["z"].values())


class Watched:
    """A backbone that notes on which thread it computes, and fails for some samples."""

    batch_size = 2

    def __init__(self, failing: str = "") -> None:
        self.failing = failing
        self.threads: set[str] = set()

    def extract(self, samples: Sequence[Sample]) -> list[dict[str, np.ndarray]]:
        self.threads.add(threading.current_thread().name)
        for sample in samples:
            if sample.id == self.failing:
                raise RuntimeError("cannot")
        return [{"z": sample.xyz[:4, :4, 2].copy()} for sample in samples]


def in_twos(jobs: Sequence[FeatureJob]) -> list[ExtractTask]:
    return [ExtractTask(tuple(jobs[i : i + 2]), "cpu") for i in range(0, len(jobs), 2)]


def test_batches_are_read_and_stored_beside_the_computing(
    jobs: list[FeatureJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, storing = Watched(), set()
    monkeypatch.setattr(features, "_backbone", lambda *_: backbone)
    write = Store.write_tensors

    def noted(self: Store, artefact: Any, *rest: Any) -> None:
        if artefact.stage == features.STAGE:
            storing.add(threading.current_thread().name)
        write(self, artefact, *rest)

    monkeypatch.setattr(Store, "write_tensors", noted)
    outcomes = list(extract_here(in_twos(jobs)))
    assert [position for position, _ in outcomes] == list(range(5))
    assert sum(outcome.samples for _, outcome in outcomes) == len(jobs) == 9
    assert backbone.threads == {"MainThread"}
    assert "MainThread" not in storing
    for job in jobs:
        clean = features.load_clean(job.clean, print)
        np.testing.assert_array_equal(load_feature(job, "cpu", print)["z"], clean.xyz[:4, :4, 2])


def test_where_networks_share_the_cores_with_it_nothing_runs_beside(tmp_path: Path) -> None:
    with Session(store=Store(tmp_path), device="cpu") as session:
        assert not pays_beside(session)
        session._resolved_device = ("cuda", "asked for")
        assert pays_beside(session)
    with Session(store=open_store("memory://beside"), device="cpu") as session:
        assert pays_beside(session)


def test_only_the_sample_that_fails_is_lost(jobs: list[FeatureJob], monkeypatch: pytest.MonkeyPatch) -> None:
    failing = jobs[2].clean.ref.id
    monkeypatch.setattr(features, "_backbone", lambda *_: Watched(failing))
    failures = {}
    for _, outcome in extract_here(in_twos(jobs)):
        failures.update(outcome.failures)
    assert list(failures) == [failing]
    assert "cannot" in failures[failing]
    assert [job.store.has_tensors(job.artefact) for job in jobs] == [i != 2 for i in range(9)]


def test_a_store_that_cannot_write_ends_it(jobs: list[FeatureJob], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_backbone", lambda *_: Watched())
    write = Store.write_tensors

    def full(self: Store, artefact: Any, *rest: Any) -> None:
        if artefact.stage == features.STAGE:
            raise StoreError("no space left")
        write(self, artefact, *rest)

    monkeypatch.setattr(Store, "write_tensors", full)
    with pytest.raises(StoreError, match="no space left"):
        list(extract_here(in_twos(jobs)))
    # nothing stays locked behind it
    monkeypatch.setattr(Store, "write_tensors", write)
    assert [outcome.failures for _, outcome in extract_here(in_twos(jobs))] == [{}] * 5


def test_a_scan_that_is_in_the_dataset_twice(jobs: list[FeatureJob], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_backbone", lambda *_: Watched())
    write = Store.write_tensors

    def slowly(self: Store, artefact: Any, *rest: Any) -> None:
        time.sleep(0.05)
        write(self, artefact, *rest)

    monkeypatch.setattr(Store, "write_tensors", slowly)
    tasks = in_twos([jobs[0], jobs[0], jobs[1], jobs[0], jobs[1], jobs[2]])
    # read before the first is stored, computed after
    assert [outcome.failures for _, outcome in extract_here(tasks)] == [{}] * 3
    assert all(job.store.has_tensors(job.artefact) for job in jobs[:3])


def test_a_pass_reads_ahead_what_earlier_samples_were_asked_for(
    jobs: list[FeatureJob], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    list(extract_here(in_twos(jobs)))
    expected = [load_feature(job, "cpu", print)["z"].copy() for job in jobs]
    # one is damaged, one is missing: they are computed again when asked for, by who asks
    damaged, missing = (jobs[i].store.path(jobs[i].artefact) for i in (3, 5))
    damaged.write_bytes(damaged.read_bytes()[:-8])
    missing.unlink()
    readers = []
    read = features._read_feature

    def noted(job: FeatureJob) -> Any:
        readers.append((job.key, threading.current_thread().name == "MainThread"))
        return read(job)

    monkeypatch.setattr(features, "_read_feature", noted)
    samples = StoredFeatures([StoredSample(job.clean.ref.id, {"z": job}, "cpu", print) for job in jobs])
    for sample, values in zip(samples, expected, strict=True):
        found = sample["z"]["z"]
        np.testing.assert_array_equal(found, values)
        assert not found.flags.writeable
    assert "computed again" in capsys.readouterr().out
    # the first two were not known to be wanted when they were read
    ahead = {key for key, main in readers if not main}
    assert ahead >= {job.key for job in jobs[2:]}
    assert {key for key, main in readers if main} <= {jobs[i].key for i in (0, 1, 3, 5)}
