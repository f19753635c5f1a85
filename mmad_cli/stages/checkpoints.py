"""Fitted states as files: taken out of the store, and put in place of a fit."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmad_cli.errors import DataError, UsageError, unforeseen
from mmad_cli.files import atomic_folder, translated_os_errors
from mmad_cli.store.store import safe_name

if TYPE_CHECKING:
    from mmad_cli.methods.base import Method
    from mmad_cli.store import Artefact, Store

_MANIFEST = "manifest.json"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A folder with the fitted state of one category, and the digest of its content."""

    folder: Path
    digest: str


def find_checkpoint(root: Path | None, category: str) -> Checkpoint | None:
    """The fitted state of a category below `root`. Raises UsageError naming --checkpoints when there is none."""
    if root is None:
        return None
    folder = root / safe_name(category)
    if not folder.is_dir() or not any(folder.iterdir()):
        raise UsageError(
            f"--checkpoints {root}: has no folder {folder.name!r} with a fitted state of that category; "
            "`mmad fit --export DIR` writes one folder per category"
        )
    digest = hashlib.blake2b(digest_size=16)
    with translated_os_errors(folder):
        for path in sorted(p for p in folder.iterdir() if p.is_file() and p.name != _MANIFEST):
            digest.update(json.dumps([path.name, path.stat().st_size]).encode())
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
    return Checkpoint(folder, digest.hexdigest())


def load_checkpoint(method: Method, checkpoint: Checkpoint) -> None:
    """Give a method the state of a checkpoint. Raises DataError naming the folder when it is of another method."""
    from safetensors import SafetensorError

    try:
        method.load(checkpoint.folder)
    except DataError as error:
        raise DataError(f"--checkpoints: {error}") from error
    except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
        raise DataError(
            f"--checkpoints {checkpoint.folder}: not a fitted state of this method, variant and configuration "
            f"({unforeseen(error)}); it must have been exported with the same --method, --variant and --set"
        ) from error


def check_export(out: Path | None, categories: Sequence[str]) -> None:
    """Refuse to write fitted states over something else. Raises UsageError naming --export."""
    if out is None:
        return
    for category in categories:
        target = _export_folder(out, category)
        if target.exists() and not (target / _MANIFEST).is_file():
            raise UsageError(f"--export {out}: {target} exists and holds something else; name a new folder")


def export_state(store: Store, parts: Sequence[Artefact], out: Path) -> Path:
    """Copy the fitted state of a category, kept in one or more parts, into a folder below `out`.

    The folder appears whole or not at all.
    """
    sources = [store.read_folder(part)[0] for part in parts]
    target = _export_folder(out, parts[-1].category)
    with translated_os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(target) as temporary:
            for source in sources:
                shutil.copytree(source, temporary, dirs_exist_ok=True)
    return target


def _export_folder(out: Path, category: str) -> Path:
    return out / safe_name(category)
