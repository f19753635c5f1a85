"""`mmad doctor`: what this machine has, and what to install for what is missing."""

from __future__ import annotations

import ctypes.util
import importlib
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from mmad_cli._version import __version__
from mmad_cli.cli.console import print_err, print_json, print_rich
from mmad_cli.cli.options import Json, StoreOption

if TYPE_CHECKING:
    from mmad_cli.store import Store

INCOMPLETE = 3

# Shared library -> Debian package; Open3D's wheel loads them
_SYSTEM_LIBRARIES = {
    "usb-1.0": "libusb-1.0-0",
    "GL": "libgl1",
    "gomp": "libgomp1",
    "EGL": "libegl1",
    "X11": "libx11-6",
}
_PACKAGES = (
    ("torch", "torch"),
    ("timm", "timm"),
    ("faiss", "faiss-gpu (faiss-cpu where that does not exist)"),
    ("open3d", "open3d"),
    ("numpy", "numpy"),
    ("scipy", "scipy"),
    ("sklearn", "scikit-learn"),
    ("skimage", "scikit-image"),
    ("kornia", "kornia"),
    ("pandas", "pandas"),
    ("tifffile", "tifffile"),
    ("safetensors", "safetensors"),
)


@dataclass(frozen=True)
class Check:
    """One thing looked at: what was found, whether it will do, and what to do otherwise."""

    name: str
    found: str
    ok: bool
    advice: str = ""


def doctor(store: StoreOption = None, json: Json = False) -> int:
    """Look at versions, device, FAISS, system libraries, store and weights; say what to install.

    Example: mmad doctor
    """

    checks = [
        Check("mmad", __version__, True),
        Check("python", platform.python_version(), sys.version_info >= (3, 11), "install Python 3.11 or later"),
        *_system_libraries(),
        *_packages(),
        *_devices(),
        _store(store),
        *_weights(),
    ]
    if json:
        print_json([asdict(check) for check in checks])
    else:
        from rich.markup import escape
        from rich.table import Table

        table = Table()
        for column in ("what", "found", "", "to do"):
            table.add_column(column, overflow="fold")
        for check in checks:
            table.add_row(
                escape(check.name),
                escape(check.found),
                "ok" if check.ok else "MISSING",
                "" if check.ok else check.advice,
            )
        print_rich(table)
    wrong = [check for check in checks if not check.ok]
    if wrong and not json:
        print_err(f"{len(wrong)} to mend")
    return INCOMPLETE if wrong else 0


def _system_libraries() -> list[Check]:
    if platform.system() != "Linux":
        return []
    return [
        Check(f"lib{name}", ctypes.util.find_library(name) or "not found", _loads(name), f"apt-get install {package}")
        for name, package in _SYSTEM_LIBRARIES.items()
    ]


def _loads(name: str) -> bool:
    found = ctypes.util.find_library(name)
    if found is None:
        return False
    try:
        ctypes.CDLL(found)
    except OSError:
        return False
    return True


def _packages() -> list[Check]:
    from mmad_cli.backbones._timm import torchvision_state
    from mmad_cli.store import library_version

    checks = []
    for module, package in _PACKAGES:
        try:
            if module == "timm":
                from mmad_cli.backbones._timm import import_timm

                import_timm()
            else:
                importlib.import_module(module)
            version = library_version({"sklearn": "scikit-learn", "skimage": "scikit-image"}.get(module, module))
            checks.append(Check(module, version or "installed", True))
        except (ImportError, OSError, RuntimeError) as error:
            checks.append(Check(module, f"{type(error).__name__}: {error}", False, f"pip install {package}"))
    state = torchvision_state()
    return [*checks, Check("torchvision", state, state != "missing", "pip install torchvision")]


def _devices() -> list[Check]:
    try:
        import torch
    except (ImportError, OSError):
        return []
    cuda = torch.cuda.is_available()
    checks = [
        Check("cuda", torch.cuda.get_device_name() if cuda else "no CUDA device: everything runs on the CPU", True)
    ]
    try:
        from mmad_cli.memory.search import import_faiss

        faiss = import_faiss()
    except (ImportError, OSError):
        return checks
    gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    return [*checks, Check("faiss device", f"{gpus} GPU" if gpus else "CPU", True)]


def _store(store: str | None) -> Check:
    import os

    from mmad_cli.store import open_store

    place = open_store(store)
    root = place.root
    if place.address != str(root):
        return _remote_store(place)
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    return Check(
        "store",
        f"{root}, {free / 1e9:.1f} GB free",
        os.access(existing, os.W_OK),
        "give write permission or choose another folder with --store or $MMAD_STORE",
    )


def _remote_store(store: Store) -> Check:
    from mmad_cli.errors import StoreError

    try:
        files = sum(line.files for line in store.usage())
    except StoreError as error:
        return Check("store", str(error), False, "choose another address with --store or $MMAD_STORE")
    return Check("store", f"{store.address}, {files} objects", True)


def _weights() -> list[Check]:
    from mmad_cli.backbones.weights import list_weights

    return [
        Check(
            f"weights {status.name}",
            status.problem or ("here" if status.state == "ready" else "not here (needed only by methods that use it)"),
            status.state != "damaged",
            f"mmad weights fetch {status.name}",
        )
        for status in list_weights()
    ]
