"""One picture of one sample: image, depth, ground truth and anomaly map side by side, with the score.

As PNG, or as text for a terminal that shows 24-bit colours.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from mmad_cli.preprocessing.resize import resize_mask, resize_rgb
from mmad_cli.reports.html import Scene
from mmad_cli.reports.html.encode import axis_signs, depth_image
from mmad_cli.types import BoolArray, ByteArray, FloatArray

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

SIDE = 320
_GAP = 12
_TITLE = 22
_LINE = 19
_BAR = 14
_BAR_LABELS = 64

# In a terminal a tile is as wide as fits, in characters; two pixels lie above each other in one character
_NARROWEST_TILE = 24
_WIDEST_TILE = 56
_HALF_BLOCK = "▀"
_RESET = "\x1b[0m"

_INK = (28, 30, 34)
_GREY = (100, 104, 112)
_PAPER = (255, 255, 255)
_OUTLINE = (0, 220, 255)

# Dark to light through purple, red and yellow: readable in grey and by the colour-blind
_COLOURS = (
    (0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85),
    (227, 89, 51), (249, 140, 10), (249, 201, 50), (252, 255, 164),
)  # fmt: skip

# Of the map over the image, where it is lowest and where it is highest
_OPACITY = (0.25, 0.85)


@dataclass(frozen=True)
class MapTile:
    """An anomaly map float32 (H, W) and the limits of its colours."""

    values: FloatArray
    low: float
    high: float


def sample_picture(scene: Scene | None, heat: MapTile | None, texts: Sequence[str]) -> bytes:
    """PNG of the tiles that there is something for, below the lines of text.

    The ground truth is drawn as an outline on the image and on the map. Raises ValueError when there is neither a scan
    nor a map.
    """
    from PIL import Image, ImageDraw

    tiles = _tiles(scene, heat)

    bar = _GAP + _BAR + _BAR_LABELS if heat is not None else 0
    text_width = max((_text_length(text, _LINE - 4) for text in texts), default=0)
    width = max(len(tiles) * (SIDE + _GAP) + bar, text_width + _GAP) + _GAP
    top = _GAP + _LINE * len(texts) + _GAP
    picture = Image.new("RGB", (width, top + _TITLE + SIDE + _GAP), _PAPER)
    draw = ImageDraw.Draw(picture)
    for number, text in enumerate(texts):
        draw.text((_GAP, _GAP + number * _LINE), text, fill=_INK if number == 0 else _GREY, font=_font(_LINE - 4))
    for number, (title, tile) in enumerate(tiles):
        left = _GAP + number * (SIDE + _GAP)
        draw.text((left, top), title, fill=_INK, font=_font(14))
        picture.paste(Image.fromarray(tile), (left, top + _TITLE))
    if heat is not None:
        _draw_bar(picture, _GAP + len(tiles) * (SIDE + _GAP), top + _TITLE, heat)
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def sample_text(scene: Scene | None, heat: MapTile | None, texts: Sequence[str], columns: int) -> str:
    """The same tiles as coloured half blocks, as many beside each other as fit into `columns` characters.

    The limits of the map's colours stand in its title. Raises ValueError when there is neither a scan nor a map.
    """
    tiles = _tiles(scene, heat)
    if heat is not None:
        title, tile = tiles[-1]
        tiles[-1] = (f"{title} {heat.low:.3g}-{heat.high:.3g}", tile)
    beside = max(1, min(len(tiles), (columns + 1) // (_NARROWEST_TILE + 1)))
    side = max(2, min(_WIDEST_TILE, (columns + 1) // beside - 1) // 2 * 2)
    lines = list(texts)
    for start in range(0, len(tiles), beside):
        row = tiles[start : start + beside]
        lines.append(" ".join(title[:side].ljust(side) for title, _ in row).rstrip())
        lines += [" ".join(parts) for parts in zip(*(_half_blocks(tile, side) for _, tile in row), strict=True)]
    return "\n".join(lines) + "\n"


def _half_blocks(tile: ByteArray, side: int) -> list[str]:
    """Lines of `side` characters: the upper pixel in the colour of the letter, the lower one in that of the ground."""
    from PIL import Image

    small = np.asarray(Image.fromarray(tile).resize((side, side), Image.Resampling.BOX))
    return [
        "".join(
            f"\x1b[38;2;{a};{b};{c};48;2;{d};{e};{f}m{_HALF_BLOCK}"
            for (a, b, c), (d, e, f) in zip(upper.tolist(), lower.tolist(), strict=True)
        )
        + _RESET
        for upper, lower in zip(small[::2], small[1::2], strict=True)
    ]


def _tiles(scene: Scene | None, heat: MapTile | None) -> list[tuple[str, ByteArray]]:
    if scene is None and heat is None:
        raise ValueError("scene and heat must not both be None")
    tiles = []
    image: ByteArray | None = None
    outline: BoolArray | None = None
    if scene is not None:
        image = resize_rgb(scene.rgb, (SIDE, SIDE))
        mask = resize_mask(scene.mask, (SIDE, SIDE))
        outline = _outline(mask)
        grey = depth_image(scene.xyz, axis_signs(scene.xyz))
        depth = resize_rgb(np.repeat(grey[..., None], 3, axis=2), (SIDE, SIDE))
        truth = np.where(mask[..., None], np.uint8(255), image // 3)
        title = "ground truth" if mask.any() else "ground truth: no defect"
        tiles = [("image", image), ("depth, near is light", depth), (title, truth)]
    if heat is not None:
        tiles.append(("anomaly map", _overlay(heat, image, outline)))
    return tiles


def _overlay(heat: MapTile, image: ByteArray | None, outline: BoolArray | None) -> ByteArray:
    from PIL import Image

    small = Image.fromarray(np.asarray(heat.values, dtype=np.float32))
    values = np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BILINEAR), dtype=np.float64)
    share = (
        np.clip((values - heat.low) / (heat.high - heat.low), 0, 1) if heat.high > heat.low else np.zeros_like(values)
    )
    colours = colour(share)
    if image is not None:
        opacity = (_OPACITY[0] + (_OPACITY[1] - _OPACITY[0]) * share)[..., None]
        grey = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2)
        colours = opacity * colours + (1 - opacity) * grey
    tile: ByteArray = np.rint(colours).astype(np.uint8)
    if outline is not None:
        tile[outline] = _OUTLINE
    return tile


def colour(share: Any) -> Any:
    """Colours float64 (..., 3) from 0 to 255 for values (...) from 0 to 1."""
    places = np.linspace(0, 1, len(_COLOURS))
    table = np.array(_COLOURS, dtype=np.float64)
    return np.stack([np.interp(share, places, table[:, channel]) for channel in range(3)], axis=-1)


def _outline(mask: BoolArray) -> BoolArray:
    """Pixels outside of the mask (H, W) that touch it."""
    padded = np.pad(mask, 1)
    near = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return np.asarray(near & ~mask)


def _draw_bar(picture: Picture, left: int, top: int, heat: MapTile) -> None:
    from PIL import Image, ImageDraw

    shades = colour(np.linspace(1, 0, SIDE))
    bar = np.repeat(np.rint(shades).astype(np.uint8)[:, None], _BAR, axis=1)
    picture.paste(Image.fromarray(bar), (left, top))
    draw = ImageDraw.Draw(picture)
    for share in (0.0, 0.5, 1.0):
        value = heat.low + share * (heat.high - heat.low)
        y = top + round((1 - share) * (SIDE - 1))
        draw.line([(left + _BAR, y), (left + _BAR + 4, y)], fill=_GREY)
        draw.text((left + _BAR + 7, y), f"{value:.3g}", fill=_INK, font=_font(12), anchor="lm")


@cache
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _text_length(text: str, size: int) -> int:
    return int(_font(size).getlength(text)) + 1
