"""From trained networks to the anomaly map of CMDR-IAD, with every intermediate map.

Errors are chord lengths, the distance of two features after scaling both to length 1, in [0, 2], and 0 where a pixel
has no point feature. They are computed at valid pixels only; the layers that mix pixels see all that reaches those.
Source: CMDR-IAD (arXiv 2603.03939), inference, and its published code, which the constants are of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from mmad_cli.methods.cmdr_iad.config import POLYURETHANE_SMOOTHING, RGB_SMOOTHING, STREAMS, NetworkName
from mmad_cli.methods.cmdr_iad.networks import (
    RGB_WIDTH,
    WINDOW,
    Mapper,
    PointDecoder,
    RGBDecoder,
    square_side,
)
from mmad_cli.methods.cmdr_iad.scan import DenseScan, Scan
from mmad_cli.methods.mapping.scoring import smooth

# features shorter than this are not scaled to length 1
LENGTH_EPS = 1e-12

GATE_WINDOW = 7
GATE_BASE = 4.0
GATE_SLOPE = 2.0
GATE_EPS = 1e-8

CONFIDENCE_DECAY = 0.3
CONFIDENCE_EPS = 1e-8

POLYURETHANE_EPS = 1e-6

# pixels, windows and positions that go through the networks at a time
_PIXEL_TILE = 2048
_WINDOW_TILE = 16
_POSITION_TILE = 2048

# pixels that the three 3 x 3 convolutions of the RGB decoder look around
_CONVOLUTION_REACH = 3

Map = NDArray[np.float64]


@dataclass(frozen=True)
class GatedMapping:
    """Reliability-gated mapping anomaly with its parts, each (H, W).

    joint: product of both mapping errors; deviation: its local standard deviation about the mean of the whole map;
    weight: slope of the gate; gate: in [0.5, 1); anomaly = gate * joint.
    """

    joint: Map
    deviation: Map
    weight: Map
    gate: Map
    anomaly: Map


@dataclass(frozen=True)
class WeightedReconstruction:
    """Confidence-weighted reconstruction anomaly with the weights of both errors, each (H, W)."""

    rgb_weight: Map
    points_weight: Map
    anomaly: Map


@dataclass(frozen=True)
class Fusion:
    """Everything between the four errors and the map that is smoothed, each (H, W)."""

    rgb_smoothed: Map
    mapping: GatedMapping
    reconstruction: WeightedReconstruction
    fused: Map


def errors(
    networks: Mapping[NetworkName, nn.Module], rgb: Tensor | None, points: Tensor | None, valid: Tensor
) -> dict[NetworkName, Tensor]:
    """Chord length (N,) of every network's output to what was observed, 0 where not valid, by name of the network.

    networks: in evaluation mode; rgb (N, C_rgb), points (N, C_pt), in raster order; valid bool (N,). A stream that no
    network needs may be None. Raises ValueError for one that is missing.
    """
    return scan_errors(networks, DenseScan(rgb, points, valid))


def scan_errors(networks: Mapping[NetworkName, nn.Module], scan: Scan) -> dict[NetworkName, Tensor]:
    """`errors` of a scan, however its features come."""
    found: dict[NetworkName, Tensor] = {}
    with torch.inference_mode():
        for name, network in networks.items():
            source, target = STREAMS[name]
            match network:
                case Mapper():
                    values = mapping_errors(network, scan.first(source, network.input), scan.observed(target))
                case RGBDecoder():
                    values = rgb_reconstruction_errors(network, scan)
                case PointDecoder():
                    values = point_reconstruction_errors(network, scan)
                case _:
                    raise TypeError(f"networks: expected those of CMDR-IAD, got {type(network).__name__} for {name}")
            found[name] = _spread(values, scan.valid)
    return found


def mapping_errors(mapper: Mapper, first: Tensor, targets: Tensor) -> Tensor:
    """Chord lengths (n,) of predictions to targets (n, C), from the output of the mapper's first layer (n, hidden)."""
    tiles = zip(torch.split(first, _PIXEL_TILE), torch.split(targets, _PIXEL_TILE), strict=True)
    return torch.cat([_chord_lengths(mapper.after_first(part), target) for part, target in tiles])


