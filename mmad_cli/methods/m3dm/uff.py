"""Unsupervised feature fusion (UFF): the network, its contrastive loss, and the fused feature made with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from mmad_cli.errors import WeightsError
from mmad_cli.methods.m3dm.config import UFF_WEIGHTS as WEIGHTS
from mmad_cli.types import FloatArray, IndexArray

POINT_CHANNELS = 1152
RGB_CHANNELS = 768
HIDDEN_FACTOR = 4
HEAD_CHANNELS = 256

# Logits are formed for this many entries at a time
_LOGIT_TILE = 1 << 24
_PATCH_TILE = 8192


class _Branch(nn.Module):
    """Linear, GELU, Linear with four times the width between."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, HIDDEN_FACTOR * channels)
        self.fc2 = nn.Linear(HIDDEN_FACTOR * channels, channels)

    def forward(self, patches: Tensor) -> Tensor:
        hidden: Tensor = nn.functional.gelu(self.fc1(patches))
        out: Tensor = self.fc2(hidden)
        return out


class FusionNetwork(nn.Module):
    """Two independent branches, points and RGB, each LayerNorm and a two-layer perceptron, without a residual.

    The heads serve the loss only. Parameter names are those of the published checkpoint; at the published sizes
    there are 15 840 896 parameters. Source: M3DM (arXiv 2303.00601), section 3.3, and its code.
    """

    def __init__(self, point_channels: int = POINT_CHANNELS, rgb_channels: int = RGB_CHANNELS) -> None:
        super().__init__()
        self.point_channels, self.rgb_channels = point_channels, rgb_channels
        self.xyz_norm = nn.LayerNorm(point_channels)
        self.xyz_mlp = _Branch(point_channels)
        self.rgb_norm = nn.LayerNorm(rgb_channels)
        self.rgb_mlp = _Branch(rgb_channels)
        self.rgb_head = nn.Linear(rgb_channels, HEAD_CHANNELS)
        self.xyz_head = nn.Linear(point_channels, HEAD_CHANNELS)

    def points_branch(self, points: Tensor) -> Tensor:
        """Point half (..., C_pt) of the fused feature."""
        out: Tensor = self.xyz_mlp(self.xyz_norm(points))
        return out

    def rgb_branch(self, rgb: Tensor) -> Tensor:
        """RGB half (..., C_rgb) of the fused feature."""
        out: Tensor = self.rgb_mlp(self.rgb_norm(rgb))
        return out

    def forward(self, points: Tensor, rgb: Tensor) -> Tensor:
        """Fused feature (..., C_pt + C_rgb), points first, from point (..., C_pt) and RGB patches (..., C_rgb)."""
        return torch.cat([self.points_branch(points), self.rgb_branch(rgb)], dim=-1)

    def loss(self, points: Tensor, rgb: Tensor, temperature: float) -> Tensor:
        """Contrastive loss of a batch of patch pairs, points (n, C_pt) and RGB (n, C_rgb).

        Pairs whose point channels are not all different from zero do not take part; without any other the
        loss is 0. Source: M3DM (arXiv 2303.00601), equation 2, as its code evaluates it.
        """
        kept = (points != 0).all(dim=1)
        points, rgb = points[kept], rgb[kept]
        if len(points) == 0:
            return sum((p.sum() for p in self.parameters()), start=torch.zeros((), device=points.device)) * 0.0
        queries = nn.functional.normalize(self.rgb_head(self.rgb_branch(rgb)), dim=1)
        keys = nn.functional.normalize(self.xyz_head(self.points_branch(points)), dim=1)
        return contrastive_loss(queries, keys, temperature)


def contrastive_loss(queries: Tensor, keys: Tensor, temperature: float = 1.0) -> Tensor:
    """2 T times the cross-entropy of q k^T / T with target i in row i, averaged over rows; a scalar tensor.

    queries, keys (n, d), rows of unit length; T the temperature. One direction only, as published. The (n, n)
    logits are formed tile by tile, forwards and backwards, and never held. Raises ValueError for shapes that
    differ and T that is not positive.
    """
    if queries.ndim != 2 or queries.shape != keys.shape or len(queries) == 0:
        shapes = f"{tuple(queries.shape)} and {tuple(keys.shape)}"
        raise ValueError(f"queries, keys: must have one shape (n, d) with n above 0, got {shapes}")
    if not temperature > 0:
        raise ValueError(f"temperature: must be above 0, got {temperature}")
    loss: Tensor = _TiledContrast.apply(queries, keys, temperature)  # type: ignore[no-untyped-call]
    return loss


