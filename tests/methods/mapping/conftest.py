"""Golden numbers of the mapping and reconstruction family, and the generators that their inputs come from.

Inputs and weights are drawn from the CRC-32 of their names with element-wise float64 arithmetic only, so they are the
same everywhere and need not be stored.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmad_cli.devices import shared_tensor
from mmad_cli.methods.mapping.dense import DenseFeatures

GOLDEN = Path(__file__).parents[2] / "golden"
BASE_SEED = 20417

_C_RGB, _C_XYZ = 768, 1152
_SHARED, _OWN, _COARSE = 10, 3, 7
_ANOMALOUS = (11, 12)
# a block and the sums in it stay in a processor's cache
_BLOCK = 32


def _random(*parts: object) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32("/".join(map(str, parts)).encode())))


def _between(random: np.random.Generator, shape: tuple[int, ...], low: float, high: float) -> np.ndarray:
    return low + (high - low) * random.random(shape)


def _upsample(coarse: np.ndarray, side: int) -> np.ndarray:
    count = coarse.shape[0]
    position = (np.arange(side, dtype=np.float64) + 0.5) * count / side - 0.5
    position = np.minimum(np.maximum(position, 0.0), count - 1.0)
    low = np.minimum(np.floor(position).astype(np.int64), count - 2)
    part = position - low
    wy, wx = part[:, None], part[None, :]
    rows, columns = low[:, None], low[None, :]
    top = (1.0 - wx) * coarse[rows, columns] + wx * coarse[rows, columns + 1]
    bottom = (1.0 - wx) * coarse[rows + 1, columns] + wx * coarse[rows + 1, columns + 1]
    return (1.0 - wy) * top + wy * bottom


def _geometry(index: int, side: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Foreground, ground truth, and the foreground token whose channels sum to zero."""
    u = _random("geometry", BASE_SEED, index).random(12)
    centre = np.arange(side, dtype=np.float64) / side + 0.5 / side
    y, x = centre[:, None], centre[None, :]
    cy, cx = 0.46 + 0.08 * u[0], 0.46 + 0.08 * u[1]
    ry, rx = 0.34 + 0.06 * u[2], 0.36 + 0.06 * u[3]
    ellipse = ((y - cy) / ry) * ((y - cy) / ry) + ((x - cx) / rx) * ((x - cx) / rx)
    hy, hx, hr = cy - 0.12 + 0.04 * u[4], cx + 0.10 + 0.04 * u[5], 0.06
    hole = (y - hy) * (y - hy) + (x - hx) * (x - hx)
    foreground = (ellipse <= 1.0) & (hole > hr * hr)
    truth = np.zeros((side, side), np.uint8)
    if index in _ANOMALOUS:
        dy, dx, dr = cy + 0.16 + 0.04 * u[6], cx + 0.10 + 0.04 * u[7], 0.05 + 0.02 * u[8]
        disc = (y - dy) * (y - dy) + (x - dx) * (x - dx) <= dr * dr
        by, bx = cy - 0.02 + 0.04 * u[9], cx - 0.22 + 0.04 * u[10]
        box = (abs(y - by) <= 0.035) & (abs(x - bx) <= 0.06)
        truth[(disc | box) & foreground] = 1
    distance = (y - cy) * (y - cy) + (x - cx) * (x - cx)
    return foreground, truth, int(np.argmin(np.where(foreground & (truth == 0), distance, np.inf)))


def _synthesise(
    maps: list[np.ndarray], rows: np.ndarray, offset: np.ndarray, noise: np.random.Generator, count: int
) -> np.ndarray:
    out = np.empty((count, len(offset)), np.float32)
    totals = np.empty((_BLOCK, len(offset)))
    parts = np.empty_like(totals)
    for begin in range(0, count, _BLOCK):
        end = min(count, begin + _BLOCK)
        total, part = totals[: end - begin], parts[: end - begin]
        total[:] = offset
        for values, row in zip(maps, rows, strict=True):
            total += np.multiply(values[begin:end, None], row, out=part)
        noise.random(out=part)
        part -= 0.5
        part *= 0.6
        total += part
        out[begin:end] = total
    return out


