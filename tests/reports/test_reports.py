from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess

import pytest
from rich.console import Console

from mmad_cli.errors import UsageError
from mmad_cli.metrics import METRIC_KEYS
from mmad_cli.reports import FORMATS, render, render_rich
from mmad_cli.results.compare import compare
from mmad_cli.results.metric_names import label
from mmad_cli.results.reference import ReferenceTable
from mmad_cli.results.schema import CategoryResult, RunResult

TEXTS = ("table", "markdown", "latex")


def markdown_tables(text: str) -> list[list[list[str]]]:
    """Rows of cells of every table, as a Markdown parser sees them."""
    from markdown_it import MarkdownIt

    tables: list[list[list[str]]] = []
    for token in MarkdownIt("commonmark", {"html": True}).enable("table").parse(text):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append([])
        elif token.type == "inline" and tables and token.level >= 4:
            tables[-1][-1].append("".join(c.content for c in token.children or () if c.type != "html_inline"))
    return tables


@pytest.fixture
def comparison(run: RunResult):
    rows = {
        "bagel": {"i_auroc": 0.825, "p_auroc": 0.995},
        "cable_gland": {"i_auroc": 0.633},
        "tire": {"i_auroc": 0.8},
    }
    return compare(run, ReferenceTable("paper", "A paper, Table 1", rows=rows, notes=("read from an image",)))


@pytest.mark.parametrize("name", TEXTS)
def test_one_run_shows_categories_mean_and_what_is_wrong(run, name):
    text = render([run], name, metrics=["i_auroc", "i_ap"])
    for word in ("0.825", "0.533", "0.679", "n/a", "no anomalous test image", "failed", "killed: out of memory"):
        assert word in text
    assert "Not comparable with published numbers: 3 of 10 categories" in text
    assert "mean over 2 of 3 categories" in text or run.mean_notes == {}


@pytest.mark.parametrize("name", TEXTS)
def test_columns_are_the_default_metrics_that_the_run_has(run, name):
    text = render([run], name).replace("\\", "")
    assert "I-AUROC" in text and "AUPRO@30% (grid 100)" in text
    assert "I-AP" not in text and "AUPRO@1%" not in text


def test_columns_have_the_aupro_rule_of_the_methods(run):
    result = run.categories["bagel"].model_copy(update={"metrics": {"aupro_30_grid100": 0.8, "aupro_30_grid99": 0.81}})
    method = run.method.model_copy(update={"name": "mafr"})
    of_99 = run.model_copy(update={"method": method, "categories": {"bagel": result}})
    of_100 = run.model_copy(update={"categories": {"bagel": result}})
    assert "grid 99" in render([of_99], "markdown") and "grid 100" not in render([of_99], "markdown")
    assert "grid 100" in render([of_100], "markdown") and "grid 99" not in render([of_100], "markdown")
    both = render([of_99, of_100], "markdown")
    assert "grid 99" in both and "grid 100" in both


def test_markdown_of_one_run_is_a_table(run):
    (rows,) = markdown_tables(render([run], "markdown"))
    assert rows[0] == ["category", "I-AUROC", "P-AUROC", "AUPRO@30% (grid 100)"]
    assert [row[0] for row in rows[1:]] == ["bagel", "cable_gland", "tire", "mean"]
    assert rows[2][1:] == ["0.533", "0.955", "0.849"]
    assert all(len(row) == 4 for row in rows)


def test_several_runs_are_rows_and_the_best_is_bold(run, other_run):
    run.update_mean()
    text = render([run, other_run], "markdown", metrics=["i_auroc", "p_auroc"])
    means, image, pixel = markdown_tables(text)
    assert [row[0] for row in means[1:]] == ["btf fpfh (official)†", "btf rgb+fpfh (official)"]
    assert image[0] == ["method", "bagel", "cable_gland", "tire", "mean"]
    assert "**0.995**" in text and "**0.955**" in text
    assert text.count("**0.900**") == 2, "only the two image values of other_run are best"
    assert image[1][3].startswith("failed") and pixel[2][4] == "0.900"
    assert "† btf fpfh (official): Not comparable" in text


def test_a_mean_over_fewer_categories_is_never_the_best(run, other_run):
    run.update_mean()
    text = render([run, other_run], "markdown", metrics=["p_auroc"])
    assert "**0.975**" not in text and "mean over 2 of 3 categories" in text


