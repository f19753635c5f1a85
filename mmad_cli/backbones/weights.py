"""The registry of pretrained weights: what is known, what is here, how it gets here, and whether it is intact.

Weights live under `$MMAD_WEIGHTS` (default: the user data folder), one folder per name with the tensors as
safetensors and a `record.json` that says where they came from. Nothing is ever downloaded but by `fetch`, and
nothing in a weights file is ever executed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmad_cli.backbones.builtin import is_builtin
from mmad_cli.errors import WeightsError

if TYPE_CHECKING:
    from mmad_cli.backbones._checkpoints import FittedTensors
    from mmad_cli.backbones._download import Progress

Kind = Literal["timm", "point_mae", "point_bert", "m3dm_uff", "builtin_rgb", "builtin_points"]
State = Literal["ready", "missing", "damaged"]

ENVIRONMENT_VARIABLE = "MMAD_WEIGHTS"
RECORD_FILE = "record.json"
_PASSING = ".new-"
_HUB = "https://huggingface.co/{}/resolve/main/model.safetensors"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# torch.hub's convention: the file name ends in the first digits of its SHA-256
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.(?:pth|pt|safetensors)$")


@dataclass(frozen=True)
class WeightsFile:
    """One published file. `sha256` is the whole digest or its first digits, None where none is published."""

    url: str
    filename: str
    sha256: str | None = None


@dataclass(frozen=True)
class WeightsEntry:
    """What the registry knows of a name. Without files it can only be imported; `page` says where to get it."""

    name: str
    kind: Kind
    files: tuple[WeightsFile, ...]
    licence: str
    description: str
    page: str = ""


class WeightsRecord(BaseModel):
    """Weights that are here. `sha256` is of the file as published or imported, `stored_sha256` of what is kept.

    `official` is false for weights that are not known to be the published ones; results made with them are not
    comparable with print. `outputs` is the last feature output that a partial file reaches, None for a whole one.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    kind: Kind
    file: str
    bytes: int
    sha256: str
    stored_sha256: str
    source: str
    official: bool
    imported_from: str | None
    tensors: int
    outputs: int | None
    created: str
    folder: Path = Field(exclude=True)

    @property
    def path(self) -> Path:
        """The safetensors file."""
        return self.folder / self.file


@dataclass(frozen=True)
class WeightsStatus:
    """One line of `mmad weights list`: `problem` says what is wrong when `state` is damaged."""

    name: str
    kind: Kind
    state: State
    description: str
    licence: str
    folder: Path
    record: WeightsRecord | None = None
    problem: str | None = None


def weights_root() -> Path:
    """`$MMAD_WEIGHTS`, or `mmad/weights` in the user data folder."""
    configured = os.environ.get(ENVIRONMENT_VARIABLE)
    if configured:
        return Path(configured).expanduser()
    from platformdirs import user_data_path

    return user_data_path("mmad", appauthor=False) / "weights"


def known_names() -> list[str]:
    """Names in the registry's own table; any other timm name with a tag works too."""
    return list(_KNOWN)


def entry(name: str) -> WeightsEntry:
    """What is known of `name`: the table, or timm's own list. UsageError for a name that does not exist."""
    return _KNOWN.get(name) or _timm_entry(name)


def list_weights() -> list[WeightsStatus]:
    """Every known name and every name that is here, with its state (sizes checked, digests not)."""
    return [_status(name) for name in _all_names()]


def verify(name: str | None = None) -> list[WeightsStatus]:
    """State with every digest computed afresh; all weights that are here, or one name."""
    if name is not None:
        return [_status(name, digests=True)]
    here = (n for n in _all_names() if is_builtin(n) or _folder(n).joinpath(RECORD_FILE).exists())
    return [_status(n, digests=True) for n in here]


