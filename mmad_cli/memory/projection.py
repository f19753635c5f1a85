"""Random projections that make the coreset selection cheaper; the bank itself keeps the unprojected rows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmad_cli.devices import shared_tensor
from mmad_cli.types import FloatArray, IndexArray

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

RandomState = int | np.random.RandomState | None


def projected_dimension(n_rows: int, n_channels: int, eps: float = 0.9) -> int | None:
    """Johnson-Lindenstrauss dimension floor(4 ln n / (eps^2 / 2 - eps^3 / 3)), or None for "do not project".

    None when that dimension is above the number of channels, or 0 (a single row): scikit-learn refuses both, and the
    published codes then select among the unprojected rows. Raises ValueError for sizes below 1 and eps outside (0, 1).
    """
    if n_rows < 1 or n_channels < 1:
        raise ValueError(f"n_rows, n_channels: must be at least 1, got {n_rows}, {n_channels}")
    if not 0 < eps < 1:
        raise ValueError(f"eps: must be in (0, 1), got {eps}")
    dimension = int(4 * math.log(n_rows) / (eps**2 / 2 - eps**3 / 3))
    return dimension if 0 < dimension <= n_channels else None


def sparse_projection(
    n_rows: int, n_channels: int, eps: float = 0.9, random_state: RandomState = None
) -> csr_matrix | None:
    """Sparse random projection (d, C) for a bank of n_rows x n_channels, or None where it stays unprojected.

    Equal to `sklearn.random_projection.SparseRandomProjection(eps=eps, random_state=random_state)` fitted on such a
    bank, without the bank and without scikit-learn, whose import takes a second: density 1 / sqrt(C), entries
    +-C^0.25 / sqrt(d). Pass one `RandomState` for several banks to draw them from one stream; None uses NumPy's
    global one. Nothing is drawn when the result is None.

    Raises ValueError as `projected_dimension`.

    Source: Li, Hastie & Church, Very sparse random projections, KDD 2006; Achlioptas 2003.
    """
    from scipy.sparse import csr_matrix

    dimension = projected_dimension(n_rows, n_channels, eps)
    if dimension is None:
        return None
    # NumPy's global functions draw from its global stream
    stream: Any = np.random if random_state is None else random_state
    if not (random_state is None or isinstance(random_state, np.random.RandomState)):
        stream = np.random.RandomState(random_state)
    density = 1 / math.sqrt(n_channels)
    columns = [_some_of(n_channels, int(stream.binomial(n_channels, density)), stream) for _ in range(dimension)]
    ends = np.cumsum([0, *map(len, columns)])
    signs = stream.binomial(1, 0.5, size=int(ends[-1])) * 2 - 1
    values = math.sqrt(1 / density) / math.sqrt(dimension) * signs
    matrix = csr_matrix((values, np.concatenate(columns), ends), shape=(dimension, n_channels))
    matrix.sort_indices()
    return matrix


def _some_of(total: int, count: int, stream: Any) -> IndexArray:
    """`count` different numbers below `total`, int64 (count,), from the draws that scikit-learn makes for them.

    It permutes all of them unless they are few (or nearly all, which at these densities does not happen).
    """
    if count > 0.01 * total:
        return np.asarray(stream.permutation(total)[:count], dtype=np.int64)
    drawn: dict[int, None] = {}
    while len(drawn) < count:
        drawn[int(stream.randint(total))] = None
    return np.array(list(drawn), dtype=np.int64)


def dense_projection(n_channels: int, dimension: int = 128, seed: int = 0) -> FloatArray:
    """Dense random projection (dimension, C) of PatchCore: the weights of a freshly initialised bias-free linear layer.

    Uniform in +-1 / sqrt(C), as `torch.nn.Linear` draws them after `torch.manual_seed(seed)`. Raises ValueError for
    sizes below 1.

    Source: Roth et al., CVPR 2022, published code.
    """
    import torch

    if n_channels < 1 or dimension < 1:
        raise ValueError(f"n_channels, dimension: must be at least 1, got {n_channels}, {dimension}")
    weight = torch.empty((dimension, n_channels))
    generator = torch.Generator().manual_seed(seed)
    torch.nn.init.kaiming_uniform_(weight, a=5**0.5, generator=generator)
    return weight.numpy()


def project(rows: NDArray[Any], matrix: csr_matrix | NDArray[Any] | None, device: str = "cpu") -> FloatArray:
    """Rows (n, C) times the transposed projection (d, C): float32 (n, d). With None, the rows as float32.

    Call it block by block. Raises ValueError when the channel counts differ.
    """
    projector = Projector(matrix, device)
    return np.ascontiguousarray(projector(rows).cpu().numpy())


class Projector:
    """A projection kept dense on a device, for many blocks.

    A sparse matrix is made dense: at the density of `sparse_projection` a dense product is as fast on a CPU as the
    sparse one and far faster on a GPU, and the matrix is at most a few MB.
    """

    def __init__(self, matrix: csr_matrix | NDArray[Any] | None, device: str = "cpu") -> None:
        import torch

        self.device = device
        self.weight: torch.Tensor | None = None
        if matrix is not None:
            dense = matrix if isinstance(matrix, np.ndarray) else matrix.toarray()
            self.weight = torch.from_numpy(np.array(dense, dtype=np.float32)).to(device)

    def __call__(self, rows: NDArray[Any]) -> Any:
        """Project rows (n, C) to a float32 tensor (n, d) on the device."""
        import torch

        if rows.ndim != 2 or (self.weight is not None and rows.shape[1] != self.weight.shape[1]):
            width = "C" if self.weight is None else self.weight.shape[1]
            raise ValueError(f"rows: must have shape (n, {width}), got {rows.shape}")
        if self.weight is None:
            # A copy, so that the result never aliases a block that its source may use again.
            return torch.from_numpy(np.array(rows, dtype=np.float32)).to(self.device)
        return shared_tensor(np.asarray(rows, dtype=np.float32)).to(self.device) @ self.weight.T
