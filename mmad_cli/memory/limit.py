"""How much memory a command may take, and arrays that go to a mapped file when they would take more.

The limit is one of the whole process and its worker processes, like the number of threads, and no part of any
configuration: results are the same with and without. It counts memory that the system cannot write back to a file
(anonymous memory); pages of a mapped file are cache, which the system takes back when it needs them.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mmad_cli.errors import StoreError, UsageError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
# an array that takes more than this share of what is left goes to a file, and one that would leave less than the
# reserve: many arrays in a row must not use up what temporary ones and libraries that are loaded later need
_SHARE = 0.5
_RESERVE = 256 << 20
_SMALL = 1 << 20
_LEAST = 32 << 20
# what a worker process takes at most for a scan of 800 x 800 pixels, libraries included (measured: 190 MB)
_WORKER = 256 << 20
_LARGEST_TILE = 1 << 24
# what products of a search, and freed memory that the C library keeps for itself, take besides arrays (measured: 75 MB)
_WORKING = 80 << 20

_limit: int | None = None
_folder: Path | None = None


def parse_memory(text: str) -> int:
    """Bytes of a size such as 4GB, 500M or 2e9. Raises UsageError naming --memory-limit."""
    number = text.strip().lower().removesuffix("b").removesuffix("i")
    unit = number[-1:] if number[-1:] in _UNITS else ""
    try:
        size = float(number.removesuffix(unit)) * _UNITS[unit]
    except ValueError:
        size = float("nan")
    if not 0 < size < float("inf"):
        raise UsageError(f"--memory-limit {text}: give a size such as 4GB or 500MB")
    return int(size)


def set_memory_limit(limit: int | None, folder: Path | None = None) -> None:
    """Let arrays of banks keep the command below `limit` bytes; files lie in `folder`. None: no limit."""
    global _limit, _folder
    _limit, _folder = limit, folder


def is_memory_limited() -> bool:
    """Whether there is a limit."""
    return _limit is not None


def memory_left() -> int | None:
    """Bytes below the limit, None without one. Raises UsageError naming --memory-limit when there is no room at all."""
    if _limit is None:
        return None
    left = _left(_limit, 2 * _LEAST)
    if left < _LEAST:
        raise _too_low(_limit, left, _WORKING)
    return left


def require_memory(size: int) -> None:
    """Make sure, before long work, that it has room for arrays of so many bytes at a time that cannot go to files.

    Raises UsageError naming --memory-limit and the smallest one that does; without a limit nothing is looked at.
    """
    if _limit is not None and (left := _left(_limit, size + _WORKING)) < size + _WORKING:
        raise _too_low(_limit, left, size + _WORKING)


def _left(limit: int, wanted: int) -> int:
    left = limit - _taken()
    if left < wanted:
        _return_free_memory()
        left = limit - _taken()
    return left


def _too_low(limit: int, left: int, wanted: int) -> UsageError:
    taken = limit - left
    return UsageError(
        f"--memory-limit: {limit / 1e6:.0f} MB is too low: this process holds {taken / 1e6:.0f} MB already (libraries, "
        f"networks, features of a sample, workers); give at least {math.ceil((taken + wanted) / 1e6)} MB"
    )


def _taken() -> int:
    return anonymous_memory() + sum(_anonymous(child.pid) or 0 for child in multiprocessing.active_children())


def _return_free_memory() -> None:
    """Let the C library return what is free in its heaps: those of threads keep it otherwise (glibc only)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def workers_that_fit(count: int, limit: int | None) -> int:
    """How many of so many worker processes a limit has room for next to this process; 1 for work in this process."""
    return count if limit is None else max(1, min(count, limit // _WORKER - 1))


def fits(size: int) -> bool:
    """Whether an array of so many bytes is to be held in memory."""
    left = memory_left()
    return left is None or size <= max(_SMALL, min(_SHARE * left, left - _RESERVE))


def tile_elements() -> int:
    """Elements of the largest temporary float32 array of a search: fewer when little memory is left."""
    left = memory_left()
    return _LARGEST_TILE if left is None else max(1 << 18, min(_LARGEST_TILE, left // 32))


def bounded_empty(shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> NDArray[Any]:
    """An array like `numpy.empty`, in memory or, where it does not fit, in a mapped file that vanishes with it.

    Raises StoreError when the disk has no room for the file.
    """
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if size == 0 or fits(size):
        return np.empty(shape, dtype)
    if _folder is not None:
        _folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(prefix=".tmp-", dir=_folder) as file:
        try:
            # reserved now: a disk that fills up later would kill the process
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise StoreError(
                f"{_folder or tempfile.gettempdir()}: no room for {size / 1e9:.1f} GB that --memory-limit keeps out of "
                f"memory ({error.strerror}); free some space, raise the limit or choose another --store"
            ) from error
        return np.memmap(file, dtype=dtype, mode="r+", shape=shape)


def anonymous_memory() -> int:
    """Bytes of this process that no file stands behind; the peak of its memory where the system does not say."""
    found = _anonymous("self")
    if found is None:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found


def _anonymous(process: int | str | None) -> int | None:
    """The same of any process; None where the system does not say or the process is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        return None
