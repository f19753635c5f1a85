"""Writing so that a reader never sees half a file, and an interrupted writer loses nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from mmad_cli.errors import StoreError

Made = TypeVar("Made")

TEMPORARY_PREFIX = ".tmp-"

_NO_SPACE = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}

_ELSEWHERE = "choose another place with --store (or $MMAD_STORE), --out or --output"

# A folder may be pruned by another process between its creation and the first file in it
_ATTEMPTS = 5


def is_no_space(error: BaseException | None) -> bool:
    """Whether an error says that the disk or the quota is full."""
    # numpy leaves out the number and says "5 requested and 3 written"
    return isinstance(error, OSError) and (error.errno in _NO_SPACE or "requested and" in str(error))


@contextlib.contextmanager
def translated_os_errors(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into a StoreError that says what to do."""
    try:
        yield
    except OSError as error:
        raise _refused(path, error) from error
    except _writer_errors() as error:
        # safetensors writes files itself and gives the system's error number in words
        number = re.search(r"\b(?:os error|code:) (\d+)", str(error))
        if number is None:
            raise
        raise _refused(path, OSError(int(number[1]), os.strerror(int(number[1])))) from error


def _writer_errors() -> tuple[type[Exception], ...]:
    # only when something went wrong: importing the library costs time
    from safetensors import SafetensorError

    return (SafetensorError,)


def _refused(path: Path, error: OSError) -> StoreError:
    if is_no_space(error):
        return StoreError(
            f"{path}: no space left on the disk. Nothing that was complete is lost: free some space "
            f"(`mmad cache prune` removes what no run needs) or {_ELSEWHERE}, then run the same command again."
        )
    reason = error.strerror or str(error)
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return StoreError(f"{path}: cannot be written ({reason}). Give write permission or {_ELSEWHERE}.")
    return StoreError(f"{path}: cannot be written ({reason}); {_ELSEWHERE}.")


def _temporary(parent: Path, make: Callable[[], Made]) -> Made:
    """Make something temporary in a folder that is created first."""
    for _ in range(_ATTEMPTS):
        parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            return make()
    return make()


def atomic_write(path: Path, data: bytes) -> None:
    """Write to a temporary name in the same folder, flush to the disk, rename.

    Raises StoreError when the disk is full or may not be written; the target is then as it was before.
    """
    with translated_os_errors(path):
        handle, name = _temporary(path.parent, lambda: tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=path.parent))
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends well, and vanishes otherwise."""
    with translated_os_errors(path):
        made = _temporary(path.parent, lambda: tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=path.parent))
        temporary = Path(made)
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _flush(file)
            if path.exists():
                shutil.rmtree(path, ignore_errors=True)
            temporary.chmod(0o755)
            temporary.replace(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _flush(file: Path) -> None:
    # opened for writing because Windows flushes nothing else
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())
