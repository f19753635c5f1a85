"""A store on an object address such as `s3://bucket/prefix`, through fsspec.

Every artefact is one object, a fitted method too (a tar archive), and an object is put as a whole: a reader sees all
of it or nothing, and of two writers the later one wins. Keys say what an object was computed from, so both wrote the
same result. Locks hold between processes of one machine; between machines nothing waits, at worst two of them compute
the same thing.

What belongs to a machine (locks, digests of raw files, timings, unfinished trainings) lies in a folder of the user's
cache.
"""

from __future__ import annotations

import contextlib
import io
import platform
import shutil
import tarfile
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmad_cli.errors import StoreError, UsageError
from mmad_cli.store.keys import digest_bytes
from mmad_cli.store.store import (
    Artefact,
    CorruptArtefactError,
    Problem,
    Store,
    Usage,
    default_root,
    digest_file,
    parse_record,
    parse_tensors,
    record_bytes,
    user_cache,
)

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

# Stores that put an object as a whole; others would show half-written files
PROTOCOLS = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "memory")
_FOLDER = ".tar"
_MANIFEST = "manifest.json"
# Fitted methods that stay unpacked on this machine, by place
_UNPACKED: OrderedDict[str, tempfile.TemporaryDirectory[str]] = OrderedDict()
_UNPACKED_AT_MOST = 4


def open_store(address: str | Path | None = None) -> Store:
    """The store at a folder or at an address such as `s3://bucket/prefix`; None: `$MMAD_STORE` or the user's cache.

    Raises UsageError for an address of a kind that is not known or cannot be used, naming --store.
    """
    chosen = str(default_root() if address is None else address)
    protocol, separator, rest = chosen.partition("://")
    if not separator:
        return Store(chosen)
    if protocol in ("file", "local"):
        return Store(rest)
    return ObjectStore(chosen)