class _TiledContrast(torch.autograd.Function):
    """`contrastive_loss` with the softmax recomputed in the backward pass."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
        step = max(1, _LOGIT_TILE // len(keys))
        normaliser = torch.cat(
            [torch.logsumexp(queries[i : i + step] @ keys.T / temperature, 1) for i in range(0, len(queries), step)]
        )
        ctx.save_for_backward(queries, keys, normaliser)
        ctx.temperature = temperature
        matched = (queries * keys).sum(1) / temperature
        return 2 * temperature * (normaliser - matched).mean()

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        queries, keys, normaliser = ctx.saved_tensors  # type: ignore[attr-defined]
        temperature = ctx.temperature  # type: ignore[attr-defined]
        step = max(1, _LOGIT_TILE // len(keys))
        for_queries, for_keys = -keys, -queries
        for i in range(0, len(queries), step):
            logits = queries[i : i + step] @ keys.T / temperature
            softmax = logits.sub_(normaliser[i : i + step, None]).exp_()
            for_queries[i : i + step] += softmax @ keys
            for_keys += softmax.T @ queries[i : i + step]
        # d(2 T mean)/d(logit) times d(logit)/d(q k) = 1 / T: the temperatures cancel
        factor = 2 * gradients[0] / len(queries)
        return for_queries * factor, for_keys * factor, None


def parameter_count(point_channels: int, rgb_channels: int) -> int:
    """Numbers that a network of these widths holds."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in FusionNetwork(point_channels, rgb_channels).parameters())


def new_network(point_channels: int, rgb_channels: int, seed: int) -> FusionNetwork:
    """A freshly initialised network (PyTorch's defaults), the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FusionNetwork(point_channels, rgb_channels)


def network_from_tensors(tensors: Mapping[str, Tensor], where: str) -> FusionNetwork:
    """A network from tensors under the published names; its widths follow from them.

    Raises WeightsError that names `where` and the keys when a tensor is missing, unknown or of a wrong shape.
    """
    widths = [tensors[name].shape[0] if name in tensors else 0 for name in ("xyz_norm.weight", "rgb_norm.weight")]
    with torch.device("meta"):
        network = FusionNetwork(widths[0] or POINT_CHANNELS, widths[1] or RGB_CHANNELS)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != given:
        wrong = sorted(name for name in {*expected, *given} if expected.get(name) != given.get(name))
        raise WeightsError(
            f"{where}: not the tensors of a feature fusion network; missing, unknown or misshapen: {wrong}"
        )
    network.load_state_dict({name: tensor.float().clone() for name, tensor in tensors.items()}, assign=True)
    return network.requires_grad_(False).eval()


def load_network(path: Any, where: str | None = None) -> FusionNetwork:
    """Read a network from a safetensors file. Raises WeightsError as `network_from_tensors`."""
    from safetensors.torch import load_file

    return network_from_tensors(load_file(str(path)), where or str(path))


def released_network() -> FusionNetwork:
    """The published block from the weights registry. Raises WeightsError, which says how to get it."""
    from mmad_cli.backbones.weights import resolve

    return load_network(resolve(WEIGHTS).path, WEIGHTS)


def save_network(network: FusionNetwork, path: Any) -> None:
    """Write the tensors under the published names as safetensors."""
    from safetensors.torch import save_file

    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}, str(path))


def fuse(network: FusionNetwork | None, points: FloatArray, rgb: FloatArray, spread: IndexArray) -> FloatArray:
    """Fused patches float32 (n, C_pt + C_rgb), points first; without a network the two side by side.

    points (n, C_pt); rgb (m, C_rgb), distinct RGB patches; spread (n,), the row of `rgb` that belongs to each
    point patch. The branches act on single patches, so each distinct RGB patch, and the patch without points
    (exactly zero), goes through the network once.
    """
    fused = np.empty((len(points), points.shape[1] + rgb.shape[1]), dtype=np.float32)
    half = points.shape[1]
    if network is None:
        fused[:, :half], fused[:, half:] = points, rgb[spread]
        return fused
    filled = points.any(axis=1)
    fused[filled, :half] = _through(network.points_branch, points[filled], network)
    fused[~filled, :half] = _through(network.points_branch, np.zeros_like(points[:1]), network)
    fused[:, half:] = _through(network.rgb_branch, rgb, network)[spread]
    return fused


def _through(branch: Any, patches: FloatArray, network: FusionNetwork) -> FloatArray:
    device = network.xyz_norm.weight.device
    with torch.inference_mode():
        parts = [
            branch(torch.from_numpy(np.array(patches[i : i + _PATCH_TILE])).to(device)).cpu().numpy()
            for i in range(0, len(patches), _PATCH_TILE)
        ]
    return np.concatenate(parts) if parts else np.empty_like(patches)
