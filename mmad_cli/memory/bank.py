"""The memory bank: rows of training features that a coreset selection keeps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from mmad_cli.devices import or_on_cpu
from mmad_cli.memory.limit import bounded_empty, fits
from mmad_cli.types import BoolArray, FloatArray, IndexArray

if TYPE_CHECKING:
    from torch import Tensor

    from mmad_cli.memory.search import FlatIndex

Blocks = Callable[[], Iterable[NDArray[Any]]]
"""Gives a new iterator over row blocks (n_i, C) at every call, the same rows in the same order each time."""

Progress = Callable[[int, int], None]

_COPIED_ELEMENTS = 1 << 20


class BankConfig(BaseModel):
    """How a bank selects its rows; the defaults are those of BTF and M3DM, with the selection in float32."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fraction: float = Field(default=0.1, gt=0, le=1, description="share of the rows that the bank keeps")
    count: int | None = Field(default=None, ge=1, description="number of rows to keep, instead of the fraction")
    coreset: Literal["greedy", "approximate", "random", "all"] = "greedy"
    coreset_dtype: Literal["float32", "float16"] = Field(
        default="float32", description="float16: the arithmetic of the published greedy selection"
    )
    projection: Literal["sparse", "dense", "none"] = "sparse"
    eps: float = Field(default=0.9, gt=0, lt=1, description="distortion of the sparse projection")
    dense_dimension: int = Field(default=128, ge=1, description="width of the dense projection")
    start: int = Field(default=0, ge=0, description="first pick of the greedy selection")
    n_starts: int = Field(default=10, ge=1, description="random rows that the approximate selection starts from")

    def rows_to_keep(self, n_rows: int) -> int:
        """`count`, or floor(fraction x n_rows); at least 1 and at most n_rows."""
        if self.coreset == "all":
            return n_rows
        wanted = self.count if self.count is not None else int(self.fraction * n_rows)
        return max(1, min(wanted, n_rows))


def scalar_moments(blocks: Blocks) -> tuple[float, float]:
    """Mean and unbiased standard deviation over all entries of all blocks, accumulated in float64.

    Raises ValueError for fewer than two entries.

    Source: Chan, Golub & LeVeque, 1979, pairwise update of the sum of squares.
    """
    n, mean, squares = 0, 0.0, 0.0
    for block in blocks():
        if block.size == 0:
            continue
        part_mean = float(block.mean(dtype=np.float64))
        part_squares = float(np.var(block, dtype=np.float64)) * block.size
        delta, total = part_mean - mean, n + block.size
        squares += part_squares + delta * delta * n * block.size / total
        mean += delta * block.size / total
        n = total
    if n < 2:
        raise ValueError(f"blocks: must hold at least two entries for a standard deviation, got {n}")
    return mean, (squares / (n - 1)) ** 0.5


