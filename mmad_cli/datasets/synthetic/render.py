"""One sample: draws the part, places the defect, scans it and says exactly which pixels are defective."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmad_cli.datasets.synthetic import scanner
from mmad_cli.datasets.synthetic.defects import DEFECTS, DefectKind, Site, make_site
from mmad_cli.datasets.synthetic.parts import CATEGORIES, Category
from mmad_cli.datasets.synthetic.scanner import Trace, View
from mmad_cli.datasets.synthetic.solids import Solid, gradient, stream
from mmad_cli.types import GOOD, BoolArray, ByteArray, FloatArray

# A pixel is defective where the surface moved by more than this (mm), or the colour by more than that.
SURFACE_THRESHOLD = 0.3
COLOUR_THRESHOLD = 0.03
# Defects sit above this height (mm): cleaning removes what is within 5 mm of the table.
LOWEST_SITE = 7.5
SMALLEST_MASK = 40
ATTEMPTS = 40


@dataclass(frozen=True)
class Scene:
    """A part before the camera, with and without its defect, free of noise. For a good sample both are the same."""

    view: View
    sound: Solid
    solid: Solid
    sound_trace: Trace
    trace: Trace
    mask: BoolArray
    severity: float


def _severity(category: str, defect: str, index: int, seed: int, rng: np.random.Generator) -> float:
    """Severity 0 to 1, spread evenly over consecutive indices (steps of the golden ratio) with some jitter."""
    start = stream("synthetic severity", seed, category, defect).random()
    return float(np.clip((start + 0.618034 * index) % 1 + rng.uniform(-0.1, 0.1), 0, 1))


def changed(kind: DefectKind, sound: Solid, solid: Solid, before: Trace, after: Trace) -> BoolArray:
    """Exact mask (H*W,): pixels where the seen surface moved by more than 0.3 mm or changed its colour.

    A pixel counts where the surface seen now lies off the sound part, or (unless the defect displaces a part) where
    the surface that a sound part would show there is gone.
    """
    mask = np.zeros(after.depth.size, dtype=np.bool_)
    now = np.flatnonzero(after.part)
    if kind.shows != "rgb":
        mask[now] = np.abs(sound.distance(after.points[:, now])) > SURFACE_THRESHOLD
        if not kind.displaces:
            then = np.flatnonzero(before.part)
            mask[then] |= np.abs(solid.distance(before.points[:, then])) > SURFACE_THRESHOLD
    if kind.shows != "3d" and not kind.displaces:
        points = after.points[:, now]
        difference = np.abs(solid.albedo(points) - sound.albedo(points)).max(0)
        mask[now] |= difference > COLOUR_THRESHOLD
    return mask


def _candidates(kind: DefectKind, view: View, seen: Trace) -> BoolArray:
    """Pixels (H*W,) where the defect may be placed: on the part, high enough, facing the camera."""
    from scipy import ndimage

    facing = -(seen.normal * view.directions).sum(0) / np.sqrt((view.directions**2).sum(0))
    fit: BoolArray = seen.part & (seen.points[2] > LOWEST_SITE) & (facing > 0.55)
    plane = seen.depth.reshape(view.size, view.size)
    width = 2 * max(2, round(view.size * (6 if kind.edge else 10) / 256)) + 1
    part = seen.part.reshape(view.size, view.size)
    inner = ndimage.minimum_filter(part, width, mode="constant", cval=False)
    step = ndimage.maximum_filter(plane, 3) - ndimage.minimum_filter(plane, 3)
    fit &= inner.ravel() & (step < 3 * max(1.0, 256 / view.size)).ravel()
    if kind.edge:
        # near the outline, but not so near that nothing of the tool touches the part
        core = ndimage.minimum_filter(part, 3 * width, mode="constant", cval=False)
        rim = fit & ~core.ravel()
        # the rim of some parts is too low
        return rim if rim.any() else fit
    return fit


def _place(sound: Solid, view: View, seen: Trace, pixel: int, rng: np.random.Generator) -> Site | None:
    """A site at the given pixel, turned at random; None where the projector does not reach it."""
    point = seen.points[:, pixel]
    # the normal of the form, not of its grain
    normal = gradient(sound, point[:, None], epsilon=0.8)
    angle = float(rng.uniform(0, 2 * np.pi))
    if not scanner.lit(sound, view, point[:, None], normal)[0]:
        return None
    return make_site(point, normal[:, 0], angle)


def _pose(category: Category, size: int, rng: np.random.Generator) -> View:
    turn = float(np.deg2rad(rng.uniform(-category.turn, category.turn)))
    shift = rng.uniform(-category.shift, category.shift, 2)
    return scanner.make_view(size, turn, (float(shift[0]), float(shift[1])), rng)


def make_scene(category: str, split: str, defect: str, index: int, size: int, seed: int) -> Scene:
    """Scene of one sample; depends on the arguments only.

    Raises RuntimeError if no place for the defect is found, which would be a fault of the generator.
    """
    kind_of_part = CATEGORIES[category]
    key = ("synthetic", seed, category, split, defect, index)
    sound = kind_of_part.build(stream(*key, "part"))
    view = _pose(kind_of_part, size, stream(*key, "pose"))
    before = scanner.trace(sound, view)
    if defect == GOOD:
        return Scene(view, sound, sound, before, before, np.zeros(size * size, dtype=np.bool_), 0.0)

    kind = DEFECTS[defect]
    rng = stream(*key, "defect")
    severity = _severity(category, defect, index, seed, rng)
    where = np.flatnonzero(_candidates(kind, view, before))
    smallest = max(8.0, SMALLEST_MASK * (size / 256) ** 2)
    for _ in range(ATTEMPTS if where.size else 0):
        site = _place(sound, view, before, int(rng.choice(where)), rng)
        if site is None:
            continue
        solid = kind.apply(sound, site, severity, rng)
        after = before if kind.shows == "rgb" else scanner.trace(solid, view, before)
        mask = changed(kind, sound, solid, before, after)
        if mask.sum() >= smallest:
            return Scene(view, sound, solid, before, after, mask, severity)
        # too little to be seen: elsewhere, and a little more of it
        severity = min(severity + 0.04, 1.0)
    raise RuntimeError(f"synthetic sample {category}/{split}/{defect}/{index:03d}: no visible place for the defect")


def scan(scene: Scene, rng: np.random.Generator, sound: bool = False) -> tuple[ByteArray, FloatArray]:
    """What the scanner gives of a scene, rgb uint8 (H, W, 3) and xyz float32 (H, W, 3) in metres.

    With `sound` it looks at the part without its defect: with an equal generator that is the twin of the defective
    scan, equal wherever the defect changed nothing.
    """
    solid, seen = (scene.sound, scene.sound_trace) if sound else (scene.solid, scene.trace)
    colour, glare = scanner.shade(solid, scene.view, seen)
    reached = scanner.lit(solid, scene.view, seen.points, seen.normal)
    # by the colour of the sound part: a discoloured patch must leave the cloud alone
    dark = scanner.darkness(scene.sound, seen)
    rgb = scanner.photograph(colour, scene.view.size, rng)
    return rgb, scanner.measure(seen, reached, glare, dark, scene.view, rng)


def render(
    category: str, split: str, defect: str, index: int, size: int, seed: int
) -> tuple[ByteArray, FloatArray, BoolArray]:
    """One sample: rgb uint8 (H, W, 3), xyz float32 (H, W, 3) in metres with gaps of (0, 0, 0), mask bool (H, W)."""
    scene = make_scene(category, split, defect, index, size, seed)
    rgb, xyz = scan(scene, stream("synthetic", seed, category, split, defect, index, "sensor"))
    return rgb, xyz, scene.mask.reshape(size, size)
