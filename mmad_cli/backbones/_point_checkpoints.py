"""Which tensors of the published point and fusion checkpoints are kept, under which names; anything else is an error.

The published loaders take what fits by name and say nothing of the rest, so a wrong file runs on random values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmad_cli.backbones._checkpoints import FittedTensors, describe, differences, module_shapes
from mmad_cli.errors import WeightsError

if TYPE_CHECKING:
    import torch

    from mmad_cli.backbones.point_transformer import Network

    Tensors = dict[str, torch.Tensor]
    Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Layout:
    """Where the encoder stands in a published file.

    prefix: of its names. unused: beginnings of the names (after the prefix) of the pre-training heads beside it.
    others: beginnings of the names outside the prefix that are known and unused; None = whatever is there.
    """

    prefix: str
    unused: tuple[str, ...]
    others: tuple[str, ...] | None


_LAYOUTS: dict[Network, _Layout] = {
    "point_mae": _Layout("MAE_encoder.", (), ("mask_token", "decoder_pos_embed.", "MAE_decoder.", "increase_dim.")),
    # beside the encoder the file holds its momentum copy, a tokeniser and a queue: networks of their own
    "point_bert": _Layout("transformer_q.", ("mask_token", "lm_head.", "cls_head."), None),
}

POINT_CHANNELS = 1152
RGB_CHANNELS = 768
HEAD_CHANNELS = 256


def fit_point(network: Network, tensors: Tensors, path: Path) -> FittedTensors:
    """The encoder of a Point-MAE or Point-BERT pre-training file, prefix removed; or an encoder alone.

    Raises WeightsError that names missing, unexpected and mis-shaped tensors by their names in the file.
    """
    import torch

    from mmad_cli.backbones.point_transformer import PointTransformer

    with torch.device("meta"):
        expected = module_shapes(PointTransformer(network))
    layout = _LAYOUTS[network]
    if any(name.startswith(layout.prefix) for name in tensors):
        tensors = {name: value for name, value in tensors.items() if not _is_unused(name, layout)}
        prefix = layout.prefix
    else:
        prefix = ""
    _require({prefix + name: shape for name, shape in expected.items()}, tensors, network, path)
    return FittedTensors({name.removeprefix(prefix): value for name, value in tensors.items()}, None)


def fit_uff(tensors: Tensors, path: Path) -> FittedTensors:
    """The fusion block of M3DM (arXiv 2303.00601) with the heads of its training, under the published names."""
    _require(uff_shapes(), tensors, "m3dm_uff", path)
    return FittedTensors(tensors, None)


def fit_builtin(name: str, tensors: Tensors, path: Path) -> FittedTensors:
    """A built-in network as `mmad pretrain` writes it: every tensor but the counters of batch normalisation."""
    import torch

    from mmad_cli.backbones.builtin.points import PointNetwork
    from mmad_cli.backbones.builtin.rgb import RgbNetwork

    with torch.device("meta"):
        expected = module_shapes(RgbNetwork() if name == "builtin_rgb" else PointNetwork())
    _require(expected, tensors, name, path)
    return FittedTensors(tensors, None)


def uff_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of the fusion block: per modality LayerNorm, linear C-4C, linear 4C-C, and a head C-256."""
    shapes: dict[str, tuple[int, ...]] = {}
    for modality, width in (("xyz", POINT_CHANNELS), ("rgb", RGB_CHANNELS)):
        layers = {"norm": (width,), "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        for layer, shape in {**layers, "head": (HEAD_CHANNELS, width)}.items():
            shapes[f"{modality}_{layer}.weight"] = shape
            shapes[f"{modality}_{layer}.bias"] = shape[:1]
    return shapes


def _is_unused(name: str, layout: _Layout) -> bool:
    if name.startswith(layout.prefix):
        return name.removeprefix(layout.prefix).startswith(layout.unused)
    return layout.others is None or name.startswith(layout.others)


def _require(expected: Shapes, tensors: Tensors, name: str, path: Path) -> None:
    problems = differences(expected, tensors)
    if any(problems.values()):
        raise WeightsError(f"{path}: does not fit {name}: " + describe(problems))
