"""Patch distances and the re-weighted image score of PatchCore, BTF and M3DM."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmad_cli.memory.expansion import largest_error, squared_norms
from mmad_cli.memory.search import FlatIndex
from mmad_cli.types import FloatArray, IndexArray

# rows examined per patch: of 3136 patches, rounding has been seen to prefer the second row for 4 and the fifth for 4
_CANDIDATES = 2


def patch_distances(
    patches: NDArray[Any], bank_index: FlatIndex, form: Literal["direct", "expanded"] = "direct"
) -> tuple[FloatArray, IndexArray]:
    """Distance of every patch to its nearest bank row, float32 (n,), and that row's index, int64 (n,).

    patches (n, C), normalised as the bank. form: `direct` differences, exact hits at 0; `expanded` the smallest
    distance as the published codes round it, see `expanded_distances`, of the two nearest rows. Raises ValueError
    for another width or form.
    """
    if form not in ("direct", "expanded"):
        raise ValueError(f"form: must be 'direct' or 'expanded', got {form!r}")
    if form == "direct":
        distances, indices = bank_index.nearest(patches, 1)
        return distances[:, 0], indices[:, 0]
    patches = np.asarray(patches, dtype=np.float32)
    direct, candidates = bank_index.nearest(patches, min(_CANDIDATES, len(bank_index)))
    return _smallest_expanded(patches, bank_index, direct, candidates)


def _smallest_expanded(
    patches: FloatArray, bank_index: FlatIndex, direct: FloatArray, candidates: IndexArray
) -> tuple[FloatArray, IndexArray]:
    """Smallest expanded distance (n,) and its row (n,) among candidates (n, k) with their direct distances (n, k)."""
    norms, row_norms = squared_norms(patches), bank_index.squared_norms[candidates]
    error = largest_error(norms[:, None], row_norms)
    squares = direct * direct
    # the others cannot become the smallest
    patch, column = np.nonzero(squares - error <= (squares + error)[:, :1])
    rounded = np.full(direct.shape, np.inf, dtype=np.float32)
    rounded[patch, column] = bank_index.expanded_distances_to(patches, patch, candidates[patch, column], norms)
    best = np.lexsort((candidates, rounded), axis=1)[:, :1]
    return np.take_along_axis(rounded, best, 1)[:, 0], np.take_along_axis(candidates, best, 1)[:, 0]


def reweighted_score(
    patches: NDArray[Any],
    bank_index: FlatIndex,
    distances: NDArray[Any],
    indices: NDArray[Any],
    eps: float = 0.0,
    scale: float = 1.0,
    form: Literal["exact", "stable"] = "exact",
    neighbours: int = 3,
) -> float:
    """Image score w s* of one sample.

    s* is the largest patch distance, x* its patch and m* the bank row nearest to it. Of the `neighbours` rows nearest
    to m*, the first (m* itself) is left out; with d_i the distances of x* to the others and C the channel count,
    w = 1 - exp(s* / sqrt C) / (sum_i exp(d_i / sqrt C) + eps). The rows that are left lie no nearer to x* than m*,
    hence w in [0.5, 1) for two of them and eps = 0. `scale` divides s* and d_i first (1000 in the two-bank variant of
    M3DM). `form="stable"` evaluates the same with exp(s* / sqrt C) divided out, which cannot overflow. A bank of one
    row has no other neighbours; w is 1 then.

    patches (n, C) normalised as the bank, distances (n,) and indices (n,) from `patch_distances`. Raises ValueError
    for empty or unequal lengths, scale <= 0, neighbours < 2 and an unknown form.

    Source: Roth et al., CVPR 2022, equation 7, in the form of the published BTF and M3DM codes (which leave m* out).
    """
    if not len(patches) == len(distances) == len(indices) or len(patches) == 0:
        sizes = f"{len(patches)}, {len(distances)}, {len(indices)}"
        raise ValueError(f"patches, distances, indices: must have one length above 0, got {sizes}")
    if scale <= 0:
        raise ValueError(f"scale: must be above 0, got {scale}")
    if neighbours < 2:
        raise ValueError(f"neighbours: must be at least 2 (the first is left out), got {neighbours}")
    if form not in ("exact", "stable"):
        raise ValueError(f"form: must be 'exact' or 'stable', got {form!r}")
    worst = int(np.argmax(distances))
    s_star = float(distances[worst]) / scale
    nearest_row = bank_index.rows[int(indices[worst])][None]
    others = bank_index.nearest(nearest_row, min(neighbours, len(bank_index)))[1][:, 1:]
    if others.shape[1] == 0:
        return s_star
    query = np.asarray(patches[worst], dtype=np.float32)[None]
    d = bank_index.distances_to(query, others)[0].astype(np.float64) / scale
    return _weight(s_star, d, float(bank_index.n_channels) ** 0.5, eps, form) * s_star


def _weight(s_star: float, d: NDArray[np.float64], root: float, eps: float, form: str) -> float:
    if form == "stable":
        return 1.0 - 1.0 / float(np.exp((d - s_star) / root).sum() + eps * np.exp(-s_star / root))
    return 1.0 - float(np.exp(s_star / root) / (np.exp(d / root).sum() + eps))
