"""Keys of artefacts: what a result depends on, hashed in one canonical form."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

DIGEST_BYTES = 20


def canonical_json(value: Any) -> str:
    """One text for equal values: sorted keys, no spaces, no NaN. Raises ValueError for values JSON cannot hold."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except TypeError as error:
        raise ValueError(f"key parts must be plain JSON values: {error}") from error


def digest_bytes(*parts: bytes | memoryview) -> str:
    """blake2b of the parts, in hex."""
    state = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        state.update(part)
    return state.hexdigest()


def make_key(stage: str, version: int, **parts: Any) -> str:
    """Key of an artefact: blake2b of the stage, its version and everything the result depends on."""
    return digest_bytes(canonical_json({"stage": stage, "version": version, **parts}).encode())


def digest_tensors(tensors: Mapping[str, NDArray[Any]], metadata_text: str) -> str:
    """Digest of named arrays (name, dtype, shape, bytes) and of the text stored beside them."""
    state = hashlib.blake2b(metadata_text.encode(), digest_size=DIGEST_BYTES)
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        state.update(canonical_json([name, array.dtype.str, list(array.shape)]).encode())
        # an empty array has no buffer to cast
        if array.size:
            state.update(array.reshape(-1).view(np.uint8).data)
    return state.hexdigest()


@cache
def library_version(name: str) -> str | None:
    """Installed version of a distribution without importing it; None when absent.

    `faiss` and `open3d` come under several distribution names.
    """
    for candidate in _DISTRIBUTIONS.get(name, (name,)):
        try:
            return metadata.version(candidate)
        except metadata.PackageNotFoundError:
            continue
    return None


def library_versions(names: Iterable[str]) -> dict[str, str | None]:
    """Versions of the libraries that computed something; they are part of its key."""
    return {name: library_version(name) for name in sorted(set(names))}


_DISTRIBUTIONS = {
    "faiss": ("faiss-gpu", "faiss-cpu", "faiss-gpu-cu12", "faiss"),
    "open3d": ("open3d", "open3d-cpu"),
}