def test_lower_is_better_for_false_positive_rates(run, other_run):
    for one, value in ((run, 0.1), (other_run, 0.2)):
        one.categories = {"bagel": CategoryResult(status="ok", metrics={"i_fpr95": value})}
        one.update_mean()
    text = render([run, other_run], "markdown")
    assert "**0.100**" in text and "**0.200**" not in text


def test_runs_on_different_content_do_not_share_a_table(run, other_run):
    other_run.dataset.digest = "something else"
    tables = markdown_tables(render([run, other_run], "markdown"))
    assert [table[0][0] for table in tables] == ["category", "category"]


def test_runs_with_one_label_are_told_apart(run):
    twin = run.model_copy(update={"run_id": "twin"})
    text = render([run, twin], "markdown")
    assert "btf fpfh (official) twin" in text and f"btf fpfh (official) {run.run_id}" in text


@pytest.mark.parametrize("name", TEXTS)
def test_comparisons_show_changed_numbers_first(run, comparison, name):
    text = render([run], name, comparisons=[comparison])
    body = text[text.index("against paper") :]
    assert body.index("0.6330") < body.index("0.8000") < body.index("0.8250")
    for word in ("-0.1000", "0.005", "out", "missing", "read from an image", "A paper, Table 1"):
        assert word in body
    assert "1 out of tolerance, 1 missing, 2 within tolerance" in body
    assert "Compare with care: the run is not comparable: 3 of 10 categories" in body
    assert "killed: out of memory" in body


def test_markdown_of_a_comparison_is_a_table(comparison):
    (rows,) = markdown_tables(render([], "markdown", comparisons=[comparison]))
    assert rows[1] == ["cable_gland", "I-AUROC", "0.5330", "0.6330", "-0.1000", "0.005", "out"]
    assert len(rows) == 5 and all(len(row) == 7 for row in rows)


def test_markdown_escapes(nasty_run, nasty_names):
    text = render([nasty_run], "markdown", metrics=["i_auroc", "p_auroc"])
    assert "<script>" not in text
    (rows,) = markdown_tables(text)
    shown = [row[0] for row in rows[1 : 1 + len(nasty_names)]]
    assert shown == [" ".join(name.split()) for name in nasty_names]
    assert all(len(row) == 3 for row in rows)


def test_rich_does_not_read_markup(nasty_run, nasty_names):
    text = render([nasty_run], "table")
    for name in nasty_names:
        assert all(line in text for line in name.split("\n"))


def test_rich_renderable_goes_to_any_console(nasty_run, comparison):
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    console.print(render_rich([nasty_run], comparisons=[comparison]))
    assert "[red]" in console.file.getvalue()


def test_a_narrow_terminal_shows_runs_as_columns(run, other_run):
    for one in (run, other_run):
        for index in range(10):
            one.set_category(f"category{index}", CategoryResult(status="ok", metrics={"i_auroc": 0.123}))
    console = Console(file=io.StringIO(), width=80)
    console.print(render_rich([run, other_run], ["i_auroc"]))
    lines = console.file.getvalue().splitlines()
    assert [line.split() for line in lines if line.startswith("category7")] == [["category7", "0.123", "0.123"]]


def test_a_narrow_terminal_shows_many_metrics_in_several_tables(run):
    run.set_category("cube", CategoryResult(status="ok", metrics=dict.fromkeys(METRIC_KEYS, 0.123)))
    console = Console(file=io.StringIO(), width=100)
    console.print(render_rich([run], METRIC_KEYS))
    lines = console.file.getvalue().splitlines()
    # each table has all of its headers in one line, and every number stands once
    heads = [line.split()[1:] for line in lines if line.startswith("category")]
    assert len(heads) > 1
    assert " ".join(word for words in heads for word in words) == " ".join(map(label, METRIC_KEYS))
    assert sum(line.count("0.123") for line in lines if line.startswith("cube")) == len(METRIC_KEYS)


