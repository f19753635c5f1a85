"""The parts of the HTML report: curves, pictures and clouds as text, deviations from published rows."""

import base64
import io
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from mmad_cli.metrics import aupro, average_precision, image_auroc, pixel_auroc
from mmad_cli.metrics.ranking import operating_points
from mmad_cli.reports.html import Scene, encode
from mmad_cli.reports.html.curves import (
    best_threshold,
    image_curves,
    pixel_curves,
    precision_recall_curve,
    roc_curve,
    thin,
)
from mmad_cli.reports.html.markup import clean_text, data_block, script_json, text_element
from mmad_cli.reports.html.tables import costs_html, deviation, expected, fitting_references, reference_data
from mmad_cli.results.schema import CategoryResult


def area(curve):
    return float(np.trapezoid(curve[1], curve[0]))


def picture(url):
    kind, _, text = url.partition(";base64,")
    assert kind.startswith("data:image/")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


@pytest.fixture
def scores():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [30, 50])
    return labels, np.round(rng.normal(labels, 1.0), 1)  # rounded: with ties


@pytest.fixture
def stack():
    rng = np.random.default_rng(1)
    masks = rng.random((4, 24, 24)) < 0.1
    return list(masks), list((rng.normal(size=masks.shape) + 1.5 * masks).astype(np.float32))


# -- curves ------------------------------------------------------------------------------------------------------


def test_areas_below_the_curves_are_the_metrics(scores):
    labels, values = scores
    points = operating_points(np.sort(values[labels == 0]), np.sort(values[labels == 1]))
    assert area(roc_curve(points)) == pytest.approx(image_auroc(labels, values), abs=1e-12)
    assert area(precision_recall_curve(points)) == pytest.approx(average_precision(labels, values), abs=1e-12)


def test_curves_of_images_start_and_end_in_the_corners(scores):
    curves = image_curves(*scores)
    x, y = curves["roc"]
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert all(a <= b for a, b in pairwise(x)) and all(a <= b for a, b in pairwise(y))
    assert curves["pr"][0][0] == 0 and curves["pr"][0][-1] == 1


@pytest.mark.parametrize(("labels", "reason"), [([0, 0], "no anomalous test image"), ([1], "no normal test image")])
def test_without_both_classes_there_is_a_reason(labels, reason):
    assert image_curves(labels, [0.5] * len(labels)) == {"reason": reason}
    assert best_threshold(labels, [0.5] * len(labels)) is None


def test_curves_of_pixels_keep_their_area_when_thinned(stack):
    curves = pixel_curves(*stack)
    assert curves["aupro_30"] == pytest.approx(aupro(*stack), abs=1e-12)
    assert area(curves["roc"]) == pytest.approx(pixel_auroc(*stack), abs=2e-3)
    assert all(len(curves[name][0]) <= 360 for name in ("roc", "pr", "pro"))


def test_maps_scaled_for_the_overlap_change_that_curve_only(stack):
    masks, maps = stack
    scaled = [one * factor for one, factor in zip(maps, (1, 5, 0.2, 3), strict=True)]
    plain, both = pixel_curves(masks, maps), pixel_curves(masks, maps, scaled)
    assert both["roc"] == plain["roc"] and both["pro"] != plain["pro"]
    assert both["aupro_30"] == pytest.approx(aupro(masks, scaled), abs=1e-12)


def test_masks_without_a_defect_have_a_reason(stack):
    assert "defect pixel" in pixel_curves([np.zeros((24, 24), bool)] * 4, stack[1])["reason"]


def test_thinning_keeps_ends_and_what_is_near_rate_zero():
    x = np.linspace(0, 1, 50_001)
    kept_x, kept_y = thin((x, np.sqrt(x)), 300)
    assert len(kept_x) <= 300 and kept_x[0] == 0 and kept_x[-1] == 1
    assert np.abs(np.interp(x, kept_x, kept_y) - np.sqrt(x)).max() < 0.02
    assert (kept_x < 0.01).sum() > 30
    assert thin((x[:300], x[:300]), 300)[0] is not None


def test_the_best_threshold_has_the_largest_f1(scores):
    labels, values = scores

    def f1(threshold):
        called = values >= threshold
        return 2 * (called & (labels == 1)).sum() / (called.sum() + labels.sum())

    best = best_threshold(labels, values)
    assert f1(best) == pytest.approx(max(f1(value) for value in values))
    assert best not in values


