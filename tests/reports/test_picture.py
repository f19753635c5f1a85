from __future__ import annotations

import io
import re

import numpy as np
import pytest
from PIL import Image

from mmad_cli.reports.html import Scene
from mmad_cli.reports.picture import SIDE, MapTile, colour, sample_picture, sample_text


@pytest.fixture
def scene():
    """A tilted plane of 60 x 60 points, half of them grey, with a defect of 10 x 10."""
    v, u = np.mgrid[:60, :60] / 60
    xyz = np.stack([u + 0.1, v + 0.1, 0.5 + 0.1 * u], axis=-1).astype(np.float32)
    mask = np.zeros((224, 224), dtype=bool)
    mask[100:140, 60:100] = True
    return Scene(np.full((60, 60, 3), 120, np.uint8), xyz, mask)


@pytest.fixture
def heat():
    values = np.zeros((224, 224), np.float32)
    values[100:140, 60:100] = 2.0
    return MapTile(values, 0.0, 2.0)


def opened(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def test_four_tiles_and_a_bar(scene, heat):
    picture = opened(sample_picture(scene, heat, ["title", "second"]))
    assert picture.shape[0] > SIDE and picture.shape[1] > 4 * SIDE + 60
    overlay = picture[-SIDE - 12 : -12, 12 + 3 * (SIDE + 12) :][:, :SIDE]
    inside = overlay[round(120 / 224 * SIDE), round(80 / 224 * SIDE)]
    outside = overlay[20, 20]
    assert inside[0] > outside[0] + 60, "the hottest place is light"
    assert (overlay == (0, 220, 255)).all(axis=-1).any(), "the ground truth is outlined"


def test_what_there_is_no_data_for_is_left_out(scene, heat):
    whole = opened(sample_picture(scene, heat, ["t"])).shape[1]
    without_map = opened(sample_picture(scene, None, ["t"])).shape[1]
    without_scene = opened(sample_picture(None, heat, ["t"])).shape[1]
    assert without_scene < without_map < whole
    with pytest.raises(ValueError, match="must not both be None"):
        sample_picture(None, None, ["t"])
    with pytest.raises(ValueError, match="must not both be None"):
        sample_text(None, None, ["t"], 100)


@pytest.mark.parametrize(("columns", "beside", "side"), [(200, 4, 48), (110, 4, 26), (80, 3, 26), (20, 1, 20)])
def test_text_fits_the_terminal_and_shows_the_same_tiles(scene, heat, columns, beside, side):
    lines = sample_text(scene, heat, ["title"], columns).splitlines()
    plain = [re.sub("\x1b[^m]*m", "", line) for line in lines]
    assert max(map(len, plain)) <= columns and plain[0] == "title"
    rows = [line for line in plain if line.startswith("▀")]
    assert len(rows) == -(-4 // beside) * side // 2
    assert len(rows[0].split(" ")) == beside and len(rows[0].split(" ")[0]) == side
    truth = [line for line in lines if "38;2;255;255;255" in line]
    assert truth, "the defect is white in the ground truth"
    assert all(line.endswith("\x1b[0m") for line in lines if "▀" in line)


def test_pictures_are_the_same_bytes_again(scene, heat):
    assert sample_picture(scene, heat, ["t"]) == sample_picture(scene, heat, ["t"])


def test_good_samples_empty_clouds_constant_maps_and_long_or_strange_names(scene):
    empty = Scene(scene.rgb, np.zeros_like(scene.xyz), np.zeros_like(scene.mask))
    flat = MapTile(np.ones((224, 224), np.float32), 1.0, 1.0)
    png = sample_picture(empty, flat, ["x" * 400, "日本 <b>\n\ud800é", ""])
    assert opened(png).shape[1] > 2000


def test_colours_rise_in_lightness():
    light = colour(np.linspace(0, 1, 100)) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(light) > 0).all() and colour(np.zeros((2, 3))).shape == (2, 3, 3)
