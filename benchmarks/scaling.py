"""How cost grows with rows, dimensions, samples and worker processes, and whether it grows as stated.

    python -m benchmarks.scaling [--quick] [--only NAME]... [--json FILE] [--read FILE] [--plot FOLDER]

Every size is measured in three turns; the exponent is that of the medians. `--read` plots the curves of an earlier
`--json` without measuring. Ends with 1 when an exponent is not in the range stated for it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.bench_command import MMAD
from benchmarks.bench_limits import operations_of
from benchmarks.bench_m3dm import FitCost, fit_costs
from benchmarks.bench_memory import low_rank_rows
from benchmarks.curves import Curve, plot
from benchmarks.machine import Others, description, peaks
from benchmarks.turns import timed, turns_of
from mmad_cli.memory import FlatIndex, greedy_coreset
from mmad_cli.threads import available_cores


def coreset_rows(quick: bool) -> list[Curve]:
    """A tenth of N rows kept: the usual loop compares N x N / 10 pairs, blocks leave out most of them."""
    sizes = (1000, 2000, 4000) if quick else (5000, 10000, 20000, 40000, 80000, 160000)
    machine = peaks(quick)
    curve = Curve(
        "coreset rows", "coreset", "Coreset: a tenth of N rows x 334", "rows N", "seconds",
        "at most N x N like the usual loop, at least N like one pass", 1.0, 2.0,
    )  # fmt: skip
    loop: list[float] = []
    made: list[float] = []
    for n in sizes:
        rows = low_rank_rows(n, 334)
        greedy_coreset(rows[:2000], 20)
        curve.measure(n, lambda rows=rows: timed(lambda: greedy_coreset(rows, len(rows) // 10))[0], turns_of(quick))
        made.append(operations_of(lambda rows=rows: greedy_coreset(rows, len(rows) // 10)) / machine.flops)
        loop.append(4.0 * n * 334 * (n // 10) / machine.bandwidth)
    curve.beside = {"bytes of the usual loop, copied": loop, "own operations in one product": made}
    return [curve]


def coreset_channels(quick: bool) -> list[Curve]:
    """A tenth of 20 000 rows kept; products grow with the channels, picking inside a block does not."""
    n = 2000 if quick else 20000
    curve = Curve(
        "coreset channels", "coreset", f"Coreset: a tenth of {n} rows x C", "channels C", "seconds",
        "at most C; what does not depend on C makes it less", 0.0, 1.1,
    )  # fmt: skip
    for channels in (33, 64, 128) if quick else (33, 72, 144, 288, 576, 1152):
        rows = low_rank_rows(n, channels)
        greedy_coreset(rows[:1000], 20)
        curve.measure(
            channels, lambda rows=rows: timed(lambda: greedy_coreset(rows, n // 10))[0], turns_of(quick)
        )  # fmt: skip
    return [curve]


def _search(curve: Curve, quick: bool, shapes: list[tuple[float, int, int, int]]) -> Curve:
    machine = peaks(quick)
    floor = []
    for size, queries, n, channels in shapes:
        index = FlatIndex(low_rank_rows(n, channels))
        some = low_rank_rows(queries, channels, seed=1)
        index.nearest(some, 1)
        curve.measure(size, lambda index=index, some=some: timed(lambda: index.nearest(some, 1))[0], turns_of(quick))
        floor.append(2.0 * queries * n * channels / machine.flops)
    curve.beside = {"2 Q N C operations in one product": floor}
    return curve


def search_channels(quick: bool) -> list[Curve]:
    queries, n = (64, 1000) if quick else (3136, 20000)
    sizes = (32, 64, 128) if quick else (33, 72, 144, 288, 576, 1152)
    curve = Curve(
        "search channels", "search", f"Search: {queries} queries in {n} rows x C", "channels C", "seconds",
        "C for the products; sorting what is found does not depend on C", 0.3, 1.1,
    )  # fmt: skip
    return [_search(curve, quick, [(c, queries, n, c) for c in sizes])]


def search_sizes(quick: bool) -> list[Curve]:
    """Queries and rows, each with the other fixed: the product of both is what counts."""
    channels = 64 if quick else 1152
    queries = (64, 128, 256) if quick else (196, 392, 784, 1568, 3136)
    rows = (500, 1000, 2000) if quick else (5000, 10000, 20000, 40000, 80000)
    of_queries = Curve(
        "search queries", "search", f"Search in {rows[2]} rows x {channels}", "queries Q", "seconds", "Q", 0.75, 1.2,
    )  # fmt: skip
    of_rows = Curve(
        "search rows", "search", f"Search of {queries[2]} queries x {channels}", "rows N", "seconds", "N", 0.75, 1.2,
    )  # fmt: skip
    return [
        _search(of_queries, quick, [(q, q, rows[2], channels) for q in queries]),
        _search(of_rows, quick, [(n, queries[2], n, channels) for n in rows]),
    ]


def samples(quick: bool) -> list[Curve]:
    """M3DM with three banks of a tenth of the rows, fitted to generated features of so many training samples."""
    sizes = (2, 4) if quick else (4, 8, 16, 32)
    costs = [fit_costs(count, 0.1, turns_of(quick)) for count in sizes]
    fit = Curve(
        "fit samples", "samples", "M3DM: fit of three banks", "training samples", "seconds",
        "between n (reading, projecting) and n x n (scores of n samples in banks that grow with n)", 0.8, 2.0,
    )  # fmt: skip
    predict = Curve(
        "predict samples", "samples", "M3DM: score of one scan", "training samples", "seconds",
        "at most n: the search in the bank grows, the rest does not", 0.0, 1.1,
    )  # fmt: skip
    memory = Curve(
        "memory samples", "samples", "M3DM: peak memory of the fit", "training samples", "GB",
        "at most n: projected rows and banks grow, a sample and its scores do not", 0.0, 1.1,
    )  # fmt: skip
    curves = [fit, predict, memory]
    parts: list[Callable[[FitCost], float]] = [lambda c: c.fit, lambda c: c.predict, lambda c: c.memory / 1e9]
    for curve, part in zip(curves, parts, strict=True):
        curve.sizes = [float(count) for count in sizes]
        curve.values = [[part(cost) for cost in some] for some in costs]
    return curves


def workers(quick: bool) -> list[Curve]:
    """Cleaning and FPFH of synthetic scans by `mmad extract`, from the command to its end, store empty each time.

    So many workers get so many cores: one alone would take them all, as Open3D does.
    """
    counts = [count for count in (1, 2, 4, 8, 16) if count <= available_cores()]
    scans = 4 if quick else 36
    curves = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "data"
        made = ["--category", "biscuit", "--train", str(scans), "--validation", "0", "--test-good", "0"]
        _call([*MMAD, "synth", str(data), *made, "--test-defect", "0", "--size", "400"], folder / "none")
        for kind, title in (("processes", "worker processes"), ("dask", "Dask workers")):
            curve = Curve(
                f"workers {kind}", "workers", f"FPFH of {scans} scans: {title}", "workers",
                "seconds", "1/workers, less what the command itself takes", -1.05, -0.5,
            )  # fmt: skip
            for count in counts:
                curve.measure(count, lambda count=count, kind=kind: _extract(data, count, kind), turns_of(quick))
            curve.beside = {"ideal": [curve.medians[0] / count for count in counts]}
            curves.append(curve)
    return curves


def _call(command: list[str], store: Path) -> None:
    environment = {**os.environ, "MMAD_STORE": str(store), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True)


def _extract(data: Path, count: int, kind: str) -> float:
    """Seconds of the command; starting a cluster is not counted, as one is there already when it is used."""
    command = [*MMAD, "extract", str(data), "--method", "btf", "--variant", "fpfh"]
    with tempfile.TemporaryDirectory() as store, _cores(count):
        if kind == "processes":
            return timed(lambda: _call([*command, "--workers", str(count)], Path(store)))[0]
        from distributed import LocalCluster

        with LocalCluster(n_workers=count, threads_per_worker=1, dashboard_address=":0") as cluster:
            return timed(lambda: _call([*command, "--dask", cluster.scheduler_address], Path(store)))[0]


@contextmanager
def _cores(count: int) -> Iterator[None]:
    """This thread, and the processes that it starts, on the first so many cores."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