class ObjectStore(Store):
    """Artefacts as objects below an address."""

    def __init__(self, address: str) -> None:
        protocol, _, rest = address.partition("://")
        self._address = f"{protocol}://{rest.strip('/')}"
        self._system, self._prefix = _open(self._address)
        super().__init__(user_cache() / "remote" / digest_bytes(self._address.encode())[:16])

    @property
    def address(self) -> str:
        """The address that it was opened with."""
        return self._address

    def place(self, name: str) -> str:
        """The address of an object."""
        return f"{self._address}/{name}"

    def _full(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def _exists(self, name: str) -> bool:
        with self._translated(name):
            return bool(self._system.isfile(self._full(name)))

    def _read(self, name: str) -> bytes:
        with self._translated(name):
            return bytes(self._system.cat_file(self._full(name)))

    def _read_start(self, name: str, count: int) -> tuple[bytes, int]:
        with self._translated(name):
            size = int(self._system.info(self._full(name))["size"])
            return bytes(self._system.cat_file(self._full(name), start=0, end=min(count, size))), size

    def _write(self, name: str, data: bytes) -> None:
        try:
            with self._translated(name):
                self._system.pipe_file(self._full(name), data)
        except FileNotFoundError as error:
            raise StoreError(f"{self.place(name)}: cannot be written ({error}); does the bucket exist?") from error

    def _remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._translated(name):
            self._system.rm_file(self._full(name))

    def remove(self, artefact: Artefact) -> None:
        """Forget a stored result of any kind."""
        for suffix in (".safetensors", ".json", _FOLDER):
            self._remove(self._name(artefact, suffix))

    # -- a fitted method: one archive ------------------------------------------------------------------------

    def has_folder(self, artefact: Artefact) -> bool:
        """Whether the fitted method is there."""
        return self._exists(self._name(artefact, _FOLDER))

    def read_folder(self, artefact: Artefact) -> tuple[Path, dict[str, Any]]:
        """Fetch, unpack and verify; the folder stays until some others were read."""
        name = self._name(artefact, _FOLDER)
        data = self._read(name)
        place = self.place(name)
        _, manifest = _read_archive(place, data)
        unpacked = tempfile.TemporaryDirectory(prefix="mmad-", ignore_cleanup_errors=True)
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            archive.extractall(unpacked.name, filter="data")
        _UNPACKED[unpacked.name] = unpacked
        while len(_UNPACKED) > _UNPACKED_AT_MOST:
            _UNPACKED.popitem(last=False)[1].cleanup()
        return Path(unpacked.name), dict(manifest["info"])

    @contextlib.contextmanager
    def write_folder(self, artefact: Artefact, info: dict[str, Any]) -> Iterator[Path]:
        """A folder to fill; on leaving it becomes one archive with a manifest. `info` may be filled."""
        with tempfile.TemporaryDirectory(prefix="mmad-") as temporary:
            folder = Path(temporary)
            yield folder
            names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
            files = {name: digest_file(folder / name) for name in names}
            (folder / _MANIFEST).write_bytes(record_bytes({"files": files, "info": info}))
            packed = io.BytesIO()
            with tarfile.open(fileobj=packed, mode="w") as archive:
                for name in (*names, _MANIFEST):
                    archive.add(folder / name, arcname=name)
            self._write(self._name(artefact, _FOLDER), packed.getvalue())

    def write_run(self, run_id: str, record: Mapping[str, Any]) -> None:
        """Record where a run lies and which artefacts it needs; the folder is one of this machine."""
        super().write_run(run_id, {**record, "machine": platform.node()})

    # -- housekeeping ----------------------------------------------------------------------------------------

    def usage(self) -> list[Usage]:
        """Objects and bytes per stage and category."""
        found: dict[tuple[str, str], list[int]] = {}
        for name, size in self._objects().items():
            parts = name.split("/")
            if len(parts) >= 3 and parts[0] != "manifests":
                counts = found.setdefault((parts[0], parts[1]), [0, 0])
                counts[0] += 1
                counts[1] += size
        return [Usage(stage, category, files, size) for (stage, category), (files, size) in sorted(found.items())]

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[Problem]:
        """Read every object and compare with its digest."""
        names = list(self._objects())
        problems = []
        for done, name in enumerate(names, start=1):
            try:
                self._verify(name)
            except (CorruptArtefactError, FileNotFoundError) as error:
                problems.append(Problem(self.place(name), str(error)))
            if progress is not None:
                progress(done, len(names))
        return problems

    def _verify(self, name: str) -> None:
        data, place = self._read(name), self.place(name)
        if name.endswith(".safetensors"):
            parse_tensors(place, data)
        elif name.endswith(_FOLDER):
            _read_archive(place, data)
        else:
            parse_record(place, data)

    def prune(self, dry_run: bool = False) -> tuple[list[Path | str], int]:
        """Remove what no run needs; runs of other machines are kept, since their folders cannot be seen from here."""
        objects = self._objects()
        needed: set[str] = set()
        removable: list[str] = []
        for name in (name for name in objects if name.startswith("runs/")):
            try:
                record = parse_record(self.place(name), self._read(name))
            except CorruptArtefactError:
                removable.append(name)
                continue
            if record["machine"] != platform.node() or Path(record["folder"]).is_dir():
                needed.update(record["keys"])
            else:
                removable.append(name)
        for name in objects:
            parts = name.split("/")
            if len(parts) >= 3 and not self._keys(parts[0], name) & needed:
                removable.append(name)
        size = sum(objects[name] for name in removable)
        if not dry_run:
            for name in removable:
                self._remove(name)
            shutil.rmtree(self.root / "work", ignore_errors=True)
        return [self.place(name) for name in removable], size

    def _keys(self, stage: str, name: str) -> set[str]:
        if stage != "manifests":
            return {name.split("/")[2].split(".")[0]}
        try:
            record = parse_record(self.place(name), self._read(name))
        except (CorruptArtefactError, FileNotFoundError):
            return set()
        return {sample["key"] for sample in record["samples"].values()}

    def _objects(self) -> dict[str, int]:
        """Size of every object by name."""
        with self._translated(""):
            try:
                found = self._system.find(self._prefix, detail=True)
            except FileNotFoundError:
                return {}
        return {path[len(self._prefix) + 1 :]: int(entry["size"]) for path, entry in sorted(found.items())}

    @contextlib.contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, StoreError):
            raise
        except Exception as error:
            raise StoreError(
                f"{self.place(name)}: cannot be reached ({type(error).__name__}: {error}); check the address, the "
                "network and the credentials of --store. What is stored already is kept."
            ) from error


def _open(address: str) -> tuple[AbstractFileSystem, str]:
    protocol = address.partition("://")[0]
    if protocol not in PROTOCOLS:
        raise UsageError(
            f"--store {address}: {protocol}:// is not supported; name a folder, or an address that begins with "
            f"{', '.join(f'{name}://' for name in PROTOCOLS if name != 'memory')}"
        )
    try:
        from fsspec.core import url_to_fs

        # what another process writes must be seen at once
        files, prefix = url_to_fs(address, use_listings_cache=False)
    except ImportError as error:
        raise UsageError(
            f"--store {address}: needs a package that is not installed ({error}); "
            "pip install 'mmad-cli[objects]' brings fsspec and s3fs"
        ) from error
    except (ValueError, OSError) as error:
        raise UsageError(f"--store {address}: cannot be opened ({error})") from error
    if not prefix.strip("/"):
        raise UsageError(f"--store {address}: name a bucket, such as {protocol}://bucket/prefix")
    return files, prefix.rstrip("/")


def _read_archive(place: str, data: bytes) -> tuple[list[str], dict[str, Any]]:
    """Names and manifest of a verified archive. Raises CorruptArtefactError naming `place`."""
    import hashlib

    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            content = {
                member.name: file.read() for member in archive if (file := archive.extractfile(member)) is not None
            }
        manifest = parse_record(place, content.pop(_MANIFEST))
    except (tarfile.TarError, KeyError, EOFError) as error:
        raise CorruptArtefactError(f"{place}: damaged (not a readable archive: {error})") from error
    found = {name: hashlib.blake2b(part, digest_size=20).hexdigest() for name, part in content.items()}
    if found != manifest["files"]:
        raise CorruptArtefactError(f"{place}: damaged (its content does not match the recorded digests)")
    return sorted(found), manifest
