"""Defects: each turns a sound solid into a defective one at a given site of its surface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mmad_cli.datasets.synthetic.solids import (
    Points,
    Solid,
    Values,
    ellipsoid,
    mix,
    noise,
    paint,
    smoothstep,
)

Shows = Literal["3d", "rgb", "both"]


@dataclass(frozen=True)
class Site:
    """Where a defect sits: a surface point, the outward normal and two tangents there, each (3,)."""

    point: Points
    normal: Points
    first: Points
    second: Points

    def local(self, points: Points) -> Points:
        """Coordinates (3, N) along the two tangents and the normal, origin at the site."""
        offset = points - self.point[:, None]
        axes = (self.first, self.second, self.normal)
        return np.stack([(axis[:, None] * offset).sum(0) for axis in axes])


def make_site(point: Points, normal: Points, angle: float) -> Site:
    """Site with its first tangent turned by `angle` radians about the normal."""
    helper = np.array([1.0, 0.0, 0.0]) if abs(normal[0]) < 0.8 else np.array([0.0, 1.0, 0.0])
    base = np.cross(normal, helper)
    base /= np.sqrt((base**2).sum())
    other = np.cross(normal, base)
    return Site(
        point, normal, base * np.cos(angle) + other * np.sin(angle), other * np.cos(angle) - base * np.sin(angle)
    )


def _between(low: float, high: float, severity: float) -> float:
    return low + (high - low) * severity


def _cap(points: Points, site: Site, radius: float) -> Values:
    """Smooth hump of height 1 around the site that is exactly 0 beyond `radius`."""
    squared = ((points - site.point[:, None]) ** 2).sum(0) / radius**2
    result: Values = np.maximum(1 - squared, 0) ** 2
    return result


def _ball(site: Site, radius: float) -> tuple[float, float, float, float]:
    """Ball about the site, the part of space that a defect may change."""
    return float(site.point[0]), float(site.point[1]), float(site.point[2]), float(radius)


def _removed(solid: Solid, site: Site, reach: float, tool: Callable[[Points], Values]) -> Solid:
    """The solid without what the tool covers; the laid-open faces have the interior colour."""

    def distance(points: Points) -> Values:
        result: Values = np.maximum(solid.distance(points), -tool(points))
        return result

    def albedo(points: Points) -> Points:
        colours = solid.albedo(points)
        if solid.interior is None:
            return colours
        depth = -solid.distance(points)
        fracture = paint(solid.interior, points.shape[1]) * (1 + 0.08 * noise(points, 0.3))
        return mix(colours, fracture, smoothstep(0.3, 0.9, depth))

    return replace(solid, distance=distance, albedo=albedo, altered=_ball(site, reach))


def _pushed(solid: Solid, site: Site, height: float, radius: float) -> Solid:
    """The solid with its surface moved by `height` mm along the normal at the site, fading out at `radius`.

    Material is moved, not removed, so that a dent in thin sheet does not become a hole.
    """

    def moved(points: Points) -> Points:
        return points - site.normal[:, None] * (height * _cap(points, site, radius))

    grown = max(height, 0.0)
    return replace(
        solid,
        distance=lambda points: solid.distance(moved(points)),
        albedo=lambda points: solid.albedo(moved(points)),
        height=solid.height + grown,
        radius=solid.radius + grown,
        altered=_ball(site, radius),
    )


def dent(solid: Solid, site: Site, severity: float, rng: np.random.Generator) -> Solid:
    """Shallow hollow: no colour change and gentle slopes, so hardly more than the depth shows it."""
    depth = _between(0.9, 2.2, severity)
    return _pushed(solid, site, -depth, depth * rng.uniform(4.8, 6.0) + 2.0)


def bump(solid: Solid, site: Site, severity: float, rng: np.random.Generator) -> Solid:
    """Shallow swelling of the same material."""
    height = _between(0.9, 2.2, severity)
    return _pushed(solid, site, height, height * rng.uniform(4.8, 6.0) + 2.0)


def hole(solid: Solid, site: Site, severity: float, rng: np.random.Generator) -> Solid:
    """Pit with a round bottom, from a prick to a deep hole."""
    radius = _between(1.6, 3.4, severity) * rng.uniform(0.9, 1.1)
    depth = _between(1.6, 6.5, severity)

    def tool(points: Points) -> Values:
        first, second, up = site.local(points)
        below = np.maximum(-up - depth + 0.8 * radius, 0) * 1.25
        bore = np.sqrt(first**2 + second**2 + below**2) - radius + 0.12 * noise(points, 0.3)
        result: Values = np.maximum(bore, up - 6)
        return result

    return _removed(solid, site, float(np.sqrt((radius + 1) ** 2 + 7**2)), tool)


def cut(solid: Solid, site: Site, severity: float, rng: np.random.Generator) -> Solid:
    """Wedge taken out by a slanted blade; at an edge a corner is missing."""
    half_length = _between(5.0, 11.0, severity) * rng.uniform(0.9, 1.2)
    half_width = _between(0.9, 2.4, severity)
    depth = _between(1.5, 5.0, severity)
    slant = rng.uniform(-0.4, 0.4)

    def tool(points: Points) -> Values:
        first, second, up = site.local(points)
        walls = np.abs(second - slant * up) - half_width * np.clip(1 + up / depth, 0.15, 1.5)
        ends = np.abs(first) - half_length
        across = np.maximum(np.abs(up) - depth, up - 6)
        result: Values = np.maximum(np.maximum(walls, ends), across) + 0.08 * noise(points, 0.4)
        return result

    return _removed(solid, site, float(np.sqrt(half_length**2 + (1.9 * half_width + 3) ** 2 + depth**2)) + 0.5, tool)


def crack(solid: Solid, site: Site, severity: float, rng: np.random.Generator) -> Solid:
    """Jagged narrow gap that runs out at both ends."""
    half_length = _between(6.0, 14.0, severity)
    half_width = _between(0.6, 1.1, severity)
    depth = _between(1.2, 3.0, severity)
    knots = np.linspace(-half_length, half_length, 9)
    course = np.cumsum(rng.uniform(-1.1, 1.1, knots.size))
    course -= course[knots.size // 2]

    def tool(points: Points) -> Values:
        first, second, up = site.local(points)
        taper = np.sqrt(np.maximum(1 - np.abs(first) / half_length, 0))
        # a V: open above, closed at the bottom, so that some light gets in
        opening = half_width * taper * np.clip(1 + 0.8 * up / depth, 0.0, 1.3)
        gap = 0.6 * (np.abs(second - np.interp(first, knots, course)) - opening)
        result: Values = np.maximum(np.maximum(gap, np.abs(first) - half_length), np.abs(up) - depth)
        return result

    return _removed(solid, site, float(np.sqrt(half_length**2 + 6**2 + depth**2)), tool)


def contamination(solid: Solid, site: Site, severity: float, rng: np.random.Generator) -> Solid:
    """Foreign matter stuck to the surface: another colour and a raised shape (crumb, drop or fibre)."""
    colour = (
        (0.05, 0.05, 0.06),
        (0.70, 0.68, 0.62),
        (0.12, 0.30, 0.10),
        (0.55, 0.42, 0.10),
        (0.10, 0.16, 0.45),
    )[int(rng.integers(5))]
    size = _between(1.6, 4.0, severity)
    stretch = rng.uniform(0.8, 2.6)
    radii = np.array([size * np.sqrt(stretch), size / np.sqrt(stretch), _between(0.7, 1.8, severity)])
    shift = rng.uniform(0, 64, 3)

    def matter(points: Points) -> Values:
        result: Values = ellipsoid(site.local(points), radii) + 0.25 * noise(points, 0.35, shift)
        return result

    def distance(points: Points) -> Values:
        result: Values = np.minimum(solid.distance(points), matter(points))
        return result

    def albedo(points: Points) -> Points:
        own = paint(colour, points.shape[1]) * (1 + 0.1 * noise(points, 0.3, shift))
        return mix(solid.albedo(points), own, 1 - smoothstep(0.02, 0.12, matter(points)))

    grown = float(radii.max())
    return replace(
        solid,
        distance=distance,
        albedo=albedo,
        height=solid.height + grown,
        radius=solid.radius + grown,
        altered=_ball(site, grown + 1.5),
    )


def stain(solid: Solid, site: Site, severity: float, rng: np.random.Generator) -> Solid:
    """Discoloured patch with an irregular border; the surface keeps its shape."""
    radius = _between(2.6, 6.5, severity) * rng.uniform(0.9, 1.1)
    strength = _between(0.35, 0.8, severity)
    colour = ((0.03, 0.03, 0.03), (0.20, 0.10, 0.04), (0.75, 0.72, 0.65), (0.08, 0.12, 0.25))[int(rng.integers(4))]
    shift = rng.uniform(0, 64, 3)

    def albedo(points: Points) -> Points:
        reach = np.sqrt(((points - site.point[:, None]) ** 2).sum(0))
        border = radius * (1 + 0.16 * noise(points, 0.5, shift))
        weight = strength * (1 - smoothstep(-0.5, 0.0, reach - border))
        return mix(solid.albedo(points), paint(colour, points.shape[1]), weight)

    return replace(solid, albedo=albedo, altered=_ball(site, 2 * radius))


def bend(solid: Solid, site: Site, severity: float, rng: np.random.Generator) -> Solid:
    """A free end bent up or sideways beyond one of the solid's fold lines (the nearest to the site)."""
    fold = min(solid.folds, key=lambda line: float((line[0] - site.point[0]) ** 2 + (line[1] - site.point[1]) ** 2))
    x, y, along_x, along_y = fold
    slope = _between(0.15, 0.55, severity)
    sideways = float(rng.choice([-1.0, 1.0])) * slope * rng.uniform(0.0, 0.5)
    # offset per millimetre beyond the fold
    rate = np.array([-along_y * sideways, along_x * sideways, slope])

    def moved(points: Points) -> Points:
        beyond = (points[0] - x) * along_x + (points[1] - y) * along_y
        # the end is free only near the fold line; a curve that comes back elsewhere stays
        across = np.abs(-(points[0] - x) * along_y + (points[1] - y) * along_x)
        near = 1 - smoothstep(22.0, 30.0, across)
        reach = np.sqrt(np.maximum(beyond, 0) ** 2 + 9) - 3
        sound: Points = points - rate[:, None] * (reach * near)
        return sound

    return replace(
        solid,
        distance=lambda points: solid.distance(moved(points)),
        albedo=lambda points: solid.albedo(moved(points)),
        height=solid.height + 24 * slope,
        radius=solid.radius + 8 * abs(sideways),
        step=solid.step * 0.8,
    )


