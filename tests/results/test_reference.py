from __future__ import annotations

import json

import pytest

from mmad_cli.errors import DataError, UsageError
from mmad_cli.results.metric_names import METRICS
from mmad_cli.results.reference import (
    DATASET_CATEGORIES,
    is_about,
    list_references,
    match_category,
    mismatches,
    reference_groups,
    resolve_reference,
)

REFERENCES = list_references()


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda r: r.name)
def test_every_reference_resolves_to_fractions_with_a_source(reference, make_run):
    table = resolve_reference(reference.name, make_run())
    values = [*table.mean.values(), *(v for row in table.rows.values() for v in row.values())]
    assert values and all(0 <= value <= 1 for value in values)
    assert len(table.source) > 20
    # One source measures at 1 % with 100 thresholds, for which the tool has no column.
    assert set(table.metrics) <= {*METRICS, "aupro_01_grid100"}
    if reference.dataset in DATASET_CATEGORIES:
        assert set(table.rows) <= set(DATASET_CATEGORIES[reference.dataset])


def test_names_are_unique_and_in_groups():
    names = [reference.name for reference in REFERENCES]
    assert len(names) == len(set(names)) > 100
    assert sum(map(len, reference_groups().values())) == len(names)
    assert not set(names) & set(reference_groups())


def test_printed_means_agree_with_their_categories_or_say_so(make_run):
    for reference in REFERENCES:
        notes = " ".join(reference.table().notes)
        for metric in reference.metrics.values():
            if metric.mean is not None and len(metric.categories) == 10:
                average = sum(metric.categories.values()) / 10
                assert abs(average - metric.mean) < 0.0006 or f"printed mean is {metric.mean:.4f}" in notes


@pytest.mark.parametrize(
    ("name", "category", "i_auroc", "p_auroc", "aupro"),
    [
        ("btf-readme:fpfh:raw", "cable_gland", 0.533, 0.955, 0.849),
        ("btf-readme:fpfh:preprocessed", "cable_gland", 0.534, 0.965, 0.878),
        ("m3dm-paper:dino+point_mae+fusion", "bagel", 0.994, 0.995, 0.970),
        ("m3dm-seed:dino", "bagel", 0.944, 0.992, 0.952),
    ],
)
def test_known_published_categories(make_run, name, category, i_auroc, p_auroc, aupro):
    row = resolve_reference(name, make_run()).rows[category]
    assert row == {"i_auroc": i_auroc, "p_auroc": p_auroc, "aupro_30_grid100": aupro}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("btf-readme:rgb+fpfh:raw", {"aupro_30_grid100": 0.964, "i_auroc": 0.873, "p_auroc": 0.993}),
        ("btf-paper:rgb+fpfh", {"aupro_30_grid100": 0.959, "i_auroc": 0.865, "p_auroc": 0.992}),
        ("m3dm-paper:point_mae", {"aupro_30_grid100": 0.906, "i_auroc": 0.874, "p_auroc": 0.970}),
        (
            "m3dm-paper:dino+point_mae+fusion",
            {"aupro_30_grid100": 0.964, "i_auroc": 0.945, "p_auroc": 0.992},
        ),
        ("cfm-paper:rgb+3d", {"aupro_30_grid99": 0.972, "i_auroc": 0.960, "p_auroc": 0.993}),
        ("cmdr-paper:rgb+3d", {"aupro_30_grid99": 0.976, "i_auroc": 0.973, "p_auroc": 0.996}),
        ("mafr-paper:rgb+3d", {"i_auroc": 0.972}),
        ("trd-paper:ast", {"aupro_30": 0.944, "i_auroc": 0.937, "p_auroc": 0.976}),
    ],
)
def test_known_published_means(make_run, name, expected):
    assert resolve_reference(name, make_run()).mean == expected


@pytest.mark.parametrize(
    ("name", "run", "expected"),
    [
        ("btf-readme", {"variant": "fpfh", "protocol": "none"}, "btf-readme:fpfh:raw"),
        ("btf-readme", {"variant": "fpfh", "protocol": "m3dm"}, "btf-readme:fpfh:preprocessed"),
        ("btf-readme:fpfh", {"variant": "fpfh", "protocol": "m3dm"}, "btf-readme:fpfh:preprocessed"),
        ("btf-paper", {"variant": "rgb+fpfh", "protocol": "m3dm"}, "btf-paper:rgb+fpfh"),
        (
            "m3dm-paper",
            {"method": "m3dm", "variant": "dino+point_mae+fusion", "protocol": "m3dm"},
            "m3dm-paper:dino+point_mae+fusion",
        ),
        ("m3dm-paper", {"method": "m3dm", "variant": "dino", "protocol": "none"}, "m3dm-paper:dino"),
        ("m3dm-seed", {"method": "M3DM", "variant": "DINO+Point_MAE"}, "m3dm-seed:dino+point_mae"),
        ("cfm-paper", {"method": "cfm", "variant": "default", "protocol": "cfm"}, "cfm-paper:rgb+3d"),
        ("mafr-paper", {"method": "mafr", "variant": "default"}, "mafr-paper:rgb+3d"),
        (
            "mafr-paper",
            {"method": "mafr", "variant": "default", "dataset": "eyecandies"},
            "mafr-paper:rgb+3d:eyecandies",
        ),
        ("cmdr-paper", {"method": "cmdr-iad", "variant": "rgb+3d"}, "cmdr-paper:rgb+3d"),
        (
            "cmdr-paper",
            {"method": "cmdr_iad", "variant": "polyurethane", "dataset": "polyurethane"},
            "cmdr-paper:3d:pu_cutting",
        ),
        ("g2sf-readme", {"method": "g2sf", "variant": "default"}, "g2sf-readme:rgb+3d"),
        (
            "cif-paper",
            {"method": "m3dm", "variant": "dino+point_mae+fusion", "shots": 2},
            "cif-paper:m3dm:2-shot",
        ),
    ],
)
def test_a_group_stands_for_the_row_that_fits_the_run(make_run, name, run, expected):
    assert resolve_reference(name, make_run(**run)).name == expected


