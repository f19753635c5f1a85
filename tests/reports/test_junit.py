from __future__ import annotations

from xml.etree import ElementTree

import pytest

from mmad_cli.errors import UsageError
from mmad_cli.reports import render
from mmad_cli.results.compare import compare
from mmad_cli.results.reference import ReferenceTable


@pytest.fixture
def comparison(run):
    rows = {"bagel": {"i_auroc": 0.825}, "cable_gland": {"i_auroc": 0.633}, "tire": {"i_auroc": 0.8}}
    return compare(run, ReferenceTable("paper", "A paper, Table 1", rows=rows, notes=("read from an image",)))


def suites(text):
    return ElementTree.fromstring(text.encode()).findall("testsuite")


def test_out_is_a_failure_missing_an_error_and_ok_neither(run, comparison):
    (suite,) = suites(render([run], "junit", comparisons=[comparison]))
    assert suite.attrib == {
        "name": "20250301-101500-btf-fpfh against paper", "tests": "3", "failures": "1", "errors": "1", "skipped": "0",
    }  # fmt: skip
    cases = {case.attrib["classname"].partition(".")[2]: case for case in suite.findall("testcase")}
    assert list(cases) == ["cable_gland", "tire", "bagel"] and len(cases["bagel"]) == 0
    (failure,) = cases["cable_gland"]
    assert (failure.tag, failure.attrib["type"]) == ("failure", "out of tolerance")
    assert failure.attrib["message"] == (
        "cable_gland I-AUROC: obtained 0.5330, expected 0.6330, difference -0.1000, tolerance 0.005"
    )
    assert "expected: 0.633" in failure.text
    (error,) = cases["tire"]
    assert (error.tag, error.attrib["type"]) == ("error", "missing")
    assert "out of memory" in error.attrib["message"]
    for word in ("3 of 10 categories", "A paper, Table 1", "read from an image"):
        assert word in suite.findtext("system-out")


def test_totals_are_over_all_suites(run, comparison):
    root = ElementTree.fromstring(render([run], "junit", comparisons=[comparison, comparison]).encode())
    assert root.attrib == {"name": "mmad report", "tests": "6", "failures": "2", "errors": "2"}


def test_a_comparison_of_nothing_is_an_error(run):
    nothing = compare(run, ReferenceTable("paper", "s", mean={"other": 0.5}))
    (suite,) = suites(render([run], "junit", comparisons=[nothing]))
    assert (suite.attrib["tests"], suite.attrib["errors"]) == ("1", "1")
    assert "nothing was compared" in suite.find("testcase/error").attrib["message"]


def test_any_name_gives_well_formed_xml(nasty_run, nasty_names):
    names = [*nasty_names, "a.b", "\x00\x1b[31m", "]]>", '"', "é\ud800", "日本"]
    rows = {name: {"i_auroc": 0.9} for name in names}
    nasty_run.run_id = "run \x01 <&>"
    text = render([nasty_run], "junit", comparisons=[compare(nasty_run, ReferenceTable("<ref>", "&\x02", rows=rows))])
    (suite,) = suites(text)
    cases = suite.findall("testcase")
    assert len(cases) == len(names) and all(case.attrib["classname"].count(".") == 1 for case in cases)
    assert any("日本" in case.attrib["classname"] for case in cases)
    text.encode()


def test_junit_needs_a_comparison(run):
    with pytest.raises(UsageError, match="--format junit: needs --against"):
        render([run], "junit")
