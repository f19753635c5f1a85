"""A store on an object address: against a local S3 server, and in memory."""

from __future__ import annotations

import json
import multiprocessing
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmad_cli.errors import StoreError, UsageError
from mmad_cli.stages import api
from mmad_cli.store import Artefact, CorruptArtefactError, ObjectStore, Store, open_store
from mmad_cli.store.store import user_cache

pytest.importorskip("s3fs")

ITEM = Artefact("extract", "bagel", "k" * 40)
FIT = Artefact("fit", "bagel", "f" * 40)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture(params=["s3", "memory"])
def store(request: pytest.FixtureRequest) -> Store:
    if request.param == "memory":
        return open_store(f"memory://store/{uuid.uuid4().hex}")
    return open_store(request.getfixturevalue("bucket"))


def arrays(value: float = 1.0) -> dict[str, np.ndarray]:
    return {"a": np.full((50, 30), value, np.float32), "b": np.arange(6).reshape(2, 3)}


def test_an_address_chooses_the_kind_of_store(tmp_path: Path) -> None:
    assert isinstance(open_store("memory://bucket/x"), ObjectStore)
    assert open_store(f"file://{tmp_path}/s").root == tmp_path / "s"
    assert type(open_store(tmp_path)) is Store
    for address, said in (("ftp://host/x", "not supported"), ("s3://", "name a bucket")):
        with pytest.raises(UsageError, match=said):
            open_store(address)


def test_tensors_records_and_folders_round_trip(store: Store) -> None:
    assert not store.has_tensors(ITEM)
    with pytest.raises(FileNotFoundError):
        store.read_tensors(ITEM)
    store.write_tensors(ITEM, arrays(), {"x": 1})
    read, info = store.read_tensors(ITEM)
    assert info == {"x": 1}
    np.testing.assert_array_equal(read["a"], arrays()["a"])
    assert store.has_tensors(ITEM)
    assert store.describe(ITEM)["bytes"] > arrays()["a"].nbytes
    store.write_record(ITEM, {"z": 1, "a": [1, 2]})
    assert list(open_store(store.address).read_record(ITEM)) == ["z", "a"]
    with pytest.raises(FileNotFoundError):
        store.read_folder(FIT)
    with store.write_folder(FIT, info := {}) as folder:
        (folder / "bank.bin").write_bytes(b"rows")
        info["banks"] = 1
    folder, info = store.read_folder(FIT)
    assert (folder / "bank.bin").read_bytes() == b"rows"
    assert info == {"banks": 1}
    assert {(u.stage, u.category): u.files for u in store.usage()} == {("extract", "bagel"): 2, ("fit", "bagel"): 1}
    store.remove(FIT)
    assert not store.has_folder(FIT)


def test_a_failed_fit_leaves_nothing(store: Store) -> None:
    with pytest.raises(RuntimeError), store.write_folder(FIT, {}) as folder:
        (folder / "bank.bin").write_bytes(b"half")
        raise RuntimeError
    assert not store.has_folder(FIT)


def test_damage_is_noticed_and_named(store: Store) -> None:
    assert isinstance(store, ObjectStore)
    store.write_tensors(ITEM, arrays(), {})
    with store.write_folder(FIT, {}) as folder:
        (folder / "bank.bin").write_bytes(b"rows" * 100)
    assert store.verify() == []
    for name in (f"extract/bagel/{ITEM.key}.safetensors", f"fit/bagel/{FIT.key}.tar"):
        data = bytearray(store._read(name))
        data[data.index(b"rowsrows") if name.endswith(".tar") else -5] ^= 0xFF
        store._write(name, bytes(data))
    with pytest.raises(CorruptArtefactError, match=ITEM.key):
        store.read_tensors(ITEM)
    with pytest.raises(CorruptArtefactError, match=FIT.key):
        store.read_folder(FIT)
    assert len(store.verify()) == 2


def test_prune_keeps_what_runs_here_and_elsewhere_need(store: Store, tmp_path: Path) -> None:
    here, elsewhere, gone = (Artefact("extract", "bagel", letter * 40) for letter in "abc")
    for item in (here, elsewhere, gone):
        store.write_tensors(item, arrays(), {})
    store.write_run("here", {"folder": str(tmp_path), "keys": [here.key]})
    store.write_run("gone", {"folder": str(tmp_path / "gone"), "keys": [gone.key]})
    store.write_run("elsewhere", {"folder": str(tmp_path / "gone"), "keys": [elsewhere.key]})
    assert isinstance(store, ObjectStore)
    record = json.loads(store._read("runs/elsewhere.json"))["record"]
    Store.write_run(store, "elsewhere", {**record, "machine": "another"})
    removed, _ = store.prune()
    assert {str(name).rsplit("/", 1)[1] for name in removed} == {"gone.json", f"{gone.key}.safetensors"}
    assert store.has_tensors(here)
    assert store.has_tensors(elsewhere)
    assert not store.has_tensors(gone)


def _write_often(address: str, value: float, times: int) -> None:
    store = open_store(address)
    for _ in range(times):
        store.write_tensors(ITEM, {"a": np.full((300, 300), value, np.float32)}, {"writer": value})
        with store.write_folder(FIT, {"writer": value}) as folder:
            (folder / "bank.bin").write_bytes(bytes([int(value)]) * 200_000)


def test_two_writers_and_a_reader_see_whole_objects_only(bucket: str) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_often, args=(bucket, float(value), 12)) for value in (1, 2)]
    for writer in writers:
        writer.start()
    store, seen = open_store(bucket), set()
    while any(writer.is_alive() for writer in writers):
        try:
            tensors, info = store.read_tensors(ITEM)
            folder, fitted = store.read_folder(FIT)
        except FileNotFoundError:
            continue
        # a mixture of both would fail its digest; the content must be that of the writer it names
        assert (tensors["a"] == info["writer"]).all()
        assert set((folder / "bank.bin").read_bytes()) == {int(fitted["writer"])}
        seen.add(info["writer"])
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert seen
    assert store.verify() == []


def test_a_service_that_does_not_answer_is_a_store_error(monkeypatch: pytest.MonkeyPatch, bucket: str) -> None:
    assert bucket
    with pytest.raises(StoreError, match=r"s3://no-such-bucket/x/.*cannot be written"):
        open_store("s3://no-such-bucket/x").write_record(ITEM, {})


def test_evaluate_gives_the_same_numbers_and_computes_once(bucket: str, tiny_dataset: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "btf", "variant": "raw", "device": "cpu"}
    local, _ = api.evaluate(tiny_dataset, store=tmp_path / "local", out=tmp_path / "a", **options)
    remote, _ = api.evaluate(tiny_dataset, store=bucket, out=tmp_path / "b", save_maps=True, **options)
    assert {n: c.metrics for n, c in remote.categories.items()} == {n: c.metrics for n, c in local.categories.items()}
    scores = [(tmp_path / run / "block" / "scores.csv").read_bytes() for run in "ab"]
    assert scores[0] == scores[1]
    before = {name: size for name, size in open_store(bucket)._objects().items() if not name.startswith("runs/")}
    again, _ = api.evaluate(tiny_dataset, store=bucket, out=tmp_path / "b", save_maps=True, **options)
    assert again.categories == remote.categories
    after = {name: size for name, size in open_store(bucket)._objects().items() if not name.startswith("runs/")}
    assert before == after
    # raw-file digests stay on this machine
    assert not any(name.startswith(("raw/", "locks/")) for name in after)
    assert any((user_cache() / "remote").rglob("raw/*.json"))
