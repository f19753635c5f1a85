"""Procedural images and surfaces: everything comes from the generator that is handed in."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

from mmad_cli import pretraining
from mmad_cli.pretraining.image_views import alter, image_views
from mmad_cli.pretraining.images import canvas
from mmad_cli.pretraining.surfaces import CELL, EXTENT, SIDE, altered, scan, surface

FLAT = np.zeros(2)


@pytest.mark.parametrize("seed", range(6))
def test_an_image_depends_on_its_seed_only(seed: int) -> None:
    first, again, other = (canvas(np.random.default_rng(s), 96) for s in (seed, seed, seed + 100))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (3, 96, 96)
    assert first.dtype == np.float32
    assert 0 <= first.min() <= first.max() <= 1
    assert np.abs(first - other).mean() > 0.01


@pytest.mark.parametrize("seed", range(4))
def test_a_scan_depends_on_its_seed_only(seed: int) -> None:
    def make(number: int) -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng(number)
        sound = surface(rng)
        broken, change = altered(rng, sound, 30.0)
        seen = scan(rng, broken, 0.5, 30.0, FLAT)
        return sound.heights, broken.heights, change, seen.points, seen.nodes

    for first, again in zip(make(seed), make(seed), strict=True):
        np.testing.assert_array_equal(first, again)
    assert not np.array_equal(make(seed)[0], make(seed + 100)[0])


@pytest.mark.parametrize("seed", range(4))
def test_change_of_form_is_where_the_surface_was_altered(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sound = surface(rng)
    broken, change = altered(rng, sound, 20.0)
    moved = np.abs(broken.heights - sound.heights)
    assert moved.max() > 0.1
    assert change.max() > 0.05
    # nothing within 4 mm moved: no change of form
    from scipy import ndimage

    untouched = ndimage.maximum_filter(moved, size=2 * int(4 / CELL) + 1) < 1e-6
    assert change[untouched].max(initial=0) < 1e-3


def test_points_of_a_scan_lie_on_the_surface() -> None:
    rng = np.random.default_rng(3)
    sound = surface(rng)
    seen = scan(rng, sound, 0.5, 30.0, FLAT)
    rows, columns = np.rint(seen.nodes).astype(int).T
    assert ((rows >= 0) & (rows < SIDE) & (columns >= 0) & (columns < SIDE)).all()
    height = 650.0 - 1e3 * seen.points[:, 2]
    assert np.median(np.abs(height - sound.heights[rows, columns])) < 0.3
    assert np.ptp(1e3 * seen.points[:, :2], axis=0).max() < EXTENT


def test_views_show_the_same_places() -> None:
    """A token of the first view and its place in the second have about the same colour, altered places do not."""
    pool = torch.from_numpy(np.stack([canvas(np.random.default_rng(s), 176) for s in range(4)]))
    views = image_views(pool, 8, 112, 8, torch.Generator().manual_seed(0))
    first = torch.nn.functional.avg_pool2d(views.first, 8)
    there = torch.nn.functional.grid_sample(views.second, views.place, align_corners=False)
    elsewhere = torch.nn.functional.grid_sample(views.second, -views.place, align_corners=False)
    inside = (views.place.abs() < 0.9).all(dim=-1)
    matched = (first - there).abs().mean(dim=1)[inside].mean()
    mismatched = (first - elsewhere).abs().mean(dim=1)[inside].mean()
    assert matched < 0.6 * mismatched


def test_cover_says_where_an_image_was_altered() -> None:
    image = torch.full((4, 3, 64, 64), 0.5)
    image[:, :, ::4] = 0.2
    result, mask = alter(image, torch.Generator().manual_seed(1))
    visible = (result - image).abs().amax(dim=1) > 0.03
    assert torch.equal(visible.float(), mask)
    assert mask.flatten(1).mean(dim=1).max() < 0.9


def test_the_generators_take_nothing_from_the_synthetic_dataset() -> None:
    """What the networks are tested on must not be what they were trained on (the import contract says the same)."""
    imported = {
        alias
        for path in Path(pretraining.__path__[0]).glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for alias in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [name.name for name in node.names]
            if isinstance(node, ast.Import)
            else []
        )
    }
    assert any(name.startswith("mmad_cli.alignment") for name in imported)
    assert not [name for name in imported if name.startswith(("mmad_cli.datasets", "mmad_cli.pseudo"))]
