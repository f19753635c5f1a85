from __future__ import annotations

import pytest

from mmad_cli.errors import UsageError
from mmad_cli.results.compare import Tolerances, compare, exit_code, parse_tolerances
from mmad_cli.results.reference import ReferenceTable, resolve_reference
from mmad_cli.results.schema import CategoryResult


@pytest.fixture
def published_run(make_run):
    """A run that gave the published numbers of BTF FPFH on raw data."""
    table = resolve_reference("btf-readme:fpfh:raw", make_run())
    return make_run(table.rows)


@pytest.fixture
def published(published_run):
    return resolve_reference("btf-readme", published_run)


def test_equal_numbers_are_ok(published_run, published):
    result = compare(published_run, published)
    assert len(result.rows) == 33 and result.count("ok") == 33
    assert result.exit_code == 0 and result.remarks == ()
    assert sum(row.is_mean for row in result.rows) == 3


def test_a_number_out_of_tolerance_comes_first(published_run, published):
    published_run.categories["foam"].metrics["i_auroc"] -= 0.02
    published_run.categories["tire"].metrics["p_auroc"] -= 0.1
    published_run.update_mean()
    result = compare(published_run, published)
    assert result.exit_code == 1
    first, second = result.rows[:2]
    assert (first.category, first.metric, first.status) == ("tire", "p_auroc", "out")
    assert first.difference == pytest.approx(-0.1)
    assert (second.category, second.metric) == ("foam", "i_auroc")


def test_the_tolerance_itself_is_inside(make_run):
    run = make_run({"a": {"i_auroc": 0.843}})
    reference = ReferenceTable("r", "s", rows={"a": {"i_auroc": 0.848}})
    assert compare(run, reference, Tolerances(0.005)).exit_code == 0
    assert compare(run, reference, Tolerances(0.0049)).exit_code == 1
    assert compare(run, reference, Tolerances(0.0, {"i_auroc": 0.01})).exit_code == 0
    assert compare(run, reference, Tolerances(0.01, {"i_auroc": 0.0})).exit_code == 1


def test_zero_tolerance_wants_equal_numbers(published_run, make_run, tmp_path):
    published_run.to_disk(tmp_path)
    same = resolve_reference(str(tmp_path), published_run)
    assert compare(published_run, same, Tolerances(0.0)).exit_code == 0


@pytest.mark.parametrize("case", ["absent", "failed", "null"])
def test_missing_parts_are_exit_code_3(published_run, published, case):
    if case == "absent":
        del published_run.categories["foam"]
        published_run.update_mean()
    elif case == "failed":
        published_run.set_category("foam", CategoryResult(status="failed", error="no memory"))
    else:
        result = published_run.categories["foam"]
        result.metrics["i_auroc"] = None
        result.metrics_null_reasons["i_auroc"] = "no anomalous test image"
        published_run.update_mean()
    comparison = compare(published_run, published)
    assert comparison.exit_code == 3
    missing = [row for row in comparison.rows if row.category == "foam" and row.status == "missing"]
    words = {"absent": "no such category", "failed": "no memory", "null": "no anomalous test image"}
    assert missing and all(words[case] in row.note and row.obtained is None for row in missing)


def test_a_mean_over_other_categories_is_not_compared(published_run, published):
    del published_run.categories["foam"]
    published_run.update_mean()
    means = [row for row in compare(published_run, published).rows if row.is_mean]
    assert [row.status for row in means] == ["missing"] * 3
    assert "9 categories" in means[0].note and "10 categories" in means[0].note


def test_a_mean_without_printed_categories_needs_the_whole_dataset(make_run, mvtec3d_categories):
    reference = resolve_reference("mafr-paper:rgb+3d", make_run())
    whole = make_run({name: {"i_auroc": 0.972} for name in mvtec3d_categories})
    part = make_run({"bagel": {"i_auroc": 0.972}})
    assert compare(whole, reference).exit_code == 0
    assert compare(part, reference).exit_code == 3


def test_out_of_tolerance_goes_before_missing(published_run, published):
    published_run.set_category("foam", CategoryResult(status="failed", error="no memory"))
    published_run.categories["tire"].metrics["p_auroc"] = 0.1
    comparison = compare(published_run, published)
    assert comparison.exit_code == 1
    assert [row.status for row in comparison.rows] == sorted(
        (row.status for row in comparison.rows), key=["out", "missing", "ok"].index
    )


def test_several_comparisons_together(published_run, published, make_run):
    fine = compare(published_run, published)
    missing = compare(make_run({"bagel": dict(published.rows["bagel"])}), published)
    out = compare(make_run({"bagel": {"i_auroc": 0.1}}), published)
    assert (fine.exit_code, missing.exit_code, out.exit_code) == (0, 3, 1)
    assert exit_code([fine]) == 0 and exit_code([fine, missing]) == 3 and exit_code([missing, out, fine]) == 1


def test_one_category_can_be_compared_alone(make_run, published):
    run = make_run({"cable_gland": {"i_auroc": 0.533, "p_auroc": 0.955, "aupro_30_grid100": 0.849}})
    assert compare(run, published, categories=["Cable-Gland"]).exit_code == 0
    with pytest.raises(UsageError, match="spoon"):
        compare(run, published, categories=["spoon"])


def test_metrics_can_be_chosen(published_run, published):
    result = compare(published_run, published, metrics=["i_auroc", "i_ap"])
    assert {row.metric for row in result.rows} == {"i_auroc"}
    assert result.not_compared == ("i_ap",)
    with pytest.raises(UsageError, match=r"which has: .*i_auroc"):
        compare(published_run, published, metrics=["i_ap"])


def test_metrics_that_the_tool_does_not_compute_are_left_out(make_run, mvtec3d_categories):
    printed = {"i_auroc": 0.971, "p_auroc": 0.997, "aupro_30_grid100": 0.979}
    run = make_run(dict.fromkeys(mvtec3d_categories, printed))
    result = compare(run, resolve_reference("g2sf-readme:rgb+3d", run))
    assert result.exit_code == 0 and result.not_compared == ("aupro_01_grid100",)


def test_nothing_compared_is_not_a_pass(make_run):
    assert compare(make_run({"a": {"i_auroc": 1.0}}), ReferenceTable("r", "s", mean={"other": 0.5})).exit_code == 3


def test_categories_agree_folded(make_run):
    run = make_run({"Cable Gland": {"i_auroc": 0.5}})
    reference = ReferenceTable("r", "s", rows={"cable_gland": {"i_auroc": 0.5}}, mean={"i_auroc": 0.5})
    result = compare(run, reference)
    assert result.exit_code == 0 and result.rows[0].category == "Cable Gland"


def test_runs_that_do_not_compare_are_compared_with_remarks(published_run, published):
    published_run.mark_not_comparable("limit 2")
    result = compare(published_run, published)
    assert result.exit_code == 0 and "limit 2" in result.remarks[0]


def test_parse_tolerances():
    assert parse_tolerances([]) == Tolerances(0.005)
    assert parse_tolerances(["0.01"]).of("p_ap") == 0.01
    parsed = parse_tolerances(["i_auroc=0.02", "0.01", "i_auroc=0.03"])
    assert parsed.of("i_auroc") == 0.03 and parsed.of("p_auroc") == 0.01


@pytest.mark.parametrize("text", ["x", "-0.1", "nan", "inf", "2", "i_auroc=", "i_aurok=0.1", "=0.1", ""])
def test_unusable_tolerances_are_usage_errors(text):
    with pytest.raises(UsageError, match="--tolerance"):
        parse_tolerances([text])
