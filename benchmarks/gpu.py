"""What a GPU must show: the full-size bank, search, geometry, networks, agreement with the CPU, seconds per category.

    python -m benchmarks.gpu [--small] [--json FILE]

Ends with 2 without a GPU. `--small` runs the same code on the CPU with small inputs, which is no measurement. Built to
take less than four minutes on one GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmad_cli.alignment.grouping import (
    _farthest_points_torch,
    _neighbours_torch,
    farthest_points,
    group_neighbours,
)
from mmad_cli.alignment.interpolation import nearest_centres
from mmad_cli.backbones.builtin.rgb import RgbNetwork
from mmad_cli.memory import FlatIndex, greedy_coreset

from . import gpu_category as parts
from .bench_memory import low_rank_rows
from .gpu_category import FULL, SMALL, Row, Sizes

# of one category, in seconds: 765 184 x 334 rows, 76 518 picks
BAR = 10.0
CLOUDS = 16
# not called "cpu", so that everything takes the path of a GPU
STAND_IN = "cpu:0"


def timed_on(device: str) -> Callable[[Callable[[], Any]], tuple[float, Any]]:
    """A function that gives seconds and result of a call, with everything on the device finished."""

    def timed(call: Callable[[], Any]) -> tuple[float, Any]:
        begin = time.perf_counter()
        result = call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin, result

    return timed


def bandwidth(device: str, elements: int) -> float:
    """Bytes per second that a copy reads and writes."""
    timed = timed_on(device)
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    timed(lambda: target.copy_(source))
    return 8 * elements / min(timed(lambda: target.copy_(source))[0] for _ in range(3))


def bank(device: str, sizes: Sizes) -> Iterator[Row]:
    """The point bank of one category against its bar, then all banks of the published method."""
    rows, channels = sizes.rows, sizes.projected(sizes.rows, sizes.point_channels)
    table = torch.from_numpy(low_rank_rows(rows, channels)).to(device)
    greedy_coreset(table[:2000], 20, device=device)
    seconds, made = parts.selection_seconds(table, sizes.kept, device)
    # the usual loop reads every row once per pick
    floor = 4 * rows * channels * sizes.kept / bandwidth(device, min(rows * channels, 1 << 26))
    yield {
        "kind": "bank",
        "name": f"coreset {rows} x {channels}, {sizes.kept} picks",
        "seconds": seconds,
        "measured_picks": made,
        "bandwidth_floor_of_loop": floor,
    }
    yield from parts.selections(sizes, table, device)


def search(device: str, sizes: Sizes) -> Iterator[Row]:
    """One scan's patches against a full bank."""
    queries, rows, channels = sizes.point_patches, sizes.kept, sizes.point_channels
    table, some = low_rank_rows(rows, channels), low_rank_rows(queries, channels, seed=1)
    expected = FlatIndex(table).nearest(some, 1)[0]
    for backend in ("auto", "torch"):
        before = outside_of_torch(device)
        index = FlatIndex(table, device, backend)
        index.nearest(some[:8], 1)
        seconds, found = timed_on(device)(lambda index=index: index.nearest(some, 1))
        yield {
            "kind": "search",
            "name": f"nearest {queries} x {rows} x {channels} ({backend})",
            "seconds": seconds,
            "ran_on": index.device,
            "largest_difference_to_cpu": float(np.abs(found[0] - expected).max()),
            "bytes_outside_of_torch": outside_of_torch(device) - before,
        }


def geometry(device: str, sizes: Sizes) -> Iterator[Row]:
    """Centres, groups and interpolation of clouds: one at a time and many in one loop, against the CPU."""
    timed = timed_on(device)
    random = np.random.default_rng(0)
    clouds = [
        (random.normal(size=(sizes.points - 7 * number, 3)) * 0.1 + 0.5).astype(np.float32) for number in range(CLOUDS)
    ]
    cloud, count = clouds[0], sizes.groups
    _farthest_points_torch([cloud], 8, True, device, [0])
    single, (chosen,) = timed(lambda: _farthest_points_torch([cloud], count, True, device, [0]))
    batch, together = timed(lambda: _farthest_points_torch(clouds, count, True, device, [0] * CLOUDS))
    first, last = (farthest_points(clouds[number], count) for number in (0, -1))
    yield {
        "kind": "geometry",
        "name": f"{count} centres of {sizes.points} points",
        "seconds_of_one": single,
        "seconds_per_cloud_of_many": batch / CLOUDS,
        "same_as_cpu": all(
            np.array_equal(a, b) for a, b in ((chosen, first), (together[0], first), (together[-1], last))
        ),
    }
    centres = cloud[chosen]
    _neighbours_torch(cloud, centres, sizes.group_size, device)
    seconds, groups = timed(lambda: _neighbours_torch(cloud, centres, sizes.group_size, device))
    same = np.array_equal(groups, group_neighbours(cloud, centres, sizes.group_size))
    name = f"{sizes.group_size} of {sizes.points} points around {count} centres"
    yield {"kind": "geometry", "name": name, "seconds": seconds, "same_as_cpu": same}
    for form in ("direct", "expanded"):
        nearest_centres(cloud, centres, form, device=device)
        seconds, found = timed(lambda form=form: nearest_centres(cloud, centres, form, device=device))
        indices, weights = nearest_centres(cloud, centres, form)
        yield {
            "kind": "geometry",
            "name": f"interpolation of {sizes.points} points from {count} centres, {form}",
            "seconds": seconds,
            "same_as_cpu": np.array_equal(found[0], indices),
            "largest_relative_difference": parts.relative_difference(found[1], weights),
        }


