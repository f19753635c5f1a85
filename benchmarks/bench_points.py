"""The point path of one scan without the network: centres, groups, interpolation and pooling to 56 x 56 patches.

Both sides start from the same cloud of 40 000 points and the same group features, in one process. The published form
is what M3DM's code does, with PyTorch in place of the CUDA operators.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from mmad_cli.alignment.grouping import farthest_points, group_neighbours
from mmad_cli.alignment.interpolation import nearest_centres, pooled_operator

GROUPS, GROUP_SIZE, CHANNELS, SIZE, GRID = 1024, 128, 1152, 224, 56
BAR = "<= 0.15 s and >= 20x"
REPEATS = 5

Timing = tuple[float, Any]


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


def seconds(call: Callable[[], Any], repeats: int) -> Timing:
    """Median wall-clock time and the last result."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return float(np.median(times)), result


def published_steps(points: np.ndarray, pixel: np.ndarray, tokens: np.ndarray, repeats: int) -> dict[str, Timing]:
    cloud, pixels, features = torch.from_numpy(points), torch.from_numpy(pixel), torch.from_numpy(tokens)
    steps = {"centres": seconds(lambda: published_centres(cloud), repeats)}
    centres = cloud[steps["centres"][1]]
    steps["groups"] = seconds(lambda: published_groups(cloud, centres), repeats)
    steps["interpolation"] = seconds(lambda: published_interpolation(cloud, centres, features), repeats)
    steps["pooling"] = seconds(lambda: published_patches(steps["interpolation"][1], pixels), repeats)
    return steps


def our_steps(points: np.ndarray, pixel: np.ndarray, tokens: np.ndarray, repeats: int) -> dict[str, Timing]:
    threads = torch.get_num_threads()
    steps = {"centres": seconds(lambda: farthest_points(points, GROUPS), repeats)}
    centres = points[steps["centres"][1]]
    steps["groups"] = seconds(lambda: group_neighbours(points, centres, GROUP_SIZE, workers=threads), repeats)
    steps["interpolation"] = seconds(lambda: nearest_centres(points, centres, "expanded", threads), repeats)
    weights = steps["interpolation"][1]
    steps["pooling"] = seconds(lambda: pooled_operator(*weights, pixel, GROUPS, GRID, SIZE) @ tokens, repeats)
    return steps


def run(quick: bool = False) -> list[dict[str, Any]]:
    """One row: name, repo_seconds, ours_seconds, ratio, bar, ok, note. `quick` times the slow form once."""
    points, pixel = cloud_of()
    tokens = np.random.default_rng(1).normal(size=(GROUPS, CHANNELS)).astype(np.float32)
    with torch.inference_mode():
        theirs = published_steps(points, pixel, tokens, 1 if quick else 3)
    our_steps(points, pixel, tokens, 1)  # imports and the pooling matrix, which all scans share
    ours = our_steps(points, pixel, tokens, REPEATS)
    repo_seconds, ours_seconds = (sum(time for time, _ in steps.values()) for steps in (theirs, ours))
    same = np.array_equal(ours["centres"][1], theirs["centres"][1].numpy())
    error = np.median(np.abs(ours["pooling"][1] - theirs["pooling"][1].numpy()))
    parts = ", ".join(f"{name} {theirs[name][0]:.3f} / {ours[name][0]:.3f}" for name in ours)
    ratio = repo_seconds / ours_seconds
    return [
        {
            "name": f"point path of one scan without the network, {len(points)} points",
            "repo_seconds": repo_seconds,
            "ours_seconds": ours_seconds,
            "ratio": ratio,
            "bar": BAR,
            "ok": bool(ours_seconds <= 0.15 and ratio >= 20 and same and error < 1e-4),
            "note": f"{parts}; {'same' if same else 'OTHER'} centres, median patch difference {error:.1e}",
        }
    ]
