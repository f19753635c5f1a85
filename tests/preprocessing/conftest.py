from pathlib import Path

import numpy as np
import pytest

from mmad_cli.types import Sample

GOLDEN = Path(__file__).parents[1] / "golden" / "preprocessing.npz"


@pytest.fixture(scope="session")
def golden():
    """Published M3DM and CFM preparation of one scan each: raw arrays and what the loader makes of them."""
    with np.load(GOLDEN) as file:
        return {name: file[name] for name in file.files}


def _frozen(array):
    array.setflags(write=False)
    return array


@pytest.fixture
def make_sample():
    """Sample from arrays that cannot be written to."""

    def make(xyz, rgb=None, mask=None, defect="good"):
        xyz = np.array(xyz, dtype=np.float32)
        rgb = np.full(xyz.shape, 90, np.uint8) if rgb is None else np.array(rgb)
        mask = np.zeros(xyz.shape[:2], bool) if mask is None else np.array(mask)
        return Sample("part", "test", defect, "000", _frozen(rgb), _frozen(xyz), _frozen(mask))

    return make


@pytest.fixture
def scene():
    """Cloud (100, 120, 3): a table 0.6 m away, a box of 40 x 40 pixels, one speck of 3 x 3; 1 mm per pixel."""

    def make(table=True, size=(100, 120)):
        row, column = np.mgrid[: size[0], : size[1]]
        xyz = np.stack([column * 1e-3 + 1e-4, row * 1e-3 + 1e-4, np.full(size, 0.6)], axis=-1)
        box, speck = np.zeros(size, bool), np.zeros(size, bool)
        box[30:70, 40:80] = True
        speck[80:83, 100:103] = True
        xyz[box | speck, 2] = 0.57
        if not table:
            xyz[~(box | speck)] = 0
        xyz[5:8, 5:8] = 0
        return xyz.astype(np.float32), box, speck

    return make
