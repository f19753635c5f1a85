"""The store: round trips, damage, concurrency, housekeeping."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from mmad_cli.errors import StoreError, UsageError
from mmad_cli.files import atomic_write
from mmad_cli.store import Artefact, CorruptArtefactError, RawIndex, Store, make_key
from mmad_cli.store.keys import canonical_json, digest_tensors
from mmad_cli.store.store import safe_name

ITEM = Artefact("extract", "bagel", "k" * 40)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def _arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "a": rng.normal(size=(5, 3)).astype(np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "bits": rng.integers(0, 255, 7).astype(np.uint8),
        "transposed": np.arange(6).reshape(2, 3).T,
    }


def test_tensors_round_trip_exactly(store: Store) -> None:
    arrays = _arrays()
    store.write_tensors(ITEM, arrays, {"plane": [0.1, 2.0], "reason": None})
    read, info = store.read_tensors(ITEM)
    assert info == {"plane": [0.1, 2.0], "reason": None}
    assert set(read) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)
        assert read[name].dtype == array.dtype


def test_every_flipped_byte_is_noticed_or_harmless(store: Store) -> None:
    arrays = _arrays()
    store.write_tensors(ITEM, arrays, {"x": 1})
    path = store.path(ITEM)
    data = path.read_bytes()
    noticed = 0
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 0x10
        path.write_bytes(bytes(changed))
        try:
            read, info = store.read_tensors(ITEM)
        except CorruptArtefactError as error:
            assert str(path) in str(error)
            noticed += 1
        else:
            assert info == {"x": 1}
            assert all(np.array_equal(read[name], arrays[name]) for name in arrays)
    assert noticed > 0.95 * len(data)


@pytest.mark.parametrize("length", [0, 4, 8, 40, -1])
def test_truncated_file_is_damage(store: Store, length: int) -> None:
    store.write_tensors(ITEM, _arrays(), {})
    path = store.path(ITEM)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CorruptArtefactError, match="damaged"):
        store.read_tensors(ITEM)


def test_compute_runs_once_and_again_after_damage(store: Store) -> None:
    calls, notices = [], []

    def compute() -> tuple[dict[str, np.ndarray], dict[str, int]]:
        calls.append(1)
        return {"a": np.arange(100.0)}, {"n": 1}

    for _ in range(2):
        store.tensors_or_compute(ITEM, compute, notices.append)
    assert len(calls) == 1
    path = store.path(ITEM)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    tensors, _ = store.tensors_or_compute(ITEM, compute, notices.append)
    np.testing.assert_array_equal(tensors["a"], np.arange(100.0))
    assert len(calls) == 2
    assert len(notices) == 1
    assert str(path) in str(notices[0])
    store.read_tensors(ITEM)


def test_failed_compute_leaves_nothing(store: Store) -> None:
    def compute() -> tuple[dict[str, np.ndarray], dict[str, int]]:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        store.tensors_or_compute(ITEM, compute, lambda error: None)
    assert not [p for p in store.root.rglob("*") if p.is_file() and "locks" not in p.parts]


def test_full_disk_is_said_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "summary.json"
    atomic_write(target, b"old")

    def no_space(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(StoreError, match="no space left") as caught:
        atomic_write(target, b"new")
    assert caught.value.exit_code == 3
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_folder_appears_only_when_complete(store: Store) -> None:
    with pytest.raises(RuntimeError), store.write_folder(ITEM, {}) as folder:
        (folder / "half").write_bytes(b"1")
        raise RuntimeError
    with pytest.raises(FileNotFoundError):
        store.read_folder(ITEM)
    info: dict[str, object] = {}
    with store.write_folder(ITEM, info) as folder:
        (folder / "bank.bin").write_bytes(b"12345")
        info["rows"] = 3
    path, read = store.read_folder(ITEM)
    assert read == {"rows": 3}
    (path / "bank.bin").write_bytes(b"12346")
    with pytest.raises(CorruptArtefactError, match=r"bank\.bin"):
        store.read_folder(ITEM)
    (path / "bank.bin").unlink()
    with pytest.raises(CorruptArtefactError, match="missing"):
        store.read_folder(ITEM)


def test_record_round_trip_and_damage(store: Store) -> None:
    store.write_record(ITEM, {"metrics": {"i_auroc": 0.1 + 0.2, "p_auroc": None}})
    assert store.read_record(ITEM) == {"metrics": {"i_auroc": 0.1 + 0.2, "p_auroc": None}}
    path = store.path(ITEM, ".json")
    path.write_text(path.read_text().replace("0.3", "0.4", 1))
    with pytest.raises(CorruptArtefactError):
        store.read_record(ITEM)


def test_verify_names_the_damaged_files(store: Store) -> None:
    good, bad = ITEM, Artefact("preprocess", "tire", "b" * 40)
    store.write_tensors(good, _arrays(), {})
    store.write_tensors(bad, _arrays(), {})
    with store.write_folder(Artefact("fit", "tire", "c" * 40), {}) as folder:
        (folder / "bank.bin").write_bytes(b"12345")
    assert store.verify() == []
    for path in (store.path(bad), store.folder(Artefact("fit", "tire", "c" * 40)) / "bank.bin"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))
    problems = store.verify()
    assert {"b" * 40 in p.reason or "bank.bin" in p.reason for p in problems} == {True}
    assert len(problems) == 2


def test_prune_keeps_what_a_run_needs(store: Store, tmp_path: Path) -> None:
    needed, other = ITEM, Artefact("extract", "bagel", "d" * 40)
    for artefact in (needed, other):
        store.write_tensors(artefact, _arrays(), {})
    with store.write_folder(Artefact("fit", "bagel", "e" * 40), {}) as folder:
        (folder / "bank.bin").write_bytes(b"1")
    run = tmp_path / "runs" / "r1"
    run.mkdir(parents=True)
    store.write_run("r1", {"folder": str(run), "keys": [needed.key, "e" * 40]})
    store.write_manifest("extract", "bagel", "m" * 40, {"samples": {"a": store.describe(needed)}})
    planned, _ = store.prune(dry_run=True)
    assert planned == [store.path(other)]
    assert store.has_tensors(other)
    store.prune()
    assert not store.has_tensors(other)
    store.read_tensors(needed)
    store.read_folder(Artefact("fit", "bagel", "e" * 40))
    run.rmdir()
    store.prune()
    assert not store.has_tensors(needed)
    assert not store.folder(Artefact("fit", "bagel", "e" * 40)).exists()


def test_prune_removes_only_old_temporaries(store: Store) -> None:
    store.write_tensors(ITEM, _arrays(), {})
    folder = store.path(ITEM).parent
    for name, age in (("old", 7200), ("new", 0)):
        leftover = folder / f".tmp-{name}"
        leftover.write_bytes(b"x")
        os.utime(leftover, (time.time() - age, time.time() - age))
    store.prune()
    assert [p.name for p in folder.iterdir()] == [".tmp-new"]


def test_category_names_become_folder_names(store: Store) -> None:
    names = ["bagel", "../up", "a/b", "<script>", "Ünï", "", ".", ".."]
    folders = [safe_name(name) for name in names]
    assert len(set(folders)) == len(names)
    assert not any("/" in folder or folder in ("", ".", "..") for folder in folders)
    item = Artefact("extract", "../up", "f" * 40)
    store.write_tensors(item, _arrays(), {})
    assert store.root in store.path(item).resolve().parents


def _write_many(root: Path, worker: int, count: int) -> None:
    store = Store(root)
    for index in range(count):
        store.tensors_or_compute(
            Artefact("extract", "bagel", make_key("t", 1, index=index)),
            lambda index=index: (_logged(root, worker, index), {"index": index}),
            lambda error: None,
        )


def _logged(root: Path, worker: int, index: int) -> dict[str, np.ndarray]:
    (root.parent / f"computed-{worker}-{index}").touch()
    time.sleep(0.002)
    return {"a": np.full(1000, index)}


def test_two_processes_share_one_store_and_compute_each_item_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    root = tmp_path / "store"
    processes = [context.Process(target=_write_many, args=(root, worker, 30)) for worker in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    store = Store(root)
    for index in range(30):
        tensors, _ = store.read_tensors(Artefact("extract", "bagel", make_key("t", 1, index=index)))
        assert (tensors["a"] == index).all()
    assert len(list(tmp_path.glob("computed-*"))) == 30


def test_keys_depend_on_everything_and_only_on_content() -> None:
    base = make_key("fit", 1, config={"a": 1, "b": [1, 2]})
    assert make_key("fit", 1, config={"b": [1, 2], "a": 1}) == base
    changed = [
        make_key("fit", 2, config={"a": 1, "b": [1, 2]}),
        make_key("extract", 1, config={"a": 1, "b": [1, 2]}),
        make_key("fit", 1, config={"a": 1, "b": [2, 1]}),
        make_key("fit", 1, config={"a": 1.5, "b": [1, 2]}),
    ]
    assert base not in changed
    assert len(set(changed)) == len(changed)


def test_keys_refuse_what_has_no_canonical_form() -> None:
    with pytest.raises(ValueError, match="plain JSON"):
        canonical_json({"path": Path("x")})
    with pytest.raises(ValueError):
        canonical_json({"x": float("nan")})


def test_digest_sees_shape_and_dtype() -> None:
    values = np.arange(6, dtype=np.float32)
    digests = {
        digest_tensors({"a": values}, ""),
        digest_tensors({"a": values.reshape(2, 3)}, ""),
        digest_tensors({"b": values}, ""),
        digest_tensors({"a": values.view(np.int32)}, ""),
        digest_tensors({"a": values}, "x"),
    }
    assert len(digests) == 5


def test_raw_index_hashes_once_and_notices_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmad_cli.store import raw

    data = tmp_path / "data"
    data.mkdir()
    first, second = data / "a.png", data / "b.png"
    first.write_bytes(b"1111")
    second.write_bytes(b"2222")
    hashed: list[Path] = []
    original = raw._hash_file

    def counted(path: Path) -> str:
        hashed.append(path)
        return original(path)

    monkeypatch.setattr(raw, "_hash_file", counted)
    before = RawIndex(tmp_path / "store", data).digests([first, second])
    assert RawIndex(tmp_path / "store", data).digests([first, second]) == before
    assert len(hashed) == 2
    # same size, same modification time: the change time gives it away
    state = first.stat()
    time.sleep(0.01)
    first.write_bytes(b"1112")
    os.utime(first, ns=(state.st_atime_ns, state.st_mtime_ns))
    after = RawIndex(tmp_path / "store", data).digests([first, second])
    assert after[first] != before[first]
    assert after[second] == before[second]
    assert len(hashed) == 3


def test_raw_index_survives_damage(tmp_path: Path) -> None:
    data = tmp_path / "a.png"
    data.write_bytes(b"1")
    index = RawIndex(tmp_path / "store", tmp_path)
    digests = index.digests([data])
    (file,) = (tmp_path / "store" / "raw").iterdir()
    file.write_text(json.dumps({"files": {str(data): "nonsense"}})[:-1])
    assert RawIndex(tmp_path / "store", tmp_path).digests([data]) == digests


def test_store_refuses_a_file_as_root(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(UsageError, match="is not a folder"):
        Store(tmp_path / "x")
