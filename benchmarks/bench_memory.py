"""Memory bank: coreset selection and nearest-neighbour search against the forms of published codes, in one process.

Rows are 200 clusters on 48 directions of falling strength plus isotropic noise of varying size, which is what
projected backbone features look like. Where a note says "scaled", the slow form ran on a part of its picks and its
time is scaled up in proportion: every pick costs the same there.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.machine import PeakMemory
from benchmarks.turns import NO_BAR, Bar, Row, in_turns, row, timed, turns_of
from mmad_cli.memory import FlatIndex, greedy_certificate, greedy_coreset, patch_distances


def low_rank_rows(n: int, channels: int, seed: int = 0, rank: int = 48) -> np.ndarray:
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((rank, channels), dtype=np.float32)
    weights *= (np.arange(1, rank + 1, dtype=np.float32) ** -0.5)[:, None]
    centres = 2 * rng.standard_normal((200, rank), dtype=np.float32)
    rows = (centres[rng.integers(0, 200, n)] + rng.standard_normal((n, rank), dtype=np.float32)) @ weights
    size = rng.gamma(2, 0.125, (n, 1)).astype(np.float32)
    return rows + size * rng.standard_normal((n, channels), dtype=np.float32)


def histogram_rows(n: int, seed: int = 0) -> np.ndarray:
    """33 channels in three histograms that sum to 100 each, as FPFH has them."""
    rng = np.random.default_rng(seed)
    centres = rng.dirichlet(np.full(11, 0.3), (300, 3))
    kind = rng.integers(0, 300, n)
    parts = rng.standard_gamma(60 * centres[kind] + 0.05)
    return (100 * parts / parts.sum(2, keepdims=True)).reshape(n, 33).astype(np.float32)


def norm_loop(rows: torch.Tensor, picks: int) -> None:
    """As published: the norm of all differences to the last pick, once per pick."""
    last = rows[:1]
    smallest = torch.linalg.norm(rows - last, dim=1, keepdim=True)
    for _ in range(picks):
        smallest = torch.minimum(torch.linalg.norm(rows - last, dim=1, keepdim=True), smallest)
        at = int(torch.argmax(smallest))
        last = rows[at : at + 1]
        smallest[at] = 0


def matrix_vector_loop(rows: torch.Tensor, picks: int) -> None:
    """The squared distance expanded: one matrix-vector product per pick."""
    norms = rows.square().sum(1)
    smallest, at = torch.full_like(norms, torch.inf), 0
    for _ in range(picks):
        squared = torch.addmv(norms + norms[at], rows, rows[at], alpha=-2.0)
        smallest = torch.minimum(smallest, squared)
        smallest[at] = 0
        at = int(smallest.argmax())


def against_loop(
    name: str,
    loop: Callable[[torch.Tensor, int], None],
    table: torch.Tensor,
    ours: Callable[[], object],
    part: int,
    turns: int,
    bar: Bar = NO_BAR,
    holds: bool = True,
    note: str = "",
) -> Row:
    """A selection of a tenth of the rows, against a part of the picks of a loop."""
    picks = len(table) // 10
    # first calls make threads and scratch memory
    loop(table, 2)
    both = in_turns(lambda: loop(table, part), ours, turns, scale=picks / part)
    scaled = f"published form scaled from {part} of {picks} picks"
    return row(name, both.ours, both.published, bar=bar, holds=holds, note=scaled + (f"; {note}" if note else ""))


def coreset_rows(quick: bool) -> list[Row]:
    """30 000 rows against both loops, with the certificate that the picks are the greedy ones; 200 000 against one."""
    turns, part = turns_of(quick), 20 if quick else 60
    rows = low_rank_rows(30000, 334)
    table = torch.from_numpy(rows)
    picks = greedy_coreset(rows, 3000)
    gap = greedy_certificate(rows, picks)
    told = f"worst pick {gap:.0e} short of the farthest row"

    def ours() -> None:
        greedy_coreset(rows, 3000)

    name = "coreset 30000 x 334, 10 % / {} loop"
    results = [
        against_loop(name.format("norm"), norm_loop, table, ours, part, turns, Bar(ratio=40), gap <= 1e-4, told),
        against_loop(name.format("matrix-vector"), matrix_vector_loop, table, ours, 2 * part, turns),
    ]
    if not quick:
        many = low_rank_rows(200000, 334)
        name = "coreset 200000 x 334, 10 % / matrix-vector loop"
        table = torch.from_numpy(many)
        results.append(
            against_loop(name, matrix_vector_loop, table, lambda: greedy_coreset(many, 20000), 40, turns, Bar(ratio=10))
        )
    return results


def histogram_coreset_rows(n: int, part: int, turns: int) -> list[Row]:
    rows, results = histogram_rows(n), []
    for dtype, table in (("float32", torch.from_numpy(rows)), ("float16", torch.from_numpy(rows).half())):

        def ours(dtype: str = dtype) -> None:
            greedy_coreset(rows, n // 10, dtype=dtype)

        name = f"coreset {n} x 33 histograms, 10 %, {dtype} / norm loop"
        results.append(against_loop(name, norm_loop, table, ours, part, turns))
    return results


def search_rows(queries: int, n: int, channels: int, turns: int) -> list[Row]:
    bank, some = low_rank_rows(n, channels), low_rank_rows(queries, channels, seed=1)
    tensors = torch.from_numpy(some), torch.from_numpy(bank)
    results = []
    for backend in ("faiss", "torch"):
        index = FlatIndex(bank, backend=backend)
        index.nearest(some[:8], 1)
        both = in_turns(
            lambda: torch.cdist(*tensors).min(1),
            lambda index=index: index.nearest(some, 1),
            turns,
        )
        note = "exact hits are 0" if backend == "faiss" else "for comparison; used on a GPU that FAISS does not see"
        results.append(
            row(f"nearest {queries} x {n} x {channels} / cdist ({backend})", both.ours, both.published, note=note)
        )
    return [*results, rounded_row(queries, bank, turns)]


def rounded_row(queries: int, bank: np.ndarray, turns: int) -> Row:
    """Distances rounded as published against exact ones, where half of the patches lie in the bank."""
    some = low_rank_rows(queries, bank.shape[1], seed=1)
    some[::2] = bank[: len(some[::2])]
    index = FlatIndex(bank)
    # norms of the rows are computed once per bank
    patch_distances(some[:1], index, "expanded")
    both = in_turns(
        lambda: patch_distances(some, index, "direct"), lambda: patch_distances(some, index, "expanded"), turns
    )
    name = f"nearest {queries} x {len(bank)} x {bank.shape[1]}, rounded as published / exact, both ours"
    return row(name, both.ours, both.published, bar=Bar(ratio=0.8), note="half of the patches are rows of the bank")


def selection_memory(n: int, channels: int) -> float:
    """Memory that a selection takes at its peak beyond the rows, as a multiple of the rows."""
    rows = low_rank_rows(n, channels)
    greedy_coreset(rows[:3000].copy(), 50)
    memory = PeakMemory()
    greedy_coreset(rows, n // 10)
    return memory.taken() / rows.nbytes


def memory_row(n: int, channels: int, turns: int) -> Row:
    """Each time in a new process: what an earlier selection left free would not be counted."""
    command = [sys.executable, "-m", "benchmarks.bench_memory", str(n), str(channels)]

    def measured() -> float:
        return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)

    taken = [timed(measured) for _ in range(turns)]
    return row(
        f"extra memory, coreset {n} x {channels}, 10 %",
        [seconds for seconds, _ in taken],
        figures=[extra for _, extra in taken],
        unit="x rows",
        bar=Bar(figure=1.3),
        note="peak resident memory beyond the rows, as a multiple of the rows; seconds with the start of the process",
    )


def run(quick: bool = False) -> list[Row]:
    """All comparisons; quick leaves out what takes longer than a few seconds."""
    turns = turns_of(quick)
    results = [*coreset_rows(quick), memory_row(30000, 334, turns)]
    results += search_rows(784 if quick else 3136, 20000, 1152, turns)
    return results if quick else [*results, *histogram_coreset_rows(175616, 20, turns)]


if __name__ == "__main__":
    # the process of its own that `memory_row` starts
    print(selection_memory(int(sys.argv[1]), int(sys.argv[2])))
