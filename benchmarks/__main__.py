"""Every benchmark: our form against the published form, as ratios, with the bars they must meet.

    python -m benchmarks [--quick] [--only NAME]... [--json FILE]

A benchmark runs in a process of its own, so that one's libraries, threads and memory do not disturb the next; both
forms of a step run in that same process. Ends with 1 when a bar is missed, with 2 when a benchmark failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import Others, description
from benchmarks.turns import HEADING, Row, line

PREFIX = "bench_"
ROOT = Path(__file__).parents[1]
# both forms use one core
ONE_CORE = {"metrics", "preprocessing"}
# share of the cores that others may take
BUSY = 0.05

Cost = dict[str, float]


def names() -> list[str]:
    """Every benchmark module of this folder."""
    found = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return sorted(name.removeprefix(PREFIX) for name in found if name.startswith(PREFIX))


def rows_of(name: str, quick: bool) -> list[Row]:
    """Rows of a benchmark, run in a new process, printed when it has ended. Raises RuntimeError where it fails."""
    environment = {**os.environ, **({"OMP_NUM_THREADS": "1"} if name in ONE_CORE else {})}
    command = [sys.executable, "-m", "benchmarks", "--here", name, *(["--quick"] if quick else [])]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{name}: ended with {done.returncode}")
    rows = [{"benchmark": name, **row} for row in json.loads(done.stdout.splitlines()[-1])]
    for row in rows:
        print(line(row), flush=True)
    return rows


def run_here(name: str, quick: bool) -> None:
    """Run a benchmark in this process and print its rows as JSON on the last line."""
    rows = importlib.import_module(f"benchmarks.{PREFIX}{name}").run(quick=quick)
    print(json.dumps(rows))


def run_all(chosen: list[str], quick: bool) -> tuple[list[Row], dict[str, Cost], list[str]]:
    """Rows, what each benchmark took, and the benchmarks that failed."""
    rows: list[Row] = []
    taken: dict[str, Cost] = {}
    failed: list[str] = []
    print(HEADING)
    for name in chosen:
        begin, others = time.perf_counter(), Others()
        try:
            rows += rows_of(name, quick)
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            failed.append(name)
        taken[name] = {"seconds": time.perf_counter() - begin, "others": others.share()}
        if taken[name]["others"] > BUSY:
            print(f"    {name}: other processes took {taken[name]['others']:.0%} of the cores; not a quiet machine")
    return rows, taken, failed


def main() -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description="Our speed against the published form, measured in one run.")
    parser.add_argument("--quick", action="store_true", help="smaller inputs, one turn: a smoke test, no measurement")
    parser.add_argument("--only", action="append", choices=names(), help="this benchmark only; repeatable")
    parser.add_argument("--json", type=Path, help="write machine and rows to this file too")
    parser.add_argument("--here", choices=names(), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        run_here(arguments.here, arguments.quick)
        return 0
    begin = time.perf_counter()
    rows, taken, failed = run_all(arguments.only or names(), arguments.quick)
    missed = [row["name"] for row in rows if row["met"] is False]
    bars = sum(bool(row["bar"]) for row in rows)
    seconds = time.perf_counter() - begin
    outcome = f"missed: {missed}" if missed else f"all {bars} bars met"
    print(f"{len(rows)} rows in {seconds:.0f} s; {outcome}" + (f"; failed: {failed}" if failed else ""))
    if arguments.json:
        record: dict[str, Any] = {"machine": description(), "quick": arguments.quick, "seconds": seconds}
        record |= {"benchmarks": taken, "failed": failed, "rows": rows}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return 2 if failed else 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