# all that the tests ask for: four of full size, 385 MB each, that several modules share, and small ones
@functools.cache
def _sample(index: int, side: int) -> dict[str, Any]:
    count = side * side
    foreground, truth, cancel = _geometry(index, side)
    random = _random("basis", BASE_SEED)
    shapes = {
        "a_rgb": ((_SHARED, _C_RGB), 1.0),
        "a_xyz": ((_SHARED, _C_XYZ), 1.0),
        "b_rgb": ((_OWN, _C_RGB), 0.5),
        "b_xyz": ((_OWN, _C_XYZ), 0.5),
        "o_rgb": ((_C_RGB,), 0.6),
        "o_xyz": ((_C_XYZ,), 0.6),
    }
    basis = {name: _between(random, shape, -most, most) for name, (shape, most) in shapes.items()}
    latent = _random("latent", BASE_SEED, index)
    coarse = _between(latent, (_SHARED + 2 * _OWN + 1, _COARSE, _COARSE), -1.0, 1.0)
    maps = [_upsample(values, side).reshape(-1) for values in coarse]
    shared, extra, bad = maps[:_SHARED], maps[-1], truth.reshape(-1) == 1
    of_rgb = [np.where(bad, extra * (1.0 + 0.5 * k), m) if k < 3 else m for k, m in enumerate(shared)]
    of_xyz = [np.where(bad, -m, m) if k < 6 else m for k, m in enumerate(shared)]
    rgb = _synthesise(
        of_rgb + maps[_SHARED : _SHARED + _OWN],
        np.concatenate([basis["a_rgb"], basis["b_rgb"]]),
        basis["o_rgb"],
        _random("noise_rgb", BASE_SEED, index, side),
        count,
    )
    xyz = _synthesise(
        of_xyz + maps[_SHARED + _OWN : _SHARED + 2 * _OWN],
        np.concatenate([basis["a_xyz"], basis["b_xyz"]]),
        basis["o_xyz"],
        _random("noise_xyz", BASE_SEED, index, side),
        count,
    )
    xyz[~foreground.reshape(-1)] = 0.0
    xyz[cancel] = 0.0
    xyz[cancel, 3], xyz[cancel, 7] = 1.0, -1.0
    for array in (rgb, xyz, foreground, truth):
        array.setflags(write=False)
    return {"rgb": rgb, "xyz": xyz, "foreground": foreground, "truth": truth, "cancel": cancel}


@pytest.fixture(scope="session")
def golden_sample() -> Callable[[int, int], dict[str, Any]]:
    """(index, side) -> rgb (N, 768) and xyz (N, 1152) float32, foreground, truth (side, side), cancel (a token)."""
    return _sample


@pytest.fixture
def dense(golden_sample: Callable[[int, int], dict[str, Any]]) -> Iterator[Callable[[int, int], DenseFeatures]]:
    """(index, side) -> the features of a sample, which nothing may write into: they are the ones of all tests."""
    given: list[torch.Tensor] = []

    def read(index: int, side: int) -> DenseFeatures:
        sample = golden_sample(index, side)
        rgb, points = (shared_tensor(sample[name]) for name in ("rgb", "xyz"))
        given.extend((rgb, points))
        return DenseFeatures(rgb, points, points.sum(dim=1) != 0, side)

    yield read
    assert all(tensor._version == 0 for tensor in given)


def _tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    random = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    values = random.standard_normal(int(np.prod(shape)))
    if len(shape) >= 2:
        values *= 1.0 / np.sqrt(float(np.prod(shape[1:])))
    elif name.endswith("running_var"):
        values = 1.0 + 0.2 * np.abs(values)
    elif name.endswith("running_mean"):
        values *= 0.02
    elif name.endswith("weight"):
        values = 1.0 + 0.02 * values
    else:
        values *= 0.02
    return values.astype(np.float32).reshape(shape)


@pytest.fixture(scope="session")
def golden_state() -> Callable[[str, Mapping[str, tuple[int, ...]]], dict[str, np.ndarray]]:
    """(network, {published state-dict key: shape}) -> the deterministic values of its tensors, by key."""
    return lambda network, shapes: {key: _tensor(f"{network}.{key}", tuple(shape)) for key, shape in shapes.items()}


@functools.cache
def _arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


@pytest.fixture(scope="session")
def golden_arrays() -> Callable[[str], dict[str, np.ndarray]]:
    """Stored arrays of one golden file by name."""
    return _arrays


@pytest.fixture(scope="session")
def golden_shapes() -> dict[str, dict[str, dict[str, list[int]]]]:
    """Published networks: configuration -> network -> state-dict key -> shape."""
    shapes: dict[str, dict[str, dict[str, list[int]]]] = json.loads((GOLDEN / "mapping_shapes.json").read_text())
    return shapes


def _assembly(side: int, centres: int) -> dict[str, np.ndarray]:
    foreground = _geometry(0, side)[0]
    random = _random("assembly", BASE_SEED, side, centres)
    relief = _upsample(_between(random, (_COARSE, _COARSE), -1.0, 1.0), side)
    cell = np.arange(side, dtype=np.float64)
    pitch = 0.10 / side
    z = 0.45 + 0.012 * relief + 0.0001 * (random.random((side, side)) - 0.5)
    x = (cell[None, :] - (side - 1) / 2.0) * pitch * z / 0.45
    y = (cell[:, None] - (side - 1) / 2.0) * pitch * z / 0.45
    cloud = np.where(foreground[None], np.stack([x + 0.0 * z, y + 0.0 * z, z]), 0.0).astype(np.float32)
    count = int(np.all(cloud != 0, axis=0).sum())
    order = np.argsort(random.random(count), kind="stable")
    return {
        "cloud": cloud.reshape(3, -1).T,
        "chosen": np.sort(order[:centres]).astype(np.int64),
        "tokens": _between(random, (_C_XYZ, centres), -2.0, 2.0).astype(np.float32).T,
        "rgb": _between(random, (_C_RGB, 28 * 28), -2.0, 2.0).astype(np.float32).T if side == 224 else np.zeros(0),
    }


@pytest.fixture(scope="session")
def golden_assembly() -> Callable[[int, int], dict[str, np.ndarray]]:
    """(side, centres) -> cloud (side * side, 3), centres chosen among its points, their tokens, RGB tokens."""
    return _assembly
