"""Scoring one scan with CFM at 224 x 224, from the extractors' tokens to map and score.

Both sides start from the same tokens, centres and networks, in one process. The published form assembles features of
every pixel in dense tensors (interpolation included, as its extractor does), maps every pixel and smooths with eight
convolutions; ours assembles them with the sparse operator and maps valid pixels only.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.bench_points import cloud_of, published_interpolation
from mmad_cli.alignment.grouping import farthest_points
from mmad_cli.alignment.interpolation import nearest_centres
from mmad_cli.methods.cfm import Cfm, CfmConfig, CfmLearner
from mmad_cli.methods.checks import GeneratedSample
from mmad_cli.methods.mapping.dense import POINTS, RGB

GROUPS, SIZE, GRID = 1024, 224, 28
CHANNELS = {RGB: 768, POINTS: 1152}
BAR = ">= 5x"
# side of the square that the part covers, of 224: about a third of the pixels, as on the stored scans
PART = 130


def published_features(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    points, centres = inputs["points"], inputs["centres"]
    interpolated = published_interpolation(points, centres, inputs["tokens"])
    image = torch.zeros(CHANNELS[POINTS], SIZE * SIZE)
    image[:, inputs["pixel"]] = interpolated.T
    averaged = F.avg_pool2d(image.view(1, -1, SIZE, SIZE), 3, stride=1)
    dense = F.adaptive_avg_pool2d(averaged, SIZE).reshape(CHANNELS[POINTS], -1).T
    tokens = inputs["rgb"].T.reshape(1, -1, GRID, GRID)
    rgb = F.interpolate(tokens, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return rgb.reshape(CHANNELS[RGB], -1).T, dense


def published_score(learner: CfmLearner, rgb: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, float]:
    lengths = []
    for mapper, inputs, targets in ((learner.to_rgb, points, rgb), (learner.to_points, rgb, points)):
        predicted = mapper(inputs)
        lengths.append((F.normalize(predicted, dim=1) - F.normalize(targets, dim=1)).pow(2).sum(1).sqrt())
    errors = lengths[0] * lengths[1]
    errors[points.sum(dim=1) == 0] = 0
    smoothed = errors.reshape(1, 1, SIZE, SIZE)
    for window in (5, 5, 5, 5, 5, 7, 7, 7):
        kernel = torch.full((1, 1, window, window), 1 / window**2)
        smoothed = F.conv2d(smoothed, kernel, padding=window // 2)
    return smoothed[0, 0], float(smoothed.max() / smoothed[smoothed != 0].mean().sqrt())


def timed(call: Callable[[], Any], repeats: int) -> tuple[list[float], Any]:
    times, result = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return times, result


def scan() -> tuple[dict[str, torch.Tensor], GeneratedSample]:
    """Tokens and geometry in both forms."""
    points, pixel = cloud_of(PART)
    rng = np.random.default_rng(1)
    centres = points[farthest_points(points, GROUPS)]
    tokens, rgb = (rng.normal(size=(n, c)).astype(np.float32) for n, c in ((GROUPS, 1152), (GRID * GRID, 768)))
    neighbours, weights = nearest_centres(points, centres, "expanded")
    arrays = {"points": points, "centres": centres, "pixel": pixel, "tokens": tokens, "rgb": rgb}
    features = {
        POINTS: {"tokens": tokens, "pixel": pixel, "neighbours": neighbours, "weights": weights},
        RGB: {"tokens": rgb, "grid": np.array([GRID, GRID])},
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}, GeneratedSample("bench", features)


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Rows: name, repo_seconds, ours_seconds, ratio, bar, ok, note. The ratio is the worst of the repeats."""
    inputs, sample = scan()
    torch.manual_seed(0)
    learner = CfmLearner(CHANNELS, "base", None)
    method = Cfm(CfmConfig())
    method.learner_, method._trained_channels = learner, dict(CHANNELS)
    repeats = 1 if quick else 3
    with torch.inference_mode():
        method.predict(sample)  # imports and matrices that all scans share
        ours, prediction = timed(lambda: method.predict(sample), repeats)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        features, dense = timed(lambda: published_features(inputs), repeats)
        theirs, (_, score) = timed(lambda: published_score(learner, *dense), repeats)
    whole = [a + b for a, b in zip(features, theirs, strict=True)]
    off = abs(prediction.image_score - score) / score
    ratio = min(whole) / max(ours)
    return [
        {
            "name": f"CFM, one scan of {len(inputs['points'])} points at 224 x 224, tokens to score",
            "repo_seconds": float(np.median(whole)),
            "ours_seconds": float(np.median(ours)),
            "ratio": ratio,
            "bar": BAR,
            "ok": bool(ratio >= 5 and off < 1e-3),
            "note": (
                f"worst of {repeats}; without assembling features {min(theirs):.2f} s; scores {off:.0e} apart; "
                f"peak memory of the process until then {before / 2**20:.2f} GB"
            ),
        }
    ]
