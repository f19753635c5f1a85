"""How far the hot steps are from what this machine can do: operations and bytes of each against measured peaks.

The limit of a step is the longest of these: its floating point operations at the rate of a large float32 product, its
bytes at the rate of a copy in memory, and what the caches hold at the rate of a copy there. Where that says little
(sorting, reading files), the part that cannot be left out is timed alone. No published form, no bars.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_mapping, bench_metrics, bench_points, bench_preprocessing
from benchmarks.bench_memory import low_rank_rows
from benchmarks.machine import Peaks, peaks
from benchmarks.turns import Row, row, timed, turns_of
from mmad_cli.alignment.grouping import farthest_points
from mmad_cli.alignment.interpolation import nearest_centres, pooled_operator
from mmad_cli.memory import FlatIndex, greedy_coreset
from mmad_cli.metrics import aupro_exact


class Limit(NamedTuple):
    """What a step needs: floating point operations, bytes in memory and in caches, seconds of a part timed alone."""

    operations: float = 0.0
    bytes: float = 0.0
    cached: float = 0.0
    part: float = 0.0


def operations_of(call: Callable[[], Any]) -> int:
    """Floating point operations of the matrix products and convolutions in torch that a call makes."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def against_limit(
    name: str, call: Callable[[], Any], limit: Limit, machine: Peaks, turns: int, counted: str, beside: str = ""
) -> Row:
    """Time of a step, and the share of it that the limit says cannot be saved."""
    call()
    seconds = [timed(call)[0] for _ in range(turns)]
    bounds = {
        "operations": limit.operations / machine.flops,
        "bytes": limit.bytes / machine.bandwidth,
        "cached": limit.cached / machine.cached,
        "part": limit.part,
    }
    bound = max(bounds, key=lambda kind: bounds[kind])
    reached = bounds[bound] / median(seconds)
    return row(
        name,
        seconds,
        note=f"limit {bounds[bound]:.3g} s ({counted}): {reached:.0%} reached" + (f"; {beside}" if beside else ""),
        limit={**limit._asdict(), "seconds": bounds[bound], "bound": bound, "reached": reached},
    )


def coreset_row(n: int, channels: int, machine: Peaks, turns: int) -> Row:
    """Operations are counted as they are made; the usual loop compares every row with every pick."""
    rows, picks = low_rank_rows(n, channels), n // 10
    made = operations_of(lambda: greedy_coreset(rows, picks))
    loop = 2.0 * n * channels * picks
    traffic = 2 * loop
    # a pick is compared with all before it, every row with one at least
    least = channels * (picks**2 + 2 * n)
    return against_limit(
        f"coreset {n} x {channels}, 10 %",
        lambda: greedy_coreset(rows, picks),
        Limit(made, 4.0 * n * channels),
        machine,
        turns,
        f"{made / 1e9:.3g} GFLOP made, of them {least / 1e9:.3g} in any case",
        f"usual loop {loop / 1e9:.3g} GFLOP and {traffic / 1e9:.3g} GB read, {traffic / machine.bandwidth:.3g} s",
    )


def search_row(queries: int, n: int, channels: int, machine: Peaks, turns: int) -> Row:
    index = FlatIndex(low_rank_rows(n, channels))
    some = low_rank_rows(queries, channels, seed=1)
    operations = 2.0 * queries * n * channels
    return against_limit(
        f"nearest {queries} x {n} x {channels}",
        lambda: index.nearest(some, 1),
        Limit(operations, 4.0 * (queries + n) * channels),
        machine,
        turns,
        f"2 x queries x rows x channels = {operations / 1e9:.3g} GFLOP",
    )


def aupro_row(count: int, machine: Peaks, turns: int) -> Row:
    masks, maps = bench_metrics.synthetic_category(count)
    normal = np.sort(maps[~masks])
    # below the false positive limit of 0.3: what has to be put in order
    above = maps[maps >= normal[int(0.7 * len(normal))]]
    sort = min(timed(lambda: np.sort(above))[0] for _ in range(3))
    return against_limit(
        f"exact AUPRO at four limits, {count} maps",
        lambda: aupro_exact(masks, maps, bench_metrics.LIMITS),
        Limit(bytes=masks.nbytes + maps.nbytes, part=sort),
        machine,
        turns,
        f"sorting the {len(above) / 1e6:.2g} of {maps.size / 1e6:.2g} million scores under the limit",
        f"reading scores and masks once: {(masks.nbytes + maps.nbytes) / machine.bandwidth:.2g} s",
    )


