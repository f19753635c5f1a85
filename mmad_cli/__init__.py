"""Benchmark for multimodal (RGB + 3D point cloud) industrial anomaly detection.

The five stages as functions, and the parts for people who have their own arrays:

    import mmad_cli
    result, folder = mmad_cli.evaluate("data/mvtec3d", method="btf", variant="fpfh")
    mmad_cli.metrics.aupro(masks, maps, limit=0.3)
    mmad_cli.memory.greedy_coreset(rows, count)
    for sample in mmad_cli.load_preprocessed("data/mvtec3d"): ...
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mmad_cli._version import __version__

if TYPE_CHECKING:
    from mmad_cli import memory, metrics
    from mmad_cli.stages.api import evaluate, extract, fit, load_preprocessed, preprocess, report

__all__ = [
    "__version__",
    "evaluate",
    "extract",
    "fit",
    "load_preprocessed",
    "memory",
    "metrics",
    "preprocess",
    "report",
]

# Loaded when first used, so that `mmad --help` stays quick
_STAGES = {"evaluate", "extract", "fit", "load_preprocessed", "preprocess", "report"}
_ROOMS = {"memory", "metrics"}


def __getattr__(name: str) -> Any:
    if name in _STAGES:
        return getattr(import_module("mmad_cli.stages.api"), name)
    if name in _ROOMS:
        return import_module(f"mmad_cli.{name}")
    raise AttributeError(f"module 'mmad_cli' has no attribute {name!r}")
