"""Euclidean distances as published memory banks round them: |a|^2 + |b|^2 - 2ab in float32.

Where a patch lies in the bank, its distance is 0 and the expansion leaves rounding noise, up to about 0.03 for patches
of length 30. What a method learns from such distances it learns from the noise, so its order of roundings is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmad_cli.devices import elements_that_fit
from mmad_cli.types import FloatArray, IndexArray

if TYPE_CHECKING:
    from torch import Tensor

# products that a matrix product adds up in one go before it starts a new partial sum
_BLOCK = 192
# pairs at a time: their products stay in the cache
_PAIRS = 512
_TILE_ELEMENTS = 1 << 22
# factors in float64 at a time on a device, of either side
_DEVICE_ELEMENTS = 1 << 25
# largest error of an expanded square seen is 5e-7 (|a|^2 + |b|^2), with up to 1920 channels
_RELATIVE_ERROR = 2e-6


def expanded_distances(
    queries: NDArray[Any],
    rows: NDArray[Any],
    query_norms: FloatArray | None = None,
    row_norms: FloatArray | None = None,
) -> FloatArray:
    """Distance of each query to the row at its place, float32 (n,), by expansion in float32; queries, rows (n, C).

    What PyTorch's `cdist` computes by one matrix product of (-2a, |a|^2, 1) with (b, 1, |b|^2), negative squares set
    to 0, here in one order on every machine: products are added in turn by fused multiply-add, 192 to a partial sum,
    and the partial sums in turn. That is the order of Intel MKL with AVX2, bit for bit; with AVX-512 it takes 384, and
    the noise is about 1.4 times larger. query_norms, row_norms (n,): `squared_norms` of both, where they are known.
    Raises ValueError for other or unequal shapes.
    """
    a, b = np.asarray(queries, dtype=np.float32), np.asarray(rows, dtype=np.float32)
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"queries, rows: must have one shape (n, C), got {a.shape} and {b.shape}")
    a_norms = squared_norms(a) if query_norms is None else query_norms
    b_norms = squared_norms(b) if row_norms is None else row_norms
    squares = np.empty(len(a), dtype=np.float32)
    for i in range(0, len(a), _PAIRS):
        part = slice(i, i + _PAIRS)
        squares[part] = _expanded_squares(a[part], b[part], a_norms[part], b_norms[part])
    return _roots(squares)


def expanded_distances_on_device(
    queries: FloatArray,
    rows: Tensor,
    which: IndexArray,
    indices: IndexArray,
    query_norms: FloatArray,
    row_norms: FloatArray,
) -> FloatArray:
    """`expanded_distances` of queries[which] (p, C) to rows[indices] (p, C), bit for bit, for rows on a device.

    query_norms, row_norms (p,): `squared_norms` of both sides of each pair.
    """
    import torch

    device, channels = rows.device, rows.shape[1]
    blocks = -(-(channels + 2) // _BLOCK)
    step = max(1, elements_that_fit(device, _DEVICE_ELEMENTS, 8) // (blocks * _BLOCK))
    found = []
    with torch.inference_mode():
        # a copy: queries may be read-only
        given = torch.from_numpy(np.array(queries, dtype=np.float32)).to(device)
        for i in range(0, len(which), step):
            part = slice(i, i + step)
            a, b = (torch.from_numpy(np.ascontiguousarray(index[part])).to(device) for index in (which, indices))
            norms = (torch.from_numpy(np.array(of[part])).to(device) for of in (query_norms, row_norms))
            found.append(_expanded_squares_on_device(given[a], rows[b], *norms))
        squares = torch.cat(found).cpu().numpy() if found else np.empty(0, dtype=np.float32)
    return _roots(squares)


def squared_norms(rows: NDArray[Any]) -> FloatArray:
    """Squared lengths float32 (n,) of rows (n, C), added up in PyTorch's order."""
    import torch

    step = max(1, _TILE_ELEMENTS // max(1, rows.shape[1]))
    out = np.empty(len(rows), dtype=np.float32)
    for i in range(0, len(rows), step):
        tile = np.asarray(rows[i : i + step], dtype=np.float32)
        out[i : i + step] = torch.from_numpy(tile * tile).sum(-1).numpy()
    return out


def largest_error(first: NDArray[Any], second: NDArray[Any]) -> FloatArray:
    """Bound on the rounding error of an expanded square, from the squared lengths of both vectors."""
    return np.asarray(_RELATIVE_ERROR * (first + second), dtype=np.float32)


def _roots(squares: FloatArray) -> FloatArray:
    """Always NumPy's roots: PyTorch's err by one unit on some processors."""
    return np.asarray(np.sqrt(np.maximum(squares, 0)), dtype=np.float32)


def _expanded_squares(a: FloatArray, b: FloatArray, a_norms: FloatArray, b_norms: FloatArray) -> FloatArray:
    """|a|^2 + |b|^2 - 2ab float32 (n,), which may be negative."""
    n, channels = a.shape
    blocks = -(-(channels + 2) // _BLOCK)
    left = np.zeros((blocks * _BLOCK, n), dtype=np.float32)
    right = np.zeros_like(left)
    left[:channels], right[:channels] = a.T, b.T
    left[:channels] *= np.float32(-2)
    left[channels], right[channels] = a_norms, 1
    left[channels + 1], right[channels + 1] = 1, b_norms
    left, right = left.reshape(blocks, _BLOCK, n), right.reshape(blocks, _BLOCK, n)
    sums = np.zeros((blocks, n), dtype=np.float32)
    exact = np.empty((blocks, n), dtype=np.float64)
    for i in range(_BLOCK):
        # a product of two float32 is exact in float64: only the sum is rounded, as a fused multiply-add does
        np.multiply(left[:, i], right[:, i], out=exact, dtype=np.float64)
        np.add(exact, sums, out=exact)
        sums[...] = exact
    total: FloatArray = sums[0]
    for one in sums[1:]:
        total += one
    return total


def _expanded_squares_on_device(a: Tensor, b: Tensor, a_norms: Tensor, b_norms: Tensor) -> Tensor:
    """The same for tensors."""
    import torch

    n, channels = a.shape
    blocks = -(-(channels + 2) // _BLOCK)
    left, right = (torch.zeros((blocks * _BLOCK, n), dtype=torch.float64, device=a.device) for _ in range(2))
    left[:channels], right[:channels] = a.T, b.T
    left[:channels] *= -2
    left[channels], right[channels] = a_norms, 1
    left[channels + 1], right[channels + 1] = 1, b_norms
    left, right = left.view(blocks, _BLOCK, n), right.view(blocks, _BLOCK, n)
    sums = torch.zeros((blocks, n), dtype=torch.float64, device=a.device)
    for i in range(_BLOCK):
        # rounded to float32 after each sum; whether the device fuses the exact product with it makes no difference
        sums = sums.addcmul_(left[:, i], right[:, i]).float().double()
    total = sums[0].float()
    for one in sums[1:]:
        total = total + one.float()
    return total
