"""What a GPU must show: the full-size bank, search, sampling and grouping of points, images per second.

    python -m benchmarks.gpu [--small] [--json FILE]

Ends with 2 without a GPU. `--small` runs the same code on the CPU with small inputs, which is no measurement.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
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
from mmad_cli.backbones.builtin.rgb import RgbNetwork
from mmad_cli.memory import FlatIndex, greedy_coreset

from .bench_memory import low_rank_rows

# an M3DM bank of one category after the projection, and its bar in seconds
FULL = (765_184, 334, 76_518)
BAR = 10.0


def timed(call: Callable[[], object], device: str) -> tuple[float, Any]:
    """Seconds and result, with everything on the device finished."""
    begin = time.perf_counter()
    result = call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, result


def bandwidth(device: str, elements: int) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    timed(lambda: target.copy_(source), device)
    seconds = min(timed(lambda: target.copy_(source), device)[0] for _ in range(3))
    return 8 * elements / seconds


def bank(device: str, rows: int, channels: int, picks: int) -> dict[str, Any]:
    table = torch.from_numpy(low_rank_rows(rows, channels)).to(device)
    greedy_coreset(table[:2000], 20, device=device)
    seconds, _ = timed(lambda: greedy_coreset(table, picks, device=device), device)
    # the usual loop reads every row once per pick
    floor = 4 * rows * channels * picks / bandwidth(device, min(rows * channels, 1 << 26))
    return {"name": f"coreset {rows} x {channels}, {picks} picks", "seconds": seconds, "bandwidth_floor_of_loop": floor}


def search(device: str, queries: int, rows: int, channels: int) -> list[dict[str, Any]]:
    table, some = low_rank_rows(rows, channels), low_rank_rows(queries, channels, seed=1)
    expected = FlatIndex(table).nearest(some, 1)[0]
    results = []
    for backend in ("auto", "torch"):
        index = FlatIndex(table, device, backend)
        index.nearest(some[:8], 1)
        seconds, found = timed(lambda index=index: index.nearest(some, 1), device)
        results.append(
            {
                "name": f"nearest {queries} x {rows} x {channels} ({backend})",
                "seconds": seconds,
                "largest_difference_to_cpu": float(np.abs(found[0] - expected).max()),
            }
        )
    return results


def points(device: str, count: int, centres: int, size: int) -> dict[str, Any]:
    cloud = (np.random.default_rng(0).normal(size=(count, 3)) * 0.1 + 0.5).astype(np.float32)
    _farthest_points_torch([cloud], 8, True, device, [0])
    sampling, chosen = timed(lambda: _farthest_points_torch([cloud], centres, True, device, [0])[0], device)
    grouping, groups = timed(lambda: _neighbours_torch(cloud, cloud[chosen], size, device), device)
    same = np.array_equal(chosen, farthest_points(cloud, centres))
    same_groups = np.array_equal(groups, group_neighbours(cloud, cloud[chosen], size))
    return {
        "name": f"{centres} centres of {count} points, {size} neighbours",
        "sampling_seconds": sampling,
        "grouping_seconds": grouping,
        "same_as_cpu": bool(same and same_groups),
    }


def images(device: str, batch: int, repeats: int) -> list[dict[str, Any]]:
    """A timm ViT-B/8 where there is room for it, else the built-in network: images per second, weights at random."""
    if device == "cpu":
        network: Any = RgbNetwork((1, 2))
        name = "built-in network"
    else:
        from mmad_cli.backbones._timm import import_timm

        network, name = (
            import_timm().create_model("vit_base_patch8_224.dino", pretrained=False, num_classes=0),
            "ViT-B/8",
        )
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        ready = network.to(device, dtype).eval()
        batch_of = torch.rand(batch, 3, 224, 224, device=device, dtype=dtype)
        with torch.inference_mode():
            ready(batch_of)
            seconds, _ = timed(lambda: [ready(batch_of) for _ in range(repeats)], device)  # noqa: B023
        results.append({"name": f"{name}, {dtype}, batch {batch}", "images_per_second": batch * repeats / seconds})
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description="Figures of a GPU.")
    parser.add_argument("--small", action="store_true", help="small inputs on the CPU: the code, not a measurement")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    arguments = parser.parse_args()
    small = arguments.small
    if not small and not torch.cuda.is_available():
        built = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        print(f"error: no GPU ({built}); on the CPU only `--small` runs, see `mmad doctor`", file=sys.stderr)
        return 2
    device = "cpu" if small else "cuda"
    rows = [
        bank(device, *((3000, 64, 300) if small else FULL)),
        *search(device, *((64, 2000, 64) if small else (3136, 76_518, 1152))),
        points(device, *((2000, 64, 16) if small else (40_000, 1024, 128))),
        *images(device, *((2, 1) if small else (32, 10))),
    ]
    for row in rows:
        print(
            "; ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key}: {value}" for key, value in row.items()
            )
        )
    missed = not small and rows[0]["seconds"] > BAR
    print("small inputs, no measurement" if small else f"bar of {BAR:g} s for the bank {'MISSED' if missed else 'met'}")
    if arguments.json:
        name = "cpu" if small else torch.cuda.get_device_name()
        arguments.json.write_text(json.dumps({"device": name, "small": small, "rows": rows}, indent=2) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
