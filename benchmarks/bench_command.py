"""Start-up and repetition: `mmad --help`, and a second `evaluate` of an unchanged run, as the user types them.

The form to compare with is the same command without what makes it quick: importing the numeric libraries first, and
the first evaluate.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.turns import Bar, Row, in_turns, row, timed, turns_of

MMAD = [sys.executable, "-m", "mmad_cli"]
HEAVY = "import torch, open3d, sklearn, faiss; from mmad_cli.cli import main; main()"
METHODS = {
    "btf on FPFH": ["--method", "btf", "--variant", "fpfh"],
    "M3DM with the built-in networks": ["--method", "m3dm", "--backbones", "builtin"],
}
COUNTS = ["--train", "4", "--validation", "0", "--test-good", "2", "--test-defect", "1"]


def artefacts(store: Path) -> dict[str, int]:
    """Time of the last change of every file of a store but for the list of runs."""
    files = (path for path in store.rglob("*") if path.is_file() and path.parent.name != "runs")
    return {str(path): path.stat().st_mtime_ns for path in files}


def help_row(environment: dict[str, str], turns: int) -> Row:
    def called(command: list[str]) -> None:
        subprocess.run([*command, "--help"], env=environment, check=True, capture_output=True)

    called(MMAD)
    both = in_turns(lambda: called([sys.executable, "-c", HEAVY]), lambda: called(MMAD), turns)
    return row("mmad --help / importing the libraries first", both.ours, both.published, bar=Bar(seconds=0.5))


def evaluate_row(what: str, folder: Path, environment: dict[str, str], turns: int) -> Row:
    """The first evaluate once, the same command again in each turn."""
    run, store = folder / f"run {what}", Path(environment["MMAD_STORE"])
    command = [*MMAD, "evaluate", str(folder / "data"), *METHODS[what], "--out", str(run)]

    def called() -> None:
        subprocess.run(command, env=environment, check=True, capture_output=True)

    first, _ = timed(called)
    computed, summary = artefacts(store), (run / "summary.json").read_bytes()
    again = [timed(called)[0] for _ in range(turns)]
    same = artefacts(store) == computed and (run / "summary.json").read_bytes() == summary
    return row(
        f"second evaluate of an unchanged run, {what} / the first",
        again,
        [first],
        bar=Bar(seconds=3, also="nothing computed"),
        holds=bool(computed) and same,
        note="the first evaluate once",
    )


def run(quick: bool = False) -> list[Row]:
    """Help, and the second evaluate of two methods."""
    turns = turns_of(quick)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {**os.environ, "MMAD_STORE": str(folder / "store"), "COLUMNS": "100"}
        make = [*MMAD, "synth", str(folder / "data"), "--category", "biscuit", *COUNTS]
        subprocess.run(make, env=environment, check=True, capture_output=True)
        methods = list(METHODS)[:1] if quick else list(METHODS)
        return [help_row(environment, turns), *(evaluate_row(what, folder, environment, turns) for what in methods)]
