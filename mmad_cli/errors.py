"""Errors that a user can act on. The message names what is wrong, the file or option, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MmadError(Exception):
    """Base of every error that is reported without a traceback; `exit_code` follows the contract."""

    exit_code = 2


class UsageError(MmadError):
    """A wrong option, name or combination of options."""


class DataError(MmadError):
    """A dataset folder or file that cannot be used; the message names the file."""


class WeightsError(MmadError):
    """Pretrained weights that are missing, damaged or of the wrong shape."""


class StoreError(MmadError):
    """The store cannot be read or written (no space, no permission). What is stored already is kept."""

    exit_code = 3


def unknown_name(kind: str, name: str, known: Iterable[str], option: str) -> UsageError:
    """Error for a name that does not exist, with the nearest known ones."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else f"known: {', '.join(known) or 'none'}"
    return UsageError(f"{option}: unknown {kind} {name!r}; {hint}")
