"""The categories: what each part looks like and how one differs from the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mmad_cli.datasets.synthetic.solids import (
    Colour,
    Points,
    Solid,
    Values,
    ellipsoid,
    mix,
    noise,
    paint,
    profile,
    rectangle,
    roughen,
    smooth_union,
    smoothstep,
)


@dataclass(frozen=True)
class Category:
    """A kind of part: `build` draws one from a random generator, poses vary by `turn` degrees and `shift` mm."""

    name: str
    description: str
    defects: tuple[str, ...]
    build: Callable[[np.random.Generator], Solid]
    turn: float = 10.0
    shift: float = 3.0


def _tint(rng: np.random.Generator, colour: Colour, spread: float = 0.04) -> Colour:
    """The colour of one specimen: brightness and hue differ a little between specimens."""
    factors = (1 + spread * rng.standard_normal()) * (1 + 0.3 * spread * rng.standard_normal(3))
    red, green, blue = np.clip(np.asarray(colour) * factors, 0.01, 0.95)
    return float(red), float(green), float(blue)


def _shift(rng: np.random.Generator) -> Points:
    """Random place in the periodic noise field, so that no two specimens share their texture."""
    return rng.uniform(0, 64, 3)


def build_flange(rng: np.random.Generator) -> Solid:
    """Turned metal flange: plate, hub, bore and six bolt holes."""
    colour, texture = _tint(rng, (0.46, 0.46, 0.48)), _shift(rng)
    scale = 1 + 0.006 * rng.standard_normal()

    def distance(points: Points) -> Values:
        radial = np.sqrt(points[0] ** 2 + points[1] ** 2)
        plate = profile(radial - 31 * scale, points[2], 0, 11, 0.8)
        hub = profile(radial - 16.5 * scale, points[2], 0, 21, 0.8)
        body = smooth_union(plate, hub, 2.5)
        body = np.maximum(body, 9.5 * scale - radial)
        sector = np.arctan2(points[1], points[0])
        sector = (sector + np.pi / 6) % (np.pi / 3) - np.pi / 6
        across = radial * np.sin(sector)
        along = radial * np.cos(sector) - 24.2 * scale
        body = np.maximum(body, 2.9 - np.sqrt(across**2 + along**2))
        return roughen(body + 0.05 * np.sin(radial * 4.2), points, lambda p: 0.04 * noise(p, 0.5, texture), 0.3)

    def albedo(points: Points) -> Points:
        radial = np.sqrt(points[0] ** 2 + points[1] ** 2)
        rings = noise(np.stack([radial * 4, points[2], np.zeros_like(radial)]), 1.0, texture)
        return paint(colour, points.shape[1]) * (1 + 0.05 * rings + 0.04 * noise(points, 1.5, texture))

    return Solid(distance, albedo, radius=33, height=22, specular=0.16, gloss=10)


def build_gear(rng: np.random.Generator) -> Solid:
    """Moulded gear wheel with 20 teeth, recessed web and keyed bore."""
    colour, texture = _tint(rng, (0.62, 0.58, 0.47)), _shift(rng)
    scale = 1 + 0.006 * rng.standard_normal()

    def distance(points: Points) -> Values:
        radial = np.sqrt(points[0] ** 2 + points[1] ** 2)
        angle = np.arctan2(points[1], points[0])
        teeth = 2.3 * np.clip(1.5 * np.sin(20 * angle), -1, 1)
        rim = profile(0.8 * (radial - 29 * scale - teeth), points[2], 0, 15, 0.6)
        web = np.maximum(np.abs(radial - 17.5 * scale) - 5.5, 10.5 - points[2])
        body = np.maximum(rim, -web)
        bore = np.minimum(radial - 6.5, rectangle(points[0], points[1] - 6.5, 1.6, 2.2))
        return roughen(np.maximum(body, -bore), points, lambda p: 0.05 * noise(p, 0.5, texture), 0.3)

    def albedo(points: Points) -> Points:
        return paint(colour, points.shape[1]) * (1 + 0.04 * noise(points, 1.2, texture))

    return Solid(distance, albedo, radius=33, height=16, step=0.75, specular=0.12, gloss=14)


def build_bracket(rng: np.random.Generator) -> Solid:
    """Painted steel bracket: a plate on two legs, with a slot, two holes and free ends that can be bent."""
    colour, texture = _tint(rng, (0.16, 0.30, 0.46)), _shift(rng)
    half_length = 34 + 0.3 * rng.standard_normal()

    def distance(points: Points) -> Values:
        x, y, z = points
        outline = rectangle(x, y, half_length, 17, 4)
        outline = np.maximum(outline, -(rectangle(x, y, 8, 2.6, 2.5)))
        outline = np.maximum(outline, 3.4 - np.sqrt((np.abs(x) - 26) ** 2 + y**2))
        plate = profile(outline, z, 13.5, 17, 0.7)
        legs = np.maximum(np.abs(np.abs(x) - 17) - 1.8, np.maximum(np.abs(y) - 17, np.abs(z - 8) - 8))
        rib = np.maximum(np.sqrt((np.abs(y) - 10) ** 2 + (z - 16.4) ** 2) - 2.2, np.abs(x) - 15)
        body = smooth_union(smooth_union(plate, legs, 2), rib, 1.5)
        return roughen(body, points, lambda p: 0.05 * noise(p, 0.35, texture), 0.3)

    def albedo(points: Points) -> Points:
        return paint(colour, points.shape[1]) * (1 + 0.06 * noise(points, 0.5, texture))

    folds = ((20.5, 0.0, 1.0, 0.0), (-20.5, 0.0, -1.0, 0.0))
    return Solid(distance, albedo, radius=39, height=19, specular=0.18, gloss=30, folds=folds)


Arc = tuple[float, float, float, float, float, float]


def _arcs(rng: np.random.Generator) -> list[Arc]:
    """Smooth plane curve of three arcs: centre x and y, signed radius, first angle, swept angle, arc length before."""
    sign = float(rng.choice([-1.0, 1.0]))
    heading, x, y, travelled = float(rng.uniform(-0.25, 0.25)) - sign * 0.5, 0.0, 0.0, 0.0
    arcs: list[Arc] = []
    for turn in (sign * rng.uniform(0.8, 1.2), -sign * rng.uniform(0.9, 1.3), sign * rng.uniform(0.4, 0.9)):
        length = 23.0
        radius = length / float(turn)
        # the centre lies to the left of the heading where the turn is positive
        centre_x, centre_y = x - radius * np.sin(heading), y + radius * np.cos(heading)
        arcs.append((centre_x, centre_y, radius, heading, float(turn), travelled))
        heading += float(turn)
        x, y = centre_x + radius * np.sin(heading), centre_y - radius * np.cos(heading)
        travelled += length
    ends = np.array([[arc[0] + arc[2] * np.sin(arc[3]), arc[1] - arc[2] * np.cos(arc[3])] for arc in arcs] + [[x, y]])
    middle_x, middle_y = (ends.min(0) + ends.max(0)) / 2
    return [(a[0] - middle_x, a[1] - middle_y, *a[2:]) for a in arcs]


def _arc_distance(x: Values, y: Values, arc: Arc) -> tuple[Values, Values]:
    """Distance in the plane to an arc, and the arc length at the nearest point of it."""
    centre_x, centre_y, radius, heading, turn, before = arc
    side = np.sign(radius)
    dx, dy = x - centre_x, y - centre_y
    middle = heading + turn / 2
    # in this frame the middle of the arc lies on the first axis
    along = side * (dx * np.sin(middle) - dy * np.cos(middle))
    across = side * (dx * np.cos(middle) + dy * np.sin(middle))
    offset = np.arctan2(across, along)
    half = abs(turn) / 2
    nearest = np.clip(offset, -half, half)
    reach = abs(radius)
    gap = np.sqrt((along - reach * np.cos(nearest)) ** 2 + (across - reach * np.sin(nearest)) ** 2)
    return gap, before + reach * (half + side * nearest)


def build_hose(rng: np.random.Generator) -> Solid:
    """Ribbed rubber hose with end fittings, lying in a curve that no two specimens share."""
    colour, mark, texture = _tint(rng, (0.50, 0.14, 0.07)), _tint(rng, (0.20, 0.20, 0.22)), _shift(rng)
    arcs = _arcs(rng)
    total = arcs[-1][5] + abs(arcs[-1][2] * arcs[-1][4])
    thickness = 7.4 + 0.1 * rng.standard_normal()

    def along(points: Points) -> tuple[Values, Values]:
        gap, length = _arc_distance(points[0], points[1], arcs[0])
        for arc in arcs[1:]:
            other, other_length = _arc_distance(points[0], points[1], arc)
            nearer = other < gap
            gap, length = np.where(nearer, other, gap), np.where(nearer, other_length, length)
        return gap, length

    def distance(points: Points) -> Values:
        gap, length = along(points)
        ends = np.minimum(length, total - length)
        fitting = 1 - smoothstep(8.5, 9.5, ends)
        ribs = 0.35 * np.sin(2 * np.pi * length / 4.0) * (1 - fitting)
        body = np.sqrt(gap**2 + (points[2] - 8.6) ** 2) - thickness - ribs - 1.1 * fitting
        return roughen(body, points, lambda p: 0.06 * noise(p, 0.4, texture), 0.3)

    def albedo(points: Points) -> Points:
        _, length = along(points)
        ends = np.minimum(length, total - length)
        rubber = paint(colour, points.shape[1]) * (1 + 0.07 * noise(points, 0.6, texture))
        return mix(rubber, paint(mark, points.shape[1]), 1 - smoothstep(8.6, 9.2, ends))

    first, last = arcs[0], arcs[-1]
    folds = tuple(
        (
            arc[0] + arc[2] * np.sin(angle),
            arc[1] - arc[2] * np.cos(angle),
            direction * np.cos(angle),
            direction * np.sin(angle),
        )
        for arc, angle, direction in (
            (first, first[3] + 0.75 * first[4], -1.0),
            (last, last[3] + 0.25 * last[4], 1.0),
        )
    )
    return Solid(distance, albedo, radius=46, height=18, step=0.8, specular=0.06, gloss=8, folds=folds)


def build_pouch(rng: np.random.Generator) -> Solid:
    """Filled plastic pouch with sealed edges, wrinkles and a printed label."""
    base, print_colour = _tint(rng, (0.62, 0.62, 0.58)), _tint(rng, (0.55, 0.10, 0.12))
    second, texture = _tint(rng, (0.10, 0.32, 0.20)), _shift(rng)
    fill = 14.5 + 0.8 * rng.standard_normal()
    lean = rng.uniform(-0.12, 0.12, 2)

    def distance(points: Points) -> Values:
        x, y, z = points
        u, v = np.clip(x / 33, -1, 1), np.clip(y / 25, -1, 1)
        dome = (1 - u * u) * (1 - v * v)
        wrinkle = noise(np.stack([x * 0.45, y * 1.2, np.full_like(x, 3.0)]), 0.9, texture)
        seam = noise(np.stack([x, y * 0.25, np.full_like(x, 9.0)]), 0.45, texture)
        edge = np.minimum(dome * 6, 1) * (1.15 - dome)
        height = 1.2 + fill * dome**0.75 * (1 + lean[0] * u + lean[1] * v)
        height = height + 0.55 * edge * wrinkle + 0.25 * edge * seam
        film: Values = np.maximum(
            np.maximum(z - height, -z) * 0.8, rectangle(x, y, 35, 27, 1.5) + 0.2 * noise(points, 0.7, texture)
        )
        return film

    def albedo(points: Points) -> Points:
        x, y, count = points[0], points[1], points.shape[1]
        colours = paint(base, count)
        colours = mix(colours, paint(second, count), smoothstep(-8.4, -8.0, -np.abs(y + 15)) * (np.abs(y + 15) < 3))
        colours = mix(colours, paint(print_colour, count), 1 - smoothstep(9.6, 10.0, np.sqrt(x * x + (y - 3) ** 2)))
        ring = np.abs(np.sqrt(x * x + (y - 3) ** 2) - 6)
        colours = mix(colours, paint(base, count), 1 - smoothstep(0.9, 1.2, ring))
        return colours * (1 + 0.03 * noise(points, 1.0, texture))

    return Solid(distance, albedo, radius=45, height=20, step=0.6, specular=0.22, gloss=40)


def build_nugget(rng: np.random.Generator) -> Solid:
    """Breaded nugget: an irregular lump, every one of another shape."""
    colour, crust, texture = _tint(rng, (0.55, 0.30, 0.10), 0.08), _tint(rng, (0.28, 0.12, 0.04)), _shift(rng)
    lumps = []
    for index in range(4):
        angle = index * np.pi / 2 + rng.uniform(-0.6, 0.6)
        reach = rng.uniform(6, 14)
        centre = np.array([reach * np.cos(angle) * 1.25, reach * np.sin(angle) * 0.9, rng.uniform(8, 10)])
        lumps.append((centre, np.array([rng.uniform(14, 19), rng.uniform(12, 17), rng.uniform(8.5, 11)])))

    def crumbs(points: Points) -> Values:
        return 0.45 * noise(points, 0.9, texture) + 0.2 * noise(points, 0.25, texture)

    def distance(points: Points) -> Values:
        body = ellipsoid(points - lumps[0][0][:, None], lumps[0][1])
        for centre, radii in lumps[1:]:
            body = smooth_union(body, ellipsoid(points - centre[:, None], radii), 6)
        return roughen(body, points, crumbs, 2.2)

    def albedo(points: Points) -> Points:
        count = points.shape[1]
        blotches = smoothstep(0.2, 1.6, noise(points, 1.2, texture[::-1]))
        colours = mix(paint(colour, count), paint(crust, count), 0.6 * blotches)
        return colours * (1 - 0.16 * noise(points, 0.25, texture))

    interior = (0.72, 0.60, 0.42)
    return Solid(distance, albedo, radius=40, height=24, step=0.7, specular=0.05, gloss=10, interior=interior)


def build_biscuit(rng: np.random.Generator) -> Solid:
    """Biscuit with chocolate chips and an uneven outline."""
    colour, chocolate, texture = _tint(rng, (0.60, 0.40, 0.20), 0.07), _tint(rng, (0.09, 0.045, 0.025)), _shift(rng)
    chips = []
    for index in range(12):
        # sunflower spacing keeps the chips apart without a search
        angle, reach = index * 2.399963 + rng.uniform(-0.25, 0.25), 26.5 * np.sqrt((index + 0.5) / 12)
        radius = rng.uniform(2.4, 3.8)
        chips.append((reach * np.cos(angle), reach * np.sin(angle), radius))

    def chip_distance(points: Points) -> Values:
        nearest = np.full(points.shape[1], 99.0)
        for x, y, radius in chips:
            radial = np.sqrt((points[0] - x) ** 2 + (points[1] - y) ** 2 + (1.3 * (points[2] - 12.2)) ** 2)
            nearest = np.minimum(nearest, radial - radius)
        return nearest

    def grain(points: Points) -> Values:
        grooves = np.maximum(0.28 - np.abs(noise(points, 1.0, texture[::-1])), 0)
        return 0.3 * noise(points, 0.8, texture) + 1.2 * grooves + 0.1 * noise(points, 0.22, texture)

    def distance(points: Points) -> Values:
        x, y, z = points
        flat = np.stack([x, y, np.full_like(x, 5.0)])
        outline = np.sqrt(x * x + y * y) - 32 - 0.7 * noise(flat, 1.4, texture)
        dough = roughen(profile(outline, z, 0, 13.2, 4.5), points, grain, 1.5)
        near = dough < 4.5
        result = dough - 2.5  # chips stand out by less than that
        result[near] = smooth_union(dough[near], chip_distance(points[:, near]), 0.8)
        return result

    def albedo(points: Points) -> Points:
        count = points.shape[1]
        dough = paint(colour, count) * (1 + 0.07 * noise(points, 0.3, texture) + 0.05 * noise(points, 1.5, texture))
        return mix(dough, paint(chocolate, count), 1 - smoothstep(0.0, 0.35, chip_distance(points)))

    interior = (0.66, 0.50, 0.30)
    return Solid(distance, albedo, radius=37, height=17, step=0.7, specular=0.04, gloss=10, interior=interior)


def build_pebble(rng: np.random.Generator) -> Solid:
    """River pebble: smooth, of any roundish shape and shade, with veins."""
    shade = float(rng.uniform(0.75, 1.15))
    colour, vein, texture = _tint(rng, (0.34 * shade, 0.33 * shade, 0.30 * shade)), (0.62, 0.60, 0.56), _shift(rng)
    radii = np.array([rng.uniform(27, 34), rng.uniform(20, 26), rng.uniform(11, 13.5)])
    tilt = rng.standard_normal(3)
    tilt /= np.sqrt((tilt**2).sum())

    def relief(points: Points) -> Values:
        return 0.7 * noise(points, 2.2, texture) + 0.05 * noise(points, 0.3, texture)

    def distance(points: Points) -> Values:
        centred = points - np.array([0, 0, radii[2] - 0.5])[:, None]
        return roughen(ellipsoid(centred, radii), points, relief, 2.5)

    def albedo(points: Points) -> Points:
        count = points.shape[1]
        layer = (tilt[:, None] * points).sum(0) / 9 + 0.25 * noise(points, 2.0, texture)
        bands = smoothstep(0.93, 0.98, np.cos(2 * np.pi * layer))
        grains = 1 + 0.09 * noise(points, 0.2, texture) + 0.06 * noise(points, 1.5, texture)
        return mix(paint(colour, count), paint(vein, count), 0.7 * bands) * grains

    return Solid(distance, albedo, radius=37, height=29, step=0.75, specular=0.06, gloss=12)


_ALL = (
    Category(
        "biscuit",
        "biscuit with chocolate chips; outline and surface vary",
        ("contamination", "crack", "cut", "hole", "stain"),
        build_biscuit,
        turn=180.0,
    ),
    Category(
        "bracket",
        "painted steel bracket; rigid, free ends",
        ("bend", "contamination", "cut", "dent", "stain"),
        build_bracket,
    ),
    Category(
        "flange",
        "turned metal flange with bolt holes; rigid, shiny",
        ("contamination", "cut", "dent", "hole", "stain"),
        build_flange,
    ),
    Category(
        "gear",
        "moulded gear wheel; rigid, fine teeth",
        ("contamination", "crack", "cut", "dent", "stain"),
        build_gear,
    ),
    Category(
        "hose",
        "ribbed rubber hose; deformable, lies in a different curve each time",
        ("bend", "contamination", "cut", "hole", "stain"),
        build_hose,
        turn=20.0,
        shift=1.0,
    ),
    Category(
        "nugget",
        "breaded nugget; every one of another shape",
        ("bump", "contamination", "cut", "hole", "stain"),
        build_nugget,
        turn=180.0,
    ),
    Category(
        "pebble",
        "river pebble with veins; shape and shade vary strongly",
        ("bump", "contamination", "crack", "dent", "stain"),
        build_pebble,
        turn=180.0,
    ),
    Category(
        "pouch",
        "filled plastic pouch with a print; deformable, wrinkled, reflections",
        ("contamination", "cut", "dent", "hole", "stain"),
        build_pouch,
    ),
)

CATEGORIES: dict[str, Category] = {category.name: category for category in _ALL}
