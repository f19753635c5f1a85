from __future__ import annotations

from pathlib import Path

import pytest

from mmad_cli.results.schema import CategoryResult, RunResult

NASTY = ("[red]", "a|b_c", "<script>alert(1)</script>", r"50% \x{$&#~^}", "*bold* `code`", "two\nlines", "_x_")


@pytest.fixture
def run() -> RunResult:
    """Three categories, one of them failed; one metric undefined in one category; not comparable."""
    return RunResult.from_disk(Path(__file__).parents[1] / "results" / "data" / "summary_v1.json")


@pytest.fixture
def other_run(run: RunResult) -> RunResult:
    """Another variant on the same dataset, without failures."""
    other = run.model_copy(deep=True)
    other.run_id = "other"
    other.method.variant = "rgb+fpfh"
    other.comparable, other.not_comparable = True, []
    for name in other.dataset.categories:
        metrics = {"i_auroc": 0.9, "p_auroc": 0.9, "aupro_30_grid100": 0.9, "i_ap": 0.9}
        other.set_category(name, CategoryResult(status="ok", metrics=metrics))
    return other


@pytest.fixture(scope="session")
def nasty_names() -> tuple[str, ...]:
    return NASTY


@pytest.fixture
def nasty_run(run: RunResult) -> RunResult:
    """Categories and errors with characters that mean something to each format."""
    nasty = run.model_copy(deep=True)
    nasty.categories = {}
    nasty.dataset.categories = {}
    nasty.not_comparable = list(NASTY)
    for name in NASTY:
        nasty.set_category(name, CategoryResult(status="ok", metrics={"i_auroc": 0.5, "p_auroc": None}))
    for name in NASTY:
        nasty.set_category(f"{name} failed", CategoryResult(status="failed", error=name))
    return nasty


@pytest.fixture
def seed_runs(run: RunResult) -> list[RunResult]:
    """The run with seeds 0, 1, 2: cable_gland has I-AUROC 0.533, 0.553, 0.573; bagel failed with seed 1."""
    runs = []
    for seed in range(3):
        one = run.model_copy(deep=True)
        one.run_id, one.seed, one.shots = f"run-{seed}", seed, 5
        one.categories["cable_gland"].metrics["i_auroc"] = 0.533 + 0.02 * seed
        if seed == 1:
            one.categories["bagel"] = CategoryResult(status="failed", error="no memory")
        one.update_mean()
        runs.append(one)
    return runs
