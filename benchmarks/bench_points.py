"""The point path of one scan without the network: centres, groups, interpolation and pooling to 56 x 56 patches.

Both sides start from the same cloud of 40 000 points and the same group features, in one process. The published form
is what M3DM's code does, with PyTorch in place of the CUDA operators.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.turns import Bar, Row, row, timed, turns_of
from mmad_cli.alignment.grouping import farthest_points, group_neighbours
from mmad_cli.alignment.interpolation import nearest_centres, pooled_operator

GROUPS, GROUP_SIZE, CHANNELS, SIZE, GRID = 1024, 128, 1152, 224, 56
BAR = Bar(ratio=20, seconds=0.15)

Steps = dict[str, tuple[float, Any]]


def cloud_of(side: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """A curved, slightly rough part 10 cm wide, half a metre away: points (side * side, 3) and their pixels."""
    rng = np.random.default_rng(0)
    row, column = np.mgrid[:side, :side]
    v, u = row / side - 0.5, column / side - 0.5
    depth = 0.6 - 0.02 * np.cos(5 * u) * np.cos(4 * v)
    points = np.stack([0.1 * u + 1e-4, 0.1 * v + 1e-4, depth], axis=-1).reshape(-1, 3)
    margin = (SIZE - side) // 2
    return (points + rng.normal(0, 1e-5, points.shape)).astype(np.float32), (
        (row + margin) * SIZE + column + margin
    ).ravel()


def published_centres(points: torch.Tensor) -> torch.Tensor:
    distance = torch.full((len(points),), 1e10)
    chosen = torch.zeros(GROUPS, dtype=torch.int64)
    for step in range(1, GROUPS):
        squared = ((points - points[chosen[step - 1]]) ** 2).sum(dim=1)
        distance = torch.minimum(distance, squared)
        chosen[step] = distance.argmax()
    return chosen


def published_groups(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    return torch.cdist(centres, points).topk(GROUP_SIZE, dim=1, largest=False).indices


def published_interpolation(points: torch.Tensor, centres: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    squared = -2 * points @ centres.T
    squared += (points**2).sum(dim=1)[:, None]
    squared += (centres**2).sum(dim=1)[None]
    distance, index = squared.sort(dim=1)
    inverse = 1 / (distance[:, :3] + 1e-8)
    weights = inverse / inverse.sum(dim=1, keepdim=True)
    return (tokens[index[:, :3]] * weights[..., None]).sum(dim=1)


def published_patches(features: torch.Tensor, pixel: torch.Tensor) -> torch.Tensor:
    image = torch.zeros(CHANNELS, SIZE * SIZE)
    image[:, pixel] = features.T
    averaged = F.avg_pool2d(image.view(1, CHANNELS, SIZE, SIZE), 3, stride=1)
    return F.adaptive_avg_pool2d(averaged, GRID).reshape(CHANNELS, -1).T


def published_steps(points: np.ndarray, pixel: np.ndarray, tokens: np.ndarray) -> Steps:
    """Seconds and result of each step."""
    cloud, pixels, features = torch.from_numpy(points), torch.from_numpy(pixel), torch.from_numpy(tokens)
    steps = {"centres": timed(lambda: published_centres(cloud))}
    centres = cloud[steps["centres"][1]]
    steps["groups"] = timed(lambda: published_groups(cloud, centres))
    steps["interpolation"] = timed(lambda: published_interpolation(cloud, centres, features))
    steps["pooling"] = timed(lambda: published_patches(steps["interpolation"][1], pixels))
    return steps


def our_steps(points: np.ndarray, pixel: np.ndarray, tokens: np.ndarray) -> Steps:
    """Seconds and result of each step."""
    threads = torch.get_num_threads()
    steps = {"centres": timed(lambda: farthest_points(points, GROUPS))}
    centres = points[steps["centres"][1]]
    steps["groups"] = timed(lambda: group_neighbours(points, centres, GROUP_SIZE, workers=threads))
    steps["interpolation"] = timed(lambda: nearest_centres(points, centres, "expanded", threads))
    weights = steps["interpolation"][1]
    steps["pooling"] = timed(lambda: pooled_operator(*weights, pixel, GROUPS, GRID, SIZE) @ tokens)
    return steps


def whole(steps: Steps) -> float:
    return sum(seconds for seconds, _ in steps.values())


def run(quick: bool = False) -> list[Row]:
    """One row; the note tells seconds per step."""
    points, pixel = cloud_of()
    tokens = np.random.default_rng(1).normal(size=(GROUPS, CHANNELS)).astype(np.float32)
    our_steps(points, pixel, tokens)  # imports and the pooling matrix, which all scans share
    runs = []
    for _ in range(turns_of(quick)):
        with torch.inference_mode():
            theirs = published_steps(points, pixel, tokens)
        runs.append((theirs, our_steps(points, pixel, tokens)))
    theirs, ours = runs[-1]
    same = np.array_equal(ours["centres"][1], theirs["centres"][1].numpy())
    error = np.median(np.abs(ours["pooling"][1] - theirs["pooling"][1].numpy()))
    parts = ", ".join(f"{name} {theirs[name][0]:.3f} / {ours[name][0]:.3f}" for name in ours)
    return [
        row(
            f"point path of one scan without the network, {len(points)} points",
            [whole(ours) for _, ours in runs],
            [whole(theirs) for theirs, _ in runs],
            bar=BAR,
            holds=bool(same and error < 1e-4),
            note=f"{parts}; {'same' if same else 'OTHER'} centres, median patch difference {error:.1e}",
        )
    ]