# -- pictures ----------------------------------------------------------------------------------------------------


def camera_scan(side=60, tilt=0.3, flip=(1, 1, 1)):
    """A tilted plane with a bump, as a camera sees it: x right, y down, z away; then axes turned by `flip`."""
    rows, columns = np.mgrid[:side, :side] / side - 0.5
    z = 0.6 + tilt * columns * 0.1 - 0.01 * np.exp(-(rows**2 + columns**2) / 0.01)
    xyz = np.stack([columns * 0.1 + 1e-5, rows * 0.1 + 1e-5, z], axis=-1) * np.asarray(flip)
    xyz[:5] = 0
    return xyz.astype(np.float32)


@pytest.mark.parametrize("flip", [(1, 1, 1), (1, -1, -1), (-1, -1, 1), (-1, 1, -1)])
def test_clouds_are_turned_to_the_viewer_whatever_the_scanner_calls_up(flip):
    signs = encode.axis_signs(camera_scan(flip=flip))
    assert signs == tuple(np.array([1, -1, -1]) * np.array(flip))


def test_depth_shows_near_points_light_and_missing_ones_black():
    image = encode.depth_image(camera_scan(tilt=0), (1, -1, -1))
    assert image[30, 30] > image[30, 5] > 0 and (image[:5] == 0).all()


def test_normals_of_a_tilted_plane():
    rows, columns = np.mgrid[:40, :40] * 0.001 + 0.01
    xyz = np.stack([columns, rows, 0.5 + 0.5 * columns], axis=-1).astype(np.float32)
    image = encode.normal_image(xyz, (1, -1, -1))
    # z away from the viewer grows to the right, so the plane looks to the right... of its slope: n ~ (0.5, 0, 1)
    wanted = 128 + 127 * np.array([0.5, 0, 1]) / np.sqrt(1.25)
    assert np.abs(image.reshape(-1, 3).astype(float) - wanted).max() <= 1.5


def test_the_cloud_can_be_read_back():
    xyz = camera_scan()
    record = encode.cloud_record(xyz, (1, -1, -1), points=10**6)
    present = np.unpackbits(np.frombuffer(base64.b64decode(record["present"]), np.uint8), count=60 * 60)
    levels = np.frombuffer(base64.b64decode(record["points"]), "<u2").reshape(-1, 3)
    low, high = np.array(record["low"]), np.array(record["high"])
    points = low + levels / 65535 * (high - low)
    assert (record["rows"], record["columns"]) == (60, 60)
    assert np.array_equal(present.reshape(60, 60).astype(bool), xyz.any(axis=-1))
    assert np.abs(points - xyz[xyz.any(axis=-1)] * (1, -1, -1)).max() < (high - low).max() / 60_000


def test_clouds_are_thinned_and_may_be_empty():
    record = encode.cloud_record(camera_scan(), (1, -1, -1), points=500)
    assert 300 < len(base64.b64decode(record["points"])) / 6 < 700
    assert encode.cloud_record(np.zeros((8, 8, 3), np.float32), (1, 1, 1), 100) is None
    assert encode.axis_signs(np.zeros((8, 8, 3), np.float32)) == (1, 1, 1)
    assert not encode.depth_image(np.zeros((8, 8, 3), np.float32), (1, 1, 1)).any()


def test_maps_and_masks_are_exact():
    rng = np.random.default_rng(2)
    values, mask = rng.random((20, 30)).astype(np.float32), rng.random((20, 30)) < 0.5
    assert np.abs(picture(encode.encode_map(values, 0, 1)) / 255 - values).max() <= 0.5 / 255 + 1e-6
    assert np.array_equal(picture(encode.encode_mask(mask)).astype(bool), mask)
    assert not picture(encode.encode_map(np.full((4, 4), 3.0, np.float32), 3, 3)).any()
    assert picture(encode.encode_map(values, 0.2, 0.4)).max() == 255


