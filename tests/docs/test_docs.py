"""The documentation is true: generated pages are current, links resolve, commands exist, marked examples run.

A line `<!-- test -->` before a fenced Python block marks it as an example that runs; the blocks of a page run in turn
in one namespace, and a `text` block that follows is what they print. `<!-- test: NAME -->` writes the block to a file.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))])
MARK = re.compile(r"<!-- test(?:: (?P<file>[\w.]+))? -->")


class Block(NamedTuple):
    language: str
    text: str
    mark: re.Match[str] | None


def blocks(page: Path) -> Iterator[Block]:
    """Fenced blocks of a page, with the mark on the line before."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start: int | None = None
    for number, line in enumerate(lines):
        if line.strip().startswith("```"):
            if start is None:
                start = number
                continue
            above = lines[start - 1] if start else ""
            language = lines[start].strip().removeprefix("```")
            yield Block(language, "\n".join(lines[start + 1 : number]) + "\n", MARK.fullmatch(above.strip()))
            start = None
    assert start is None, f"{page}: a fence is not closed"


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "tools" / "generate_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return load_generator()


@pytest.fixture(scope="module")
def tree(generator: ModuleType) -> dict[tuple[str, ...], Any]:
    """Every command by its path."""
    from typer.main import get_command

    from mmad_cli.cli.app import app

    return dict(generator.commands(get_command(app)))


class TestGenerated:
    @pytest.mark.parametrize("page", ["cli.md", "run.schema.json"])
    def test_pages_are_current(self, generator, tmp_path, page):
        generator.write(tmp_path)
        assert (DOCS / page).read_text() == (tmp_path / page).read_text(), "run: make docs"

    def test_width_of_the_terminal_does_not_matter(self, generator, monkeypatch):
        pages = set()
        for columns in ("40", "200"):
            monkeypatch.setenv("COLUMNS", columns)
            pages.add(generator.cli_page())
        assert len(pages) == 1

    def test_every_command_and_option_has_a_help_text(self, tree):
        for path, command in tree.items():
            assert command.help, path
            for parameter in command.params:
                assert parameter.help, (path, parameter.name)

    def test_every_command_has_an_example(self, generator, tree):
        assert [path for path, command in tree.items() if not generator.examples(command)] == []


def command_lines(page: Path) -> Iterator[str]:
    for block in blocks(page):
        if block.language == "bash":
            lines = block.text.replace("\\\n", " ").splitlines()
            yield from (line for line in lines if line.startswith("mmad "))
        if block.language == "yaml":
            yield from re.findall(r"run: (mmad .*)", block.text)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_exist_with_their_options(page, tree):
    for line in command_lines(page):
        words = shlex.split(line)
        path = tuple(words[:1])
        while len(words) > len(path) and (*path, words[len(path)]) in tree:
            path = tuple(words[: len(path) + 1])
        command = tree[path]
        assert not getattr(command, "commands", None) or len(words) == len(path), f"{line}: no such sub-command"
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        used = {word for word in words if word.startswith("-")}
        assert used <= known, f"{line}: {sorted(used - known)}"


def anchors(page: Path) -> set[str]:
    """Anchors as they are made of headings."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), f"{name(page)}: {target}"
        assert not anchor or anchor in anchors(linked), f"{name(page)}: {target}"


def test_index_names_every_page():
    linked = re.findall(r"\]\(([^)\s]+)\)", (DOCS / "index.md").read_text())
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} - {"index.md"}
    assert pages <= set(linked)


def test_the_site_builds_without_warnings(tmp_path):
    """A page that is not in the navigation, a dead link or anchor is a warning."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr
    pages = {page.relative_to(DOCS).with_suffix(".html") for page in DOCS.rglob("*.md")}
    assert all((tmp_path / "site" / page).is_file() for page in pages)


@pytest.fixture
def working_folder(tiny_dataset, tmp_path, monkeypatch) -> Path:
    """A folder to run examples in, with a tiny dataset at `data/parts`."""
    place = tmp_path / "working_folder"
    (place / "data").mkdir(parents=True)
    shutil.move(tiny_dataset, place / "data" / "parts")
    monkeypatch.chdir(place)
    return place