def rgb_reconstruction_errors(decoder: RGBDecoder, scan: Scan) -> Tensor:
    """Chord lengths at the valid pixels, in their order, between reconstructed and observed RGB features.

    Only windows of tokens and rows and columns that reach a valid pixel through the convolutions are computed.
    """
    observed = scan.observed("rgb")
    if not len(observed):
        return observed.new_zeros(0)
    tiles = zip(torch.split(_refined(decoder, scan), _PIXEL_TILE), torch.split(observed, _PIXEL_TILE), strict=True)
    return torch.cat([_chord_lengths(decoder.reconstruct(part), target) for part, target in tiles])


def point_reconstruction_errors(decoder: PointDecoder, scan: Scan) -> Tensor:
    """Chord lengths at the valid pixels, in their order, between reconstructed and observed point features.

    Pixels without point features are zero and take no part in the first layer; of the last only the rows of valid
    pixels are kept, and the channel means that gate them.
    """
    hidden = decoder.projection[1:](_positions_mixed(decoder, *scan.filled()))
    kept, means = _expanded(decoder, hidden.T, scan.valid)
    gate = decoder.attention[1:](means[None, :, None])[0, :, 0]
    tiles = zip(torch.split(kept, _PIXEL_TILE), torch.split(scan.observed("points"), _PIXEL_TILE), strict=True)
    return torch.cat([_chord_lengths(part * gate, target) for part, target in tiles])


def gated_mapping(rgb_error: NDArray[np.floating], points_error: NDArray[np.floating]) -> GatedMapping:
    """Reliability-gated mapping anomaly of the errors (H, W) of both mappers.

    With j their product, mu its mean over all pixels, zeros included, and s the root of the 7 x 7 mean of (j - mu)^2
    (zeros beyond the border): weight W = 4 + 2 s / (mean(s) + 1e-8), gate = sigmoid(W j), anomaly = gate * j.
    """
    joint = rgb_error.astype(np.float64) * points_error
    deviation = np.sqrt(smooth((joint - joint.mean()) ** 2, (GATE_WINDOW,)))
    weight = GATE_BASE + GATE_SLOPE * deviation / (deviation.mean() + GATE_EPS)
    gate = 1.0 / (1.0 + np.exp(-weight * joint))
    return GatedMapping(joint, deviation, weight, gate, gate * joint)


def weighted_reconstruction(
    rgb_error: NDArray[np.floating], points_error: NDArray[np.floating]
) -> WeightedReconstruction:
    """Mean of both reconstruction errors (H, W), each weighted by exp(-0.3 error): the larger one counts a bit less."""
    first, second = rgb_error.astype(np.float64), points_error.astype(np.float64)
    rgb_weight, points_weight = np.exp(-CONFIDENCE_DECAY * first), np.exp(-CONFIDENCE_DECAY * second)
    total = rgb_weight * first + points_weight * second
    return WeightedReconstruction(rgb_weight, points_weight, total / (rgb_weight + points_weight + CONFIDENCE_EPS))


def fuse(maps: Mapping[NetworkName, NDArray[np.floating]], valid: NDArray[np.bool_]) -> Fusion:
    """Product of mapping and reconstruction anomaly, 0 where not valid, with all that leads to it.

    maps: the errors (H, W) of the four networks; valid bool (H, W). The RGB reconstruction error is smoothed first,
    by which it reaches beyond the object; the three others stay as they are.
    """
    smoothed = smooth(maps["rgb_decoder"], RGB_SMOOTHING)
    mapping = gated_mapping(maps["points_to_rgb"], maps["rgb_to_points"])
    reconstruction = weighted_reconstruction(smoothed, maps["point_decoder"])
    return Fusion(smoothed, mapping, reconstruction, np.where(valid, mapping.anomaly * reconstruction.anomaly, 0.0))


def polyurethane_map(error: NDArray[np.floating]) -> Map:
    """Anomaly map (H, W) of the variant for polyurethane; its maximum is the score of the chunk.

    One 5 x 5 mean of the point reconstruction error, divided by the root of its mean over non-zero pixels + 1e-6.
    """
    smoothed = smooth(error, POLYURETHANE_SMOOTHING)
    reached = np.count_nonzero(smoothed)
    if not reached:
        return smoothed
    return np.asarray(smoothed / (np.sqrt(smoothed.sum() / reached) + POLYURETHANE_EPS))


def _chord_lengths(predicted: Tensor, observed: Tensor) -> Tensor:
    """Distances (n,) of rows after scaling each to length 1; overwrites `predicted` (n, C)."""
    ours, theirs = (torch.linalg.vector_norm(rows, dim=1, keepdim=True) for rows in (predicted, observed))
    difference = predicted.div_(ours.clamp_(min=LENGTH_EPS))
    difference.addcdiv_(observed, theirs.clamp_(min=LENGTH_EPS), value=-1.0)
    lengths: Tensor = torch.linalg.vector_norm(difference, dim=1)
    return lengths