def resolve(name: str) -> WeightsRecord:
    """The weights called `name`. Raises WeightsError, which says how to get them, when missing or damaged.

    A published file put by hand into the folder of the name is imported on the way.
    """
    folder = _folder(name)
    if not (folder / RECORD_FILE).exists():
        if is_builtin(name):
            return _shipped(name)
        found = next((folder / f.filename for f in entry(name).files if (folder / f.filename).is_file()), None)
        if found is None:
            raise _missing(entry(name))
        return import_file(name, found)
    return _checked_record(name)


def fetch(
    name: str,
    progress: bool | Progress = True,
    urls: Sequence[str] | None = None,
    force: bool = False,
) -> WeightsRecord:
    """Download, check and keep weights; what is here and intact is not downloaded again unless `force`.

    progress: a bar on stderr, none, or a callable (bytes done, bytes in all or None). urls: other addresses of the
    file, tried in order; such weights count as official only if their digest is the published one. An interrupted
    download goes on where it stopped when the server allows it. Raises WeightsError on any failure; what was here
    before stays.
    """
    if not force and _status(name, digests=True).state == "ready":
        return _checked_record(name)
    known = entry(name)
    files = known.files if urls is None else tuple(_published(known, url) for url in urls)
    if not files:
        raise _missing(known)
    with _locked(name) as folder, _progress_callback(name, progress) as callback:
        failures = []
        for file in files:
            try:
                return _fetch_file(known, file, folder, callback, trusted=urls is None)
            except _FetchError as error:
                failures.append(str(error))
    raise WeightsError(f"{name}: download failed\n  " + "\n  ".join(failures) + "\n" + _how_to_get(known))


def import_file(name: str, path: Path | str) -> WeightsRecord:
    """Check a local file against the architecture of `name` and keep its tensors.

    Raises WeightsError for a file that cannot be read safely or does not fit; it names the tensors. The weights
    count as official only if the file's digest is the published one.
    """
    known = entry(name)
    path = Path(path).expanduser()
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; mmad weights import {name} FILE needs a safetensors or .pth file")
    with _locked(name):
        digest = _sha256(path)
        return _install(
            known,
            path,
            digest,
            source=f"file:{path.name}",
            official=_is_published(known, digest),
            imported_from=path.name,
        )


class _FetchError(Exception):
    """One address that did not give good weights; the next one is tried."""


def _fetch_file(
    known: WeightsEntry, file: WeightsFile, folder: Path, progress: Progress | None, trusted: bool
) -> WeightsRecord:
    from mmad_cli.backbones._download import DownloadError, download

    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=_PASSING) as temporary:
            path = Path(temporary) / file.filename
            digest = download(file.url, path, folder / f"{file.filename}.part", file.sha256, progress)
            official = trusted or _is_published(known, digest)
            return _install(known, path, digest, source=file.url, official=official, imported_from=None)
    except (DownloadError, WeightsError) as error:
        raise _FetchError(str(error).replace(str(path), file.url)) from error
    except OSError as error:
        raise _FetchError(f"{folder}: cannot be written ({error.strerror or error})") from error


def _install(
    known: WeightsEntry, path: Path, digest: str, *, source: str, official: bool, imported_from: str | None
) -> WeightsRecord:
    """Convert to safetensors beside the final place, then switch the record over to it."""
    from safetensors.torch import save_file

    from mmad_cli.backbones._checkpoints import network_tensors, read_checkpoint

    folder = _folder(known.name)
    checkpoint = read_checkpoint(path)
    fitted = _fit(known, network_tensors(checkpoint, path), path)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=_PASSING) as temporary:
            new = Path(temporary) / "weights.safetensors"
            if checkpoint.format == "safetensors" and checkpoint.content.keys() == fitted.tensors.keys():
                shutil.copyfile(path, new)
            else:
                # clones, because safetensors refuses tensors that share memory
                save_file({key: value.clone() for key, value in fitted.tensors.items()}, new)
            stored = _sha256(new)
            record = WeightsRecord(
                name=known.name,
                kind=known.kind,
                file=f"{stored[:16]}.safetensors",
                bytes=new.stat().st_size,
                sha256=digest,
                stored_sha256=stored,
                source=source,
                official=official,
                imported_from=imported_from,
                tensors=len(fitted.tensors),
                outputs=fitted.outputs,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                folder=folder,
            )
            new_record = Path(temporary) / RECORD_FILE
            new_record.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
            _replace(new, record.path)
            _replace(new_record, folder / RECORD_FILE)
    except OSError as error:
        raise WeightsError(f"{folder}: cannot be written ({error.strerror or error})") from error
    for other in folder.glob("*.safetensors"):
        # only files that an earlier record pointed to; what a person put here stays
        if other != record.path and re.fullmatch(r"[0-9a-f]{16}\.safetensors", other.name):
            other.unlink(missing_ok=True)
    return record


