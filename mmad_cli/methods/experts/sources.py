"""What an expert looks at: one feature of a scan, brought to 56 x 56 cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmad_cli.alignment.pooling import patches_from_map, patches_from_points
from mmad_cli.errors import DataError
from mmad_cli.methods.base import SampleFeatures
from mmad_cli.methods.m3dm.patches import on_point_grid, point_patches
from mmad_cli.methods.single_bank import read_array
from mmad_cli.types import BoolArray, FloatArray, IndexArray

if TYPE_CHECKING:
    from mmad_cli.backbones.specs import FeatureSpec

GRID = 56
CELLS = GRID * GRID

# Outputs of a convolutional network are averaged and brought to this grid (PatchCore, BTF at 224 pixels)
_NETWORK_GRID = 28
_HISTOGRAM = 33
# three transformer blocks of 384 side by side; the built-in network has fewer
_POINT_CHANNELS = 1152


@dataclass(frozen=True)
class Cells:
    """Features of one scan: distinct rows float32 (m, C), and the row under each cell, int64 (3136,).

    A network with 28 x 28 tokens has 784 rows, each under four cells.
    """

    rows: FloatArray
    row: IndexArray

    @property
    def filled(self) -> BoolArray:
        """Cells whose feature is not zero throughout, bool (3136,): for features of points, the foreground."""
        return np.asarray(self.rows.astype(bool).any(axis=1))[self.row]

    def under(self, cells: BoolArray) -> tuple[IndexArray, IndexArray]:
        """Rows that lie under some cells, ascending (k,), and the place of each such cell's row among them."""
        used, place = np.unique(self.row[cells], return_inverse=True)
        return used, place


@dataclass(frozen=True)
class Source:
    """An expert's view of a scan.

    name: under which the method reads the feature. standardise: by one mean and one deviation over all entries of the
    training rows, which features of 2D networks are (M3DM, G2SF), those of points are not.
    """

    name: str
    spec: FeatureSpec
    standardise: bool

    @classmethod
    def image(
        cls,
        name: str,
        backbone: str,
        *,
        input: Any = "rgb",
        outputs: tuple[int, ...] | None = None,
        **params: Any,
    ) -> Source:
        """A pretrained 2D network on `rgb`, `normals`, `relief`, `depth` or `render`; no `outputs`: a ViT's tokens."""
        from mmad_cli.backbones.specs import FeatureSpec

        chosen = None if outputs is None else list(outputs)
        return cls(name, FeatureSpec.timm(backbone, input=input, outputs=chosen, **params), standardise=True)

    @classmethod
    def fpfh(cls, name: str = "fpfh", **params: Any) -> Source:
        """Fast point feature histograms (BTF)."""
        from mmad_cli.backbones.specs import FeatureSpec

        return cls(name, FeatureSpec.fpfh(**params), standardise=False)

    @classmethod
    def point(cls, name: str = "points", network: Any = "point_mae", **params: Any) -> Source:
        """Group tokens of a point transformer (M3DM)."""
        from mmad_cli.backbones.specs import FeatureSpec

        return cls(name, FeatureSpec.point(network, **params), standardise=False)

    @property
    def of_points(self) -> bool:
        """Whether cells without a point under them are exactly zero."""
        return self.spec.backbone != "timm" or self.spec.input == "render"

    def shape(self) -> tuple[int, int]:
        """Rows per sample and channels, from the architecture; a network is built without values."""
        spec = self.spec
        if spec.backbone == "fpfh":
            return CELLS, _HISTOGRAM
        if spec.backbone != "timm":
            return CELLS, _POINT_CHANNELS
        from mmad_cli.backbones.specs import TimmParams
        from mmad_cli.backbones.timm_backbone import output_shapes

        shapes = output_shapes(TimmParams.model_validate(spec.params))
        if "tokens" in shapes:
            return int(shapes["tokens"][0]), int(shapes["tokens"][1])
        return _NETWORK_GRID**2, sum(int(shape[0]) for shape in shapes.values())

    def cells(self, sample: SampleFeatures) -> Cells:
        """The feature on 56 x 56 cells. Raises DataError naming the sample where it is missing or has no points."""
        backbone = self.spec.backbone
        if backbone == "fpfh":
            return self._of_histograms(sample)
        if backbone == "timm":
            outputs = self.spec.params["outputs"]
            if outputs is None or self.spec.input == "render":
                return self._of_tokens(sample)
            return self._of_maps(sample, tuple(outputs))
        return Cells(point_patches(_Renamed(sample, {"points": self.name})), _each_its_own())

    def _of_histograms(self, sample: SampleFeatures) -> Cells:
        points = read_array(sample, self.name, "points")
        if len(points) == 0:
            raise DataError(f"{sample.id}: no valid 3D points, so there are no FPFH features; check its xyz file")
        pixel = read_array(sample, self.name, "pixel")
        return Cells(patches_from_points(points, pixel, self.spec.params["size"], GRID), _each_its_own())

    def _of_tokens(self, sample: SampleFeatures) -> Cells:
        tokens = np.asarray(read_array(sample, self.name, "tokens"), dtype=np.float32)
        height, width = (int(side) for side in read_array(sample, self.name, "grid"))
        if height != width or height * width != len(tokens):
            raise DataError(
                f"{sample.id}: {len(tokens)} tokens of feature {self.name!r} on a grid of {height} x {width}; this "
                "method needs a square grid with one token per cell"
            )
        return Cells(*on_point_grid(tokens, height))

    def _of_maps(self, sample: SampleFeatures, outputs: tuple[int, ...]) -> Cells:
        maps = [read_array(sample, self.name, f"out{i}") for i in outputs]
        rows = np.concatenate([patches_from_map(one, _NETWORK_GRID) for one in maps], axis=1)
        return Cells(*on_point_grid(rows, _NETWORK_GRID))


@dataclass(frozen=True)
class _Renamed:
    """A sample whose features are read under other names."""

    sample: SampleFeatures
    names: Mapping[str, str]

    @property
    def id(self) -> str:
        """Of the sample."""
        return self.sample.id

    def __getitem__(self, name: str) -> Mapping[str, NDArray[Any]]:
        return self.sample[self.names.get(name, name)]


def _each_its_own() -> IndexArray:
    return np.arange(CELLS)
