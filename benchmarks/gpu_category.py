"""Seconds per category of MVTec 3D-AD with M3DM, put together from parts that are measured by themselves.

Networks have the published sizes and random weights, features and banks are made up: times do not depend on values
much. `Sizes` says how large everything is; the small ones only exercise the code.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmad_cli.backbones import FeatureSpec, create
from mmad_cli.backbones.builtin import is_builtin
from mmad_cli.backbones.weights import import_file
from mmad_cli.datasets import published_train_counts
from mmad_cli.memory import MemoryBank, greedy_coreset, projected_dimension
from mmad_cli.methods import build_config, get_method
from mmad_cli.methods.base import MAP_SIZE
from mmad_cli.methods.m3dm.dlf import one_class_coefficients
from mmad_cli.methods.m3dm.method import M3DM
from mmad_cli.methods.m3dm.streams import Samples, first
from mmad_cli.methods.m3dm.uff import new_network
from mmad_cli.types import Sample

from .bench_memory import low_rank_rows

Row = dict[str, Any]
Timed = Callable[[Callable[[], Any]], tuple[float, Any]]

# Test samples per category, Bergmann et al., VISAPP 2022, table 1
TEST_COUNTS = {
    "bagel": 110,
    "cable_gland": 108,
    "carrot": 159,
    "cookie": 131,
    "dowel": 130,
    "foam": 100,
    "peach": 132,
    "potato": 114,
    "rope": 101,
    "tire": 112,
}
COLUMNS = ("train", "test", "image", "points", "rows", "selection", "fusion", "scoring", "seconds")
SCOPE = (
    "in: resizing; both networks in float32 (image, points); rows of the banks; the published selection in half "
    "precision; decision fusion, which scores every training sample and fits a one-class machine; scoring of the test "
    "samples. Not in: reading and writing of files, cleaning of scans, metrics, reports. Features, banks and weights "
    "are made up"
)


@dataclass(frozen=True)
class Sizes:
    """How large everything is; the defaults are M3DM on the 244 training scans of a bagel."""

    samples: int = 244
    point_patches: int = 3136
    rgb_patches: int = 784
    point_channels: int = 1152
    rgb_channels: int = 768
    groups: int = 1024
    group_size: int = 128
    points: int = 40_000
    side: int = 800
    network_size: int = 224
    image_network: str = "vit_base_patch8_224.dino"
    point_network: str = "point_mae"
    scans: int = 64
    scored: int = 4
    # a selection that takes longer is stopped and its time scaled up
    limit: float = 15.0

    @property
    def rows(self) -> int:
        """Rows that the point bank selects from."""
        return self.samples * self.point_patches

    @property
    def kept(self) -> int:
        """Rows that the point bank keeps, a tenth."""
        return self.rows // 10

    def projected(self, rows: int, channels: int) -> int:
        """Width of projected rows."""
        return projected_dimension(rows, channels) or channels


FULL = Sizes()
SMALL = Sizes(
    samples=3,
    rgb_patches=49,
    point_patches=1000,
    point_channels=24,
    rgb_channels=16,
    groups=64,
    group_size=16,
    points=2000,
    side=64,
    network_size=56,
    image_network="builtin_rgb",
    point_network="builtin_points",
    scans=2,
    scored=1,
)


def stand_ins(sizes: Sizes, folder: Path) -> None:
    """Random weights for both networks, in a registry of their own."""
    from mmad_cli.backbones._timm import import_timm
    from mmad_cli.backbones.point_transformer import PointTransformer

    os.environ["MMAD_WEIGHTS"] = str(folder / "weights")
    makers: dict[str, Callable[[], torch.nn.Module]] = {
        sizes.image_network: lambda: import_timm().create_model(sizes.image_network, pretrained=False),
        sizes.point_network: lambda: PointTransformer("point_mae"),
    }
    for name, make in makers.items():
        if not is_builtin(name):
            file = folder / f"{name}.pth"
            torch.save(make().state_dict(), file)
            import_file(name, file)
            file.unlink()


def scans(sizes: Sizes, count: int) -> list[Sample]:
    """Parts on a cleared background that fill about 80 % of the picture, half a metre away."""
    side, random = sizes.side, np.random.default_rng(0)
    row, column = np.mgrid[:side, :side] / side - 0.5
    inside = (np.abs(row) < 0.446) & (np.abs(column) < 0.446)
    found = []
    for number in range(count):
        depth = 0.55 - 0.02 * np.cos((5 + number % 7) * column) * np.cos(4 * row)
        xyz = np.stack([0.1 * column + 1e-4, 0.1 * row + 1e-4, depth], axis=-1)
        xyz = np.where(inside[..., None], xyz + random.normal(0, 1e-5, xyz.shape), 0).astype(np.float32)
        rgb = random.integers(0, 255, (side, side, 3), dtype=np.uint8)
        found.append(Sample("made-up", "train", "good", f"{number:03d}", rgb, xyz, np.zeros((side, side), bool)))
    return found


def point_spec(sizes: Sizes, **params: Any) -> FeatureSpec:
    """The point features of the method."""
    return FeatureSpec.point(
        sizes.point_network, groups=sizes.groups, group_size=sizes.group_size, size=sizes.network_size, **params
    )


def image_spec(sizes: Sizes, **params: Any) -> FeatureSpec:
    """The image features of the method."""
    return FeatureSpec.timm(sizes.image_network, size=sizes.network_size, **params)


def extraction(sizes: Sizes, device: str, timed: Timed) -> list[Row]:
    """Scans per second through resizing, geometry, network and the way back to the host."""
    samples, rows = scans(sizes, sizes.scans), []
    for what, make in (("point", point_spec), ("image", image_spec)):
        for precision in ("float32", "bfloat16"):
            backbone = create(make(sizes, precision=precision), device)
            backbone.extract(samples[: backbone.batch_size])
            seconds, _ = timed(partial(backbone.extract, samples))
            name = f"{what} features, {make(sizes).params.get('model', sizes.point_network)}, {precision}"
            rows.append(
                {
                    "kind": "extraction",
                    "name": name,
                    "what": what,
                    "precision": precision,
                    "scans_per_second": len(samples) / seconds,
                    "seconds_per_scan": seconds / len(samples),
                }
            )
    return rows


def relative_difference(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Largest difference, relative to the largest value."""
    return float(np.abs(found.astype(np.float64) - expected).max() / np.abs(expected).max())