class MemoryBank:
    """Bank rows selected from a stream of row blocks that is never held as a whole.

    `fit` reads the blocks twice: the first pass keeps the projected rows only, the second only the picked rows.
    Afterwards: `rows_` float32 (M, C) in order of choice, normalised; `picks_` int64 (M,), their positions in the
    stream; `mean_`, `std_`, the scalar normalisation (0 and 1 without one).
    """

    rows_: FloatArray
    picks_: IndexArray
    mean_: float
    std_: float

    def __init__(self, config: BankConfig | None = None) -> None:
        self.config = config or BankConfig()
        self.device = "cpu"

    def fit(
        self,
        blocks: Blocks,
        n_rows: int,
        n_channels: int,
        random_state: int | np.random.RandomState | None = None,
        device: str = "cpu",
        progress: Progress | None = None,
        mean: float = 0.0,
        std: float = 1.0,
    ) -> MemoryBank:
        """Select and keep rows; returns self.

        blocks: callable giving an iterator over float blocks (n_i, C) that sum up to n_rows. random_state seeds the
        projection and the selection; one `RandomState` may be shared by several banks, which then draw from it in
        turn. mean and std, scalars, are applied to every block as (x - mean) / std before anything else. progress is
        called with (done, total) picks.

        Raises ValueError when blocks do not have n_channels columns or do not sum up to n_rows, or std is not
        positive.
        """
        if not std > 0:
            raise ValueError(f"std: must be above 0, got {std}")
        if self.config.coreset == "greedy" and self.config.start >= n_rows:
            raise ValueError(f"start: must be a row index in [0, {n_rows}), got {self.config.start}")
        stream = random_state
        if not isinstance(stream, np.random.RandomState) and stream is not None:
            stream = np.random.RandomState(stream)
        self.__dict__.pop("index", None)
        self.device, self.mean_, self.std_ = device, float(mean), float(std)
        self.picks_ = self._select(blocks, n_rows, n_channels, stream, progress)
        self.rows_ = self._gather(blocks, n_rows, n_channels)
        return self

    @classmethod
    def from_rows(
        cls, rows: NDArray[Any], config: BankConfig | None = None, mean: float = 0.0, std: float = 1.0
    ) -> MemoryBank:
        """A bank of given rows (M, C), normalised already, without a selection; `picks_` counts them."""
        bank = cls(config)
        bank.rows_ = np.ascontiguousarray(rows, dtype=np.float32)
        if bank.rows_.ndim != 2 or bank.rows_.size == 0:
            raise ValueError(f"rows: must be a non-empty (M, C) matrix, got shape {bank.rows_.shape}")
        bank.picks_ = np.arange(len(bank.rows_), dtype=np.int64)
        bank.mean_, bank.std_ = float(mean), float(std)
        return bank

    def add_row(self, row: FloatArray, where: Callable[[FloatArray], BoolArray] | None = None) -> None:
        """Append a row (1, C) on the scale of the bank that is no training row: its pick is -1.

        where: given some rows (n, C), says which of them stay, (n,); without it all do. Rows are copied a few at a
        time, to a mapped file where a memory limit wants that.
        """
        step = max(1, _COPIED_ELEMENTS // self.rows_.shape[1])
        tiles = [slice(i, i + step) for i in range(0, len(self.rows_), step)]
        kept = np.ones(len(self.rows_), dtype=np.bool_)
        if where is not None:
            for tile in tiles:
                kept[tile] = where(self.rows_[tile])
        joined = bounded_empty((int(kept.sum()) + 1, self.rows_.shape[1]))
        end = 0
        for tile in tiles:
            some = self.rows_[tile][kept[tile]]
            joined[end : end + len(some)] = some
            end += len(some)
        joined[end:] = row
        self.__dict__.pop("index", None)
        self.rows_, self.picks_ = joined, np.append(self.picks_[kept], -1)

    def normalise(self, patches: NDArray[Any]) -> FloatArray:
        """Patches (n, C) on the scale of the bank: (x - mean_) / std_, float32."""
        values = np.asarray(patches, dtype=np.float32)
        if self.mean_ == 0.0 and self.std_ == 1.0:
            return values
        return (values - np.float32(self.mean_)) / np.float32(self.std_)

    @cached_property
    def index(self) -> FlatIndex:
        """Search structure over `rows_`, built on first use on `device`."""
        from mmad_cli.memory.search import FlatIndex

        return FlatIndex(self.rows_, self.device)

    def nearest(self, queries: NDArray[Any], k: int = 1) -> tuple[FloatArray, IndexArray]:
        """Distances (n, k) and bank row indices (n, k) of normalised queries (n, C), see `FlatIndex.nearest`."""
        return self.index.nearest(queries, k)

    def save(self, path: str | Path) -> None:
        """Write rows, picks, normalisation and configuration into one safetensors file."""
        from safetensors.numpy import save_file

        metadata = {"config": self.config.model_dump_json(), "scale": json.dumps([self.mean_, self.std_])}
        save_file({"rows": self.rows_, "picks": self.picks_}, str(path), metadata=metadata)

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> MemoryBank:
        """Read what `save` wrote; searches run on `device`. Raises ValueError for a file of another kind."""
        from safetensors import safe_open

        with safe_open(str(path), framework="np") as file:
            metadata = file.metadata() or {}
            if {"config", "scale"} - metadata.keys() or {"rows", "picks"} - set(file.keys()):
                raise ValueError(f"path: must be a memory bank file, got {path}")
            bank = cls(BankConfig.model_validate_json(metadata["config"]))
            bank.picks_ = file.get_tensor("picks")
            shape = file.get_slice("rows").get_shape()
            if fits(4 * int(np.prod(shape))):
                bank.rows_ = file.get_tensor("rows")
            else:
                bank.rows_ = _mapped_rows(Path(path))
        bank.mean_, bank.std_ = json.loads(metadata["scale"])
        bank.device = device
        return bank

    def _select(
        self,
        blocks: Blocks,
        n_rows: int,
        n_channels: int,
        stream: np.random.RandomState | None,
        progress: Progress | None,
    ) -> IndexArray:
        from mmad_cli.memory import coreset

        config, count = self.config, self.config.rows_to_keep(n_rows)
        if config.coreset == "all" or (config.count is None and config.fraction == 1.0):
            return np.arange(n_rows, dtype=np.int64)
        if config.coreset == "random":
            return coreset.random_coreset(n_rows, count, stream)
        # drawn once, so that a second try on the CPU selects the same rows
        projection = self._projection(n_rows, n_channels, stream)
        state = None if stream is None else stream.get_state()

        def selected(device: str) -> IndexArray:
            if stream is not None and state is not None:
                stream.set_state(state)
            projected = self._projected(blocks, n_rows, n_channels, projection, device)
            if config.coreset == "approximate":
                return coreset.approximate_greedy_coreset(projected, count, config.n_starts, stream, device, progress)
            return coreset.greedy_coreset(projected, count, config.start, device, config.coreset_dtype, progress)

        return or_on_cpu(selected, self.device, f"selecting {count} of {n_rows} rows")

    def _projected(self, blocks: Blocks, n_rows: int, n_channels: int, projection: Any, device: str) -> Tensor:
        import torch

        from mmad_cli.memory.projection import Projector

        projector = Projector(projection, device)
        width = n_channels if projector.weight is None else projector.weight.shape[0]
        if device == "cpu":
            out = torch.from_numpy(bounded_empty((n_rows, width)))
        else:
            out = torch.empty((n_rows, width), dtype=torch.float32, device=device)
        for position, block in _checked(blocks, n_rows, n_channels):
            out[position : position + len(block)] = projector(self.normalise(block))
        return out

    def _projection(self, n_rows: int, n_channels: int, stream: np.random.RandomState | None) -> Any:
        from mmad_cli.memory.projection import dense_projection, sparse_projection

        if self.config.projection == "sparse":
            return sparse_projection(n_rows, n_channels, self.config.eps, stream)
        if self.config.projection == "dense":
            source = stream if stream is not None else np.random
            return dense_projection(n_channels, self.config.dense_dimension, int(source.randint(2**31 - 1)))
        return None

    def _gather(self, blocks: Blocks, n_rows: int, n_channels: int) -> FloatArray:
        order = np.argsort(self.picks_, kind="stable")
        ascending = self.picks_[order]
        out = bounded_empty((len(order), n_channels))
        for position, block in _checked(blocks, n_rows, n_channels):
            begin, end = np.searchsorted(ascending, [position, position + len(block)])
            out[order[begin:end]] = self.normalise(block[ascending[begin:end] - position])
        return out


def _checked(blocks: Blocks, n_rows: int, n_channels: int) -> Iterator[tuple[int, NDArray[Any]]]:
    """(position of its first row, block) over the stream, checked against the announced size."""
    position = 0
    for block in blocks():
        if block.ndim != 2 or block.shape[1] != n_channels:
            raise ValueError(f"blocks: must have shape (n, {n_channels}), got {block.shape}")
        if position + len(block) > n_rows:
            raise ValueError(f"blocks: must sum up to {n_rows} rows, got more")
        yield position, block
        position += len(block)
    if position != n_rows:
        raise ValueError(f"blocks: must sum up to {n_rows} rows, got {position}")


def _mapped_rows(path: Path) -> FloatArray:
    """The tensor `rows` of a safetensors file, read from the file when it is used."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))["rows"]
    return np.memmap(
        path, dtype=np.float32, mode="r", offset=8 + length + entry["data_offsets"][0], shape=tuple(entry["shape"])
    )