def _shipped(name: str, digests: bool = False) -> WeightsRecord:
    """The weights that the package carries under this name."""
    from mmad_cli.backbones.builtin import HERE, card

    known, facts = entry(name), card()["networks"][name]
    path = HERE / facts["file"]
    size = path.stat().st_size if path.is_file() else 0
    if size != facts["bytes"] or (digests and _sha256(path) != facts["sha256"]):
        raise WeightsError(f"{name}: {path} is missing or damaged; install mmad-cli again")
    return WeightsRecord(
        name=name,
        kind=known.kind,
        file=facts["file"],
        bytes=facts["bytes"],
        sha256=facts["sha256"],
        stored_sha256=facts["sha256"],
        source=f"package:{facts['file']}",
        official=False,
        imported_from=None,
        tensors=facts["tensors"],
        outputs=None,
        created=facts["created"],
        folder=HERE,
    )


def _fit(known: WeightsEntry, tensors: dict[str, Any], path: Path) -> FittedTensors:
    from mmad_cli.backbones._checkpoints import fit_timm
    from mmad_cli.backbones._point_checkpoints import fit_builtin, fit_point, fit_uff

    if known.kind == "timm":
        return fit_timm(known.name, tensors, path)
    if known.kind == "m3dm_uff":
        return fit_uff(tensors, path)
    if known.kind == "builtin_rgb" or known.kind == "builtin_points":
        return fit_builtin(known.kind, tensors, path)
    return fit_point(known.kind, tensors, path)


def _replace(new: Path, final: Path) -> None:
    with new.open("rb") as file:
        os.fsync(file.fileno())
    new.replace(final)


def _status(name: str, digests: bool = False) -> WeightsStatus:
    folder = _folder(name)
    if is_builtin(name) and not (folder / RECORD_FILE).exists():
        return _shipped_status(name, digests)
    if not (folder / RECORD_FILE).exists():
        known = entry(name)
        return WeightsStatus(name, known.kind, "missing", known.description, known.licence, folder)
    known_entry = _KNOWN.get(name)
    description = known_entry.description if known_entry else "timm model"
    licence = known_entry.licence if known_entry else ""
    kind: Kind = known_entry.kind if known_entry else "timm"
    try:
        record = _checked_record(name, digests)
    except WeightsError as error:
        return WeightsStatus(name, kind, "damaged", description, licence, folder, problem=str(error))
    return WeightsStatus(name, record.kind, "ready", description, licence, folder, record)


def _shipped_status(name: str, digests: bool) -> WeightsStatus:
    from mmad_cli.backbones.builtin import HERE

    known = entry(name)
    try:
        record = _shipped(name, digests)
    except WeightsError as error:
        return WeightsStatus(name, known.kind, "damaged", known.description, known.licence, HERE, problem=str(error))
    return WeightsStatus(name, known.kind, "ready", known.description, known.licence, HERE, record)


