"""The machine that figures come from, and what it can do at best."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.turns import timed

LIBRARIES = ("torch", "numpy", "scipy", "scikit-learn", "open3d", "timm")


def description() -> dict[str, Any]:
    """Processor, cores, memory, versions, date."""
    from mmad_cli._version import __version__
    from mmad_cli.threads import available_cores

    return {
        "processor": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "vector_units": [flag for flag in ("avx2", "avx512f", "amx_tile") if flag in _field("/proc/cpuinfo", "flags")],
        "cores": available_cores(),
        "memory_gb": round(_memory() / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "libraries": {**{name: _version(name) for name in LIBRARIES}, "faiss": _faiss()},
        "mmad": __version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _field(file: str, name: str) -> str:
    """Value of the first line of a file under /proc that begins with a name; empty where there is none."""
    path = Path(file)
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _faiss() -> str:
    return next((f"{name} {found}" for name in ("faiss-gpu", "faiss-cpu") if (found := _version(name)) != "absent"), "")


class Others:
    """Share of the cores that other processes take while this process and those that it starts run, 0 to 1."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.busy, self.own = _busy_seconds(), _own_seconds()

    def share(self) -> float:
        """Since the beginning; processes that were started must have ended."""
        others = (_busy_seconds() - self.busy) - (_own_seconds() - self.own)
        return max(0.0, others / ((time.perf_counter() - self.began) * (os.cpu_count() or 1)))


def _busy_seconds() -> float:
    """CPU time of the whole machine but for waiting; 0 where the system does not tell."""
    if not Path("/proc/stat").is_file():
        return 0.0
    user, nice, system, _, _, interrupts, soft, stolen = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    return sum(os.times()[:4])


class Peaks(NamedTuple):
    """What the machine did at best: operations per second of a float32 product, bytes per second of a copy.

    bandwidth is that of an array in memory, on all cores; cached that of one of 1 MB, on one core.
    """

    flops: float
    bandwidth: float
    cached: float


def peaks(quick: bool = False) -> Peaks:
    """A product of two square float32 matrices; copies, which count as read and written."""
    import numpy as np
    import torch

    side, size, repeats = (1024, 1 << 26, 2) if quick else (4096, 1 << 30, 5)
    left, right = torch.rand(side, side), torch.rand(side, side)
    out = torch.mm(left, right)
    product = min(timed(lambda: torch.mm(left, right, out=out))[0] for _ in range(repeats))
    source = torch.ones(size // 4)
    target = torch.zeros(size // 4)
    copy = min(timed(lambda: target.copy_(source))[0] for _ in range(repeats))
    few, times = np.ones(1 << 18, np.float32), 200
    kept = np.zeros_like(few)
    cached = min(timed(lambda: [np.copyto(kept, few) for _ in range(times)])[0] for _ in range(repeats))
    return Peaks(2 * side**3 / product, 2 * size / copy, 2 * few.nbytes * times / cached)


class PeakMemory:
    """Resident memory that the process takes at its peak beyond what it holds when this begins, in bytes."""

    def __init__(self) -> None:
        # 5: begin anew with the largest resident size
        Path("/proc/self/clear_refs").write_text("5")
        self.before = _resident("VmRSS")

    def taken(self) -> int:
        return _resident("VmHWM") - self.before


def _resident(field: str) -> int:
    return int(_field("/proc/self/status", field).split()[0]) * 1024
