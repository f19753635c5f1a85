"""The store: expensive results on disk, found by the key of what they were computed from.

    <root>/<stage>/<category>/<key>.safetensors    one sample
    <root>/<stage>/<category>/<key>/               a fitted method (folder with files and manifest.json)
    <root>/<stage>/<category>/<key>.json           a small record
    <root>/manifests/<stage>/<category>/<key>.json which samples make up a stage's output, with digests
    <root>/runs/<run-id>.json                      which manifests a run needs (for prune)
    <root>/locks/                                  one lock per artefact
    <root>/timings.json                            seconds per item of earlier work, for estimates

Every file carries or is listed with the digest of its content and is checked whenever it is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmad_cli.errors import StoreError, UsageError
from mmad_cli.files import TEMPORARY_PREFIX, atomic_folder, atomic_write, translated_os_errors
from mmad_cli.store.keys import canonical_json, digest_bytes, digest_tensors
from mmad_cli.store.timings import TIMINGS

Tensors = dict[str, NDArray[Any]]

ENVIRONMENT_VARIABLE = "MMAD_STORE"
_METADATA = "mmad"
# Holds the header of nearly every stored sample
_HEADER_BYTES = 4096
# A temporary name older than this belongs to a process that was killed
_STALE_SECONDS = 3600.0
# File systems take 255 bytes
_LONGEST_NAME = 200
# Folders below the root that hold no artefacts under a key
_NOT_ARTEFACTS = ("datasets", "locks", "raw", "runs", "work")
# What nothing depends on, or what checks itself when it is read
_NOT_VERIFIED = ("locks", "raw", "work", TIMINGS)


class CorruptArtefactError(StoreError):
    """A stored file does not hold what was written."""


@dataclass(frozen=True)
class Artefact:
    """Place of one stored result."""

    stage: str
    category: str
    key: str


@dataclass(frozen=True)
class Problem:
    """A stored file that failed verification, and why."""

    path: Path | str
    reason: str


@dataclass(frozen=True)
class Usage:
    """Files and bytes of one stage and category."""

    stage: str
    category: str
    files: int
    bytes: int


def default_root() -> str | Path:
    """`$MMAD_STORE`, else the user's cache folder."""
    return os.environ.get(ENVIRONMENT_VARIABLE) or user_cache()


def user_cache() -> Path:
    """The folder that the system keeps for caches of this program. Raises UsageError where there is no home folder."""
    from platformdirs import user_cache_path

    try:
        return user_cache_path("mmad", appauthor=False)
    except RuntimeError as error:
        raise UsageError(f"--store: {error}; name a folder with --store or ${ENVIRONMENT_VARIABLE}") from error


def safe_name(name: str) -> str:
    """A folder name for any category name: plain characters stay, the rest is percent-encoded.

    A name that grows too long for a file system is cut and ends with its digest.
    """
    encoded = [c if c.isalnum() or c in "-_ " else "".join(f"%{b:02x}" for b in os.fsencode(c)) for c in name]
    plain = "".join(encoded)
    if len(os.fsencode(plain)) <= _LONGEST_NAME:
        return plain or "%"
    # a character takes at most 12 bytes when encoded
    return f"{''.join(encoded[: _LONGEST_NAME // 24])}%{digest_bytes(os.fsencode(name))}"