def test_a_group_without_a_fitting_row_lists_its_names(make_run):
    with pytest.raises(UsageError, match=r"no row is for method cfm.*m3dm-paper:dino"):
        resolve_reference("m3dm-paper", make_run(method="cfm", variant="default"))


def test_a_group_with_several_fitting_rows_asks_for_one(make_run):
    with pytest.raises(UsageError, match=r"several rows fit.*btf-readme:fpfh:raw, btf-readme:fpfh:preprocessed"):
        resolve_reference("btf-readme", make_run(protocol="cfm"))


def test_unknown_names_suggest_near_ones(make_run):
    with pytest.raises(
        UsageError, match=r"--against: unknown reference, run or file 'm3dm-papr'; did you mean .*'m3dm-paper'"
    ):
        resolve_reference("m3dm-papr", make_run())
    with pytest.raises(UsageError, match=r"known: .*btf-readme") as caught:
        resolve_reference("zzzzzzzz", make_run())
    assert len(str(caught.value)) < 600


def test_a_run_is_a_reference(make_run, tmp_path):
    run = make_run({"bagel": {"i_auroc": 0.5, "p_auroc": None}})
    run.to_disk(tmp_path / "run-1")
    by_folder = resolve_reference(str(tmp_path / "run-1"), run)
    by_file = resolve_reference(str(tmp_path / "run-1" / "summary.json"), run)
    by_id = resolve_reference("run-1", run, runs_root=tmp_path)
    for table in (by_folder, by_file, by_id):
        assert table.rows == {"bagel": {"i_auroc": 0.5}}
        assert table.mean == {"i_auroc": 0.5}
        assert not table.published


def test_a_plain_json_file_is_a_reference(make_run, tmp_path):
    file = tmp_path / "expected.json"
    file.write_text(json.dumps({"categories": {"Bagel": {"i_auroc": 1, "p_ap": None}}, "mean": {"i_auroc": 0.5}}))
    table = resolve_reference(str(file), make_run())
    assert table.rows == {"Bagel": {"i_auroc": 1.0}} and table.mean == {"i_auroc": 0.5}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "JSON"),
        ("[]", "expected"),
        ('{"means": {}}', "expected"),
        ('{"mean": {}}', "no numbers"),
        ('{"mean": {"i_aurok": 0.5}}', "did you mean.*i_auroc"),
        ('{"mean": {"i_auroc": 95.4}}', "between 0 and 1, got 95.4"),
        ('{"mean": {"i_auroc": NaN}}', "between 0 and 1"),
        ('{"mean": {"i_auroc": true}}', "between 0 and 1"),
        ('{"categories": []}', "no numbers"),
        ('{"categories": [1]}', "should map names"),
        ('{"categories": {"bagel": 0.5}}', "bagel: expected"),
    ],
)
def test_unusable_files_say_what_is_wrong(make_run, tmp_path, content, message):
    file = tmp_path / "expected.json"
    file.write_text(content)
    with pytest.raises((DataError, UsageError), match=message):
        resolve_reference(str(file), make_run())


def test_missing_files_are_named(make_run):
    with pytest.raises(DataError, match=r"nowhere\.json: no such file"):
        resolve_reference("nowhere.json", make_run())


def test_mismatches_of_run_and_reference(make_run):
    published = resolve_reference("m3dm-paper:dino", make_run())
    fitting = make_run(method="m3dm", variant="dino", protocol="m3dm")
    assert mismatches(fitting, published) == []
    other = make_run(protocol="none", dataset="parts", shots=5, not_comparable=["stand-in weights"])
    text = "\n".join(mismatches(other, published))
    for word in ("stand-in weights", "dataset mvtec3d", "protocol m3dm", "5 training samples"):
        assert word in text


@pytest.mark.parametrize("name", ["Cable Gland", "cable-gland", "CABLEGLAND", "cable_gland"])
def test_category_names_agree_folded(name):
    assert match_category(name, ["bagel", "cable_gland"]) == "cable_gland"


def test_ambiguous_category_names_need_the_exact_spelling():
    assert match_category("ab", ["a_b", "a-b"]) is None
    assert match_category("a_b", ["a_b", "a-b"]) == "a_b"


def test_metric_names_are_those_of_the_metrics_room():
    metrics = pytest.importorskip("mmad_cli.metrics")
    assert tuple(METRICS) == metrics.METRIC_KEYS + metrics.VALIDATION_KEYS


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("btf-readme", {}, True),
        ("btf-readme:fpfh", {}, True),
        ("btf-readme:raw", {}, False),
        ("btf-readme", {"dataset": "synthetic"}, False),
        ("btf-readme", {"method": "m3dm", "variant": "dino"}, False),
        ("a-file.json", {"dataset": "synthetic"}, True),
    ],
)
def test_which_runs_published_rows_are_about(make_run, name, options, expected):
    assert is_about(name, make_run(**options)) is expected
