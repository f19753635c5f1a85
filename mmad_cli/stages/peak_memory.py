"""How much memory a piece of work took at its highest, without disturbing others who measure this process."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

# A peak between two looks is missed, unless it is the highest so far of the process, which the system keeps
_SECONDS_BETWEEN_LOOKS = 0.05
_STATM = Path("/proc/self/statm")


def peak_rss() -> int | None:
    """Largest resident set of this process so far, in bytes."""
    try:
        import resource
    except ImportError:
        # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # kilobytes on Linux, bytes on macOS
    return int(peak if sys.platform == "darwin" else peak * 1024)


class PeakMemory:
    """Context in which the resident set of this process is watched; `bytes` is its peak, None where it is not known.

    Worker processes are not counted. Where the system does not tell the present size (it does on Linux), the peak is
    known only if it is the highest so far of the process.
    """

    def __init__(self) -> None:
        self.bytes: int | None = None
        self._seen = 0
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._before: int | None = None

    def __enter__(self) -> PeakMemory:
        self._before = peak_rss()
        if _resident() is not None:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._end.set()
            self._thread.join()
        after = peak_rss()
        if after is not None and self._before is not None and after > self._before:
            self.bytes = after
        else:
            self.bytes = self._seen or None

    def _watch(self) -> None:
        while True:
            self._seen = max(self._seen, _resident() or 0)
            if self._end.wait(_SECONDS_BETWEEN_LOOKS):
                break
        self._seen = max(self._seen, _resident() or 0)


def _resident() -> int | None:
    """Resident set now, in bytes."""
    try:
        import resource

        return int(_STATM.read_text().split()[1]) * resource.getpagesize()
    except (ImportError, OSError, IndexError, ValueError):
        return None
