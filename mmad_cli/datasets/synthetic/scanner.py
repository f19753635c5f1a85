"""The scanner: a pinhole camera with a structured-light projector beside it.

`trace` finds what each pixel sees without any noise; `photograph` and `measure` turn that into the RGB image and the
organised point cloud that a real scanner would give, with its gaps and its noise.

Camera frame: X right, Y down, Z away from the camera. Lengths are in millimetres until the cloud is in metres.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmad_cli.datasets.synthetic.solids import Points, Solid, Values, gradient, noise
from mmad_cli.types import BoolArray, ByteArray, FloatArray

# Geometry after the calibration published with MVTec 3D-AD: about 94 mm field of view at 650 mm, view off the axis.
FOCAL_PER_PIXEL = 6.895
CENTRE_X = 0.135117
CENTRE_Y = 0.490175
TABLE_DISTANCE = 650.0
TABLE_SLOPE = (0.131, -0.383)
PROJECTOR = np.array([190.0, -15.0, 10.0])
EXPOSURE = 0.8
HIT = 0.02
BLOCK = 4
APPROACH_STEPS = 24
MARCH_STEPS = 60
SHADOW_STEPS = 36


@dataclass(frozen=True)
class View:
    """Camera rays in the frame of the part: point = origin + depth * direction, depth along the camera's Z in mm.

    `directions` is (3, H*W); `rays` are the same rays in the camera frame; `light` is the projector's place and
    `lamp` the unit direction to the lamp, both in the frame of the part.
    """

    size: int
    origin: Points
    directions: Points
    rays: Points
    projector: Points
    lamp: Points


@dataclass(frozen=True)
class Trace:
    """What each of the H*W pixels sees, free of noise.

    `depth` in mm, `part` true on the part (else the table), `normal` (3, H*W) outward, `points` (3, H*W) in the
    frame of the part.
    """

    depth: Values
    part: BoolArray
    normal: Points
    points: Points


def make_view(size: int, turn: float, shift: tuple[float, float], rng: np.random.Generator) -> View:
    """View of a part turned by `turn` radians and shifted on the table by `shift` mm; `rng` jitters the table."""
    focal = FOCAL_PER_PIXEL * size
    column = (np.arange(size) + 0.5 - CENTRE_X * size) / focal
    row = (np.arange(size) + 0.5 - CENTRE_Y * size) / focal
    rays = np.stack([np.tile(column, size), np.repeat(row, size), np.ones(size * size)])

    slope = np.array([*TABLE_SLOPE, -1.0]) + np.array([*(0.006 * rng.standard_normal(2)), 0.0])
    up = slope / np.sqrt((slope**2).sum())
    right = np.array([1.0, 0.0, 0.0]) - up[0] * up
    right /= np.sqrt((right**2).sum())
    forward = np.cross(up, right)
    middle = np.array([(0.5 - CENTRE_X) / FOCAL_PER_PIXEL, (0.5 - CENTRE_Y) / FOCAL_PER_PIXEL, 1.0])
    table = middle * (TABLE_DISTANCE + 1.5 * rng.standard_normal())

    cosine, sine = np.cos(turn), np.sin(turn)
    axes = np.stack([cosine * right + sine * forward, cosine * forward - sine * right, up])
    offset = shift[0] * right + shift[1] * forward

    def to_part(vectors: Points) -> Points:
        # written out: a matrix product may round differently with another number of threads
        turned: Points = axes[:, :1] * vectors[0] + axes[:, 1:2] * vectors[1] + axes[:, 2:3] * vectors[2]
        return turned

    origin = to_part((-(table + offset))[:, None])[:, 0]
    projector = to_part((middle * PROJECTOR[2] + np.array([PROJECTOR[0], PROJECTOR[1], 0.0]) - table - offset)[:, None])
    lamp = to_part(np.array([[0.22], [-0.20], [-1.0]]))[:, 0]
    return View(size, origin, to_part(rays), rays, projector[:, 0], lamp / np.sqrt((lamp**2).sum()))


def _bounds(solid: Solid, origin: Points, directions: Points) -> tuple[Values, Values]:
    """Entry and exit (N,) of rays with the bounding cylinder of a part; entry > exit where they miss it.

    `origin` is (3,) or (3, N).
    """
    start = origin.reshape(3, -1)
    squared = directions[0] ** 2 + directions[1] ** 2
    half = start[0] * directions[0] + start[1] * directions[1]
    inside = half**2 - squared * (start[0] ** 2 + start[1] ** 2 - solid.radius**2)
    root = np.sqrt(np.maximum(inside, 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        near, far = (-half - root) / squared, (-half + root) / squared
        low, high = -start[2] / directions[2], (solid.height - start[2]) / directions[2]
    entry = np.maximum(near, np.minimum(low, high))
    leave = np.minimum(far, np.maximum(low, high))
    return np.where(inside > 0, entry, 1.0), np.where(inside > 0, leave, 0.0)


def _near(ball: tuple[float, float, float, float], view: View) -> BoolArray:
    """True (H*W,) for the rays that pass through a ball."""
    offset = np.array(ball[:3]) - view.origin
    along = (view.directions * offset[:, None]).sum(0)
    squared = (offset**2).sum() - along**2 / (view.directions**2).sum(0)
    result: BoolArray = squared < ball[3] ** 2
    return result


def _approach(solid: Solid, view: View) -> Values:
    """Depth (H*W,) up to which no ray meets the part, found by marching one cone for each block of BLOCK^2 rays.

    A cone may go on while the distance to the part exceeds its radius: no ray of its block can have met the part.
    """
    size, count = view.size, -(-view.size // BLOCK)
    # the middle of a block that sticks out of the image is taken inside it, hence twice the half diagonal
    middle = np.minimum(np.arange(count) * BLOCK + BLOCK // 2, size - 1)
    pixels = (middle[:, None] * size + middle[None, :]).ravel()
    rays = view.directions[:, pixels]
    spread = BLOCK * np.sqrt(2) / (FOCAL_PER_PIXEL * size)
    length = np.sqrt((rays**2).sum(0))
    entry, leave = _bounds(solid, view.origin, rays)
    # a block may enter the bounds where its middle misses them: start above all of the part
    top = (solid.height - view.origin[2]) / rays[2]
    reached = np.minimum(np.where(entry < leave, np.minimum(entry, top), top), top)
    end = -view.origin[2] / rays[2]
    active = np.arange(pixels.size)
    for _ in range(APPROACH_STEPS):
        if active.size == 0:
            break
        where = reached[active]
        free = solid.distance(view.origin[:, None] + where * rays[:, active]) - spread * where
        go = free > HIT
        active, where, free = active[go], where[go], free[go]
        reached[active] = where + solid.step * free / length[active]
        active = active[reached[active] < end[active]]
    blocks = np.repeat(np.repeat(reached.reshape(count, count), BLOCK, axis=0), BLOCK, axis=1)
    return np.ascontiguousarray(blocks[:size, :size]).ravel()


def trace(solid: Solid, view: View, before: Trace | None = None) -> Trace:
    """First surface along every ray: sphere tracing of the part [Hart 1996, section 2.3], the table analytically.

    With `before`, the trace of the solid without its defect, only the rays that the defect can change are traced.
    """
    if before is None or solid.altered is None:
        chosen = np.arange(view.directions.shape[1])
    else:
        chosen = np.flatnonzero(_near(solid.altered, view))
    rays = view.directions[:, chosen]
    depth = -view.origin[2] / rays[2]
    part = np.zeros(chosen.size, dtype=np.bool_)
    normal = np.zeros((3, chosen.size))
    normal[2] = 1.0

    entry, leave = _bounds(solid, view.origin, rays)
    if chosen.size == view.directions.shape[1]:
        entry = np.maximum(entry, _approach(solid, view))
    active = np.flatnonzero(entry < leave)
    where, end = entry[active], leave[active]
    directions = np.ascontiguousarray(rays[:, active])
    length = np.sqrt((directions**2).sum(0))
    last_where, last_gap = where - 1.0, np.full(where.size, np.inf)
    for _ in range(MARCH_STEPS):
        if active.size == 0:
            break
        gap = solid.distance(view.origin[:, None] + where * directions)
        step = solid.step * gap / length
        # along the line through the last two values the distance reaches zero after `ahead`
        rate = (last_gap - gap) / (where - last_where)
        steady = (rate > 0.1) & np.isfinite(rate)
        ahead = np.divide(gap, rate, out=step.copy(), where=steady & (gap < 1.0))
        hit = np.abs(gap) < HIT
        part[active[hit]] = True
        depth[active[hit]] = where[hit] + np.clip(ahead[hit], -HIT, HIT)
        last_where, last_gap = where, gap
        # a step too far is taken back
        where = where + np.where(gap > 0, np.clip(ahead, step, 2.5 * step), step)
        go = ~hit & (where < end)
        active, where, end, length = active[go], where[go], end[go], length[go]
        last_where, last_gap, directions = last_where[go], last_gap[go], directions[:, go]

    points = view.origin[:, None] + depth * rays
    if part.any():
        normal[:, part] = gradient(solid, points[:, part])
    if before is None or chosen.size == before.depth.size:
        return Trace(depth, part, normal, points)
    after = Trace(before.depth.copy(), before.part.copy(), before.normal.copy(), before.points.copy())
    after.depth[chosen], after.part[chosen] = depth, part
    after.normal[:, chosen], after.points[:, chosen] = normal, points
    return after


def lit(solid: Solid, view: View, points: Points, normal: Points) -> BoolArray:
    """True (N,) where the projector reaches surface points (3, N) with outward normals (3, N)."""
    start = points + 0.35 * normal
    directions = view.projector[:, None] - start
    directions /= np.sqrt((directions**2).sum(0))
    facing = (directions * normal).sum(0) > 0.05
    entry, leave = _bounds(solid, start, directions)
    shadow = ~facing
    active = np.flatnonzero(facing & (leave > np.maximum(entry, 0)))
    where, end = np.maximum(entry[active], 0.0), leave[active]
    start, directions = start[:, active], directions[:, active]
    for _ in range(SHADOW_STEPS):
        if active.size == 0:
            break
        gap = solid.distance(start + where * directions)
        dark = gap < HIT
        shadow[active[dark]] = True
        where = where + np.maximum(1.2 * solid.step * gap, 0.3)
        go = ~dark & (where < end)
        active, where, end = active[go], where[go], end[go]
        start, directions = start[:, go], directions[:, go]
    reached: BoolArray = ~shadow
    return reached


def shade(solid: Solid, view: View, seen: Trace) -> tuple[Points, Values]:
    """Linear colour (3, H*W) under soft light, and the strength (H*W,) of the mirror reflection of the projector.

    Wide frontal light as at an inspection station: 55 % of it from everywhere (dimmed in hollows), the rest from a
    lamp near the camera, with Lambert's law and a Blinn-Phong highlight.
    """
    colour = np.full((3, seen.depth.size), 0.0)
    cloth = 0.0011 * (1 + 0.25 * noise(seen.points, 0.3))
    colour += np.array([0.9, 1.0, 1.1])[:, None] * cloth
    glare = np.zeros(seen.depth.size)
    on = np.flatnonzero(seen.part)
    if on.size == 0:
        return colour, glare
    points, normal = seen.points[:, on], seen.normal[:, on]
    towards = -view.directions[:, on]
    towards = towards / np.sqrt((towards**2).sum(0))

    open_sky = np.ones(on.size)
    for reach, weight in ((1.2, 0.30), (3.5, 0.25)):
        open_sky -= weight * np.clip(1 - solid.distance(points + reach * normal) / reach, 0, 1)
    diffuse = 0.55 * open_sky + 0.45 * np.maximum((normal * view.lamp[:, None]).sum(0), 0) * open_sky
    halfway = towards + view.lamp[:, None]
    halfway /= np.sqrt((halfway**2).sum(0))
    highlight = solid.specular * np.maximum((halfway * normal).sum(0), 0) ** solid.gloss
    colour[:, on] = EXPOSURE * (solid.albedo(points) * diffuse + 0.35 * highlight)

    beam = view.projector[:, None] - points
    beam /= np.sqrt((beam**2).sum(0))
    halfway = towards + beam
    halfway /= np.sqrt((halfway**2).sum(0))
    glare[on] = solid.specular * np.maximum((halfway * normal).sum(0), 0) ** (6 * solid.gloss)
    return colour, glare


def photograph(colour: Points, size: int, rng: np.random.Generator) -> ByteArray:
    """RGB image uint8 (H, W, 3) of linear colours (3, H*W): lens blur, exposure, gamma 2.2 and sensor noise."""
    from scipy import ndimage

    image = colour.reshape(3, size, size)
    image = ndimage.gaussian_filter(image, (0.0, 0.5, 0.5), mode="nearest").transpose(1, 2, 0)
    image = image * (1 + 0.02 * rng.standard_normal()) * (1 + 0.008 * rng.standard_normal(3))
    image = np.clip(image, 0, 1) ** (1 / 2.2) * 255
    image = image + 1.3 * rng.standard_normal(image.shape, dtype=np.float32)
    result: ByteArray = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    return result


def measure(
    seen: Trace, reached: BoolArray, glare: Values, darkness: Values, view: View, rng: np.random.Generator
) -> FloatArray:
    """Organised cloud (H, W, 3) in metres as a structured-light scanner gives it; invalid pixels are (0, 0, 0).

    Depth noise grows with slope and on the dark table (0.04 mm frontal, 0.6 mm table). Points are missing where the
    projector does not reach, at grazing angles, at depth steps, in mirror reflections, on dark spots (`darkness`
    0 to 1) and on nearly half of the table.
    """
    from scipy import ndimage

    size = view.size
    chance = rng.random(size * size)
    white = rng.standard_normal((2, size, size))
    phases = rng.uniform(0, 2 * np.pi, 2)
    stray = (rng.random(size * size) < 0.0015) & ~seen.part
    flight = rng.exponential(8.0, size * size)

    towards = view.rays / np.sqrt((view.rays**2).sum(0))
    slope = np.abs((seen.normal * view.directions).sum(0)) / np.sqrt((view.directions**2).sum(0))
    windowed = ndimage.gaussian_filter(white[1], 0.8, mode="nearest")
    # matching windows overlap, so part of the error is shared by neighbours
    error = (0.5 * white[0] + 2.2 * windowed).ravel()
    sigma = np.where(seen.part, 0.022 + 0.016 / np.maximum(slope, 0.15), 0.36)
    # a few wrong matches float above the table
    depth = seen.depth + sigma * error - stray * flight
    depth = np.rint(depth / 0.005) * 0.005

    rows = np.repeat(np.arange(size), size) * 400 / size
    columns = np.tile(np.arange(size), size) * 400 / size
    # rectified scanners lose the dark table in a lattice, not in white noise
    lattice = 0.16 * np.cos(2 * np.pi * rows / 2.83 + phases[0]) + 0.16 * np.cos(2 * np.pi * columns / 2.71 + phases[1])
    lose = np.where(seen.part, 0.003, 0.43 + lattice)
    lose = np.maximum(lose, np.where(seen.part, np.clip((0.30 - slope) / 0.16, 0, 1), 0))
    plane = seen.depth.reshape(size, size)
    step = ndimage.maximum_filter(plane, 3, mode="nearest") - ndimage.minimum_filter(plane, 3, mode="nearest")
    lose = np.maximum(lose, 0.75 * (step.ravel() > 4.5 * np.sqrt(256 / size)))
    lose = np.maximum(lose, np.clip((glare - 0.10) / 0.12, 0, 0.95))
    lose = np.maximum(lose, 0.35 * darkness * seen.part)
    valid = reached & (chance >= lose)

    cloud = np.where(valid, towards * np.sqrt((view.rays**2).sum(0)) * depth * 1e-3, 0.0)
    return np.ascontiguousarray(cloud.T.reshape(size, size, 3), dtype=np.float32)


def darkness(solid: Solid, seen: Trace) -> NDArray[np.float64]:
    """How dark (0 to 1) the material of each pixel is to the projector, (H*W,)."""
    result = np.zeros(seen.depth.size)
    on = np.flatnonzero(seen.part)
    if on.size:
        result[on] = np.clip((0.07 - solid.albedo(seen.points[:, on]).mean(0)) / 0.05, 0, 1)
    return result
