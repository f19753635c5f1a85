"""The loss of MAFR: three terms per modality, all of weight 1, over every pixel, background included.

`side` is the side of the square image whose pixels, row by row, are the rows of the (P, C) tables. With `valid`, bool
(P,), a term counts valid pixels only, which the published code does not do. The third term is called census in the
published code although it makes no census transform.
Source: MAFR (arXiv 2510.21793), combined loss, as its code computes it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

STANDARD_EPS = 1e-8
CENSUS_WINDOW = 7

# `first_two`: the published code takes the first two channels, as if they were the two components of a flow field
SmoothnessChannels = Literal["first_two", "all"]


def similarity(restored: Tensor, reference: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean squared difference (ZNSSD) of features standardised per pixel, a scalar; 2 - 2 times their correlation.

    restored, reference (P, C). Each pixel's channels are brought to mean 0 and deviation 1, 1e-8 being added to the
    variance. A constant pixel becomes 0: a background pixel, whose point feature is 0, costs about 1.
    Raises ValueError when the shapes differ.
    """
    if restored.ndim != 2 or restored.shape != reference.shape:
        shapes = f"{tuple(restored.shape)} and {tuple(reference.shape)}"
        raise ValueError(f"restored, reference: must have one shape (P, C), got {shapes}")
    if valid is not None:
        restored, reference = restored[valid], reference[valid]
    return functional.mse_loss(_standardised(restored), _standardised(reference))


def smoothness(
    residual: Tensor,
    guide: Tensor,
    side: int,
    valid: Tensor | None = None,
    channels: SmoothnessChannels = "first_two",
) -> Tensor:
    """Mean gradient of the residual u, v, damped where the guide g has edges; a scalar.

    residual (P, C), restored less reference; guide (P,), the reference averaged over its channels. Per pixel
    |d_x u| exp(-|d_x g|) + |d_y u| exp(-|d_y g|) and the same for v, in forward differences; last row and last column
    have none. u and v are the first two channels; with `all`, every channel takes part and the sum is scaled to that
    of two. A pixel is valid here when the two neighbours of its differences are as well.
    Raises ValueError for a P that is not side * side, side below 2 and fewer than two channels.
    """
    _check_image(residual, side)
    if side < 2 or residual.shape[1] < 2 or guide.shape != residual.shape[:1]:
        shapes = f"{tuple(residual.shape)} and {tuple(guide.shape)} with side {side}"
        raise ValueError(f"residual, guide: must be (P, C) and (P,) with C and side at least 2, got {shapes}")
    flow = residual[:, :2] if channels == "first_two" else residual
    across, down = _forward_differences(flow.reshape(side, side, -1))
    edges_across, edges_down = _forward_differences(guide.reshape(side, side, 1))
    damped = across.abs() * torch.exp(-edges_across.abs()) + down.abs() * torch.exp(-edges_down.abs())
    per_pixel = 2.0 * damped.mean(-1)
    if valid is None:
        return per_pixel.mean()
    image = valid.reshape(side, side)
    return _mean_over(per_pixel, image[:-1, :-1] & image[:-1, 1:] & image[1:, :-1])


def census(residual: Tensor, side: int, valid: Tensor | None = None) -> Tensor:
    """Mean absolute 7 x 7 average of the residual, a scalar.

    residual (P, C), restored less reference: averaging is linear, so one average of the difference replaces the
    difference of two. Beyond the border (and where not valid) the residual counts as 0; the divisor is always 49.
    Raises ValueError for a P that is not side * side.
    """
    _check_image(residual, side)
    image = residual.reshape(side, side, residual.shape[1])
    if valid is not None:
        image = image * valid.reshape(side, side, 1)
    averaged: Tensor = _WindowMean.apply(image)  # type: ignore[no-untyped-call]
    if valid is None:
        return averaged.abs().mean()
    return _mean_over(averaged.abs().mean(-1), valid.reshape(side, side))


def modality_terms(
    restored: Tensor,
    reference: Tensor,
    side: int,
    valid: Tensor | None = None,
    channels: SmoothnessChannels = "first_two",
) -> dict[str, Tensor]:
    """The three terms of one modality by name, scalars; restored, reference (P, C)."""
    alike = similarity(restored, reference, valid)
    residual = restored - reference
    return {
        "similarity": alike,
        "smoothness": smoothness(residual, reference.mean(1), side, valid, channels),
        "census": census(residual, side, valid),
    }


class _WindowMean(torch.autograd.Function):
    """Mean over 7 x 7 pixels of an image (H, W, C), zeros beyond the border; the operator is its own adjoint.

    PyTorch's gradient of a mean pooling takes seven times as long as the pooling itself.
    """

    @staticmethod
    def forward(ctx: Any, image: Tensor) -> Tensor:
        return _window_mean(image)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _window_mean(gradients[0])


def _window_mean(image: Tensor) -> Tensor:
    half = CENSUS_WINDOW // 2
    # only in this order does PyTorch see that channels lie last; else pooling takes seven times as long
    planes = image[None].permute(0, 3, 1, 2)
    rows = functional.avg_pool2d(planes, (1, CENSUS_WINDOW), stride=1, padding=(0, half))
    return functional.avg_pool2d(rows, (CENSUS_WINDOW, 1), stride=1, padding=(half, 0))[0].permute(1, 2, 0)


def _standardised(features: Tensor) -> Tensor:
    return functional.layer_norm(features, features.shape[-1:], eps=STANDARD_EPS)


def _forward_differences(image: Tensor) -> tuple[Tensor, Tensor]:
    """Along columns and along rows, (H - 1, W - 1, C) each, of an image (H, W, C)."""
    corner = image[:-1, :-1]
    return image[:-1, 1:] - corner, image[1:, :-1] - corner


def _mean_over(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean of the chosen values; 0 when there are none."""
    return (values * chosen).sum() / chosen.sum().clamp(min=1)


def _check_image(residual: Tensor, side: int) -> None:
    if residual.ndim != 2 or len(residual) != side * side:
        raise ValueError(f"residual: must have side * side = {side * side} rows, got shape {tuple(residual.shape)}")