@dataclass(frozen=True)
class DefectKind:
    """A kind of defect. `shows`: the modality in which it is visible. `edge`: it sits at the outline where it can.

    "3d" means that the colour of the material is unchanged and the slopes are gentle, so that under the wide frontal
    light the image changes by a few grey levels only; "rgb" that the point cloud is the same, bit by bit.

    `displaces`: the part is moved, not removed, so its mask is where the moved part is seen, not where it was.
    """

    name: str
    description: str
    shows: Shows
    apply: Callable[[Solid, Site, float, np.random.Generator], Solid]
    edge: bool = False
    displaces: bool = False


_ALL = (
    DefectKind("bend", "a free end is bent", "both", bend, edge=True, displaces=True),
    DefectKind("bump", "shallow swelling, colour unchanged", "3d", bump),
    DefectKind("contamination", "foreign matter of another colour and shape", "both", contamination),
    DefectKind("crack", "jagged narrow gap", "both", crack),
    DefectKind("cut", "wedge or corner cut out", "both", cut, edge=True),
    DefectKind("dent", "shallow hollow, colour unchanged", "3d", dent),
    DefectKind("hole", "hole bored into the part", "both", hole),
    DefectKind("stain", "discoloured patch, shape unchanged", "rgb", stain),
)

DEFECTS: dict[str, DefectKind] = {kind.name: kind for kind in _ALL}
