"""Scoring one scan with CFM, MAFR and CMDR-IAD at 224 x 224, from the extractors' tokens to map and score.

Both sides start from the same tokens, centres and networks, in one process. The published form assembles features of
every pixel in dense tensors (interpolation included, as its extractor does), sends every pixel through the networks and
smooths with convolutions; ours computes valid pixels only and applies first layers to tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.bench_points import cloud_of, published_interpolation
from benchmarks.machine import PeakMemory
from benchmarks.turns import NO_BAR, Bar, Row, row, timed, turns_of
from mmad_cli.alignment.grouping import farthest_points
from mmad_cli.alignment.interpolation import nearest_centres
from mmad_cli.methods.checks import GeneratedSample
from mmad_cli.methods.cmdr_iad.networks import HEADS, WINDOW, WindowAttention
from mmad_cli.methods.mafr.networks import Decoder
from mmad_cli.methods.mapping.config import POINTS, RGB
from mmad_cli.methods.mapping.method import MappingMethod
from mmad_cli.methods.registry import build_config, get_method

GROUPS, SIZE, GRID = 1024, 224, 28
CHANNELS = {RGB: 768, POINTS: 1152}
# side of the square that the part covers, of 224: 15 % of the pixels as on 60 real scans of cable_gland, and a third,
# for which there is no bar
PARTS = (88, 130)
SMOOTHING = (5, 5, 5, 5, 5, 7, 7, 7)


def published_features(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    points, centres = inputs["points"], inputs["centres"]
    interpolated = published_interpolation(points, centres, inputs["tokens"])
    image = torch.zeros(CHANNELS[POINTS], SIZE * SIZE)
    image[:, inputs["pixel"]] = interpolated.T
    averaged = F.avg_pool2d(image.view(1, -1, SIZE, SIZE), 3, stride=1)
    dense = F.adaptive_avg_pool2d(averaged, SIZE).reshape(CHANNELS[POINTS], -1).T
    tokens = inputs["rgb"].T.reshape(1, -1, GRID, GRID)
    rgb = F.interpolate(tokens, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return rgb.reshape(CHANNELS[RGB], -1).T, dense


def box_means(image: Tensor, windows: tuple[int, ...]) -> Tensor:
    smoothed = image.reshape(1, 1, SIZE, SIZE)
    for window in windows:
        kernel = torch.full((1, 1, window, window), 1 / window**2)
        smoothed = F.conv2d(smoothed, kernel, padding=window // 2)
    return smoothed[0, 0]


def published_score(errors: Tensor, points: Tensor) -> float:
    errors = errors.reshape(-1).clone()
    errors[points.sum(dim=1) == 0] = 0
    smoothed = box_means(errors, SMOOTHING)
    return float(smoothed.max() / smoothed[smoothed != 0].mean().sqrt())


def chord(predicted: Tensor, observed: Tensor) -> Tensor:
    return (F.normalize(predicted, dim=1) - F.normalize(observed, dim=1)).pow(2).sum(1).sqrt()


def published_cfm(learner: Any, rgb: Tensor, points: Tensor) -> float:
    errors = chord(learner.to_rgb(points), rgb) * chord(learner.to_points(rgb), points)
    return published_score(errors, points)


def published_mafr(learner: Any, rgb: Tensor, points: Tensor) -> float:
    network = learner.network
    encoder = network.encoder
    fused = encoder.after_first(encoder.input_fc(torch.cat([rgb, points], dim=1)))
    lengths = []
    for decoder, observed in ((network.rgb_decoder, rgb), (network.point_decoder, points)):
        lengths.append(torch.linalg.vector_norm(published_restoration(decoder, fused) - observed, dim=1))
    return published_score(lengths[0] * lengths[1], points)


def published_restoration(decoder: Decoder, fused: Tensor) -> Tensor:
    """With the attention on maps of one pixel, pooled and convolved as the published code does."""
    hidden = F.gelu(decoder.norm(decoder.input_fc(fused)))
    for layer in decoder.layers:
        hidden = F.gelu(decoder.norm(layer(hidden)))
    maps = hidden[:, :, None, None]
    perceptron = decoder.cbam.channel_attention.fc
    pooled = [pool(maps, 1).flatten(1) for pool in (F.adaptive_avg_pool2d, F.adaptive_max_pool2d)]
    maps = maps * torch.sigmoid(perceptron(pooled[0]) + perceptron(pooled[1]))[:, :, None, None]
    over = torch.cat([maps.mean(1, keepdim=True), maps.max(1, keepdim=True).values], dim=1)
    maps = maps * torch.sigmoid(decoder.cbam.spatial_attention.conv(over))
    restored: Tensor = decoder.output_fc(maps.flatten(1)) + decoder.skip(fused)
    return restored


def published_cmdr(learner: Any, rgb: Tensor, points: Tensor) -> float:
    networks = learner.networks
    valid = points.sum(dim=1) != 0
    outputs = {
        "rgb_to_points": (networks["rgb_to_points"](rgb), points),
        "points_to_rgb": (networks["points_to_rgb"](points), rgb),
        "rgb_decoder": (published_rgb_decoder(networks["rgb_decoder"], rgb), rgb),
        "point_decoder": (published_point_decoder(networks["point_decoder"], points), points),
    }
    error = {name: chord(*pair) * valid for name, pair in outputs.items()}
    of_rgb = box_means(error["rgb_decoder"], (5, 5, 5, 7, 7)).reshape(-1)
    joint = error["rgb_to_points"] * error["points_to_rgb"]
    deviation = box_means((joint - joint.mean()) ** 2, (7,)).sqrt().reshape(-1)
    gated = torch.sigmoid((4 + 2 * deviation / (deviation.mean() + 1e-8)) * joint) * joint
    weights = [torch.exp(-0.3 * values) for values in (of_rgb, error["point_decoder"])]
    total = weights[0] * of_rgb + weights[1] * error["point_decoder"]
    return published_score(gated * total / (weights[0] + weights[1] + 1e-8), points)


def published_attention(attention: WindowAttention, tokens: Tensor) -> Tensor:
    count, channels = tokens.shape
    parts = attention.qkv(tokens).view(count // WINDOW, WINDOW, 3, HEADS, channels // HEADS).permute(2, 0, 3, 1, 4)
    similar = (parts[0] @ parts[1].transpose(-2, -1)) * (channels // HEADS) ** -0.5
    attended = (similar.softmax(dim=-1) @ parts[2]).transpose(1, 2).reshape(count, channels)
    out: Tensor = attention.proj(attended)
    return out


def published_rgb_decoder(decoder: Any, rgb: Tensor) -> Tensor:
    tokens, block = decoder.projection(rgb), decoder.attn
    tokens = tokens + published_attention(block.attn, block.norm1(tokens))
    tokens = tokens + block.mlp(block.norm2(tokens))
    maps = tokens.T.reshape(1, -1, SIZE, SIZE)
    for layer in decoder.conv_decoder:
        maps = nn.ConvTranspose2d.forward(layer, maps) if isinstance(layer, nn.ConvTranspose2d) else layer(maps)
    restored: Tensor = decoder.reconstruct(maps[0].flatten(1).T)
    return restored


def published_point_decoder(decoder: Any, points: Tensor) -> Tensor:
    sequence = decoder.projection(points.T[None])
    for layer in decoder.decoder:
        kind = next((base for base in (nn.ConvTranspose1d, nn.BatchNorm1d) if isinstance(layer, base)), None)
        sequence = layer(sequence) if kind is None else kind.forward(layer, sequence)
    return (sequence * decoder.attention(sequence))[0].T


PUBLISHED: dict[str, Callable[[Any, Tensor, Tensor], float]] = {
    "cfm": published_cfm,
    "mafr": published_mafr,
    "cmdr_iad": published_cmdr,
}


class Measured(NamedTuple):
    """Seconds of a call, GB that it took at its peak beyond what the process held, its result."""

    seconds: float
    memory: float
    result: Any


def measured(call: Callable[[], Any]) -> Measured:
    memory = PeakMemory()
    seconds, result = timed(call)
    return Measured(seconds, memory.taken() / 1e9, result)


def scan(side: int) -> tuple[dict[str, Tensor], GeneratedSample]:
    """Tokens and geometry in both forms, of a part that covers a square of the image."""
    points, pixel = cloud_of(side)
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


def untrained(name: str) -> MappingMethod:
    """A method with freshly drawn networks, ready to score."""
    definition = get_method(name)
    method = definition.build(build_config(definition, None, "official", {}), "cpu")
    if not isinstance(method, MappingMethod):
        raise TypeError(f"{name}: is no method on dense features")
    method.learner_ = method._fresh(dict(CHANNELS), 0)
    for module in method.learner_.groups.values():
        module.requires_grad_(False).eval()
    return method


class Run(NamedTuple):
    """One turn of one method."""

    features: Measured
    published: Measured
    ours: Measured


def turn(
    methods: dict[str, MappingMethod], inputs: dict[str, Tensor], sample: GeneratedSample
) -> Iterator[tuple[str, Run]]:
    """Every method once in both forms; the published features, which all start from, are made once."""
    with torch.inference_mode():
        features = measured(lambda: published_features(inputs))
    for name, method in methods.items():
        with torch.inference_mode():
            theirs = measured(partial(PUBLISHED[name], method.learner_, *features.result))
        yield name, Run(features, theirs, measured(partial(method.predict, sample)))


def compare(name: str, points: int, runs: list[Run], bar: Bar) -> Row:
    """One row: from tokens to map and score in both forms."""
    ours = [run.ours.seconds for run in runs]
    networks = [run.published.seconds for run in runs]
    theirs = runs[0].published.result
    off = abs(runs[0].ours.result.image_score - theirs) / theirs
    peak = [max(getattr(run, part).memory for run in runs) for part in Run._fields]
    given = [seconds / own for seconds, own in zip(networks, ours, strict=True)]
    return row(
        f"{get_method(name).title}, one scan of {points} points, tokens to score",
        ours,
        [run.features.seconds + run.published.seconds for run in runs],
        bar=bar,
        holds=off < 1e-3,
        note=(
            f"{points / SIZE**2:.0%} of the pixels; with features per pixel given, published {median(networks):.2f} s "
            f"({median(given):.1f}x); scores {off:.0e} apart; peak memory beyond the networks {peak[2]:.2f} GB, "
            f"published {peak[0]:.2f} GB for the features and {peak[1]:.2f} GB more"
        ),
    )


def run(quick: bool = False) -> list[Row]:
    """Every method at 15 % of the pixels with a bar, and at a third in one turn without."""
    methods = {name: untrained(name) for name in PUBLISHED}
    rows: list[Row] = []
    for side in PARTS[:1] if quick else PARTS:
        inputs, sample = scan(side)
        for method in methods.values():
            method.predict(sample)  # imports and matrices that all scans share
        barred = side == PARTS[0]
        turns = [dict(turn(methods, inputs, sample)) for _ in range(turns_of(quick or not barred))]
        bar = Bar(ratio=5) if barred else NO_BAR
        rows += [compare(name, len(inputs["points"]), [one[name] for one in turns], bar) for name in methods]
    return rows