def agreement(sizes: Sizes, device: str) -> list[Row]:
    """One scan on the CPU and on the device: geometry must be the same, tokens up to rounding."""
    sample, rows = scans(sizes, 1), []
    for what, spec in (("point", point_spec(sizes)), ("image", image_spec(sizes))):
        (expected,), (found,) = (create(spec, at).extract(sample) for at in ("cpu", device))
        row = {
            "kind": "agreement",
            "name": f"{what} tokens on CPU and device",
            "largest_relative_difference": relative_difference(found["tokens"], expected["tokens"]),
        }
        if what == "point":
            same = ("centres", "pixel", "neighbours", "weights")
            row["same_geometry"] = all(np.array_equal(found[name], expected[name]) for name in same)
        rows.append(row)
    return rows


class _EnoughError(Exception):
    """A selection has run for as long as it may."""


def selection_seconds(
    table: torch.Tensor, picks: int, device: str, dtype: Any = "float32", limit: float = 60.0
) -> tuple[float, int]:
    """Seconds for all picks, and how many were made; stopped at the limit, in proportion to the picks."""
    begin, reached = time.perf_counter(), 1

    def progress(done: int, _: int) -> None:
        nonlocal reached
        reached = done
        if done < picks and time.perf_counter() - begin > limit:
            raise _EnoughError

    with contextlib.suppress(_EnoughError):
        greedy_coreset(table, picks, device=device, dtype=dtype, progress=progress)
    return (time.perf_counter() - begin) * picks / reached, reached


