"""Download one file: resumable, to a partial file beside its destination, with errors that say what happened."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import requests

# Called with (bytes done, bytes in all or None); at most a few times a second
Progress = Callable[[int, int | None], None]

CHUNK = 1 << 16
ATTEMPTS = 3
TIMEOUT = (10.0, 60.0)
_REPORT_SECONDS = 0.2


class DownloadError(Exception):
    """A download that did not finish; the message is the cause in one line."""


def download(url: str, part: Path, progress: Progress | None = None, attempts: int = ATTEMPTS) -> str | None:
    """Download `url` into the file `part`, going on where an earlier try stopped if the server allows it.

    Returns the SHA-256 that the server states for the file (Hugging Face does, in `X-Linked-Etag`), or None.
    Raises DownloadError; what has arrived stays in `part` for the next try.
    """
    part.parent.mkdir(parents=True, exist_ok=True)
    interrupted: _InterruptedDownloadError | None = None
    for attempt in range(attempts):
        time.sleep(0.5 * attempt)
        try:
            return _download_once(url, part, progress)
        except _InterruptedDownloadError as error:
            interrupted = error
    raise DownloadError(str(interrupted)) from interrupted


class _InterruptedDownloadError(Exception):
    """The connection ended early; trying again makes sense."""


def _download_once(url: str, part: Path, progress: Progress | None) -> str | None:
    import requests

    try:
        with requests.get(url, stream=True, timeout=TIMEOUT, headers=_resume_headers(url, part)) as response:
            if response.status_code == requests.codes.requested_range_not_satisfiable:
                part.unlink(missing_ok=True)
                raise _InterruptedDownloadError(f"{url}: the partial file is longer than the file on the server")
            response.raise_for_status()
            _write(response, url, part, progress)
            return _stated_sha256(response)
    except requests.HTTPError as error:
        status = error.response.status_code if error.response is not None else "an error"
        raise DownloadError(f"{url}: the server answered {status}") from error
    except (requests.exceptions.ChunkedEncodingError, requests.exceptions.ReadTimeout) as error:
        raise _InterruptedDownloadError(f"{url}: the connection ended early ({_size(part)} bytes arrived)") from error
    except requests.ConnectionError as error:
        raise DownloadError(f"{url}: no connection ({_cause(error)})") from error
    except (requests.RequestException, OSError) as error:
        raise DownloadError(f"{url}: {error}") from error


def _write(response: requests.Response, url: str, part: Path, progress: Progress | None) -> None:
    resumed = response.status_code == 206
    done = _size(part) if resumed else 0
    length = response.headers.get("Content-Length")
    # a compressed transfer states the compressed length
    known = length is not None and not response.headers.get("Content-Encoding")
    total = done + int(length) if known and length is not None else None
    _note_origin(url, part, response.headers)
    reported = 0.0
    with part.open("ab" if resumed else "wb") as file:
        for chunk in response.iter_content(CHUNK):
            file.write(chunk)
            done += len(chunk)
            if progress is not None and time.monotonic() - reported >= _REPORT_SECONDS:
                progress(done, total)
                reported = time.monotonic()
    if total is not None and done != total:
        raise _InterruptedDownloadError(f"{url}: the connection ended early ({done} of {total} bytes arrived)")
    if progress is not None:
        progress(done, total)


def discard(part: Path) -> None:
    """Delete a partial file and the note on where it came from."""
    part.unlink(missing_ok=True)
    _origin_path(part).unlink(missing_ok=True)


def _origin_path(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _note_origin(url: str, part: Path, headers: Mapping[str, str]) -> None:
    tag = headers.get("ETag") or headers.get("Last-Modified")
    _origin_path(part).write_text(json.dumps({"url": url, "validator": tag}), encoding="utf-8")


def _resume_headers(url: str, part: Path) -> dict[str, str]:
    """Ask for the rest only if the partial file is from the same address and the server can tell a changed file."""
    headers = {"Accept-Encoding": "identity"}
    try:
        origin = json.loads(_origin_path(part).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return headers
    validator = origin.get("validator")
    if origin.get("url") != url or not validator or str(validator).startswith("W/") or not _size(part):
        return headers
    return {**headers, "Range": f"bytes={_size(part)}-", "If-Range": str(validator)}


def _stated_sha256(response: requests.Response) -> str | None:
    for answer in (*response.history, response):
        tag = str(answer.headers.get("X-Linked-Etag", "")).strip('"').lower()
        if len(tag) == 64 and all(character in "0123456789abcdef" for character in tag):
            return tag
    return None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _cause(error: BaseException) -> str:
    """The innermost reason, which is what a person can act on."""
    reason: object = error
    while isinstance(reason, BaseException) and reason.args and isinstance(reason.args[0], BaseException):
        reason = reason.args[0]
    inner = getattr(reason, "reason", reason)
    return str(inner).rsplit(": ", 1)[-1] or type(error).__name__
