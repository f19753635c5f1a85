from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess

import pytest
from rich.console import Console

from mmad_cli.errors import UsageError
from mmad_cli.reports import render_leaderboards, render_leaderboards_rich
from mmad_cli.results.leaderboard import Leaderboard, Row, Score, Setting

TEXTS = ("table", "markdown", "latex")


@pytest.fixture
def leaderboard(nasty_names):
    """Two ranked rows, one that is not, a published one, and one with names that mean something to each format."""
    full, few = Setting(), Setting(shots=5)
    rows = (
        Row(
            "btf", "fpfh", "3D", "run-a", False, full, recipe="official", run_ids=("run-a",), seeds=(0,),
            scores={"i_auroc": Score(0.9, None, (0.8123, 0.9567), 1), "p_auroc": Score(0.8, rank=2)},
        ),
        Row(
            "btf", "raw", "3D", "2 runs, seeds 0, 1", False, full, recipe="corrected", seeds=(0, 1),
            scores={
                "i_auroc": Score(0.7, 0.0123, (0.6, 0.8), 2, note="over 2 of 3 seeds"),
                "p_auroc": Score(0.95, rank=1, no_interval="the run folder has no scores.csv"),
            },
        ),
        Row(
            "m3dm", "dino", "RGB", "m3dm-paper:dino", True, full, published_as="M3DM", source_text="A paper, Table 1",
            scores={"i_auroc": Score(0.6, rank=3), "p_auroc": Score()},
        ),
        Row(
            " ".join(nasty_names), "v", "", "s", False, few, reasons=tuple(nasty_names), ranked=False,
            scores={"i_auroc": Score(0.5), "p_auroc": Score(note="failed: no memory")},
        ),
    )  # fmt: skip
    return Leaderboard("mvtec3d", "mean", ("i_auroc", "p_auroc"), rows)


def parsed(text):
    """Cells of the table, as text, as a Markdown parser sees them."""
    from markdown_it import MarkdownIt

    rows = []
    for token in MarkdownIt("commonmark", {"html": True}).enable("table").parse(text):
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and rows and token.level >= 4:
            rows[-1].append("".join(c.content if c.type != "html_inline" else " " for c in token.children or ()))
    return [[" ".join(cell.split()) for cell in row] for row in rows]


def test_markdown_is_a_table_of_all_rows(leaderboard, nasty_names):
    text = render_leaderboards([leaderboard], "markdown")
    header, first, second, published, odd = parsed(text)
    assert header == ["rank", "method", "variant", "modality", "source", "I-AUROC", "P-AUROC"]
    assert first == ["1", "btf", "fpfh", "3D", "run-a", "0.900 0.812 to 0.957", "0.800"]
    assert second == [
        "2", "btf", "raw (corrected)", "3D", "2 runs, seeds 0, 1", "0.700 ± 0.012 1 0.600 to 0.800", "0.950",
    ]  # fmt: skip
    assert published == ["3", "m3dm", "dino", "RGB", "m3dm-paper", "0.600", "–"]
    assert odd[0] == "–" and odd[1].endswith("†") and odd[6] == "n/a 2"
    assert "**0.900**" in text and "**0.950**" in text and "**0.600**" not in text
    assert "<script>" not in text and all(len(row) == 7 for row in (first, second, published, odd))


@pytest.mark.parametrize("name", TEXTS)
def test_what_the_numbers_are_is_explained(leaderboard, name):
    text = render_leaderboards([leaderboard], name).replace("$\\pm$", "±").replace("\\%", "%")
    text = " ".join(text.split()).replace("\\_", "_")
    for words in (
        "Leaderboard on mvtec3d",
        "ranked by I-AUROC",
        "±: sample standard deviation over the seeds",
        "95 % interval over test images, from 1000 bootstrap draws",
        "No interval for P-AUROC of btf raw",
        "the run folder has no scores.csv",
        "m3dm-paper: A paper, Table 1",
        "over 2 of 3 seeds",
        "failed: no memory",
        "not comparable with the ranked rows",
    ):
        assert words in text, words


def test_csv_is_tidy_and_exact(leaderboard, nasty_names):
    rows = list(csv.DictReader(io.StringIO(render_leaderboards([leaderboard], "csv"))))
    assert len(rows) == 8
    first = rows[0]
    assert (first["rank"], first["value"], first["low"], first["high"]) == ("1", "0.9", "0.8123", "0.9567")
    assert (first["metric"], first["confidence"], first["published"], first["seeds"]) == (
        "i_auroc",
        "0.95",
        "false",
        "0",
    )
    assert (rows[2]["std"], rows[2]["seeds"], rows[2]["recipe"]) == ("0.0123", "0 1", "corrected")
    assert (rows[5]["value"], rows[5]["published_as"], rows[5]["source"]) == ("", "M3DM", "m3dm-paper:dino")
    assert rows[6]["not_comparable"] == "; ".join(nasty_names) and rows[6]["ranked"] == "false"


def test_json_holds_the_same(leaderboard):
    (data,) = json.loads(render_leaderboards([leaderboard], "json"))
    assert (data["dataset"], data["category"], data["draws"]) == ("mvtec3d", "mean", 1000)
    assert data["rows"][0]["scores"]["i_auroc"] == {
        "value": 0.9, "std": None, "interval": [0.8123, 0.9567], "rank": 1, "note": None, "no_interval": None,
    }  # fmt: skip
    assert data["rows"][2]["source_text"] == "A paper, Table 1"


def test_a_narrow_console_cuts_nothing(leaderboard):
    console = Console(file=io.StringIO(), width=70)
    console.print(render_leaderboards_rich([leaderboard]))
    text = console.file.getvalue()
    assert "…" not in text and "0.812" in text and "0.957" in text


@pytest.mark.parametrize("name", ["html", "junit"])
def test_formats_without_leaderboards(leaderboard, name):
    with pytest.raises(UsageError, match=f"--format {name}: not for --leaderboard, which has table, markdown"):
        render_leaderboards([leaderboard], name)


def test_latex_says_what_it_needs(leaderboard):
    text = render_leaderboards([leaderboard], "latex")
    assert text.startswith("% needs \\usepackage{booktabs,graphicx}\n")
    narrow = Leaderboard("d", "mean", ("i_auroc",), leaderboard.rows[:1])
    assert render_leaderboards([narrow], "latex").startswith("% needs \\usepackage{booktabs}\n")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles_and_fits_the_page(leaderboard, tmp_path):
    """A wide table, names with every special character, and letters that pdflatex has no glyph for."""
    strange = Row("日本語", "αβ é ł", "3D", "--save-maps `x`", False, Setting(), scores=leaderboard.rows[0].scores)
    board = Leaderboard("x" * 20, "mean", leaderboard.metrics, (*leaderboard.rows, strange))
    tables = render_leaderboards([board, leaderboard], "latex")
    packages = tables.partition("\n")[0].removeprefix("% needs ")
    document = rf"\documentclass{{article}}{packages}\begin{{document}}{tables}\end{{document}}"
    (tmp_path / "report.tex").write_text(document, encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "report.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, errors="replace")
    assert done.returncode == 0, done.stdout[-2000:]
    assert not [line for line in done.stdout.splitlines() if line.startswith("Overfull")]
