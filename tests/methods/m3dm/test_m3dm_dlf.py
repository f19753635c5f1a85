"""Decision layer fusion against the published code's numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mmad_cli.methods.m3dm.dlf import DecisionFusion, one_class_coefficients

Golden = Callable[[str], dict[str, np.ndarray]]


@pytest.mark.parametrize(
    ("case", "kind", "table", "test"),
    [
        ("double", "detect", "s_lib", "s_test"),
        ("triple", "detect", "s_lib", "s_test"),
        ("double", "seg", "s_map_lib", "s_map_test"),
    ],
)
def test_published_coefficients_and_scores(golden: Golden, case: str, kind: str, table: str, test: str) -> None:
    expected = golden(f"dlf/{case}")
    coefficients = one_class_coefficients(expected[table])
    np.testing.assert_allclose(coefficients, expected[f"f64_{kind}_coef"], rtol=1e-6)
    fusion = DecisionFusion(coefficients, coefficients)
    scores = [fusion.image_score(row) for row in expected[test]]
    np.testing.assert_allclose(scores, expected[f"f64_{kind}_scores"], rtol=1e-6)
    pixels = fusion.anomaly_map([column[None] for column in expected[test].T])[0]
    np.testing.assert_allclose(pixels, expected[f"f64_{kind}_scores"], rtol=1e-6)


@pytest.mark.parametrize("case", ["double_multiple", "triple_uff_multiple", "triple_uff_asy2", "triple_uff_pointbert"])
def test_coefficients_of_the_published_runs_are_positive(golden: Golden, case: str) -> None:
    for kind in ("detect", "seg"):
        assert (golden(f"e2e/{case}")[f"{kind}_coef"] > 0).all()


def test_negative_weight_is_said() -> None:
    rows = np.random.default_rng(0).random((50, 2)) * [1, -1]
    with pytest.warns(UserWarning, match="image scores learned a negative weight"):
        coefficients = one_class_coefficients(rows, what="image scores")
    assert coefficients[1] < 0


def test_one_row_is_enough() -> None:
    assert np.isfinite(one_class_coefficients(np.array([[0.5, 0.2]]))).all()


@pytest.mark.parametrize("rows", [np.empty((0, 2)), np.ones(3)])
def test_table_without_rows_or_columns_is_refused(rows: np.ndarray) -> None:
    with pytest.raises(ValueError, match="rows"):
        one_class_coefficients(rows)
