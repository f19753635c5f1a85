"""Point-MAE and Point-BERT features of a cleaned scan, as M3DM (arXiv 2303.00601) and its descendants use them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from mmad_cli.alignment.grouping import farthest_points_of, group_neighbours
from mmad_cli.alignment.interpolation import NEIGHBOURS, nearest_centres
from mmad_cli.backbones._checkpoints import build_with, read_checkpoint
from mmad_cli.backbones.base import Features, float32
from mmad_cli.backbones.weights import resolve
from mmad_cli.devices import Batches, sent
from mmad_cli.errors import DataError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from mmad_cli.backbones.specs import FeatureSpec, PointParams
    from mmad_cli.types import FloatArray, Sample

# scans whose centres are chosen in one loop, and whose tokens go through the transformer together
_BATCH_GPU = 16


class PointBackbone:
    """Group tokens of a point transformer, and where the groups lie on the pixel grid."""

    def __init__(self, spec: FeatureSpec, device: str = "cpu") -> None:
        import torch

        self.spec = spec
        self._settings = cast("PointParams", spec.settings)
        self._device = torch.device(device)
        kind = type(self)
        on_cpu = None if self._device.type == "cpu" else lambda: kind(spec).extract
        self._batches: Batches[Sample, Features] = Batches(self.batch_size, "point features", on_cpu)
        record = resolve(self._settings.network)
        built = build_with(self._architecture, read_checkpoint(record.path).content, str(record.path))
        self._network = built.to(self._device).eval().requires_grad_(False)

    def _architecture(self) -> torch.nn.Module:
        from mmad_cli.backbones.point_transformer import Network, PointTransformer

        return PointTransformer(cast("Network", self._settings.network))

    @property
    def batch_size(self) -> int:
        """A hint for the caller."""
        return 1 if self._device.type == "cpu" else _BATCH_GPU

    def extract(self, samples: Sequence[Sample]) -> list[Features]:
        """`tokens`, `centres`, `pixel`, `neighbours`, `weights` per sample; DataError for one with too few points."""
        # one by one on a CPU: as fast there, and a value never depends on which samples share a batch
        return self._batches.run(samples, self._batch)

    def _batch(self, samples: Sequence[Sample]) -> list[Features]:
        settings, device = self._settings, self._device.type
        scans = [self._points(sample) for sample in samples]
        clouds = [points for points, _ in scans]
        starts = [self._start(sample, len(points)) for sample, points in zip(samples, clouds, strict=True)]
        chosen = farthest_points_of(clouds, settings.groups, settings.fps_skip_origin, device, starts)
        centres = np.stack([points[index] for points, index in zip(clouds, chosen, strict=True)])
        groups = np.stack([self._group(*pair) for pair in zip(clouds, centres, strict=True)])
        tokens = self._tokens(groups, centres, samples)
        return [
            {
                "tokens": float32(of_sample),
                "centres": float32(middle),
                "pixel": pixel.astype(np.int32),
                **self._interpolation(points, middle),
            }
            for of_sample, middle, (points, pixel) in zip(tokens, centres, scans, strict=True)
        ]

    def _group(self, points: FloatArray, centres: FloatArray) -> FloatArray:
        """Coordinates (G, M, 3) of the nearest points of each centre, relative to it."""
        import torch

        size, device = self._settings.group_size, self._device.type
        return points[group_neighbours(points, centres, size, device, torch.get_num_threads())] - centres[:, None]

    def _interpolation(self, points: FloatArray, centres: FloatArray) -> Features:
        """`neighbours` (n, 3) among the centres and their `weights` (n, 3) for each point."""
        import torch

        settings, threads = self._settings, torch.get_num_threads()
        indices, weights = nearest_centres(points, centres, settings.idw, threads, self._device.type)
        small = settings.groups <= 2**15
        return {"neighbours": indices.astype(np.int16 if small else np.int32), "weights": float32(weights)}

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

    def _tokens(self, groups: FloatArray, centres: FloatArray, samples: Sequence[Sample]) -> FloatArray:
        """Tokens (B, G, C) of groups (B, G, M, 3) around centres (B, G, 3)."""
        import torch

        half = self._settings.precision == "bfloat16"
        with torch.inference_mode(), torch.autocast(self._device.type, torch.bfloat16, enabled=half):
            tokens = self._forward(sent(groups, self._device), sent(centres, self._device), samples)
        return tokens.float().cpu().numpy()

    def _forward(self, groups: torch.Tensor, centres: torch.Tensor, samples: Sequence[Sample]) -> torch.Tensor:
        settings = self._settings
        tokens = self._network(
            groups,
            centres,
            batch_statistics=settings.point_bn == "batch",
            keep=None if settings.point_droppath == "off" else [self._keep(sample) for sample in samples],
            blocks=settings.blocks,
        )
        return cast("torch.Tensor", tokens)

    def _keep(self, sample: Sample) -> list[bool]:
        """Stochastic depth of this sample: the same whatever was computed before it."""
        import torch

        from mmad_cli.backbones.point_transformer import draw_keep

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
