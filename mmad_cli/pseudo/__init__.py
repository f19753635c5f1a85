"""Pseudo anomalies: defects made on good scans, for methods that learn what to make of their scores.

A room of its own beside `preprocessing`: pure functions on `Sample`, which know no backbone, method, dataset or store.
A method asks for them by `FeatureSpec.augmentation`; the extraction stage applies them to clean scans before the
backbone sees them. Names are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmad_cli.pseudo.config import PSEUDO_VERSION, Augmentation
    from mmad_cli.pseudo.generate import PSEUDO_MASK, pseudo_anomaly

__all__ = ["PSEUDO_MASK", "PSEUDO_VERSION", "Augmentation", "pseudo_anomaly"]

_MODULE_OF = {
    "PSEUDO_MASK": "generate",
    "PSEUDO_VERSION": "config",
    "Augmentation": "config",
    "pseudo_anomaly": "generate",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
