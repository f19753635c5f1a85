"""The page as text: what is in it, that it loads nothing, and that no name can turn into markup."""

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mmad_cli.errors import DataError, UsageError
from mmad_cli.reports.html import RunInput, render_html
from mmad_cli.results.runs import read_scores
from mmad_cli.results.schema import CategoryResult, RunResult
from mmad_cli.stages import pictures
from mmad_cli.stages.evaluate import evaluate
from mmad_cli.stages.request import EvaluateRequest
from mmad_cli.stages.session import Session
from mmad_cli.store import Store

VOID = {"meta", "input", "img", "br", "link"}


class Page(HTMLParser):
    """Elements with their attributes and the text in them; fails where tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self._open = [], [], []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self._open[-1] if self._open else "", data))

    def blocks(self):
        contents = [text for tag, text in self.texts if tag == "script"]
        names = [attributes.get("id") for tag, attributes in self.elements if tag == "script"]
        return {name: json.loads(text) for name, text in zip(names, contents, strict=True) if name}

    def all_text(self):
        return "".join(text for tag, text in self.texts if tag not in ("script", "style"))


@pytest.fixture(scope="module")
def page(rendered):
    return Page(rendered)


def test_every_section_and_control_is_there(page):
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for name in ("summary", "curves", "samples", "costs", "training", "provenance", "gallery", "cloud", "theme"):
        assert name in ids
    labelled = {attributes["for"] for tag, attributes in page.elements if tag == "label" and "for" in attributes}
    assert labelled <= set(ids)
    assert ("html", {"lang": "en"}) in page.elements


def test_the_page_loads_nothing(rendered, page):
    for _tag, attributes in page.elements:
        assert not {"src", "srcset", "onclick", "onload", "style"} & attributes.keys()
        assert attributes.get("href", "#").startswith("#")
    style = next(text for tag, text in page.texts if tag == "style")
    assert "url(" not in style and "@import" not in style
    addresses = re.findall(r"https?://[^\s\"']+", rendered)
    assert set(addresses) == {"http://www.w3.org/2000/svg"}


def test_only_the_pages_own_script_and_style_may_run(page):
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "img-src data:;" in policy
    assert not any(word in policy for word in ("unsafe", "http", "*", "'self'"))
    script = next(text for tag, text in reversed(page.texts) if tag == "script")
    style = next(text for tag, text in page.texts if tag == "style")
    for kind, text in (("script", script), ("style", style)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_data_of_a_run_with_pictures(page):
    blocks = page.blocks()
    data = blocks.pop("data")
    bagel, gland, tire = data["results"]
    assert (bagel["category"], gland["category"], tire["category"]) == ("bagel", "cable_gland", "tire")
    assert len(bagel["samples"]) == 12 and {"pixel", "image", "range", "window"} <= bagel.keys()
    assert tire["error"] and tire["samples"] == [] and "reason" in tire["image"]
    assert all(set(curve) >= {"roc", "pr", "pro"} for curve in (bagel["pixel"], gland["pixel"]))
    assert bagel["training"]["2d to 3d"] == [1.0, 0.2, 0.05]
    numbers = [sample[kind] for result in (bagel, gland) for sample in result["samples"] for kind in ("scene", "map")]
    assert len(numbers) == 2 * 14
    assert set(blocks) == {f"{kind}-{n}" for kind in ("scene", "map") for n in range(14)}


def test_the_tables_need_no_script(page, inputs):
    text = page.all_text()
    for word in ("I-AUROC", "cable_gland", "failed", "a note on pictures", "btf-readme", "Time and memory", "1.50"):
        assert word in text
    assert inputs[0].run.dataset.digest in text and inputs[0].run.environment.python in text
    assert any(attributes.get("class", "").startswith("delta ") for _, attributes in page.elements)


def test_runs_on_the_same_data_share_their_scenes(inputs, other_run):
    second = RunInput(other_run, {"bagel": inputs[0].scores["bagel"]}, inputs[0].pictures)
    blocks = Page(render_html([*inputs, second])).blocks()
    assert sum(name.startswith("scene-") for name in blocks) == 14
    assert sum(name.startswith("map-") for name in blocks) == 14 + 12
    runs = blocks["data"]["runs"]
    assert len({run["label"] for run in runs}) == 2


def test_a_run_without_pictures_still_has_curves(inputs):
    page = Page(render_html([RunInput(inputs[0].run, inputs[0].scores, None, ["how to get them"])]))
    (data,) = page.blocks().values()
    bagel = data["results"][0]
    assert "roc" in bagel["image"] and "pixel" not in bagel and "scene" not in bagel["samples"][0]
    assert "how to get them" in page.all_text()


def test_a_curve_that_is_not_of_the_recorded_number_says_so(inputs):
    inputs[0].run.categories["bagel"].metrics["aupro_30"] = 0.1
    data = Page(render_html(inputs)).blocks()["data"]
    assert "recorded AUPRO@30% 0.100" in data["results"][0]["pixel"]["note"]


def test_nothing_to_show_is_no_crash(run):
    assert Page(render_html([RunInput(run)])).blocks()["data"]["results"]
    for category in list(run.categories):
        run.set_category(category, CategoryResult(status="failed", error="no memory"))
    assert "no memory" in Page(render_html([RunInput(run)])).all_text()


def test_unknown_metrics_are_usage_errors(inputs):
    with pytest.raises(UsageError, match="did you mean 'i_auroc'"):
        render_html(inputs, ["i_aurok"])


def test_a_comparison_is_shown(inputs, compared):
    page = Page(render_html(inputs, comparisons=[compared]))
    assert "against made up" in page.all_text()
    assert page.blocks()["data"]["runs"][0]["references"][0]["name"] == "made up"


def test_hostile_names_stay_text(rendered_nasty, nasty_texts, rendered):
    text = rendered_nasty
    text.encode()  # single surrogates are gone
    page, harmless = Page(text), Page(rendered)
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in harmless.elements} | {"sup"}
    scripts = [attributes for tag, attributes in page.elements if tag == "script"]
    assert all(attributes.get("type") == "application/json" for attributes in scripts[:-1]) and scripts[-1] == {}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert text.count("<script>") == 1 and text.count("<!--") == 0
    body = page.all_text()
    assert all(name in body for name in nasty_texts)
    results = page.blocks()["data"]["results"]
    assert [result["category"] for result in results] == [*nasty_texts, "failed"]


# -- pictures of a real run --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def _evaluated(_tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluated")
    session = Session(store=Store(root / "store"), workers=1, device="cpu")
    evaluate(
        session,
        EvaluateRequest(data=_tiny, method="btf", variant="raw", protocol="none", out=root / "run", argv=["mmad"]),
    )
    return session, root / "run"


@pytest.fixture
def evaluated(_evaluated, tiny_dataset, tmp_path):
    """Session, run folder and dataset of a run whose maps are in the store only; the folders are the test's own."""
    session, folder = _evaluated
    return session, Path(shutil.copytree(folder, tmp_path / "run")), tiny_dataset


