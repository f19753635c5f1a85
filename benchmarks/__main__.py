"""Every benchmark in one process: our form against the published form, as ratios, with the bars they must meet.

    python -m benchmarks [--quick] [--only NAME]... [--json FILE]

Ends with 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import platform
import sys
import time
from pathlib import Path
from typing import Any

PREFIX = "bench_"


def names() -> list[str]:
    """Every benchmark module of this folder."""
    found = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return sorted(name.removeprefix(PREFIX) for name in found if name.startswith(PREFIX))


def run_all(chosen: list[str], quick: bool) -> list[dict[str, Any]]:
    """Rows of the chosen benchmarks, printed as they come."""
    rows: list[dict[str, Any]] = []
    print(f"{'what':<78} {'published':>11} {'ours':>10} {'ratio':>8}  bar")
    for name in chosen:
        module = importlib.import_module(f"benchmarks.{PREFIX}{name}")
        for row in module.run(quick=quick):
            rows.append({"benchmark": name, **row})
            print_row(row)
    return rows


def print_row(row: dict[str, Any]) -> None:
    """One line; a bar of None is for information only, a `figure` stands where no times are compared."""
    verdict = "" if row.get("ok") is None or not row.get("bar") else ("met" if row["ok"] else "MISSED")
    numbers = [f"{row[key]:.4g} s" if row.get(key) is not None else "" for key in ("repo_seconds", "ours_seconds")]
    ratio = row.get("figure") or (f"{row['ratio']:.1f}x" if row.get("ratio") else "")
    print(
        f"{row['name']:<78} {numbers[0]:>11} {numbers[1]:>10} {ratio:>8}  {row.get('bar') or ''} {verdict}", flush=True
    )
    if row.get("note"):
        print(f"    {row['note']}", flush=True)


def main() -> int:
    """Run, print, write; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description="Our speed against the published form, measured in one run.")
    parser.add_argument("--quick", action="store_true", help="smaller inputs: a smoke test, not a measurement")
    parser.add_argument("--only", action="append", choices=names(), help="this benchmark only; repeatable")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    arguments = parser.parse_args()
    start = time.perf_counter()
    rows = run_all(arguments.only or names(), arguments.quick)
    missed = [row["name"] for row in rows if row.get("bar") and row.get("ok") is False]
    print(
        f"{len(rows)} rows in {time.perf_counter() - start:.0f} s; "
        + (f"missed: {missed}" if missed else "all bars met")
    )
    if arguments.json:
        machine = {"machine": platform.processor() or platform.machine(), "python": platform.python_version()}
        arguments.json.write_text(json.dumps({**machine, "quick": arguments.quick, "rows": rows}, indent=2) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
