"""Comparisons as JUnit XML: what CI systems show as test results.

A comparison is a test suite and a compared number a test case: a number out of tolerance is a failure, a missing one
an error. Form: the schema of the Jenkins xUnit plugin, which GitHub, GitLab and others read too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree

from mmad_cli.results.compare import Comparison, ComparisonRow
from mmad_cli.results.metric_names import label

# What XML 1.0 cannot hold, not even escaped
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render_junit(comparisons: Sequence[Comparison]) -> str:
    """XML with one suite per comparison; a comparison of nothing is a suite with one error."""
    suites = [_suite(comparison) for comparison in comparisons]
    root = ElementTree.Element("testsuites", {"name": "mmad report", **_counts(suites)})
    root.extend(suites)
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'


def _suite(comparison: Comparison) -> ElementTree.Element:
    name = _text(f"{comparison.run_id} against {comparison.reference.name}")
    cases = [_case(comparison, row) for row in comparison.rows] or [_nothing(comparison)]
    suite = ElementTree.Element("testsuite", {"name": name, **_counts_of_cases(cases)})
    suite.extend(cases)
    remarks = [*comparison.remarks, f"expected: {comparison.reference.source}", *comparison.reference.notes]
    ElementTree.SubElement(suite, "system-out").text = _text("\n".join(remarks))
    return suite


def _case(comparison: Comparison, row: ComparisonRow) -> ElementTree.Element:
    # Dots part packages from classes: viewers group the numbers of a run by category
    place = {"classname": _text(f"{_no_dots(comparison.run_id)}.{_no_dots(row.category)}"), "name": _text(row.metric)}
    case = ElementTree.Element("testcase", {**place, "time": "0"})
    if row.status == "ok":
        return case
    kind = "failure" if row.status == "out" else "error"
    problem = ElementTree.SubElement(case, kind, {"type": _TYPES[row.status], "message": _text(_message(row))})
    problem.text = _text(_details(comparison, row))
    return case


_TYPES = {"out": "out of tolerance", "missing": "missing"}


def _message(row: ComparisonRow) -> str:
    if row.obtained is None or row.difference is None:
        return f"{row.category} {label(row.metric)}: missing, expected {row.expected:.4f}: {row.note}"
    return (
        f"{row.category} {label(row.metric)}: obtained {row.obtained:.4f}, expected {row.expected:.4f}, "
        f"difference {row.difference:+.4f}, tolerance {row.tolerance:g}"
    )


def _details(comparison: Comparison, row: ComparisonRow) -> str:
    obtained = "n/a" if row.obtained is None else repr(row.obtained)
    difference = "n/a" if row.difference is None else repr(row.difference)
    return (
        f"run: {comparison.run_id}\nreference: {comparison.reference.name}\nobtained: {obtained}\n"
        f"expected: {row.expected!r}\ndifference: {difference}\ntolerance: {row.tolerance!r}"
    )


def _nothing(comparison: Comparison) -> ElementTree.Element:
    case = ElementTree.Element(
        "testcase", {"classname": _text(_no_dots(comparison.run_id)), "name": "comparison", "time": "0"}
    )
    message = f"nothing was compared: {comparison.reference.name} has no number that this tool computes"
    ElementTree.SubElement(case, "error", {"type": "missing", "message": _text(message)})
    return case


def _counts_of_cases(cases: Sequence[ElementTree.Element]) -> dict[str, str]:
    def having(kind: str) -> str:
        return str(sum(case.find(kind) is not None for case in cases))

    return {"tests": str(len(cases)), "failures": having("failure"), "errors": having("error"), "skipped": "0"}


def _counts(suites: Sequence[ElementTree.Element]) -> dict[str, str]:
    return {key: str(sum(int(suite.attrib[key]) for suite in suites)) for key in ("tests", "failures", "errors")}


def _no_dots(text: str) -> str:
    return text.replace(".", "_")


def _text(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)