def test_a_category_of_110_samples_stays_below_30_megabytes():
    """Even when image, surface and map are noise, which nothing compresses."""
    rng = np.random.default_rng(3)
    rows, columns = np.mgrid[:400, :400] / 400 + 0.1
    xyz = np.stack([columns, rows, 1 + rng.normal(0, 0.01, rows.shape)], axis=-1).astype(np.float32)
    scene = Scene(rng.integers(0, 256, (400, 400, 3), dtype=np.uint8), xyz, rng.random((224, 224)) < 0.5)
    record = data_block("scene-0", encode.scene_record(scene, encode.detail_for(110)))
    levels = data_block("map-0", encode.encode_map(rng.random((224, 224)).astype(np.float32), 0, 1))
    assert 110 * (len(record) + len(levels)) < 40e6
    # a real scan: smooth surface and map
    smooth = np.stack([columns, rows, 1 + 0.1 * np.sin(9 * rows)], axis=-1).astype(np.float32)
    photo = (120 + 60 * np.sin(20 * columns)[..., None] + rng.normal(0, 4, (400, 400, 3))).clip(0, 255).astype(np.uint8)
    record = data_block("scene-0", encode.scene_record(Scene(photo, smooth, scene.mask), encode.detail_for(110)))
    values = np.sin(np.mgrid[:224, :224].sum(axis=0) / 30).astype(np.float32)
    assert 110 * (len(record) + len(data_block("map-0", encode.encode_map(values, -1, 1)))) < 25e6


def test_many_samples_get_less_detail():
    assert encode.detail_for(110).points > encode.detail_for(400).points > encode.detail_for(1200).points >= 1000


# -- markup ------------------------------------------------------------------------------------------------------


def test_data_cannot_leave_its_script_element(nasty_texts):
    import json

    text = script_json({name: [name] for name in nasty_texts})
    assert text.isascii() and not set("<>&") & set(text)
    assert json.loads(text) == {name: [name] for name in nasty_texts}


def test_text_is_escaped_in_elements_and_attributes():
    assert text_element("b", '<i> & "q" \'', title='"><script>') == (
        '<b title="&quot;&gt;&lt;script&gt;">&lt;i&gt; &amp; &quot;q&quot; &#x27;</b>'
    )


def test_broken_file_names_become_printable():
    assert clean_text("a\udcff\u00e9").startswith("a\ufffd") and clean_text("a\udcff\u00e9").endswith("\u00e9")
    clean_text("x\ud800").encode()


# -- published rows ----------------------------------------------------------------------------------------------


def test_the_methods_own_source_comes_first(run):
    tables = fitting_references(run, [])
    assert len(tables) > 1 and tables[0].name.startswith("btf-readme:fpfh")
    assert all("btf" in table.name for table in tables)


def test_a_compared_row_comes_before_published_ones(run, compared):
    assert fitting_references(run, [compared])[0] is compared.reference


def test_a_run_on_other_data_has_no_published_row(run):
    run.dataset.name = "synthetic"
    assert fitting_references(run, []) == []


def test_a_mean_is_only_held_against_a_mean_over_the_same_categories(run):
    table = fitting_references(run, [])[0]
    metric = next(iter(table.mean))
    assert expected(table, run, None, metric) is None
    assert expected(table, run, "bagel", metric) == table.rows["bagel"][metric]
    for name in table.rows:
        run.set_category(name, CategoryResult(status="ok", metrics={metric: 0.5}))
    assert expected(table, run, None, metric) == table.mean[metric]
    assert reference_data(run, table)["mean"][metric] == table.mean[metric]


@pytest.mark.parametrize(
    ("metric", "value", "kind"),
    [
        ("i_auroc", 0.904, "same"),
        ("i_auroc", 0.91, "better"),
        ("i_auroc", 0.93, "better large"),
        ("i_auroc", 0.89, "worse"),
        ("i_auroc", 0.5, "worse large"),
        ("i_fpr95", 0.91, "worse"),
        ("i_fpr95", 0.5, "better large"),
    ],
)
def test_deviations(metric, value, kind):
    assert deviation(metric, value, 0.9) == (kind, f"{value - 0.9:+.3f}")


def test_no_deviation_without_a_published_number():
    assert deviation("i_auroc", 0.5, None) == ("", "")


def test_memory_per_stage_has_a_table_of_its_own(run):
    assert "memory</h3>" not in costs_html([run], ["x"])
    run.categories["bagel"].peak_rss_bytes_by_stage = {"fit": 300 * 2**20, "predict": 100 * 2**20}
    page = costs_html([run], ["x"])
    assert ": memory</h3>" in page and page.count("300 MiB") == page.count("100 MiB") == 1
