"""Small datasets in the layouts of Eyecandies and of the polyurethane cutting set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SIDE = 64
LOW, HIGH = 1.5, 2.5


def candy(seed: int, dent: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Depth in metres and mask of a round candy on a belt that is 2 m from the camera."""
    rng = np.random.default_rng(seed)
    v, u = np.mgrid[:SIDE, :SIDE] / SIDE - 0.5
    centre = rng.uniform(-0.05, 0.05, 2)
    distance = np.hypot(u - centre[0], v - centre[1])
    height = 0.12 * np.clip(1 - (distance / 0.15) ** 2, 0, None)
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    if dent:
        mask = distance < 0.06
        height = np.where(mask, height - 0.03, height)
    return 2.0 - height + rng.normal(0, 1e-4, (SIDE, SIDE)), mask


def write_candy(folder: Path, stem: str, seed: int, dent: bool = False, lights: tuple[int, ...] = (0, 4)) -> None:
    """The items of one sample as Eyecandies names them, those that are not used among them."""
    folder.mkdir(parents=True, exist_ok=True)
    depth, mask = candy(seed, dent)
    codes = np.round((depth - LOW) / (HIGH - LOW) * 65535).astype(np.uint16)
    Image.fromarray(codes).save(folder / f"{stem}_depth.png")
    (folder / f"{stem}_info_depth.yaml").write_text(f"normalization:\n  max: {HIGH}\n  min: {LOW}\n")
    np.savetxt(folder / f"{stem}_pose.txt", np.eye(4))
    Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{stem}_mask.png")
    for light in lights:
        rgb = np.random.default_rng([seed, light]).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(rgb).save(folder / f"{stem}_image_{light}.png")
    Image.fromarray(np.zeros((SIDE, SIDE, 3), np.uint8)).save(folder / f"{stem}_normals.png")
    (folder / f"{stem}_metadata.yaml").write_text(f"anomalous: {int(dent)}\n")


@pytest.fixture
def candies(tmp_path: Path) -> Path:
    """Two categories of Eyecandies: three training, one validation and four test samples each."""
    root = tmp_path / "Eyecandies"
    for number, category in enumerate(("CandyCane", "Lollipop")):
        seed = 100 * number
        for i in range(3):
            write_candy(root / category / "train" / "data", f"{i:03d}", seed + i)
        write_candy(root / category / "val" / "data", "00", seed + 10)
        for i in range(4):
            write_candy(root / category / "test_public" / "data", f"{i:02d}", seed + 20 + i, dent=i in (1, 2))
        write_candy(root / category / "test_private" / "data", "000", seed + 30)
    return root


@pytest.fixture
def candy_writer():
    """Writes further samples."""
    return write_candy


def ply_header(form: str, count: int, properties: str = "float x|float y|float z") -> str:
    lines = "".join(f"property {text}\n" for text in properties.split("|"))
    return f"ply\nformat {form} 1.0\ncomment a scan\nelement vertex {count}\n{lines}end_header\n"


def write_ply(path: Path, points: np.ndarray, form: str = "binary_little_endian") -> None:
    """Points as a PLY file of any format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = ply_header(form, len(points)).encode()
    if form == "ascii":
        path.write_bytes(header + "".join(f"{x} {y} {z}\n" for x, y, z in points.tolist()).encode())
    else:
        path.write_bytes(header + points.astype("<f4" if "little" in form else ">f4").tobytes())


@pytest.fixture
def ply_writer():
    """Writes point clouds."""
    return write_ply


def strip(seed: int, count: int, outliers: tuple[int, ...] = ()) -> np.ndarray:
    """Points float32 (count, 3) of a scanned edge in the order of acquisition, some far off it."""
    rng = np.random.default_rng(seed)
    points = np.stack([np.linspace(1, 100, count), rng.uniform(1, 60, count), rng.uniform(1, 3, count)], axis=1)
    points[list(outliers)] += [300, 300, 80]
    return points.astype(np.float32)


@pytest.fixture
def edges(tmp_path: Path) -> Path:
    """One category of two PLY scans: 30 chunks of 64 points and a rest; one chunk with an outlier."""
    folder = tmp_path / "data" / "edges"
    write_ply(folder / "a.ply", strip(0, 20 * 64 + 30, outliers=(200,)))
    write_ply(folder / "b.ply", strip(1, 10 * 64), "ascii")
    return folder.parent
