"""Seconds per item of earlier work, so that a plan can say how long the same work will take.

Kept in `<root>/timings.json`: no artefact, nothing depends on it. A file that is missing or damaged only means that
nothing is known yet, and one that cannot be written is not an error.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmad_cli.files import TEMPORARY_PREFIX
from mmad_cli.store.keys import canonical_json, digest_bytes
from mmad_cli.threads import available_cores

TIMINGS = "timings.json"
# Another form of the file is not read
_VERSION = 1
# What was learned earlier counts as so many items at most, so that a change of speed shows soon
_MEMORY = 200.0
# A rename takes milliseconds on some file systems, so records are written together
_SAVE_SECONDS = 10.0


class Timings:
    """Seconds per item by what was done, as measured on machines like this one; `machine` names them."""

    def __init__(self, root: Path, machine: str | None = None) -> None:
        self._path = root / TIMINGS
        self._machine = machine or f"{platform.machine()}, {available_cores()} cores"
        self._pending: list[tuple[str, float, float]] = []
        self._saved = time.monotonic()

    def known(self) -> dict[str, float]:
        """Seconds per item by name; empty when nothing was learned yet."""
        return {name: rate for name, (_, rate) in self._load().get(self._machine, {}).items()}

    def record(self, name: str, items: float, seconds: float) -> None:
        """Learn from one piece of work; earlier ones count by their items. Written by `save` at the latest."""
        if not (_positive(items) and _positive(seconds)):
            return
        self._pending.append((name, items, seconds))
        if time.monotonic() - self._saved > _SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Write what was recorded since the last time, if anything was and the store can be written."""
        if not self._pending:
            return
        # read again each time, for what another process has learned meanwhile
        machines = self._load()
        known = machines.setdefault(self._machine, {})
        for name, items, seconds in self._pending:
            weight, rate = known.get(name, (0.0, 0.0))
            known[name] = (min(weight + items, _MEMORY), (weight * rate + seconds) / (weight + items))
        self._pending.clear()
        self._saved = time.monotonic()
        with contextlib.suppress(OSError):
            _replace(self._path, json.dumps({"digest": _digest(machines), "machines": machines}).encode())

    def _load(self) -> dict[str, dict[str, tuple[float, float]]]:
        try:
            content = json.loads(self._path.read_bytes())
            machines = {
                str(machine): {str(name): (float(items), float(rate)) for name, (items, rate) in known.items()}
                for machine, known in content["machines"].items()
            }
            sound = content["digest"] == _digest(machines)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
        return machines if sound else {}


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _digest(machines: Mapping[str, Any]) -> str:
    return digest_bytes(canonical_json([_VERSION, machines]).encode())


def _replace(path: Path, data: bytes) -> None:
    """Atomic, but not flushed to the disk: what a power failure takes costs nothing but an estimate."""
    handle, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
