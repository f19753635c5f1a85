"""Memory bank: coreset selection and nearest-neighbour search against the forms of published codes, in one process.

Rows are 200 clusters on 48 directions of falling strength plus isotropic noise of varying size, which is what
projected backbone features look like. Where the table says "scaled", the slow form ran on a part of its picks and its
time is scaled up in proportion: every pick costs the same there.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mmad_cli.memory import FlatIndex, greedy_certificate, greedy_coreset, patch_distances

Result = dict[str, Any]


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


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


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


def scaled(loop: Callable[[torch.Tensor, int], None], rows: np.ndarray, picks: int, part: int) -> float:
    table = torch.from_numpy(rows)
    loop(table, 2)
    return seconds(lambda: loop(table, part)) * picks / part


def row(name: str, repo: float, ours: float, bar: float | None, note: str) -> Result:
    ratio = repo / ours
    return {
        "name": name,
        "repo_seconds": repo,
        "ours_seconds": ours,
        "ratio": ratio,
        "bar": None if bar is None else f">= {bar:g}x",
        "ok": bar is None or ratio >= bar,
        "note": note,
    }


def coreset_rows(n: int, channels: int, part: int, bars: tuple[float | None, float | None]) -> list[Result]:
    rows, count = low_rank_rows(n, channels), n // 10
    picks = greedy_coreset(rows, count)
    ours = min(seconds(lambda: greedy_coreset(rows, count)) for _ in range(3 if n <= 50000 else 1))
    note = f"scaled from {part} of {count} picks"
    if n <= 50000:
        gap = greedy_certificate(rows, picks)
        note += f"; worst pick {gap:.0e} short of the farthest row"
        bars = bars if gap <= 1e-4 else (float("inf"), float("inf"))
    name = f"coreset {n} x {channels}, 10 %"
    results = []
    for form, loop, bar in (("norm", norm_loop, bars[0]), ("matrix-vector", matrix_vector_loop, bars[1])):
        if bar is not None or n <= 50000:
            results.append(row(f"{name} / {form} loop", scaled(loop, rows, count, part), ours, bar, note))
    return results


def half_row(n: int, part: int) -> list[Result]:
    rows = histogram_rows(n)
    results = []
    for dtype, table in (("float32", torch.from_numpy(rows)), ("float16", torch.from_numpy(rows).half())):
        ours = seconds(lambda dtype=dtype: greedy_coreset(rows, n // 10, dtype=dtype))
        repo = seconds(lambda table=table: norm_loop(table, part)) * (n // 10) / part
        name = f"coreset {n} x 33 histograms, 10 %, {dtype} / norm loop"
        results.append(row(name, repo, ours, None, f"scaled from {part} picks"))
    return results


def search_rows(queries: int, n: int, channels: int) -> list[Result]:
    bank, some = low_rank_rows(n, channels), low_rank_rows(queries, channels, seed=1)
    tensors = torch.from_numpy(some), torch.from_numpy(bank)
    repo = min(seconds(lambda: torch.cdist(*tensors).min(1)) for _ in range(3))
    results = []
    for backend in ("faiss", "torch"):
        index = FlatIndex(bank, backend=backend)
        ours = min(seconds(lambda index=index: index.nearest(some, 1)) for _ in range(3))
        note = "exact hits are 0" if backend == "faiss" else "for comparison; used on a GPU that FAISS does not see"
        results.append(row(f"nearest {queries} x {n} x {channels} / cdist ({backend})", repo, ours, None, note))
    return [*results, rounded_row(queries, bank)]


def rounded_row(queries: int, bank: np.ndarray) -> Result:
    """Distances rounded as published against exact ones, where half of the patches lie in the bank."""
    some = low_rank_rows(queries, bank.shape[1], seed=1)
    some[::2] = bank[: len(some[::2])]
    index = FlatIndex(bank)
    # norms of the rows are computed once per bank
    patch_distances(some[:1], index, "expanded")
    direct, expanded = (
        min(seconds(lambda form=form: patch_distances(some, index, form)) for _ in range(3))
        for form in ("direct", "expanded")
    )
    name = f"nearest {queries} x {len(bank)} x {bank.shape[1]}, rounded as published / exact"
    return row(name, direct, expanded, 0.8, "half of the patches are rows of the bank")


PROBE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from bench_memory import low_rank_rows
from mmad_cli.memory import greedy_coreset

def field(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024

n, channels = int(sys.argv[2]), int(sys.argv[3])
rows = low_rank_rows(n, channels)
greedy_coreset(rows[:3000].copy(), 50)
Path("/proc/self/clear_refs").write_text("5")
before = field("VmRSS")
greedy_coreset(rows, n // 10)
print((field("VmHWM") - before) / rows.nbytes)
"""


def memory_row(n: int, channels: int, bar: float = 1.3) -> Result:
    """Extra resident memory of a selection in a fresh process, as a multiple of the rows (no ratio of times)."""
    from pathlib import Path

    command = [sys.executable, "-c", PROBE, str(Path(__file__).parent), str(n), str(channels)]
    begin = time.perf_counter()
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    extra = float(run.stdout) if run.returncode == 0 else float("nan")
    return {
        "name": f"extra memory, coreset {n} x {channels}, 10 %",
        "repo_seconds": None,
        "ours_seconds": time.perf_counter() - begin,
        "figure": f"{extra:.2f}x",
        "bar": f"<= {bar:g}x",
        "ok": extra <= bar,
        "note": "peak resident memory beyond the rows, as a multiple of the rows",
    }


def run(quick: bool = False) -> list[Result]:
    """All comparisons; quick leaves out what takes longer than a few seconds."""
    results = coreset_rows(30000, 334, part=20 if quick else 100, bars=(40.0, None))
    results.append(memory_row(30000, 334))
    results += search_rows(784 if quick else 3136, 20000, 1152)
    if not quick:
        results += coreset_rows(200000, 334, part=40, bars=(None, 10.0))
        results += half_row(175616, part=40)
    return results
