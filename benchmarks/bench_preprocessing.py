"""Preprocessing one scan against the published recipe, in one process on the same scan, file reading included.

The scan is generated: 400 x 400 pixels, a speckled table, an object of about 24000 points, debris. With MMAD_BENCH_DATA
set to a dataset folder, its first scan is taken instead. One core.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import open3d
import tifffile
from PIL import Image

from benchmarks.turns import Bar, Row, in_turns, row, turns_of
from mmad_cli.datasets.scan import examine_scan
from mmad_cli.preprocessing import PreprocessConfig, preprocess
from mmad_cli.types import Sample, SampleRef

BAR = Bar(ratio=20, seconds=0.15, also="kept mask IoU >= 0.999")


def generated_scan(folder: Path, size: int = 400, seed: int = 0) -> SampleRef:
    """Files of a scan: table 0.65 m away with holes, a dome of about 24000 points, some specks beside it."""
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[:size, :size] / size - 0.5
    depth = 0.65 + 0.01 * column + rng.normal(0, 1e-4, (size, size))
    height = np.clip(1 - (row / 0.25) ** 2 - (column / 0.2) ** 2, 0, None)
    depth -= 0.03 * np.sqrt(height)
    for _ in range(5):
        speck = np.hypot(row - rng.uniform(-0.4, 0.4), column - rng.choice([-0.35, 0.35])) < 0.01
        depth[speck] -= 0.02
    xyz = np.stack([column * 0.094, row * 0.094, depth], axis=-1).astype(np.float32)
    xyz[(rng.random((size, size)) < 0.4) & (height == 0)] = 0
    rgb = rng.integers(0, 255, (size, size, 3), dtype=np.uint8)
    files = {"rgb": folder / "rgb.png", "xyz": folder / "xyz.tiff"}
    tifffile.imwrite(files["xyz"], xyz, photometric="rgb", rowsperstrip=1, metadata=None)
    Image.fromarray(rgb).save(files["rgb"])
    return SampleRef("generated", "train", "good", "000", files)


def scan_of(data: Path) -> SampleRef:
    from mmad_cli.datasets import open_dataset

    dataset = open_dataset(data)
    return dataset.samples(dataset.categories()[0])[0]


def published_recipe(ref: SampleRef, out: Path) -> np.ndarray:
    """The released scripts' steps: read, plane of the border, remove, pad, DBSCAN, write. Returns the kept pixels."""
    xyz = tifffile.imread(ref.files["xyz"])
    rgb = np.array(Image.open(ref.files["rgb"]).convert("RGB"))
    strips = [xyz[:10], xyz[-10:], xyz[:, :10], xyz[:, -10:]]
    border = np.concatenate([strip.reshape(-1, 3) for strip in strips])
    border = border[np.all(border != 0, axis=1)]
    cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(border))
    open3d.utility.random.seed(0)
    plane, _ = cloud.segment_plane(distance_threshold=0.004, ransac_n=50, num_iterations=1000)
    flat, colours = xyz.reshape(-1, 3).copy(), rgb.reshape(-1, 3).copy()
    near = np.abs(np.dot(np.append(flat, np.ones((len(flat), 1)), axis=1), np.array(plane))) < 0.005
    flat[near], colours[near] = 0, 0
    side = int(max(np.ceil(np.array(xyz.shape[:2]) / 100)) * 100)
    top, left = (side - xyz.shape[0]) // 2, (side - xyz.shape[1]) // 2
    widths = ((top, side - xyz.shape[0] - top), (left, side - xyz.shape[1] - left), (0, 0))
    flat = np.pad(flat.reshape(xyz.shape), widths).reshape(-1, 3)
    colours = np.pad(colours.reshape(rgb.shape), widths).reshape(-1, 3)
    valid = np.nonzero(np.all(flat != 0, axis=1))[0]
    cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(flat[valid]))
    labels = np.array(cloud.cluster_dbscan(eps=0.006, min_points=30))
    names, counts = np.unique(labels, return_counts=True)
    debris = valid[labels != names[np.argmax(counts)]]
    flat[debris], colours[debris] = 0, 0
    tifffile.imwrite(out / "clean.tiff", flat.reshape(side, side, 3))
    Image.fromarray(colours.reshape(side, side, 3)).save(out / "clean.png")
    return np.all(flat != 0, axis=1).reshape(side, side)


def ours(ref: SampleRef) -> Sample:
    sample = examine_scan(ref, read_unused=False).sample
    if sample is None:
        raise RuntimeError(f"{ref.id}: cannot be read")
    return preprocess(sample, PreprocessConfig())


def run(quick: bool = False) -> list[Row]:
    """One row."""
    given = os.environ.get("MMAD_BENCH_DATA")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ref = scan_of(Path(given)) if given else generated_scan(folder)
        ours(ref)  # imports and file cache
        both = in_turns(lambda: published_recipe(ref, folder), lambda: ours(ref), turns_of(quick))
    kept = (both.result.xyz != 0).all(axis=-1)
    overlap = float((kept & both.theirs).sum() / max((kept | both.theirs).sum(), 1))
    height, width = both.result.info["scan_size"]
    return [
        row(
            f"clean one scan, {height} x {width}, {'real' if given else 'generated'}, files included",
            both.ours,
            both.published,
            bar=BAR,
            holds=overlap >= 0.999,
            note=f"{int(kept.sum())} points kept, IoU {overlap:.6f}; the published form also writes its result",
        )
    ]
