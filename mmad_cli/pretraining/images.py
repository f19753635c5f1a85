"""Procedural images: noise textures, fractals, dead leaves and shading, composed at random.

Everything is drawn from the generator that is handed in, so an image depends on its seed only. The shapes and
textures of the synthetic dataset are not used here: it is there to test with.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.float32]
Image = NDArray[np.float32]

_JULIA_STEPS = 14


def canvas(rng: np.random.Generator, size: int) -> Image:
    """One image float32 (3, size, size) in [0, 1]: textured ground, leaves upon it, shading over both."""
    image = texture(rng, size)
    for _ in range(int(rng.integers(0, 4))):
        image = _with_leaves(rng, image)
    if rng.random() < 0.7:
        image = image * _shading(rng, size)
    if rng.random() < 0.2:
        image = _with_shadowed_ground(rng, image)
    return np.clip(image, 0, 1).astype(np.float32)


def texture(rng: np.random.Generator, size: int) -> Image:
    """A texture (3, size, size): a scalar field coloured by a palette, sometimes two of them blended."""
    image = _coloured(rng, _field(rng, size))
    if rng.random() < 0.35:
        weight = np.clip(0.5 + 1.5 * spectral(rng, size, 2.5), 0, 1)
        image = image + (_coloured(rng, _field(rng, size)) - image) * weight
    if rng.random() < 0.5:
        image = image * (1 + rng.uniform(0.02, 0.12) * spectral(rng, size, rng.uniform(0, 1.5)))
    return np.asarray(image, dtype=np.float32)


def spectral(rng: np.random.Generator, size: int, slope: float, stretch: float = 1.0, angle: float = 0.0) -> Plane:
    """Noise (size, size) with amplitude falling as frequency to the power of -slope; zero mean, unit deviation.

    `stretch` above 1 draws its features out along `angle`.
    """
    along, across = np.meshgrid(np.fft.rfftfreq(size), np.fft.fftfreq(size))
    turned = np.cos(angle) * along + np.sin(angle) * across
    other = np.cos(angle) * across - np.sin(angle) * along
    frequency = np.sqrt((turned * stretch) ** 2 + other**2)
    frequency[0, 0] = np.inf
    amplitude = np.maximum(frequency, 1 / size) ** -slope
    amplitude[0, 0] = 0
    spectrum = amplitude * (rng.standard_normal(amplitude.shape) + 1j * rng.standard_normal(amplitude.shape))
    plane = np.fft.irfft2(spectrum, (size, size))
    return np.asarray(plane / max(float(plane.std()), 1e-12), dtype=np.float32)


def _field(rng: np.random.Generator, size: int) -> Plane:
    """A scalar field (size, size) of about unit deviation: one of several families."""
    families: tuple[Callable[[np.random.Generator, int], Plane], ...] = (
        _noise_field,
        _noise_field,
        _stripes,
        _cells,
        _speckles,
        _julia,
        _plain,
        _ridged,
    )
    return families[int(rng.integers(len(families)))](rng, size)


def _noise_field(rng: np.random.Generator, size: int) -> Plane:
    return spectral(rng, size, rng.uniform(0.3, 2.8), np.exp(rng.uniform(0, 2.2)), rng.uniform(0, np.pi))


def _plain(rng: np.random.Generator, size: int) -> Plane:
    return (0.15 * spectral(rng, size, rng.uniform(0, 2.5))).astype(np.float32)


def _ridged(rng: np.random.Generator, size: int) -> Plane:
    return (1 - 1.6 * np.abs(spectral(rng, size, rng.uniform(1.3, 2.6)))).astype(np.float32)


def _stripes(rng: np.random.Generator, size: int) -> Plane:
    """Gratings with wavering lines; two of them make a weave."""
    rows, columns = _pixels(size)
    total = np.zeros((size, size), dtype=np.float32)
    for _ in range(int(rng.integers(1, 3))):
        angle, period = rng.uniform(0, np.pi), np.exp(rng.uniform(np.log(4), np.log(40)))
        waver = rng.uniform(0, 2) * spectral(rng, size, 2.5)
        phase = 2 * np.pi * (np.cos(angle) * columns + np.sin(angle) * rows) / period + waver
        total += np.clip(np.sin(phase) * rng.uniform(0.7, 4), -1, 1).astype(np.float32)
    return total


def _cells(rng: np.random.Generator, size: int) -> Plane:
    """Cells about random points: a value each, or the distance to their borders."""
    from scipy.spatial import cKDTree

    count = int(np.exp(rng.uniform(np.log(12), np.log(500))))
    rows, columns = _pixels(size)
    warp = rng.uniform(0, 4) * spectral(rng, size, 2.2)
    where = np.stack([rows + warp, columns - warp], axis=-1).reshape(-1, 2)
    distance, index = cKDTree(rng.uniform(0, size, (count, 2))).query(where, k=2)
    if rng.random() < 0.5:
        values = rng.standard_normal(count)[index[:, 0]]
    else:
        values = np.minimum((distance[:, 1] - distance[:, 0]) * np.sqrt(count) / size * 4, 1.5)
    return np.asarray(values.reshape(size, size), dtype=np.float32)


def _speckles(rng: np.random.Generator, size: int) -> Plane:
    """Blobs that stand out of a ground."""
    field = spectral(rng, size, rng.uniform(0.6, 1.8)) - rng.uniform(0.3, 1.6)
    return np.asarray(2 * np.maximum(field, 0), dtype=np.float32)


def _julia(rng: np.random.Generator, size: int) -> Plane:
    """Smoothed escape times of a Julia set."""
    rows, columns = _pixels(size)
    zoom, angle = np.exp(rng.uniform(-1.5, 0.5)), rng.uniform(0, 2 * np.pi)
    middle = rng.uniform(-0.6, 0.6, 2)
    value = ((columns / size - 0.5) + 1j * (rows / size - 0.5)) * 3 * zoom * np.exp(1j * angle) + complex(*middle)
    constant = 0.7885 * np.exp(1j * rng.uniform(0, 2 * np.pi))
    value = value.astype(np.complex64)
    total = np.zeros((size, size), dtype=np.float32)
    for _ in range(_JULIA_STEPS):
        value = value * value + np.complex64(constant)
        magnitude = np.abs(value)
        value /= np.maximum(magnitude / 8, 1)
        total += np.exp(-magnitude)
    return np.asarray((total - total.mean()) / max(float(total.std()), 1e-6), dtype=np.float32)


def _pixels(size: int) -> tuple[Plane, Plane]:
    rows, columns = np.mgrid[:size, :size].astype(np.float32)
    return rows, columns


def _coloured(rng: np.random.Generator, field: Plane) -> Image:
    """The field through a palette of two to four colours, with soft or hard steps between them."""
    count = int(rng.integers(2, 5))
    colours = palette(rng, count)
    place = (np.clip(field / rng.uniform(1.5, 4) + 0.5, 0, 1) * (count - 1)).astype(np.float32)
    if rng.random() < 0.3:
        low = np.floor(place)
        place = low + np.clip((place - low - 0.5) * rng.uniform(3, 10) + 0.5, 0, 1)
    steps = np.arange(count)
    return np.stack([np.interp(place, steps, channel) for channel in colours.T]).astype(np.float32)


def palette(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """Colours (count, 3): often near each other, as those of one material are."""
    base = rng.uniform(0.03, 0.95) + rng.exponential(0.12) * rng.standard_normal(3)
    spread = np.exp(rng.uniform(np.log(0.03), np.log(0.5)))
    brightness = spread * rng.standard_normal((count, 1))
    hue = rng.uniform(0.1, 0.8) * spread * rng.standard_normal((count, 3))
    return np.asarray(np.clip(base + brightness + hue, 0, 1))


def _with_leaves(rng: np.random.Generator, image: Image) -> Image:
    """The image with overlapping shapes, each plain or filled from one of two textures (dead leaves)."""
    size = image.shape[-1]
    fills = [texture(rng, size) for _ in range(2)]
    image = image.copy()
    lift = rng.uniform(0, 0.5)
    for _ in range(int(np.exp(rng.uniform(0, np.log(14))))):
        radius = float(np.clip(4 * rng.random() ** -0.6, 4, size / 2.5))
        middle = rng.uniform(0, size, 2)
        reach = int(radius * 1.5) + 3
        top, left = (max(int(m) - reach, 0) for m in middle)
        bottom, right = (min(int(m) + reach, size) for m in middle)
        if bottom <= top or right <= left:
            continue
        rows, columns = np.mgrid[top:bottom, left:right].astype(np.float32)
        distance = shape_distance(rng, rows - middle[0], columns - middle[1], radius)
        cover = np.clip(0.5 - distance, 0, 1)
        part = image[:, top:bottom, left:right]
        kind = rng.random()
        colour = rng.uniform(0.02, 0.95, 3) if kind < 0.3 else palette(rng, 1)[0]
        fill: Image = (
            np.broadcast_to(colour[:, None, None], part.shape).astype(np.float32)
            if kind < 0.45
            else fills[int(rng.integers(2))][:, top:bottom, left:right]
        )
        if kind > 0.85:
            fill = fill * (1 + lift * np.clip(-distance / radius, 0, 1))
        shadow = 1 - rng.uniform(0, 0.35) * np.clip(1 - np.abs(distance) / 3, 0, 1)
        image[:, top:bottom, left:right] = (part + (fill - part) * cover) * shadow
    return image


def shape_distance(rng: np.random.Generator, rows: Plane, columns: Plane, radius: float) -> Plane:
    """About the distance to the outline of a random shape of about `radius` around the origin, negative inside."""
    angle = rng.uniform(0, 2 * np.pi)
    x = np.cos(angle) * columns + np.sin(angle) * rows
    y = np.cos(angle) * rows - np.sin(angle) * columns
    kind = int(rng.integers(5))
    if kind == 0:
        aspect = rng.uniform(0.3, 1)
        found = (np.sqrt(x**2 + (y / aspect) ** 2) - radius) * aspect
    elif kind == 1:
        aspect, corner = rng.uniform(0.2, 1), rng.uniform(0, 0.3) * radius
        dx, dy = np.abs(x) - radius + corner, np.abs(y) - aspect * radius + corner
        found = np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0) - corner
    elif kind == 2:
        found = np.abs(np.hypot(x, y) - 0.75 * radius) - rng.uniform(0.1, 0.25) * radius
    elif kind == 3:
        sides = int(rng.integers(3, 8))
        turns = rng.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(sides) / sides + rng.uniform(-0.3, 0.3, sides)
        found = np.max([np.cos(t) * x + np.sin(t) * y for t in turns], axis=0) - 0.8 * radius
    else:
        waves = sum(rng.uniform(-0.12, 0.12) * np.sin(k * np.arctan2(y, x) + rng.uniform(0, 6.3)) for k in range(2, 7))
        found = np.hypot(x, y) - radius * (1 + waves)
    return np.asarray(found, dtype=np.float32)


def _shading(rng: np.random.Generator, size: int) -> Plane:
    """Light (size, size) upon a bumpy surface: Lambert's law on the slopes of noise, with a highlight at times."""
    height = rng.uniform(0.5, 8) * spectral(rng, size, rng.uniform(1.6, 3.0))
    if rng.random() < 0.5:
        rows, columns = _pixels(size)
        middle = rng.uniform(0, size, 2)
        distance = shape_distance(rng, rows - middle[0], columns - middle[1], rng.uniform(0.2, 0.6) * size)
        width = rng.uniform(1, 15)
        height = height + rng.uniform(2, 20) / (1 + np.exp(np.clip(distance / width, -30, 30)))
    down, right = np.gradient(height)
    light = rng.standard_normal(3)
    light[2] = abs(light[2]) + 1.2
    light /= np.sqrt((light**2).sum())
    length = np.sqrt(down**2 + right**2 + 1)
    cosine = np.maximum((light[2] - light[0] * right - light[1] * down) / length, 0)
    ambient = rng.uniform(0.3, 0.8)
    result = ambient + (1 - ambient) * cosine / light[2]
    if rng.random() < 0.4:
        result = result + rng.uniform(0.05, 0.5) * cosine ** rng.uniform(8, 40)
    return np.asarray(result, dtype=np.float32)


def _with_shadowed_ground(rng: np.random.Generator, image: Image) -> Image:
    """The image with everything outside a shape nearly black or plain, as around a part that was cut out."""
    size = image.shape[-1]
    rows, columns = _pixels(size)
    middle = rng.uniform(0.2, 0.8, 2) * size
    distance = shape_distance(rng, rows - middle[0], columns - middle[1], rng.uniform(0.25, 0.6) * size)
    cover = np.clip(0.5 - distance / rng.uniform(0.7, 3), 0, 1)
    ground = 0.0 if rng.random() < 0.6 else rng.uniform(0, 0.2, (3, 1, 1))
    return np.asarray(ground + (image - ground) * cover, dtype=np.float32)