def test_table_text_is_plain_and_never_cut(run, other_run):
    text = render([run, other_run], "table")
    assert "\x1b" not in text and "…" not in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_latex_escapes(nasty_run):
    text = render([nasty_run], "latex")
    body = re.sub(r"\\[a-zA-Z]+|\\[{}$&#%_\\]", "", text)
    cells = [line for line in body.splitlines() if line.startswith("    ")]
    assert cells and not any(set("#%$_~^<>|") & set(line) for line in cells)
    assert r"\\" + "\n    [" not in text
    assert "a\\textbar{}b\\_c" in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles(nasty_run, run, other_run, comparison, tmp_path):
    tables = render([nasty_run, run, other_run], "latex", comparisons=[comparison])
    packages = tables.partition("\n")[0].removeprefix("% needs ")
    document = rf"\documentclass{{article}}{packages}\begin{{document}}{tables}\end{{document}}"
    (tmp_path / "report.tex").write_text(document)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "report.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


def test_latex_has_booktabs_rules_and_balanced_environments(run):
    text = render([run], "latex")
    for word in (r"\toprule", r"\midrule", r"\bottomrule", "booktabs"):
        assert word in text
    for environment in ("table", "tabular"):
        assert text.count(rf"\begin{{{environment}}}") == text.count(rf"\end{{{environment}}}") == 1
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 5 and all(line.count("&") == 3 for line in rows)


def test_csv_is_tidy_and_exact(run):
    run.categories["bagel"].metrics["i_auroc"] = 0.1 + 0.2
    rows = list(csv.DictReader(io.StringIO(render([run], "csv"))))
    assert " ".join(rows[0]) == "run_id method variant recipe dataset category metric value comparable"
    value = {(row["category"], row["metric"]): row["value"] for row in rows}
    assert float(value["bagel", "i_auroc"]) == 0.1 + 0.2
    assert value["bagel", "i_ap"] == "" and value["tire", "i_auroc"] == ""
    assert float(value["mean", "p_auroc"]) == 0.975
    assert {row["comparable"] for row in rows} == {"false"}
    assert len(rows) == 4 * 4


def test_csv_quotes(nasty_run, nasty_names):
    rows = list(csv.DictReader(io.StringIO(render([nasty_run], "csv", metrics=["i_auroc"]))))
    assert [row["category"] for row in rows[: len(nasty_names)]] == list(nasty_names)


def test_csv_of_comparisons(run, comparison):
    rows = list(csv.DictReader(io.StringIO(render([run], "csv", comparisons=[comparison]))))
    assert [row["status"] for row in rows] == ["out", "missing", "ok", "ok"]
    assert float(rows[0]["difference"]) == pytest.approx(-0.1) and rows[1]["obtained"] == ""


def test_json_holds_runs_and_comparisons(run, comparison):
    data = json.loads(render([run], "json", comparisons=[comparison]))
    assert RunResult.model_validate(data["runs"][0]) == run
    assert data["comparisons"][0]["exit_code"] == 1
    assert data["comparisons"][0]["rows"][0]["status"] == "out"


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_to_report_is_no_crash(name):
    assert isinstance(render([], name), str)


@pytest.mark.parametrize("name", FORMATS)
def test_a_run_that_failed_everywhere_is_reported(run, name):
    for category in list(run.categories):
        run.set_category(category, CategoryResult(status="failed", error="no memory"))
    text = render([run], name)
    assert "tire" in text or name == "csv"


@pytest.mark.parametrize("name", FORMATS)
def test_unknown_metrics_are_usage_errors(run, name):
    with pytest.raises(UsageError, match="did you mean 'i_auroc'"):
        render([run], name, metrics=["i_aurok"])


def test_unknown_formats_are_usage_errors(run):
    with pytest.raises(UsageError, match="did you mean 'markdown'"):
        render([run], "markdwn")


def test_categories_without_a_result_yet_are_named(run):
    del run.categories["tire"]
    assert "No result for: tire" in render([run], "markdown")


# -- several seeds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_seeds_get_a_table_of_mean_and_deviation(seed_runs, name):
    text = render(seed_runs, name, ["i_auroc", "i_ap"]).replace("$\\pm$", "±")
    body = text[text.index("over 3 seeds") :]
    for word in (
        "mean ± sample standard deviation",
        "seeds 0, 1, 2",
        "5 shots",
        "0.553 ± 0.020",
        "over 2 of 3 seeds; seed 1: failed: no memory",
        "seeds 0, 2: no anomalous test image",
        "over 0 of 3 seeds; seeds 0, 1, 2: failed: killed: out of memory",
        "over 2 of 3 seeds; seed 1: too few categories; mean over 2 of 3 categories",
        "Not comparable with published numbers: 3 of 10 categories",
    ):
        assert word in body, word