def test_pictures_come_from_the_store_and_the_dataset(evaluated, tmp_path):
    session, folder, data = evaluated
    result = RunResult.from_disk(folder)
    one = pictures.run_input(session, folder, data=data)
    assert (
        one.notes == [] and one.pictures is not None and one.scores["block"] == read_scores(folder / "block/scores.csv")
    )
    scene = one.pictures.scene("block", "test/dent/000")
    found = one.pictures.anomaly_map("block", "test/dent/000")
    assert scene.mask.any() and scene.mask.shape == found.values.shape == (224, 224)
    assert one.pictures.scene("block", "test/dent/999") is None
    drawn = Page(pictures.html_report(session, [folder], data=data)).blocks()["data"]["results"][0]["pixel"]
    assert drawn["aupro_30"] == pytest.approx(result.categories["block"].metrics["aupro_30"], abs=1e-9)
    assert "note" not in drawn


def test_a_report_without_dataset_or_maps_says_how_to_get_them(evaluated, tmp_path):
    session, folder, data = evaluated
    one = pictures.run_input(session, folder)
    assert one.pictures is None
    assert "--data DATA" in one.notes[0] and "--save-maps" in one.notes[1] and "block, cube" in one.notes[1]
    assert set(one.scores) == {"block", "cube"}
    with (data / "block" / "readme.txt").open("w") as file:
        file.write("not part of the data")
    (data / "block" / "train" / "good" / "rgb" / "000.png").write_bytes(
        (data / "block" / "train" / "good" / "rgb" / "001.png").read_bytes()
    )
    other = pictures.run_input(session, folder, data=data)
    assert "its files are not those that the run was made from" in other.notes[0]


def test_a_moved_dataset_is_found_on_the_command_line_of_the_run(evaluated):
    session, folder, data = evaluated
    result = RunResult.from_disk(folder)
    result.argv = ["mmad", "evaluate", str(data), "--out", str(folder)]
    result.to_disk(folder)
    assert pictures.run_input(session, folder).notes == []
    # a relative path, given in another folder than this one: looked for above the run
    result.argv = ["mmad", "evaluate", str(data.relative_to(folder.parent.parent)), "--method", "btf"]
    result.to_disk(folder)
    assert folder.parent.parent in folder.parents and not Path(result.argv[2]).exists()
    assert pictures.run_input(session, folder).notes == []


def test_saved_maps_and_scans_without_a_store(evaluated, tmp_path):
    session, folder, data = evaluated
    request = EvaluateRequest(data=data, method="btf", variant="raw", protocol="none", out=folder, save_maps=True)
    evaluate(session, request)
    empty = Session(store=Store(tmp_path / "other store"), workers=1, device="cpu")
    one = pictures.run_input(empty, folder, data=data)
    assert one.notes == []
    kept = one.pictures.anomaly_map("cube", "test/good/000").values
    stored = pictures.run_input(session, folder, data=data).pictures.anomaly_map("cube", "test/good/000").values
    assert (kept == stored).all()
    assert one.pictures.scene("cube", "test/good/000") is not None
    only_maps = pictures.run_input(empty, folder)
    assert only_maps.pictures is not None and len(only_maps.notes) == 1


def test_lost_scores_cost_only_their_category(evaluated):
    session, folder, data = evaluated
    (folder / "block" / "scores.csv").unlink()
    one = pictures.run_input(session, folder, data=data)
    assert list(one.scores) == ["cube"] and "no curves for block" in one.notes[0]


def test_no_run_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"summary\.json"):
        pictures.run_input(Session(store=Store(tmp_path)), tmp_path)


def test_centre_crops_show_what_the_method_sees(scan_maker):
    from mmad_cli.types import Sample

    xyz, rgb, mask = scan_maker(1, dent=True)
    scene = pictures.scene_in_view(Sample("a", "test", "dent", "0", rgb, xyz, mask), "crop")
    assert scene.rgb.shape[:2] == scene.xyz.shape[:2] == (88, 88) and scene.mask.shape == (224, 224)
