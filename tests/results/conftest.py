from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from mmad_cli.results.schema import CategoryResult, RunResult

MVTEC3D = ["bagel", "cable_gland", "carrot", "cookie", "dowel", "foam", "peach", "potato", "rope", "tire"]


@pytest.fixture(scope="session")
def stored_summary() -> Path:
    """A `summary.json` as an earlier version wrote it."""
    return Path(__file__).parent / "data" / "summary_v1.json"


@pytest.fixture
def stored_run(stored_summary: Path) -> RunResult:
    return RunResult.from_disk(stored_summary)


@pytest.fixture(scope="session")
def mvtec3d_categories() -> list[str]:
    return MVTEC3D


@pytest.fixture
def make_run() -> Callable[..., RunResult]:
    def build(
        categories: Mapping[str, Mapping[str, float | None]] | None = None,
        method: str = "btf",
        variant: str = "fpfh",
        protocol: str = "none",
        dataset: str = "mvtec3d",
        **extra: Any,
    ) -> RunResult:
        counts = {"train": 3, "validation": 1, "test_good": 2, "test_anomalous": 2}
        run = RunResult.model_validate(
            {
                "run_id": "run-1",
                "method": {
                    "name": method,
                    "variant": variant,
                    "recipe": extra.pop("recipe", "official"),
                    "config_hash": "c",
                    "method_version": "1",
                },
                "dataset": {
                    "name": dataset,
                    "digest": "d",
                    "categories": dict.fromkeys(categories or {}, counts),
                },
                "preprocessing": {"protocol": protocol, "key": "k"},
                "environment": {"mmad": "0", "python": "3.11", "platform": "x", "device": "cpu"},
                **extra,
            }
        )
        for name, metrics in (categories or {}).items():
            run.set_category(name, CategoryResult(status="ok", metrics=dict(metrics)))
        return run

    return build