def _spread(values: Tensor, valid: Tensor) -> Tensor:
    whole = values.new_zeros(len(valid))
    whole[valid] = values
    return whole


def _refined(decoder: RGBDecoder, scan: Scan) -> Tensor:
    """What the head of the RGB decoder gets, at the valid pixels only."""
    side = square_side(len(scan.valid))
    valid = scan.valid.view(side, side)
    top, bottom, left, right = _box(valid, _CONVOLUTION_REACH)
    needed = torch.zeros_like(valid)
    needed[top:bottom, left:right] = True
    tokens = _tokens(decoder, scan, needed.view(-1)).view(side, side, -1)
    # what lies outside the box is zero here, which the outermost _CONVOLUTION_REACH pixels of the box get to feel
    maps = decoder.conv_decoder(tokens[top:bottom, left:right].permute(2, 0, 1)[None])
    rows: Tensor = maps[0].permute(1, 2, 0)[valid[top:bottom, left:right]]
    return rows


def _box(valid: Tensor, margin: int) -> tuple[int, int, int, int]:
    """First and one beyond the last row and column of the valid pixels (H, W), with a margin inside the image."""
    bounds = []
    for axis, size in ((1, valid.shape[0]), (0, valid.shape[1])):
        found = torch.nonzero(valid.any(dim=axis))
        bounds += [max(int(found[0]) - margin, 0), min(int(found[-1]) + 1 + margin, size)]
    return bounds[0], bounds[1], bounds[2], bounds[3]


def _tokens(decoder: RGBDecoder, scan: Scan, needed: Tensor) -> Tensor:
    """Tokens after the attention block (N, width) at the needed pixels; elsewhere zero.

    Whole windows are attended to, but only what is needed goes on.
    """
    layer, rest, block = cast(nn.Linear, decoder.projection[0]), decoder.projection[1:], decoder.attn
    tokens = torch.zeros(len(needed), RGB_WIDTH, device=needed.device)
    for begin, end in _runs(needed, WINDOW):
        for start in range(begin, end, WINDOW * _WINDOW_TILE):
            stop = min(start + WINDOW * _WINDOW_TILE, end)
            part = rest(scan.first_of_image(layer, start, stop))
            kept = needed[start:stop]
            attended = (part + block.attn(block.norm1(part)[None])[0])[kept]
            tokens[start:stop][kept] = attended + block.mlp(block.norm2(attended))
    return tokens


def _runs(needed: Tensor, size: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each run of neighbouring blocks of `size` elements that hold a needed one."""
    padded = functional.pad(needed, (0, -len(needed) % size))
    blocks = functional.pad(padded.view(-1, size).any(dim=1).to(torch.int8), (1, 1)).diff()
    begins, ends = (torch.nonzero(blocks == sign).squeeze(1) * size for sign in (1, -1))
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        yield begin, min(end, len(needed))


def _positions_mixed(decoder: PointDecoder, index: Tensor, rows: Tensor) -> Tensor:
    """First linear layer of the point decoder (C, N / 32), from point features (m, C) at positions (m,)."""
    layer = cast(nn.Linear, decoder.projection[0])
    mixed = layer.bias[:, None].repeat(1, rows.shape[1])
    for positions, part in zip(torch.split(index, _POSITION_TILE), torch.split(rows, _POSITION_TILE), strict=True):
        mixed.addmm_(layer.weight.index_select(1, positions), part)
    return mixed.T


def _expanded(decoder: PointDecoder, rows: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of valid positions (n, C) and the mean over all (C,) of the decoded sequence, from (N / 32, C)."""
    hidden = decoder.decoder[:-2](rows[None])
    last = decoder.decoder[-2:]
    around = functional.pad(hidden, (0, 0, 1, 1))
    kept, total = [], around.new_zeros(rows.shape[1])
    half = _POSITION_TILE // 2
    for begin in range(0, hidden.shape[1], half):
        end = min(begin + half, hidden.shape[1])
        # one position more on either side, dropped again from the doubled result
        part = last(around[:, begin : end + 2])[0, 2:-2]
        total += part.sum(dim=0)
        kept.append(part[valid[2 * begin : 2 * end]])
    return torch.cat(kept), total / len(valid)