class Store:
    """Artefacts below one root folder. Safe for several processes at once.

    root: also holds what belongs to this machine: locks, digests of raw files, timings, unfinished trainings.
    """

    def __init__(self, root: str | Path | None = None) -> None:
        try:
            self.root = Path(root or default_root()).expanduser().absolute()
        except RuntimeError as error:
            raise UsageError(f"--store: {error}; name a folder with --store or ${ENVIRONMENT_VARIABLE}") from error
        if os.path.lexists(self.root) and not os.path.isdir(self.root):  # noqa: PTH112 - Path raises without permission
            raise UsageError(f"--store: {self.root} is not a folder; name one with --store or ${ENVIRONMENT_VARIABLE}")

    @property
    def address(self) -> str:
        """What `open_store` takes, in any process that sees the same place."""
        return str(self.root)

    # -- places ----------------------------------------------------------------------------------------------

    def folder(self, artefact: Artefact) -> Path:
        """Where a fitted method lies."""
        return self.root / artefact.stage / safe_name(artefact.category) / artefact.key

    def path(self, artefact: Artefact, suffix: str = ".safetensors") -> Path:
        """Where a file artefact lies."""
        return self.folder(artefact).with_name(artefact.key + suffix)

    def place(self, name: str) -> str:
        """Where a file of the store lies, as a user would name it."""
        return str(self.root / name)

    @staticmethod
    def _name(artefact: Artefact, suffix: str) -> str:
        return f"{artefact.stage}/{safe_name(artefact.category)}/{artefact.key}{suffix}"

    # -- what another kind of place does in its own way ------------------------------------------------------

    def _exists(self, name: str) -> bool:
        return (self.root / name).is_file()

    def _read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def _read_start(self, name: str, count: int) -> tuple[bytes, int]:
        """The first bytes of a file (at most `count`) and its size."""
        with (self.root / name).open("rb") as file:
            return file.read(count), os.fstat(file.fileno()).st_size

    def _remove(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    def _write(self, name: str, data: bytes) -> None:
        atomic_write(self.root / name, data)

    @contextlib.contextmanager
    def lock(self, artefact: Artefact) -> Iterator[None]:
        """Hold the artefact's lock: whoever comes second waits and then finds the result."""
        from filelock import FileLock

        path = self.root / "locks" / artefact.key[:2] / f"{artefact.stage}-{artefact.key}.lock"
        with translated_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # whoever writes releases it, which may be another thread than the one that computed
            lock = FileLock(path, thread_local=False)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    # -- one sample: tensors ---------------------------------------------------------------------------------

    def has_tensors(self, artefact: Artefact) -> bool:
        """Whether the file is there (its content is checked on reading)."""
        return self._exists(self._name(artefact, ".safetensors"))

    def has_record(self, artefact: Artefact) -> bool:
        """Whether the record is there."""
        return self._exists(self._name(artefact, ".json"))

    def has_folder(self, artefact: Artefact) -> bool:
        """Whether the fitted method is there."""
        return self.folder(artefact).is_dir()

    def write_tensors(self, artefact: Artefact, tensors: Mapping[str, NDArray[Any]], info: Mapping[str, Any]) -> None:
        """Store named arrays and a JSON record beside them, atomically."""
        from safetensors.numpy import save

        arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        text = canonical_json(dict(info))
        header = {_METADATA: text, "digest": digest_tensors(arrays, text)}
        self._write(self._name(artefact, ".safetensors"), save(arrays, metadata=header))

    def read_tensors(self, artefact: Artefact) -> tuple[Tensors, dict[str, Any]]:
        """Read and verify. Raises FileNotFoundError, or CorruptArtefactError naming the file."""
        name = self._name(artefact, ".safetensors")
        return parse_tensors(self.place(name), self._read(name))

    def describe(self, artefact: Artefact) -> dict[str, Any]:
        """Key, digest and size of a stored file, from its header alone.

        Raises FileNotFoundError, or CorruptArtefactError naming the file.
        """
        name = self._name(artefact, ".safetensors")
        start, size = self._read_start(name, _HEADER_BYTES)
        length = int.from_bytes(start[:8], "little")
        if len(start) < min(8 + length, size):
            start, size = self._read_start(name, min(8 + length, size))
        digest = _header(self.place(name), start[8 : 8 + length])["digest"]
        return {"key": artefact.key, "digest": digest, "bytes": size}

    def remove(self, artefact: Artefact) -> None:
        """Forget a stored result of any kind."""
        self.path(artefact).unlink(missing_ok=True)
        self.path(artefact, ".json").unlink(missing_ok=True)
        shutil.rmtree(self.folder(artefact), ignore_errors=True)

    def tensors_or_compute(
        self,
        artefact: Artefact,
        compute: Callable[[], tuple[Mapping[str, NDArray[Any]], Mapping[str, Any]]],
        on_corrupt: Callable[[CorruptArtefactError], None],
    ) -> tuple[Tensors, dict[str, Any]]:
        """What is stored, or what `compute` returns (then stored). A damaged file is reported and computed again."""
        try:
            return self.read_tensors(artefact)
        except FileNotFoundError:
            pass
        except CorruptArtefactError as error:
            on_corrupt(error)
        with self.lock(artefact):
            # another process may have finished it while this one waited
            try:
                return self.read_tensors(artefact)
            except (FileNotFoundError, CorruptArtefactError):
                pass
            tensors, info = compute()
            self.write_tensors(artefact, tensors, info)
        return dict(tensors), dict(info)

    # -- a fitted method: folder -----------------------------------------------------------------------------

    def read_folder(self, artefact: Artefact) -> tuple[Path, dict[str, Any]]:
        """Verify a stored folder. Raises FileNotFoundError or CorruptArtefactError."""
        folder = self.folder(artefact)
        manifest_path = folder / "manifest.json"
        if not folder.is_dir():
            raise FileNotFoundError(folder)
        manifest = _read_record(manifest_path)
        for name, digest in manifest["files"].items():
            if digest_file(folder / name) != digest:
                raise _corrupt(folder / name, "its content does not match the recorded digest")
        return folder, dict(manifest["info"])

    @contextlib.contextmanager
    def write_folder(self, artefact: Artefact, info: dict[str, Any]) -> Iterator[Path]:
        """A folder to fill; on leaving it is sealed with a manifest and moved into place. `info` may be filled."""
        with atomic_folder(self.folder(artefact)) as temporary:
            yield temporary
            names = sorted(p.relative_to(temporary).as_posix() for p in temporary.rglob("*") if p.is_file())
            record = {"files": {name: digest_file(temporary / name) for name in names}, "info": info}
            atomic_write(temporary / "manifest.json", record_bytes(record))

    # -- small records ---------------------------------------------------------------------------------------

    def write_record(self, artefact: Artefact, record: Mapping[str, Any]) -> None:
        """Store a JSON record with its digest."""
        self._write(self._name(artefact, ".json"), record_bytes(record))

    def read_record(self, artefact: Artefact) -> dict[str, Any]:
        """Read and verify a JSON record. Raises FileNotFoundError or CorruptArtefactError."""
        name = self._name(artefact, ".json")
        return parse_record(self.place(name), self._read(name))

    def write_manifest(self, stage: str, category: str, key: str, record: Mapping[str, Any]) -> None:
        """Record which artefacts make up the output of a stage for a category."""
        name = f"manifests/{stage}/{safe_name(category)}/{key}.json"
        data = record_bytes(record)
        with contextlib.suppress(FileNotFoundError):
            if self._read(name) == data:
                return
        self._write(name, data)

    def has_manifest(self, stage: str, category: str, key: str) -> bool:
        """Whether the manifest is there."""
        return self._exists(f"manifests/{stage}/{safe_name(category)}/{key}.json")

    def write_run(self, run_id: str, record: Mapping[str, Any]) -> None:
        """Record where a run lies and which artefacts it needs."""
        self._write(f"runs/{run_id}.json", record_bytes(record))

    def remove_run(self, run_id: str) -> None:
        """Forget the record of a run."""
        self._remove(f"runs/{run_id}.json")

    def has_run(self, run_id: str) -> bool:
        """Whether a run of that name is recorded."""
        return self._exists(f"runs/{run_id}.json")

    # -- housekeeping ----------------------------------------------------------------------------------------

    def usage(self) -> list[Usage]:
        """Files and bytes per stage and category."""
        found: dict[tuple[str, str], list[int]] = {}
        for path in self._files():
            parts = path.relative_to(self.root).parts
            if len(parts) < 3 or parts[0] in (*_NOT_ARTEFACTS, "manifests"):
                continue
            counts = found.setdefault((parts[0], parts[1]), [0, 0])
            counts[0] += 1
            counts[1] += _size(path)
        return [Usage(stage, category, files, size) for (stage, category), (files, size) in sorted(found.items())]

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[Problem]:
        """Read every stored file and compare with its digest."""
        problems = []
        files = [p for p in self._files() if p.relative_to(self.root).parts[0] not in _NOT_VERIFIED]
        for done, path in enumerate(files, start=1):
            try:
                _verify_file(path)
            except CorruptArtefactError as error:
                problems.append(Problem(path, str(error)))
            except OSError as error:
                problems.append(Problem(path, f"{path}: cannot be read ({error.strerror})"))
            if progress is not None:
                progress(done, len(files))
        return problems

    def prune(self, dry_run: bool = False) -> tuple[Sequence[Path | str], int]:
        """Remove what no existing run needs, stale temporary files and idle locks; return paths and bytes.

        A run exists as long as its folder does; one that was interrupted before its first summary counts too. A run
        that starts meanwhile computes again what it misses.
        """
        # listed before the runs are read: what a run adds after its announcement is not in the list
        files = list(self._files())
        needed: set[str] = set()
        removable: list[Path] = []
        for record_path in sorted((self.root / "runs").glob("*.json")):
            try:
                record = _read_record(record_path)
            except CorruptArtefactError:
                removable.append(record_path)
                continue
            if Path(record["folder"]).is_dir():
                needed.update(record["keys"])
            else:
                removable.append(record_path)
        for path in files:
            parts = path.relative_to(self.root).parts
            if len(parts) < 3 or parts[0] in _NOT_ARTEFACTS:
                continue
            keys = _manifest_keys(path) if parts[0] == "manifests" else {parts[2].split(".")[0]}
            if not keys & needed:
                removable.append(path)
        removable += self._stale_temporaries()
        size = sum(_size(path) for path in removable if path.is_file())
        if not dry_run:
            for path in removable:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
            self._remove_idle_locks()
            self._remove_empty_folders()
        return removable, size

    def _walk(self) -> Iterator[tuple[Path, list[str], list[str]]]:
        # os.walk passes over folders that another process removes meanwhile
        for folder, folders, files in os.walk(self.root):
            if Path(folder) == self.root and "datasets" in folders:
                folders.remove("datasets")
            folders.sort()
            yield Path(folder), folders, sorted(files)

    def _files(self) -> Iterator[Path]:
        for folder, folders, files in self._walk():
            folders[:] = [name for name in folders if not name.startswith(TEMPORARY_PREFIX)]
            yield from (folder / name for name in files if not name.startswith(TEMPORARY_PREFIX))

    def _stale_temporaries(self) -> list[Path]:
        oldest = time.time() - _STALE_SECONDS
        found = [
            folder / name
            for folder, folders, files in self._walk()
            for name in (*folders, *files)
            if name.startswith(TEMPORARY_PREFIX)
        ]
        return [path for path in found if _modified(path) < oldest]

    def _remove_idle_locks(self) -> None:
        from filelock import FileLock, Timeout

        for path in (self.root / "locks").glob("*/*.lock"):
            # removed while held, so nobody else can hold it; who waits for it notices and makes a new one
            with contextlib.suppress(Timeout, OSError), FileLock(path, timeout=0):
                path.unlink(missing_ok=True)

    def _remove_empty_folders(self) -> None:
        for folder, _, _ in sorted(self._walk(), reverse=True):
            if folder != self.root:
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        # another process has removed it meanwhile
        return 0


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return math.inf


def _corrupt(path: Path | str, reason: str) -> CorruptArtefactError:
    return CorruptArtefactError(f"{path}: damaged ({reason})")


def parse_tensors(path: Path | str, data: bytes) -> tuple[Tensors, dict[str, Any]]:
    """Arrays and record of a stored file. Raises CorruptArtefactError naming `path`."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    header = _header(path, data[8 : 8 + int.from_bytes(data[:8], "little")])
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _corrupt(path, f"not a readable tensor file: {error}") from error
    if digest_tensors(tensors, header[_METADATA]) != header["digest"]:
        raise _corrupt(path, "its content does not match its digest")
    return tensors, json.loads(header[_METADATA])


def _header(path: Path | str, text: bytes) -> dict[str, str]:
    try:
        metadata = json.loads(text)["__metadata__"]
        return {_METADATA: metadata[_METADATA], "digest": metadata["digest"]}
    except (ValueError, KeyError, TypeError) as error:
        raise _corrupt(path, f"its header cannot be read: {error}") from error


def record_bytes(record: Mapping[str, Any]) -> bytes:
    """A JSON record with its digest, as it is stored."""
    # the digest is over the canonical form, so the order that a reader will see can be kept
    digest = digest_bytes(canonical_json(dict(record)).encode())
    return json.dumps({"digest": digest, "record": dict(record)}, indent=1).encode()


def _read_record(path: Path) -> dict[str, Any]:
    return parse_record(path, path.read_bytes())


def parse_record(path: Path | str, data: bytes) -> dict[str, Any]:
    """A stored JSON record. Raises CorruptArtefactError naming `path`."""
    try:
        content = json.loads(data)
        record, digest = content["record"], content["digest"]
        matches = digest_bytes(canonical_json(record).encode()) == digest
    except (ValueError, KeyError, TypeError) as error:
        raise _corrupt(path, f"not a readable record: {error}") from error
    if not matches:
        raise _corrupt(path, "its content does not match its digest")
    return dict(record)


def _manifest_keys(path: Path) -> set[str]:
    try:
        return {sample["key"] for sample in _read_record(path)["samples"].values()}
    except CorruptArtefactError:
        return set()


def digest_file(path: Path) -> str:
    """blake2b of a file. Raises CorruptArtefactError where it is missing."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=20)).hexdigest()
    except FileNotFoundError as error:
        raise _corrupt(path, "it is missing") from error


def _verify_file(path: Path) -> None:
    if path.suffix == ".safetensors" and not (path.parent / "manifest.json").is_file():
        parse_tensors(path, path.read_bytes())
    elif path.name == "manifest.json":
        manifest = _read_record(path)
        for name, digest in manifest["files"].items():
            if digest_file(path.parent / name) != digest:
                raise _corrupt(path.parent / name, "its content does not match the recorded digest")
    elif path.suffix == ".json" and not (path.parent / "manifest.json").is_file():
        _read_record(path)
