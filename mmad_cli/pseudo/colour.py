"""Colour of pseudo anomalies: a donor image, changed by three random operations and blended in."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mmad_cli.types import BoolArray, ByteArray

Operation = Callable[[NDArray[np.float64], np.random.Generator], NDArray[np.float64]]

OPERATIONS_PER_DONOR = 3
BLEND = (0.5, 1.0)


def blur(image: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Gaussian blur of 0.5 to 2 % of the height."""
    from scipy.ndimage import gaussian_filter

    sigma = rng.uniform(0.005, 0.02) * image.shape[0]
    out: NDArray[np.float64] = gaussian_filter(image, (sigma, sigma, 0))
    return out


def gamma(image: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Power of 0.5 to 2."""
    out: NDArray[np.float64] = image ** (2.0 ** rng.uniform(-1, 1))
    return out


def brightness(image: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Factor of 0.7 to 1.3 and a shift of up to 12 % of the range."""
    out: NDArray[np.float64] = image * rng.uniform(0.7, 1.3) + rng.uniform(-0.12, 0.12)
    return out


def hue_saturation(image: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Colours turned about the grey axis by any angle and scaled by 0.5 to 1.5 away from it."""
    axis = np.full(3, 1 / np.sqrt(3))
    angle = rng.uniform(-np.pi, np.pi)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    turn = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    grey = image.mean(axis=-1, keepdims=True)
    out: NDArray[np.float64] = grey + rng.uniform(0.5, 1.5) * ((image - grey) @ turn.T)
    return out


def autocontrast(image: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Every channel stretched to the full range."""
    low, high = image.min(axis=(0, 1)), image.max(axis=(0, 1))
    out: NDArray[np.float64] = (image - low) / np.maximum(high - low, 1e-6)
    return out


def elastic(image: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Displacement by smooth random fields of up to 3 % of the height."""
    from scipy.ndimage import map_coordinates, zoom

    height, width = image.shape[:2]
    fields = [zoom(rng.uniform(-1, 1, (7, 7)), (height / 7, width / 7), order=3) for _ in range(2)]
    y, x = np.mgrid[:height, :width]
    at = np.stack([y + 0.03 * height * fields[0], x + 0.03 * height * fields[1]])
    return np.stack([map_coordinates(image[..., i], at, order=1, mode="reflect") for i in range(3)], axis=-1)


def inversion(image: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """The negative."""
    return 1.0 - image


def cartoon(image: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Few grey levels after smoothing, dark along edges."""
    from scipy.ndimage import gaussian_gradient_magnitude, uniform_filter

    levels = int(rng.integers(4, 8))
    flat = np.round(uniform_filter(image, (5, 5, 1)) * levels) / levels
    edges = gaussian_gradient_magnitude(image.mean(axis=-1), 1.0)
    out: NDArray[np.float64] = flat * np.exp(-10 * edges)[..., None]
    return out


OPERATIONS: tuple[Operation, ...] = (
    blur, gamma, brightness, hue_saturation, autocontrast, elastic, inversion, cartoon,
)  # fmt: skip


def changed_image(rgb: ByteArray, rng: np.random.Generator) -> ByteArray:
    """The image after three different random operations; uint8 (H, W, 3)."""
    image = rgb.astype(np.float64) / 255
    for i in rng.choice(len(OPERATIONS), OPERATIONS_PER_DONOR, replace=False):
        image = np.clip(OPERATIONS[i](image, rng), 0, 1)
    return np.asarray(np.round(image * 255), dtype=np.uint8)


def blend(rgb: ByteArray, donor: ByteArray, mask: BoolArray, weight: float) -> ByteArray:
    """(1 - weight) rgb + weight donor on the pixels of `mask`; uint8 (H, W, 3)."""
    out = rgb.copy()
    mixed = (1 - weight) * rgb[mask].astype(np.float64) + weight * donor[mask].astype(np.float64)
    out[mask] = np.round(mixed).astype(np.uint8)
    return out
