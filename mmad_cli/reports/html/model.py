"""What the HTML report is made from: runs with their scores, and pictures that a stage hands in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mmad_cli.results.runs import SampleScore
from mmad_cli.results.schema import RunResult
from mmad_cli.types import BoolArray, ByteArray, FloatArray


@dataclass(frozen=True)
class Scene:
    """One cleaned test scan in the image region that the maps cover.

    rgb uint8 (H, W, 3); xyz float32 (h, w, 3) in metres, missing points (0, 0, 0); mask bool of the size of the map.
    """

    rgb: ByteArray
    xyz: FloatArray
    mask: BoolArray


@dataclass(frozen=True)
class ScoredMap:
    """Anomaly map float32 (H, W); AUPRO is computed on `values * aupro_scale`."""

    values: FloatArray
    aupro_scale: float = 1.0


class PictureSource(Protocol):
    """Gives the pictures of one run, one sample at a time, so that never all are in memory."""

    @property
    def scene_key(self) -> str:
        """What the scenes depend on; runs with one key share them."""

    def scene(self, category: str, sample: str) -> Scene | None:
        """The scan, or None where it cannot be had."""

    def anomaly_map(self, category: str, sample: str) -> ScoredMap | None:
        """The map, or None where it was not kept."""


@dataclass(frozen=True)
class RunInput:
    """One run: its result, its test scores by category, its pictures, and notes on what is missing and why."""

    run: RunResult
    scores: Mapping[str, Sequence[SampleScore]] = field(default_factory=dict)
    pictures: PictureSource | None = None
    notes: Sequence[str] = ()
