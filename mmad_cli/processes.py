"""How worker processes behave: quiet when the user interrupts, and gone when their parent is gone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def become_worker() -> None:
    """Call first in every worker process, as the initializer of its pool."""
    # The parent decides what an interrupt means; a worker must not print a traceback of its own
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End when the parent is gone, however it went: a killed run leaves no processes behind."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