CURVES: dict[str, Callable[[bool], list[Curve]]] = {
    "coreset-rows": coreset_rows,
    "coreset-channels": coreset_channels,
    "search-channels": search_channels,
    "search": search_sizes,
    "samples": samples,
    "workers": workers,
}


def main() -> int:
    parser = argparse.ArgumentParser(description="How cost grows, and whether it grows as stated.")
    parser.add_argument("--quick", action="store_true", help="small sizes, one turn: a smoke test, no measurement")
    parser.add_argument("--only", action="append", choices=CURVES, help="these curves only; repeatable")
    parser.add_argument("--json", type=Path, help="write machine and curves to this file")
    parser.add_argument("--read", type=Path, help="take the curves of this file instead of measuring")
    parser.add_argument("--plot", type=Path, help="write one SVG per figure into this folder")
    arguments = parser.parse_args()
    begin, others = time.perf_counter(), Others()
    curves: list[Curve] = []
    if arguments.read:
        curves = [Curve.of(record) for record in json.loads(arguments.read.read_text())["curves"]]
    for name in [] if arguments.read else arguments.only or CURVES:
        made = CURVES[name](arguments.quick)
        print("\n".join(line for curve in made for line in curve.lines(judged=not arguments.quick)), flush=True)
        curves += made
    if arguments.json:
        record = {"machine": description(), "quick": arguments.quick, "others": others.share()}
        record["curves"] = [curve.record() for curve in curves]
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.plot:
        for path in plot(curves, arguments.plot):
            print(f"wrote {path}")
    # small sizes say nothing about growth
    wrong = [] if arguments.quick else [curve.name for curve in curves if not curve.met]
    print(
        f"{len(curves)} curves in {time.perf_counter() - begin:.0f} s" + (f"; not as stated: {wrong}" if wrong else "")
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