def selections(sizes: Sizes, table: torch.Tensor, device: str) -> list[Row]:
    """The three banks of the published method, in both precisions; `table` holds the projected point rows."""
    chained = max(1, sizes.kept // 10)
    rgb_rows = min(len(table), sizes.samples * sizes.rgb_patches)
    width = min(table.shape[1], sizes.projected(rgb_rows, sizes.rgb_channels))
    banks = {
        "points": (table, sizes.kept),
        "rgb": (table[:rgb_rows, :width].contiguous(), min(chained, rgb_rows)),
        "fused": (table, chained),
    }
    rows = []
    for dtype in ("float32", "float16"):
        for bank, (some, picks) in banks.items():
            seconds, made = selection_seconds(some, picks, device, dtype, sizes.limit)
            rows.append(
                {
                    "kind": "selection",
                    "name": f"{bank} bank, {len(some)} x {some.shape[1]}, {picks} picks, {dtype}",
                    "bank": bank,
                    "dtype": dtype,
                    "seconds": seconds,
                    "measured_picks": made,
                }
            )
    return rows


@dataclass(frozen=True)
class Scan:
    """Features of one scan, held in memory."""

    id: str
    features: dict[str, dict[str, NDArray[Any]]]

    def __getitem__(self, name: str) -> dict[str, NDArray[Any]]:
        return self.features[name]


def featured_scans(sizes: Sizes, count: int) -> Samples:
    """Features that lie where the banks of `scoring` do; 15 % of the pixels have a point, as in real scans."""
    y, x = np.mgrid[:MAP_SIZE, :MAP_SIZE] - MAP_SIZE // 2
    pixel = np.flatnonzero(x * x + y * y < 49**2)
    random = np.random.default_rng(1)
    side = round(sizes.rgb_patches**0.5)
    samples = []
    for number in range(count):
        # near each other for pixels that are near each other
        nearest = pixel // MAP_SIZE // 7 * 32 + pixel % MAP_SIZE // 7
        neighbours = (nearest[:, None] + np.arange(3)) % sizes.groups
        points = {
            "tokens": low_rank_rows(sizes.groups, sizes.point_channels, seed=100 + number),
            "pixel": pixel.astype(np.int32),
            "neighbours": neighbours.astype(np.int16),
            "weights": random.dirichlet(np.ones(3), len(pixel)).astype(np.float32),
        }
        rgb = {
            "tokens": low_rank_rows(sizes.rgb_patches, sizes.rgb_channels, seed=200 + number),
            "grid": np.array([side, side], np.int32),
        }
        samples.append(Scan(f"train/good/{number:03d}", {"points": points, "rgb": rgb}))
    return Samples(samples)


def method_of(sizes: Sizes, device: str, **settings: Any) -> M3DM:
    """The published method with a fusion block of random weights."""
    definition = get_method("m3dm")
    method = definition.build(build_config(definition, None, "official", settings), device)
    assert isinstance(method, M3DM)
    method.uff_ = new_network(sizes.point_channels, sizes.rgb_channels, 0).to(device)
    return method


def scoring(sizes: Sizes, device: str, timed: Timed) -> list[Row]:
    """Seconds per scan for making the rows of the banks, for scoring against full banks and for decision fusion."""
    streamed = featured_scans(sizes, 2 * sizes.scored)
    few = method_of(sizes, device, coreset_fraction=0.001, dlf_fit="fixed")
    few.fit(first(streamed, 1), Samples([]), seed=0)
    rows_seconds, _ = timed(lambda: few.fit(streamed, Samples([]), seed=0))

    method = method_of(sizes, device)
    chained = max(1, sizes.kept // 10)
    shapes = {
        "points": (sizes.kept, sizes.point_channels),
        "rgb": (chained, sizes.rgb_channels),
        "fused": (chained, sizes.point_channels + sizes.rgb_channels),
    }
    method.banks_ = {name: MemoryBank.from_rows(low_rank_rows(*shapes[name])) for name in method.config.parts}
    for bank in method.banks_.values():
        bank.device = device
    method.fusion_ = method._fixed_fusion()
    scored = first(streamed, sizes.scored)
    method.predict(scored[0])
    predict_seconds, _ = timed(lambda: [method.predict(scan) for scan in scored])
    # distances of order 1, as patches have; how many epochs it takes depends on them
    pixels = np.random.default_rng(0).gamma(2, 0.3, (sizes.scored * MAP_SIZE**2, len(shapes)))
    machine_seconds, _ = timed(lambda: one_class_coefficients(pixels))
    parts = {
        "rows": ("rows of three banks", rows_seconds / len(streamed)),
        "score": (f"scoring against banks of {sizes.kept}, {chained}, {chained} rows", predict_seconds / len(scored)),
        "machine": ("one-class machine of decision fusion", machine_seconds / len(scored)),
    }
    return [
        {"kind": "scoring", "name": f"{text}, per scan", "what": what, "seconds_per_scan": seconds}
        for what, (text, seconds) in parts.items()
    ]


def per_category(sizes: Sizes, rows: list[Row]) -> list[Row]:
    """Seconds of every category and of all, in float32 networks and the published selection.

    Selections grow with the square of the training samples, scoring in proportion to them, as the banks do.
    """
    per_scan = {
        row["what"]: row["seconds_per_scan"]
        for row in rows
        if row["kind"] == "scoring" or (row["kind"] == "extraction" and row["precision"] == "float32")
    }
    selecting = sum(row["seconds"] for row in rows if row["kind"] == "selection" and row["dtype"] == "float16")
    found = []
    for category, train in published_train_counts("mvtec3d").items():
        test, growth = TEST_COUNTS[category], train / FULL.samples
        parts = {
            "image": (train + test) * per_scan["image"],
            "points": (train + test) * per_scan["point"],
            "rows": train * per_scan["rows"],
            "selection": selecting * growth**2,
            "fusion": train * (per_scan["score"] * growth + per_scan["machine"]),
            "scoring": test * per_scan["score"] * growth,
        }
        counts = {"train": train, "test": test}
        found.append({"kind": "category", "name": category, **counts, **parts, "seconds": sum(parts.values())})
    total = {column: sum(row[column] for row in found) for column in COLUMNS}
    return [*found, {"kind": "category", "name": "all", **total}]


def category_table(rows: list[Row]) -> list[str]:
    """Lines of a table of what `per_category` gives."""
    head = f"{'category':<12}" + "".join(f"{column:>11}" for column in COLUMNS)
    return [head, *(f"{row['name']:<12}" + "".join(f"{row[column]:>11.4g}" for column in COLUMNS) for row in rows)]