def test_the_table_of_seeds_follows_those_of_the_runs(seed_runs):
    *others, seeds = markdown_tables(render(seed_runs, "markdown", ["i_auroc"]))
    assert [row[0] for row in others[0][1:]] == [f"btf fpfh (official) seed {seed}†" for seed in range(3)]
    assert seeds == [
        ["category", "I-AUROC"],
        ["bagel", "0.825 ± 0.0001"],
        ["cable_gland", "0.553 ± 0.020"],
        ["tire", "failed2"],
        # of the means (0.825 + 0.533) / 2 and (0.825 + 0.573) / 2
        ["mean", "0.689 ± 0.0143"],
    ]


def test_a_single_value_among_seeds_has_no_deviation(seed_runs):
    text = render(seed_runs[:2], "markdown", ["i_auroc"])
    rows = {row[0]: row[1] for row in markdown_tables(text)[-1]}
    assert rows["bagel"] == "0.8251"
    assert "(1) over 1 of 2 seeds; seed 1: failed: no memory" in text


@pytest.mark.parametrize("name", TEXTS)
def test_runs_that_differ_in_more_than_the_seed_get_no_table_of_seeds(run, seed_runs, other_run, name):
    other_run.seed = 1
    text = render([seed_runs[0], other_run, run], name)
    assert "±" not in text and "pm$" not in text
    assert "over" not in text or "seeds" not in text


def test_each_method_has_its_own_table_of_seeds(seed_runs, other_run):
    others = [other_run.model_copy(update={"seed": seed, "run_id": f"other-{seed}"}, deep=True) for seed in (3, 4)]
    text = render([*seed_runs, *others], "markdown", ["i_auroc"])
    assert "btf fpfh (official) on mvtec3d over 3 seeds" in text
    assert "btf rgb+fpfh (official) on mvtec3d over 2 seeds" in text
    assert "0.900 ± 0.000" in text


def test_namesakes_that_differ_in_more_than_the_seed_show_their_ids(run, seed_runs):
    run.seed = 7
    text = render([run, *seed_runs], "markdown", ["i_auroc"])
    assert "btf fpfh (official) run-1" in text and "btf fpfh (official) seed 1" not in text


def test_json_has_the_spread_over_seeds_and_csv_is_as_before(seed_runs):
    data = json.loads(render(seed_runs, "json"))
    assert [run["seed"] for run in data["runs"]] == [0, 1, 2]
    (group,) = data["seeds"]
    assert group["seeds"] == [0, 1, 2] and group["run_ids"] == ["run-0", "run-1", "run-2"]
    assert (group["method"], group["variant"], group["dataset"]) == ("btf", "fpfh", "mvtec3d")
    assert group["categories"]["cable_gland"]["i_auroc"] == pytest.approx({"mean": 0.553, "std": 0.02, "n": 3})
    assert group["categories"]["bagel"]["i_auroc"]["n"] == 2
    assert group["categories"]["tire"]["i_auroc"] == {"mean": None, "std": None, "n": 0}
    assert group["mean"]["i_auroc"] == pytest.approx({"mean": 0.689, "std": 0.02 / 2**0.5, "n": 2})
    assert json.loads(render(seed_runs[:1], "json"))["seeds"] == []

    separate = [render([run], "csv").splitlines() for run in seed_runs]
    assert render(seed_runs, "csv").splitlines() == [separate[0][0], *(line for text in separate for line in text[1:])]


def test_a_narrow_terminal_does_not_cut_spreads(seed_runs):
    console = Console(file=io.StringIO(), width=48)
    console.print(render_rich(seed_runs, ["i_auroc", "p_auroc", "aupro_30_grid100"]))
    text = console.file.getvalue()
    assert "…" not in text
    body = text[text.index("over 3 seeds") :]
    assert "0.553" in body and "0.020" in body


@pytest.mark.parametrize("name", FORMATS)
def test_seeds_that_failed_everywhere_are_reported(seed_runs, name):
    for run in seed_runs:
        for category in list(run.categories):
            run.set_category(category, CategoryResult(status="failed", error="no memory"))
    assert render(seed_runs, name)
