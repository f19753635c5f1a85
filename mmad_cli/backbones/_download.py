"""Download one file through pooch: resumable, checked before it gets its name, with errors that say what happened."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
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
_SHA256_DIGITS = 64


class DownloadError(Exception):
    """A download that gave no good file; the message is the address and the cause in one line."""


def download(url: str, path: Path, part: Path, sha256: str | None = None, progress: Progress | None = None) -> str:
    """Download `url` to `path`, which must not exist yet, and return the SHA-256 of the file.

    `sha256` is the digest the file must have or its first digits; with None, the digest that the server states is
    used (Hugging Face does, in `X-Linked-Etag`), if it states one. What has arrived of an unfinished file stays in
    `part`, in the same file system, for the next call. Raises DownloadError; then there is nothing at `path`.
    """
    import pooch

    downloader = ResumingDownloader(part, progress)
    # pooch compares whole digests; the first digits are left to us
    known_hash = sha256 if sha256 is not None and len(sha256) == _SHA256_DIGITS else None
    try:
        with _quiet(pooch.get_logger()):
            pooch.retrieve(url, known_hash, fname=path.name, path=path.parent, downloader=downloader)
        digest: str = pooch.file_hash(str(path))
    except (ValueError, OSError) as error:
        raise DownloadError(f"{url}: {error}") from error
    wanted = sha256 or downloader.stated_sha256
    if wanted is not None and not digest.startswith(wanted):
        path.unlink()
        raise DownloadError(f"{url}: wrong SHA-256, expected {wanted}, got {digest}; deleted")
    return digest


class ResumingDownloader:
    """A downloader for pooch that collects a file in `part` and goes on there after a break, now or in a later run.

    `stated_sha256` is the digest that the server stated for the file, if it did.
    """

    def __init__(self, part: Path, progress: Progress | None = None) -> None:
        self.part = part
        self.progress = progress
        self.stated_sha256: str | None = None

    def __call__(self, url: str, output_file: str, pooch: object) -> None:
        """Put the file at `url` in the place of `output_file`. Raises DownloadError."""
        interrupted: _InterruptedDownloadError | None = None
        for attempt in range(ATTEMPTS):
            time.sleep(0.5 * attempt)
            try:
                self.stated_sha256 = _download_once(url, self.part, self.progress)
            except _InterruptedDownloadError as error:
                interrupted = error
            else:
                self.part.replace(output_file)
                _origin_path(self.part).unlink(missing_ok=True)
                return
        raise DownloadError(str(interrupted)) from interrupted


class _InterruptedDownloadError(Exception):
    """The connection ended early; trying again makes sense."""


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Without pooch's lines on where it puts files: the place is a passing one."""
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


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
    except requests.ReadTimeout as error:
        raise _InterruptedDownloadError(f"{url}: no answer within {TIMEOUT[1]:.0f} s") from error
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
        for chunk in _chunks(response, url):
            file.write(chunk)
            done += len(chunk)
            if progress is not None and time.monotonic() - reported >= _REPORT_SECONDS:
                progress(done, total)
                reported = time.monotonic()
    if total is not None and done != total:
        raise _InterruptedDownloadError(f"{url}: the connection ended early ({done} of {total} bytes arrived)")
    if progress is not None:
        progress(done, total)


def _chunks(response: requests.Response, url: str) -> Iterator[bytes]:
    """What arrives; a connection that breaks off or stalls on the way is worth another try."""
    import requests

    try:
        yield from response.iter_content(CHUNK)
    except requests.RequestException as error:
        raise _InterruptedDownloadError(f"{url}: the connection ended early ({_cause(error)})") from error


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