def run_page(page: Path, capsys: pytest.CaptureFixture[str]) -> int:
    """Run the marked blocks of a page, compare what they print; returns how many ran."""
    found = list(blocks(page))
    namespace: dict[str, Any] = {"__name__": "example"}
    ran = 0
    for block, following in zip(found, [*found[1:], None], strict=True):
        if block.mark is None or block.mark["file"]:
            continue
        capsys.readouterr()
        exec(compile(block.text, name(page), "exec"), namespace)
        ran += 1
        printed = capsys.readouterr().out
        expected = following.text if following is not None and following.language == "text" else ""
        assert printed == expected, f"{name(page)}: an example prints something else"
    return ran


@pytest.mark.parametrize(
    ("page", "count"), [("concepts.md", 1), ("metrics.md", 1), ("python.md", 4), ("adding-a-dataset.md", 1)]
)
def test_examples_print_what_the_page_says(page, count, working_folder, capsys):
    assert run_page(DOCS / page, capsys) == count


def test_the_dataset_example_is_read(working_folder, capsys):
    from mmad_cli.cli.app import run

    run_page(DOCS / "adding-a-dataset.md", capsys)
    assert run(["check", "data/own", "--json"]) == 0
    checked = json.loads(capsys.readouterr().out)
    assert checked["counts"]["lid"]["test"] == {"dent": 2, "good": 2}
    assert [f for f in checked["findings"] if f["level"] == "error"] == []
    arguments = ["data/own", "--method", "btf", "--variant", "raw", "--protocol", "none", "--workers", "1"]
    assert run(["evaluate", *arguments]) == 0