def images(device: str, sizes: Sizes) -> Iterator[Row]:
    """The network alone, on images that are on the device: what extraction cannot exceed."""
    if sizes is SMALL:
        network, name, batch, repeats = RgbNetwork((1, 2)), "built-in network", 2, 1
    else:
        from mmad_cli.backbones._timm import import_timm

        network = import_timm().create_model(sizes.image_network, pretrained=False, num_classes=0)
        name, batch, repeats = "ViT-B/8", 32, 5
    for dtype in (torch.float32, torch.bfloat16):
        ready = network.to(device, dtype).eval()
        some = torch.rand(batch, 3, sizes.network_size, sizes.network_size, device=device, dtype=dtype)
        with torch.inference_mode():
            ready(some)
            seconds, _ = timed_on(device)(lambda ready=ready, some=some: [ready(some) for _ in range(repeats)])
        yield {
            "kind": "network",
            "name": f"{name} alone, {dtype}, batch {batch}",
            "images_per_second": batch * repeats / seconds,
        }


def outside_of_torch(device: str) -> int:
    """Bytes in use on the device that PyTorch does not hold: those of FAISS and of CUDA itself."""
    if device != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def with_peaks(rows: Iterable[Row], device: str) -> Iterator[Row]:
    """Rows with the peak of PyTorch's memory on the device since the row before, None on a CPU."""
    iterator = iter(rows)
    while True:
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        row = next(iterator, None)
        if row is None:
            return
        yield {**row, "peak_device_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None}


def all_rows(device: str, sizes: Sizes, folder: Path) -> Iterator[Row]:
    """Everything that is measured; the time that each part took goes to standard error."""
    timed = timed_on(device)
    parts.stand_ins(sizes, folder)
    steps: list[Callable[[], Iterable[Row]]] = [
        lambda: bank(device, sizes),
        lambda: search(device, sizes),
        lambda: geometry(device, sizes),
        lambda: images(device, sizes),
        lambda: parts.agreement(sizes, device),
        lambda: parts.extraction(sizes, device, timed),
        lambda: parts.scoring(sizes, device, timed),
    ]
    for step in steps:
        begin = time.perf_counter()
        kind = ""
        for row in with_peaks(step(), device):
            kind = row["kind"]
            yield row
        print(f"{kind}: {time.perf_counter() - begin:.1f} s", file=sys.stderr)


def line_of(row: Row) -> str:
    """A row as text."""
    shown = {key: value for key, value in row.items() if key not in ("kind", "what", "bank", "dtype", "precision")}
    peak = shown.pop("peak_device_bytes", None)
    if peak is not None:
        shown["peak_device_GB"] = peak / 1e9
    figures = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items())
    return "; ".join(figures).removeprefix("name ")


def main() -> int:
    """Measure, print, write; 1 when the bar is missed."""
    parser = argparse.ArgumentParser(description="Figures of a GPU.")
    parser.add_argument("--small", action="store_true", help="small inputs on the CPU: the code, not a measurement")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    arguments = parser.parse_args()
    small = arguments.small
    if not small and not torch.cuda.is_available():
        built = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        print(f"error: no GPU ({built}); on the CPU only `--small` runs, see `mmad doctor`", file=sys.stderr)
        return 2
    device, sizes = (STAND_IN, SMALL) if small else ("cuda", FULL)
    begin = time.perf_counter()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for row in all_rows(device, sizes, Path(folder)):
            print(line_of(row), flush=True)
            rows.append(row)
    categories = parts.per_category(sizes, rows)
    print("\nM3DM on MVTec 3D-AD, seconds, put together from the parts above:")
    print("\n".join(parts.category_table(categories)))
    print(parts.SCOPE)
    missed = not small and rows[0]["seconds"] > BAR
    print("small inputs, no measurement" if small else f"bar of {BAR:g} s for the bank {'MISSED' if missed else 'met'}")
    if arguments.json:
        name = "cpu" if small else torch.cuda.get_device_name()
        figures = {
            "device": name,
            "small": small,
            "seconds": time.perf_counter() - begin,
            "rows": [*rows, *categories],
            "scope": parts.SCOPE,
        }
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
