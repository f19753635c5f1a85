"""Memory banks: projection, coreset selection, nearest-neighbour search and the scores made from them.

Names are loaded on first use, so that importing this package imports neither torch nor FAISS.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmad_cli.memory.bank import BankConfig, MemoryBank, scalar_moments
    from mmad_cli.memory.coreset import (
        approximate_greedy_coreset,
        covering_radius,
        greedy_certificate,
        greedy_coreset,
        random_coreset,
    )
    from mmad_cli.memory.expansion import expanded_distances
    from mmad_cli.memory.projection import dense_projection, project, projected_dimension, sparse_projection
    from mmad_cli.memory.scoring import patch_distances, reweighted_score
    from mmad_cli.memory.search import FlatIndex

__all__ = [
    "BankConfig",
    "FlatIndex",
    "MemoryBank",
    "approximate_greedy_coreset",
    "covering_radius",
    "dense_projection",
    "expanded_distances",
    "greedy_certificate",
    "greedy_coreset",
    "patch_distances",
    "project",
    "projected_dimension",
    "random_coreset",
    "reweighted_score",
    "scalar_moments",
    "sparse_projection",
]

_MODULE_OF = {
    "BankConfig": "bank",
    "FlatIndex": "search",
    "MemoryBank": "bank",
    "approximate_greedy_coreset": "coreset",
    "covering_radius": "coreset",
    "dense_projection": "projection",
    "expanded_distances": "expansion",
    "greedy_certificate": "coreset",
    "greedy_coreset": "coreset",
    "patch_distances": "scoring",
    "project": "projection",
    "projected_dimension": "projection",
    "random_coreset": "coreset",
    "reweighted_score": "scoring",
    "scalar_moments": "bank",
    "sparse_projection": "projection",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