def _checked_record(name: str, digests: bool = False) -> WeightsRecord:
    folder = _folder(name)
    again = f"run: mmad weights fetch {name} (or mmad weights import {name} FILE)"
    try:
        text = (folder / RECORD_FILE).read_text(encoding="utf-8")
        record = WeightsRecord.model_validate({**_json_object(text), "folder": folder})
    except (OSError, ValueError) as error:
        reason = "not a valid record" if isinstance(error, ValidationError) else str(error)
        raise WeightsError(f"{name}: {folder / RECORD_FILE} cannot be read ({reason}); {again}") from error
    if not record.path.is_file():
        raise WeightsError(f"{name}: {record.path} is gone; {again}")
    size = record.path.stat().st_size
    if size != record.bytes:
        raise WeightsError(f"{name}: {record.path} has {size} bytes instead of {record.bytes}; {again}")
    if digests and _sha256(record.path) != record.stored_sha256:
        raise WeightsError(f"{name}: {record.path} has changed since it was stored (other SHA-256); {again}")
    return record


def _json_object(text: str) -> dict[str, Any]:
    import json

    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _missing(known: WeightsEntry) -> WeightsError:
    return WeightsError(f"{known.name}: pretrained weights are missing ({known.description})\n" + _how_to_get(known))


def _how_to_get(known: WeightsEntry) -> str:
    lines = [f"  file:    {file.filename}\n  address: {file.url}" for file in known.files[:1]]
    if known.page:
        lines.append(f"  page:    {known.page}")
    if known.files:
        lines.append(f"  fetch it:           mmad weights fetch {known.name}")
    lines.append(f"  or, from a file:    mmad weights import {known.name} FILE")
    if known.files:
        lines.append(f"  or put the file in: {_folder(known.name)}")
    if not is_builtin(known.name):
        lines.append(
            "  or do without it:   --backbones builtin (small networks that come with mmad; not for comparison)"
        )
    return "\n".join(lines)


