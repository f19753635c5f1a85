"""Content digests of raw files, remembered by size and times so that an unchanged dataset is hashed once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmad_cli.errors import DataError
from mmad_cli.files import atomic_write
from mmad_cli.store.keys import DIGEST_BYTES, canonical_json, digest_bytes


class RawIndex:
    """Digests of the files below one dataset root, kept in the store; raw data itself is never written to."""

    def __init__(self, store_root: Path, dataset_root: Path) -> None:
        self._root = dataset_root.absolute()
        self._path = store_root / "raw" / f"{digest_bytes(os.fsencode(self._root))}.json"
        self._known: dict[str, list[Any]] = self._load()

    def _load(self) -> dict[str, list[Any]]:
        try:
            content = json.loads(self._path.read_bytes())
            known = dict(content["files"])
            sound = content["digest"] == _digest_of(known)
        except (OSError, ValueError, KeyError, TypeError):
            # a missing or damaged index only costs hashing again
            return {}
        return known if sound else {}

    def digests(
        self, paths: Iterable[Path], progress: Callable[[int, int], None] | None = None, threads: int = 4
    ) -> dict[Path, str]:
        """Digest per path. Raises DataError naming a file that cannot be read."""
        paths = list(paths)
        result: dict[Path, str] = {}
        missing: list[tuple[Path, list[int]]] = []
        for path in paths:
            state = _state(path)
            known = self._known.get(str(path))
            if known is not None and known[:-1] == state:
                result[path] = known[-1]
            else:
                missing.append((path, state))
        if missing:
            with ThreadPoolExecutor(threads) as pool:
                for done, ((path, state), digest) in enumerate(
                    zip(missing, pool.map(_hash_file, (p for p, _ in missing)), strict=True), start=1
                ):
                    result[path] = digest
                    self._known[str(path)] = [*state, digest]
                    if progress is not None:
                        progress(done, len(missing))
            self._save()
        return result

    def _save(self) -> None:
        # merge with what another process learned meanwhile
        known = {**self._load(), **self._known}
        content = {"root": str(self._root), "digest": _digest_of(known), "files": known}
        atomic_write(self._path, json.dumps(content).encode())


def check_unchanged(files: Mapping[str, Path], digests: Mapping[str, str]) -> None:
    """Raises DataError for a file whose content is no longer what its digest says; both are by role.

    What was computed from such a file must not be kept under a key that was made from the digest.
    """
    for role, digest in digests.items():
        if _hash_file(files[role]) != digest:
            raise DataError(f"{files[role]}: was changed while this command ran; run the same command again")


def _digest_of(known: Mapping[str, Any]) -> str:
    return digest_bytes(canonical_json(known).encode())


def _state(path: Path) -> list[int]:
    try:
        state = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({os.strerror(error.errno or 0)})") from error
    # the change time catches an edit that sets size and modification time back
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]


def _hash_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES)).hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from error