def scan_row(machine: Peaks, turns: int) -> Row:
    import tifffile
    from PIL import Image

    with tempfile.TemporaryDirectory() as name:
        ref = bench_preprocessing.generated_scan(Path(name))

        def read() -> None:
            tifffile.imread(ref.files["xyz"])
            np.asarray(Image.open(ref.files["rgb"]))

        size = sum(path.stat().st_size for path in ref.files.values())
        decode = min(timed(read)[0] for _ in range(3))
        return against_limit(
            "clean one scan, 400 x 400, files included",
            lambda: bench_preprocessing.ours(ref),
            Limit(bytes=size, part=decode),
            machine,
            turns,
            f"reading and decoding {size / 1e6:.2g} MB",
        )


def point_rows(machine: Peaks, turns: int) -> list[Row]:
    points, pixel = bench_points.cloud_of()
    groups, grid, size = bench_points.GROUPS, bench_points.GRID, bench_points.SIZE
    tokens = np.random.default_rng(1).normal(size=(groups, bench_points.CHANNELS)).astype(np.float32)
    neighbours, weights = nearest_centres(points, points[farthest_points(points, groups)], "expanded", 1)

    def pooled() -> np.ndarray:
        return np.asarray(pooled_operator(neighbours, weights, pixel, groups, grid, size) @ tokens)

    # three differences, three squares, two sums, a comparison; coordinates and distance read, distance written
    operations, traffic = 9.0 * len(points) * groups, 20.0 * len(points) * groups
    entries = pooled_operator(neighbours, weights, pixel, groups, grid, size).nnz
    return [
        against_limit(
            f"farthest points, {groups} of {len(points)}",
            lambda: farthest_points(points, groups),
            Limit(operations, cached=traffic),
            machine,
            turns,
            f"{traffic / 1e9:.2g} GB within the caches",
        ),
        against_limit(
            f"interpolate and pool {len(points)} points to {grid} x {grid}",
            pooled,
            Limit(2.0 * entries * tokens.shape[1], 4.0 * (tokens.size + grid**2 * tokens.shape[1])),
            machine,
            turns,
            f"{2 * entries * tokens.shape[1] / 1e6:.3g} MFLOP, tokens read and patches written",
        ),
    ]


def mapping_row(machine: Peaks, turns: int) -> Row:
    _, sample = bench_mapping.scan(bench_mapping.PARTS[0])
    method = bench_mapping.untrained("cfm")
    made = operations_of(lambda: method.predict(sample))
    return against_limit(
        "CFM, one scan at 15 % of the pixels, tokens to score",
        lambda: method.predict(sample),
        Limit(made),
        machine,
        turns,
        f"{made / 1e9:.3g} GFLOP in the networks",
    )


def network_row(machine: Peaks, turns: int) -> Row:
    from mmad_cli.backbones._timm import import_timm

    network = import_timm().create_model("vit_base_patch8_224.dino", pretrained=False, num_classes=0).eval()
    image = torch.rand(1, 3, 224, 224)

    @torch.inference_mode()
    def call() -> None:
        network(image)

    # the counter knows plain products, not the fused attention of the CPU
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        made = operations_of(call)
    return against_limit(
        "ViT-B/8, one image of 224 x 224, float32",
        call,
        Limit(made),
        machine,
        turns,
        f"{made / 1e9:.3g} GFLOP",
    )


def run(quick: bool = False) -> list[Row]:
    """Peaks of the machine, then a row per step."""
    turns, machine = turns_of(quick), peaks(quick)
    first = row(
        "peaks of this machine",
        [],
        note=f"float32 product {machine.flops / 1e9:.0f} GFLOP/s, copy {machine.bandwidth / 1e9:.1f} GB/s, "
        f"within the cache of a core {machine.cached / 1e9:.1f} GB/s",
        peaks=machine._asdict(),
    )
    rows = [
        first,
        coreset_row(*((3000, 64) if quick else (30000, 334)), machine, turns),
        search_row(*((196, 2000, 256) if quick else (3136, 20000, 1152)), machine, turns),
        aupro_row(20 if quick else 132, machine, turns),
        scan_row(machine, turns),
        *point_rows(machine, turns),
    ]
    return rows if quick else [*rows, mapping_row(machine, turns), network_row(machine, turns)]
