"""Normals of organised clouds against surfaces whose normals are known."""

import numpy as np
import pytest

from mmad_cli.preprocessing.normals import organised_normals
from mmad_cli.preprocessing.resize import valid_pixels


def _grid(side=60, pitch=5e-4):
    y, x = (np.mgrid[:side, :side] + 0.5 - side / 2) * pitch
    return x, y


def test_a_plane_has_one_normal_towards_the_camera():
    x, y = _grid()
    xyz = np.stack([x + 0.01, y + 0.02, 0.5 + 0.3 * x - 0.2 * y], axis=-1).astype(np.float32)
    normals = organised_normals(xyz)
    expected = np.array([0.3, -0.2, -1]) / np.linalg.norm([0.3, -0.2, -1])
    np.testing.assert_allclose(normals.reshape(-1, 3), np.tile(expected, (3600, 1)), atol=1e-3)


def test_a_sphere_has_radial_normals():
    x, y = _grid(80)
    radius, centre = 0.05, np.array([0.0, 0.0, 0.4])
    inside = x * x + y * y < (0.018) ** 2
    z = centre[2] - np.sqrt(np.maximum(radius**2 - x * x - y * y, 0))
    xyz = np.where(inside[..., None], np.stack([x, y, z], axis=-1), 0).astype(np.float32)
    normals = organised_normals(xyz)
    known = valid_pixels(xyz)
    radial = (xyz[known] - centre) / radius
    assert (normals[known] * radial).sum(axis=1).min() > 0.995
    assert not normals[~known].any()


def test_lonely_points_have_none():
    xyz = np.zeros((20, 20, 3), np.float32)
    xyz[3, 3] = xyz[3, 4] = (0.1, 0.1, 0.5)
    assert not organised_normals(xyz).any()
    assert not organised_normals(np.zeros((5, 5, 3), np.float32)).any()


def test_even_windows_are_refused():
    with pytest.raises(ValueError, match="window"):
        organised_normals(np.zeros((5, 5, 3), np.float32), 4)