def _folder(name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise WeightsError(f"weights: {name!r} is not a name of weights (letters, digits, '.', '_' and '-')")
    return weights_root() / name


def _all_names() -> list[str]:
    root = weights_root()
    here = sorted(path.parent.name for path in root.glob(f"*/{RECORD_FILE}")) if root.is_dir() else []
    return [*_KNOWN, *(name for name in here if name not in _KNOWN)]


@contextlib.contextmanager
def _locked(name: str) -> Iterator[Path]:
    from filelock import FileLock

    folder = _folder(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire()
    except OSError as error:
        raise WeightsError(
            f"{folder}: cannot be written ({error.strerror or error}); set {ENVIRONMENT_VARIABLE} to another folder"
        ) from error
    try:
        # what a killed process was at; nobody else is in here now
        for left in folder.glob(f"{_PASSING}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield folder
    finally:
        lock.release()


@contextlib.contextmanager
def _progress_callback(name: str, progress: bool | Progress) -> Iterator[Progress | None]:
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error})") from error


def _is_published(known: WeightsEntry, digest: str) -> bool:
    return any(file.sha256 is not None and digest.startswith(file.sha256) for file in known.files)


def _published(known: WeightsEntry, url: str) -> WeightsFile:
    """The file at another address; under a published name it has to be the published file."""
    filename = PurePosixPath(urlsplit(url).path).name or "weights"
    same = next((file for file in known.files if file.filename == filename), None)
    return WeightsFile(url, filename, same.sha256 if same else None)


def _file(url: str, sha256: str | None = None) -> WeightsFile:
    filename = PurePosixPath(urlsplit(url).path).name
    match = _HASH_IN_NAME.search(filename)
    return WeightsFile(url, filename, sha256 or (match.group(1) if match else None))


def _timm_files(hub_id: str | None, url: str | None) -> tuple[WeightsFile, ...]:
    """Files whose digest is published first, so that what is fetched can be checked against print."""
    files = [_file(_HUB.format(hub_id))] if hub_id else []
    if url and not url.endswith(".npz"):
        files.append(_file(url))
    return tuple(sorted(files, key=lambda file: file.sha256 is None))


@functools.cache
def _timm_entry(name: str) -> WeightsEntry:
    from mmad_cli.backbones._checkpoints import check_timm_name
    from mmad_cli.backbones._timm import import_timm

    check_timm_name(name)
    config = import_timm().get_pretrained_cfg(name)
    files = _timm_files(config.hf_hub_id, config.url)
    return WeightsEntry(name, "timm", files, config.license or "see the model's page", "timm model")


def _timm(name: str, licence: str, description: str, url: str | None = None) -> WeightsEntry:
    return WeightsEntry(name, "timm", _timm_files(f"timm/{name}", url), licence, description)


_TORCH = "https://download.pytorch.org/models/"
_DINO = "https://dl.fbaipublicfiles.com/dino/"

_KNOWN: dict[str, WeightsEntry] = {
    known.name: known
    for known in (
        _timm(
            "wide_resnet50_2.racm_in1k",
            "apache-2.0",
            "Wide ResNet-50-2, timm's training; BTF",
            "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-weights/"
            "wide_resnet50_racm-8234f177.pth",
        ),
        _timm(
            "wide_resnet50_2.tv_in1k",
            "bsd-3-clause",
            "Wide ResNet-50-2, torchvision's training; PatchCore",
            _TORCH + "wide_resnet50_2-95faca4d.pth",
        ),
        _timm(
            "resnet18.tv_in1k", "bsd-3-clause", "ResNet-18, torchvision's training", _TORCH + "resnet18-f37072fd.pth"
        ),
        _timm(
            "resnet50.tv_in1k", "bsd-3-clause", "ResNet-50, torchvision's training", _TORCH + "resnet50-0676ba61.pth"
        ),
        _timm(
            "vit_base_patch8_224.dino",
            "apache-2.0",
            "ViT-B/8, DINO; M3DM and its descendants",
            _DINO + "dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth",
        ),
        _timm(
            "vit_small_patch8_224.dino",
            "apache-2.0",
            "ViT-S/8, DINO",
            _DINO + "dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth",
        ),
        _timm("vit_base_patch8_224.augreg_in21k_ft_in1k", "apache-2.0", "ViT-B/8, ImageNet-21k then ImageNet-1k"),
        _timm("vit_base_patch8_224.augreg_in21k", "apache-2.0", "ViT-B/8, ImageNet-21k"),
        _timm(
            "vit_base_patch14_dinov2.lvd142m",
            "apache-2.0",
            "ViT-B/14, DINOv2",
            "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
        ),
        _timm(
            "vit_small_patch14_dinov2.lvd142m",
            "apache-2.0",
            "ViT-S/14, DINOv2",
            "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
        ),
        _timm("vit_base_patch16_dinov3.lvd1689m", "dinov3-license", "ViT-B/16, DINOv3"),
        _timm("vit_small_patch16_dinov3.lvd1689m", "dinov3-license", "ViT-S/16, DINOv3"),
        WeightsEntry(
            "point_mae",
            "point_mae",
            (
                _file(
                    "https://github.com/Pang-Yatian/Point-MAE/releases/download/main/pretrain.pth",
                    "27ded932bb0a2625d5a8eb006df199b2578598c774aee6d86b985300b6a5fd20",
                ),
            ),
            "see github.com/Pang-Yatian/Point-MAE",
            "Point-MAE, ShapeNet pre-training; M3DM and its descendants",
        ),
        WeightsEntry(
            "point_bert",
            "point_bert",
            (WeightsFile("https://cloud.tsinghua.edu.cn/f/202b29805eea45d7be92/?dl=1", "Point-BERT.pth"),),
            "see github.com/lulutang0608/Point-BERT",
            "Point-BERT, ShapeNet pre-training",
        ),
        WeightsEntry(
            "builtin_rgb", "builtin_rgb", (), "apache-2.0", "built-in RGB network; comes with mmad, --backbones builtin"
        ),
        WeightsEntry(
            "builtin_points",
            "builtin_points",
            (),
            "apache-2.0",
            "built-in point network; comes with mmad, --backbones builtin",
        ),
        WeightsEntry(
            "m3dm_uff",
            "m3dm_uff",
            (),
            "see github.com/nomewang/M3DM",
            "M3DM's unsupervised feature fusion block",
            page="https://github.com/nomewang/M3DM (the drive link in its README)",
        ),
    )
}
