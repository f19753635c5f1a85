from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from mmad_cli.results.schema import CategoryResult, RunResult
from mmad_cli.results.seeds import Spread, group_by_seed

MakeRun = Callable[..., RunResult]

WEIGHTS = {"name": "net", "sha256": "1", "source": "timm"}


@pytest.fixture
def make_seeds(make_run: MakeRun) -> Callable[..., list[RunResult]]:
    """A run per given value of cable_gland, with seeds 0, 1, ...; bagel has 0.9 in all."""

    def build(*values: float | None, **extra: Any) -> list[RunResult]:
        tables = [{"bagel": {"i_auroc": 0.9}, "cable_gland": {"i_auroc": value}} for value in values]
        return [make_run(table, seed=seed, run_id=f"run-{seed}", **extra) for seed, table in enumerate(tables)]

    return build


def test_mean_and_sample_standard_deviation(make_seeds):
    (group,) = group_by_seed(make_seeds(0.5, 0.6, 0.8))
    assert group.seeds == (0, 1, 2)
    spread = group.categories["cable_gland"]["i_auroc"]
    # deviations -2/15, -1/30, 1/6 from 19/30; squares sum to 7/150, divided by n - 1 = 2
    assert spread.mean == pytest.approx(19 / 30)
    assert spread.std == pytest.approx(math.sqrt(7 / 300))
    assert spread.values == {0: 0.5, 1: 0.6, 2: 0.8}
    assert (group.categories["bagel"]["i_auroc"].mean, group.categories["bagel"]["i_auroc"].std) == (0.9, 0.0)


def test_the_mean_row_spreads_over_the_means_of_the_runs(make_seeds):
    (group,) = group_by_seed(make_seeds(0.5, 0.6, 0.8))
    assert group.mean["i_auroc"].mean == pytest.approx((0.7 + 0.75 + 0.85) / 3)
    assert group.mean["i_auroc"].std == pytest.approx(math.sqrt(7 / 300) / 2), "half of one category's"


def test_one_value_has_no_deviation_and_none_no_mean():
    assert (Spread({3: 0.5}).mean, Spread({3: 0.5}).std) == (0.5, None)
    assert (Spread().mean, Spread().std, Spread().count) == (None, None, 0)


def test_runs_are_ordered_by_seed_and_groups_by_their_first_run(make_seeds):
    few, all_samples = make_seeds(0.1, 0.2, shots=5), make_seeds(0.3, 0.4)
    groups = group_by_seed([few[1], all_samples[1], all_samples[0], few[0]])
    assert [group.runs[0].shots for group in groups] == [5, None]
    assert [group.seeds for group in groups] == [(0, 1), (0, 1)]


@pytest.mark.parametrize(
    "change",
    [
        {"method": {"name": "other"}},
        {"method": {"variant": "raw"}},
        {"method": {"recipe": "corrected"}},
        {"method": {"config_hash": "other"}},
        {"method": {"config": {"coreset_fraction": 0.5}}},
        {"method": {"method_version": "2"}},
        {"dataset": {"name": "other"}},
        {"dataset": {"digest": "other"}},
        {"preprocessing": {"protocol": "m3dm"}},
        {"preprocessing": {"key": "other"}},
        {"shots": 5},
        {"limit": 5},
        {"full_resolution": True},
        {"weights": [WEIGHTS | {"sha256": "2"}]},
        {"weights": []},
    ],
    ids=str,
)
def test_what_else_differs_keeps_runs_apart(make_seeds, change):
    runs = make_seeds(0.5, 0.6, weights=[WEIGHTS])
    data = runs[1].model_dump(by_alias=True)
    for key, value in change.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) else value
    assert len(group_by_seed(runs)) == 1
    assert group_by_seed([runs[0], RunResult.model_validate(data)]) == []


def test_what_does_not_matter_keeps_runs_together(make_seeds):
    first, second = make_seeds(0.5, 0.6, weights=[WEIGHTS, WEIGHTS | {"name": "another"}])
    second.weights.reverse()
    second.argv, second.environment.platform = ["mmad"], "elsewhere"
    assert len(group_by_seed([first, second])) == 1


def test_one_seed_alone_is_no_group(make_seeds):
    (run,) = make_seeds(0.5)
    assert group_by_seed([]) == group_by_seed([run]) == group_by_seed([run, run]) == []


@pytest.mark.parametrize("later_first", [True, False])
def test_of_two_runs_with_one_seed_the_latest_counts(make_seeds, later_first):
    old, other = make_seeds(0.5, 0.6)
    new = make_seeds(0.7)[0]
    old.created, new.created = datetime(2025, 1, 1, tzinfo=UTC), datetime(2025, 1, 2, tzinfo=UTC)
    (group,) = group_by_seed([new, other, old] if later_first else [old, other, new])
    assert group.categories["cable_gland"]["i_auroc"].values == {0: 0.7, 1: 0.6}


def test_a_failed_category_leaves_its_seed_out_of_itself_and_of_the_mean(make_seeds):
    runs = make_seeds(0.5, 0.6, 0.8)
    runs[1].set_category("cable_gland", CategoryResult(status="failed", error="x", metrics={"i_auroc": 0.1}))
    (group,) = group_by_seed(runs)
    assert group.categories["cable_gland"]["i_auroc"].values == {0: 0.5, 2: 0.8}
    assert group.categories["bagel"]["i_auroc"].count == 3
    assert set(group.mean["i_auroc"].values) == {0, 2}, "a mean over bagel alone is another number"


def test_a_missing_category_is_left_out_like_a_failed_one(make_seeds):
    runs = make_seeds(0.5, 0.6)
    del runs[0].categories["cable_gland"]
    (group,) = group_by_seed(runs)
    assert group.categories["cable_gland"]["i_auroc"].values == {1: 0.6}
    assert group.mean["i_auroc"].std is None


def test_a_category_undefined_for_every_seed_does_not_cost_the_mean(make_seeds):
    (group,) = group_by_seed(make_seeds(None, None))
    assert group.categories["cable_gland"]["i_auroc"].count == 0
    assert group.mean["i_auroc"].values == {0: 0.9, 1: 0.9}


def test_runs_that_failed_everywhere_make_an_empty_group(make_seeds):
    runs = make_seeds(0.5, 0.6)
    for run in runs:
        run.categories = {name: CategoryResult(status="failed", error="x") for name in run.categories}
    (group,) = group_by_seed(runs)
    assert group.mean == {}
    assert group.categories == {"bagel": {}, "cable_gland": {}}