@pytest.fixture
def method_package(working_folder, monkeypatch) -> Iterator[Path]:
    """The package of adding-a-method.md, as if it were installed."""
    folder = working_folder / "package"
    folder.mkdir()
    for block in blocks(DOCS / "adding-a-method.md"):
        if block.mark is not None:
            (folder / block.mark["file"]).write_text(block.text)
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    metadata = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = [f"{key} = {value}" for key, value in project["entry-points"]["mmad.methods"].items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[mmad.methods]", *lines, ""]))
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    sys.modules.pop("depth_gauss", None)


def test_the_method_example_works_from_its_entry_point(method_package, working_folder, capsys):
    from mmad_cli.cli.app import run
    from mmad_cli.results.schema import RunResult

    assert run(["list", "methods", "--json"]) == 0
    assert "depth_gauss" in {row["name"] for row in json.loads(capsys.readouterr().out)}
    arguments = ["data/parts", "--method", "depth_gauss", "--workers", "1", "--device", "cpu"]
    assert run(["evaluate", *arguments, "--out", "one"]) == 0
    assert run(["evaluate", *arguments, "--out", "two", "--set", "sigma=2"]) == 0
    first, second = RunResult.from_disk(Path("one")), RunResult.from_disk(Path("two"))
    assert (first.method.name, first.method.variant) == ("depth_gauss", "depth")
    assert set(second.not_comparable) - set(first.not_comparable) == {"settings: sigma differ from the recipe"}
    assert first.categories["block"].metrics != second.categories["block"].metrics
    assert run(["evaluate", *arguments, "--set", "sigm=2"]) == 2
    assert "did you mean 'sigma'" in capsys.readouterr().err


def test_the_method_example_passes_the_common_checks(method_package):
    spec = importlib.util.spec_from_file_location("test_depth_gauss", method_package / "test_depth_gauss.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.test_common_checks()


def rows_of(page: str) -> dict[str, list[str]]:
    """Cells of all table rows of a page by their first cell, without quotes and marks."""
    found = {}
    for line in (DOCS / page).read_text().splitlines():
        if line.startswith("| "):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            for first in re.split(r"[`*, ]+", cells[0]):
                if first:
                    found[first] = cells[1:]
    return found


class TestTables:
    def test_synthetic_categories_and_defects(self):
        from mmad_cli.datasets.synthetic import CATEGORIES, DEFECTS

        rows = rows_of("datasets.md")
        shows = {"3d": "3D", "rgb": "RGB", "both": "3D and RGB"}
        assert {n: rows[n] for n in CATEGORIES} == {
            n: [category.description, ", ".join(category.defects)] for n, category in CATEGORIES.items()
        }
        assert {n: rows[n][1] for n in DEFECTS} == {n: shows[kind.shows] for n, kind in DEFECTS.items()}

    def test_every_metric_is_described(self):
        from mmad_cli.metrics import METRIC_KEYS

        assert set(METRIC_KEYS) <= set(rows_of("metrics.md"))

    @pytest.mark.parametrize("method", ["btf", "g2sf", "iaenet", "m3dm", "patchcore"])
    def test_every_switch_of_a_method_is_described(self, method):
        from mmad_cli.methods import get_method

        definition = get_method(method)
        rows = rows_of(f"methods/{method}.md")
        assert set(definition.config.model_fields) - {"variant"} <= set(rows)
        assert set(definition.variants) - {"rgb"} <= set(rows)
        for switch, value in definition.recipes["corrected"].items():
            assert rows[switch][-1] == f"`{value}`".lower(), switch

    @pytest.mark.parametrize("method", ["cfm", "mafr", "cmdr_iad"])
    def test_every_switch_of_the_mapping_family_is_described(self, method):
        """Switches that the family shares stand on the page of CFM, with the same values in the recipes."""
        from mmad_cli.methods import build_config, get_method

        definition = get_method(method)
        rows = {**rows_of("methods/cfm.md"), **rows_of(f"methods/{method}.md")}
        usual = build_config(definition, None, "official", {}).model_dump()
        assert set(usual) - {"variant"} <= set(rows)
        for recipe, column in (("corrected", -2), ("fast", -1)):
            for switch, value in definition.recipes[recipe].items():
                shown = rows[switch][column].strip("`")
                assert shown == str(value).lower() or (not shown and value == usual[switch]), (recipe, switch)

    @pytest.mark.parametrize(
        ("method", "variants"), [("cfm", ["base", "big"]), ("cmdr_iad", ["rgb+3d", "rgb", "3d", "polyurethane"])]
    )
    def test_parameters_of_the_mapping_family(self, method, variants):
        import torch

        from mmad_cli.methods import build, build_config, get_method

        rows, definition = rows_of(f"methods/{method}.md"), get_method(method)
        for variant in variants:
            built = build(definition, build_config(definition, variant, "official", {}))
            with torch.device("meta"):
                learner = built.build_learner({"rgb": 768, "points": 1152})
            count = sum(p.numel() for module in learner.groups.values() for p in module.parameters())
            assert f"{count:_}".replace("_", " ") in rows[variant], variant

    def test_every_registered_method_has_a_page(self):
        from mmad_cli.methods.registry import _BUILT_IN

        assert {f"{method}.md" for method in _BUILT_IN} <= {page.name for page in (DOCS / "methods").iterdir()}

    def test_published_means_of_m3dm(self):
        from mmad_cli.methods import get_method
        from mmad_cli.results.reference import list_references

        known = {reference.name: reference.metrics for reference in list_references()}
        text = (DOCS / "methods" / "m3dm.md").read_text()
        for variant in get_method("m3dm").variants:
            metrics = known[f"m3dm-paper:{variant}"]
            means = " / ".join(f"{metrics[key].mean:.3f}" for key in ("aupro_30_grid100", "i_auroc", "p_auroc"))
            assert f"| `{variant}` | {means} |" in text

    def test_published_means_of_btf(self):
        from mmad_cli.results.reference import list_references

        known = {reference.name: reference.metrics for reference in list_references()}
        text = (DOCS / "methods" / "btf.md").read_text()
        for variant in ("rgb", "depth", "raw", "hog", "sift", "fpfh", "rgb+fpfh"):
            cells = [
                " / ".join(f"{known[f'btf-readme:{variant}:{data}'][key].mean:.3f}" for key in keys)
                for data in ("raw", "preprocessed")
                for keys in [("aupro_30_grid100", "i_auroc", "p_auroc")]
            ]
            assert f"| `{variant}` | {cells[0]} | {cells[1]} |" in text
