from __future__ import annotations

import json

import pytest

from mmad_cli.errors import DataError, UsageError
from mmad_cli.results.compare import Tolerances, compare
from mmad_cli.results.reference import mismatches, resolve_reference
from mmad_cli.results.reference_update import update_reference
from mmad_cli.results.schema import CategoryResult

NUMBERS = {"a": {"i_auroc": 0.1 + 0.2, "p_auroc": 0.9}, "b": {"i_auroc": 0.5, "p_auroc": None}}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "reference" / "a.json"


def test_a_new_reference_has_all_numbers_and_agrees_to_the_last_digit(make_run, file):
    run = make_run(NUMBERS)
    changes = update_reference(run, file)
    assert {str(change).partition(":")[0] for change in changes} == {
        "a I-AUROC added", "a P-AUROC added", "b I-AUROC added", "mean I-AUROC added", "mean P-AUROC added",
    }  # fmt: skip
    table = resolve_reference(str(file), run)
    assert table.rows == {"a": {"i_auroc": 0.1 + 0.2, "p_auroc": 0.9}, "b": {"i_auroc": 0.5}}
    comparison = compare(run, table, Tolerances(0.0))
    assert comparison.exit_code == 0 and len(comparison.rows) == 5
    assert [path.name for path in file.parent.iterdir()] == ["a.json"]


def test_an_update_says_what_moved(make_run, file):
    update_reference(make_run(NUMBERS), file)
    moved = make_run({"a": {"i_auroc": 0.4, "p_auroc": 0.9}, "c": {"i_auroc": 0.5}})
    texts = [str(change) for change in update_reference(moved, file)]
    assert "a I-AUROC 0.3000 -> 0.4000 (+0.1000)" in texts
    assert "b I-AUROC removed: 0.5000" in texts and "c I-AUROC added: 0.5000" in texts
    assert not any("a P-AUROC" in text for text in texts)
    assert update_reference(moved, file) == []


def test_a_reference_keeps_its_choice_of_numbers(make_run, file):
    file.parent.mkdir()
    file.write_text(json.dumps({"categories": {"a": {"i_auroc": 0.1}}}))
    update_reference(make_run(NUMBERS), file)
    data = json.loads(file.read_text())
    assert data["categories"] == {"a": {"i_auroc": 0.1 + 0.2}, "b": {"i_auroc": 0.5}} and "mean" not in data
    file.write_text(json.dumps({"mean": {"p_auroc": 0.1}}))
    update_reference(make_run(NUMBERS), file)
    data = json.loads(file.read_text())
    assert data["categories"] == {} and data["mean"] == {"p_auroc": 0.9}
    update_reference(make_run(NUMBERS), file, metrics=["i_auroc"])
    assert json.loads(file.read_text())["mean"] == {"i_auroc": pytest.approx(0.4)}


def test_chosen_categories_have_no_mean(make_run, file):
    run = make_run(NUMBERS)
    update_reference(run, file, metrics=["i_auroc"], categories=["B"])
    table = resolve_reference(str(file), run)
    assert table.rows == {"b": {"i_auroc": 0.5}} and table.mean == {}
    with pytest.raises(UsageError, match="--category: unknown category 'aa'; did you mean 'a'"):
        update_reference(run, file, categories=["aa"])


def test_the_summary_of_a_run_can_be_replaced_by_a_reference_but_not_in_its_folder(make_run, tmp_path):
    run = make_run(NUMBERS)
    run.to_disk(tmp_path / "run")
    with pytest.raises(UsageError, match="is the summary of a run"):
        update_reference(run, tmp_path / "run" / "summary.json")
    copy = tmp_path / "copy.json"
    copy.write_text((tmp_path / "run" / "summary.json").read_text())
    assert update_reference(run, copy) == []
    assert set(json.loads(copy.read_text())) == {"made_from", "categories", "mean"}


def test_a_run_with_lost_categories_is_refused(make_run, file):
    run = make_run(NUMBERS)
    run.set_category("b", CategoryResult(status="failed", error="no memory"))
    with pytest.raises(UsageError, match="no numbers for b, which would then no longer be checked"):
        update_reference(run, file)
    with pytest.raises(UsageError, match="no numbers for b: no memory"):
        update_reference(run, file, categories=["b"])
    assert not file.exists()
    update_reference(run, file, categories=["a"])
    del run.categories["b"]
    with pytest.raises(UsageError, match="no numbers for b"):
        update_reference(run, file)


def test_what_cannot_be_read_is_not_overwritten(make_run, file):
    file.parent.mkdir()
    for content in ("{", '{"mean": {"i_auroc": 95}}'):
        file.write_text(content)
        with pytest.raises(DataError, match="remove the file to write it anew"):
            update_reference(make_run(NUMBERS), file)
        assert file.read_text() == content
    with pytest.raises(UsageError, match="is a folder"):
        update_reference(make_run(NUMBERS), file.parent)


def test_a_reference_knows_what_it_holds_for(make_run, file):
    update_reference(make_run(NUMBERS, protocol="m3dm", shots=5), file)
    remarks = " ".join(mismatches(make_run(NUMBERS), resolve_reference(str(file), make_run())))
    assert "protocol m3dm" in remarks and "5 training samples" in remarks
    assert "run-1" in resolve_reference(str(file), make_run()).source


def test_misspelt_keys_of_a_reference_are_errors(make_run, file):
    file.parent.mkdir()
    file.write_text('{"categories": {"a": {"i_auroc": 0.5}}, "means": {"i_auroc": 0.5}}')
    with pytest.raises(UsageError, match=r"unknown key 'means'; did you mean 'mean'"):
        resolve_reference(str(file), make_run())
