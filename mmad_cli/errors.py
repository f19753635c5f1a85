"""Errors that a user can act on. The message names what is wrong, the file or option, and what to do."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable
from pathlib import Path


class MmadError(Exception):
    """Base of every error that is reported without a traceback; `exit_code` follows the contract."""

    exit_code = 2


# What a defect of ours or of a third party's code raises: for the places where one failing sample or category must not
# cost the others. Not among them: KeyboardInterrupt, MmadError, ImportError (nothing else would work either).
UNFORESEEN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    NameError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)

_LISTED_AT_MOST = 20


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
    hint = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else f"known: {_listed(known)}"
    return UsageError(f"{option}: unknown {kind} {name!r}; {hint}")


def unforeseen(error: BaseException) -> str:
    """One line about an error that nobody foresaw: its kind, its words and where it was raised.

    A GPU without memory is a likely one, whose place tells nothing; PyTorch is not imported to know its type.
    """
    if type(error).__name__ == "OutOfMemoryError":
        return f"{error}: the GPU has too little free memory for this; free it of other programs, or use --device cpu"
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"


def _listed(names: list[str]) -> str:
    more = len(names) - _LISTED_AT_MOST
    return (", ".join(names[:_LISTED_AT_MOST]) or "none") + (f" and {more} more" if more > 0 else "")
