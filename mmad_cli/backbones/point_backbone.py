"""Point-MAE and Point-BERT features of a cleaned scan, as M3DM (arXiv 2303.00601) and its descendants use them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from mmad_cli.alignment.grouping import farthest_points, group_neighbours
from mmad_cli.alignment.interpolation import NEIGHBOURS, nearest_centres
from mmad_cli.backbones._checkpoints import build_with, read_checkpoint
from mmad_cli.backbones.base import Features, float32
from mmad_cli.backbones.weights import resolve
from mmad_cli.errors import DataError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from mmad_cli.backbones.specs import FeatureSpec, PointParams
    from mmad_cli.types import FloatArray, Sample


class PointBackbone:
    """Group tokens of a point transformer, and where the groups lie on the pixel grid."""

    batch_size = 1

    def __init__(self, spec: FeatureSpec, device: str = "cpu") -> None:
        import torch

        self.spec = spec
        self._settings = cast("PointParams", spec.settings)
        self._device = torch.device(device)
        record = resolve(self._settings.network)
        built = build_with(self._architecture, read_checkpoint(record.path).content, str(record.path))
        self._network = built.to(self._device).eval().requires_grad_(False)

    def _architecture(self) -> torch.nn.Module:
        from mmad_cli.backbones.point_transformer import Network, PointTransformer

        return PointTransformer(cast("Network", self._settings.network))

    def extract(self, samples: Sequence[Sample]) -> list[Features]:
        """`tokens`, `centres`, `pixel`, `neighbours`, `weights` per sample; DataError for one with too few points."""
        return [self._one(sample) for sample in samples]

    def _one(self, sample: Sample) -> Features:
        import torch

        settings, threads = self._settings, torch.get_num_threads()
        points, pixel = self._points(sample)
        start = self._start(sample, len(points))
        chosen = farthest_points(points, settings.groups, settings.fps_skip_origin, self._device.type, start)
        centres = points[chosen]
        members = group_neighbours(points, centres, settings.group_size, self._device.type, threads)
        indices, weights = nearest_centres(points, centres, settings.idw, threads)
        return {
            "tokens": self._tokens(points[members] - centres[:, None], centres, sample),
            "centres": float32(centres),
            "pixel": pixel.astype(np.int32),
            "neighbours": indices.astype(np.int16 if settings.groups <= 2**15 else np.int32),
            "weights": float32(weights),
        }

    def _points(self, sample: Sample) -> tuple[FloatArray, NDArray[np.int64]]:
        """Valid points (n, 3) at network size in raster order, and their pixels size * y + x."""
        from mmad_cli.preprocessing.resize import resize_xyz, valid_pixels

        settings = self._settings
        xyz = resize_xyz(sample.xyz, settings.size, settings.xyz_resize)
        pixel = np.flatnonzero(valid_pixels(xyz))
        needed = max(settings.group_size, NEIGHBOURS)
        if len(pixel) < needed:
            raise DataError(
                f"{sample.id}: {len(pixel)} valid 3D points are left at {settings.size} x {settings.size}, groups of "
                f"{settings.group_size} need at least {needed}; check the scan, preprocess it with another protocol, "
                "or set a smaller group_size"
            )
        return xyz.reshape(-1, 3)[pixel], pixel

    def _tokens(self, groups: FloatArray, centres: FloatArray, sample: Sample) -> FloatArray:
        import torch

        half = self._settings.precision == "bfloat16"
        with torch.inference_mode(), torch.autocast(self._device.type, torch.bfloat16, enabled=half):
            tokens = self._network(
                torch.from_numpy(groups).to(self._device),
                torch.from_numpy(centres).to(self._device),
                batch_statistics=self._settings.point_bn == "batch",
                keep=self._keep(sample),
                blocks=self._settings.blocks,
            )
        return float32(tokens.cpu().numpy())

    def _keep(self, sample: Sample) -> list[bool] | None:
        """Stochastic depth of this sample: the same whatever was computed before it."""
        import torch

        from mmad_cli.backbones.point_transformer import draw_keep

        if self._settings.point_droppath == "off":
            return None
        return draw_keep(torch.Generator().manual_seed(_own_seed(self._settings.droppath_seed, sample)))

    def _start(self, sample: Sample, count: int) -> int:
        """The first group centre: point 0, or any point, the same whatever was computed before."""
        if self._settings.fps_start == "first":
            return 0
        return int(np.random.default_rng(_own_seed(self._settings.fps_seed, sample)).integers(count))


def _own_seed(seed: int, sample: Sample) -> int:
    """A seed of the sample's own."""
    name = f"{seed}/{sample.category}/{sample.id}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")
