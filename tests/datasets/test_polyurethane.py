"""PLY scans without labels: chunks, marks, splits, and how the stages keep the marks."""

import shutil
from functools import partial

import numpy as np
import pytest

import mmad_cli
from mmad_cli.datasets import open_dataset, polyurethane
from mmad_cli.datasets.base import ScanLabels
from mmad_cli.datasets.check import check_dataset
from mmad_cli.datasets.ply import read_points
from mmad_cli.datasets.polyurethane import PolyurethaneDataset
from mmad_cli.datasets.scan import Unusable
from mmad_cli.errors import DataError, UsageError
from mmad_cli.preprocessing import chunks

FORMATS = ("ascii", "binary_little_endian", "binary_big_endian")


@pytest.fixture(autouse=True)
def _few_trees(monkeypatch):
    """The forest itself is tested against stored numbers; here it only has to find one far point."""
    monkeypatch.setattr(chunks, "isolated_points", partial(chunks.isolated_points, trees=20))


@pytest.fixture
def small(edges):
    return PolyurethaneDataset(edges, chunk_points=64)


def described(edges):
    (edges / "dataset.toml").write_text('layout = "polyurethane"\nchunk_points = 64\n')
    return edges


# --- PLY


@pytest.mark.parametrize("form", FORMATS)
def test_formats(tmp_path, ply_writer, form):
    points = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    ply_writer(tmp_path / "a.ply", points, form)
    np.testing.assert_array_equal(read_points(tmp_path / "a.ply"), points)


@pytest.mark.parametrize("text", [True, False])
def test_files_of_open3d(tmp_path, text):
    open3d = pytest.importorskip("open3d")
    rng = np.random.default_rng(0)
    cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(rng.normal(size=(40, 3))))
    cloud.normals = open3d.utility.Vector3dVector(rng.normal(size=(40, 3)))
    cloud.colors = open3d.utility.Vector3dVector(rng.random((40, 3)))
    path = tmp_path / "a.ply"
    open3d.io.write_point_cloud(str(path), cloud, write_ascii=text)
    np.testing.assert_allclose(read_points(path), np.asarray(cloud.points), rtol=1e-5)


def test_other_properties_and_elements_are_stepped_over(tmp_path):
    points = np.random.default_rng(0).normal(size=(5, 3))
    record = np.dtype([("i", "<u1"), ("z", "<f8"), ("x", "<f8"), ("y", "<f8"), ("x2", "<i4")])
    rows = np.zeros(5, record)
    rows["x"], rows["y"], rows["z"], rows["i"] = *points.T, 7
    header = (
        "ply\r\nformat binary_little_endian 1.0\r\nobj_info a\r\nelement sensor 2\r\nproperty short a\r\n"
        "element vertex 5\r\nproperty uchar i\r\nproperty double z\r\nproperty double x\r\nproperty double y\r\n"
        "property int scan\r\nelement face 1\r\nproperty list uchar int vertex_indices\r\nend_header\r\n"
    )
    path = tmp_path / "a.ply"
    path.write_bytes(header.encode() + bytes(4) + rows.tobytes() + bytes([1, 0, 0, 0, 0]))
    np.testing.assert_allclose(read_points(path), points, rtol=1e-6)
    text = "ply\nformat ascii 1.0\nelement sensor 2\nproperty int a\nelement vertex 2\n"
    text += "".join(f"property float {name}\n" for name in "zxyw") + "end_header\n7\n8\n3 1 2 9\n6 4 5 9\n1 2\n"
    path.write_text(text)
    np.testing.assert_array_equal(read_points(path), [[1, 2, 3], [4, 5, 6]])


HEADER = "ply\nformat {form} 1.0\nelement vertex {count}\nproperty float x\nproperty float y\n{rest}end_header\n"
Z = "property float z\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"solid", "is not a PLY file"),
        (b"ply\nformat ascii 1.0\n", "header has no end"),
        (HEADER.format(form="ascii", count=2, rest=Z).encode() + b"1 2 3\n", "cut off: 1 of 2 points"),
        (HEADER.format(form="ascii", count=1, rest=Z).encode() + b"1 2 x\n", "cannot be read as PLY"),
        (HEADER.format(form="ascii", count=1, rest=Z).encode() + b"1 2 nan\n", "1 points have NaN"),
        (HEADER.format(form="binary_little_endian", count=2, rest=Z).encode() + bytes(20), "cut off: "),
        (HEADER.format(form="binary_middle_endian", count=1, rest=Z).encode() + bytes(12), "no known format"),
        (HEADER.format(form="ascii", count=1, rest="").encode() + b"1 2\n", "vertices without z"),
        (HEADER.format(form="ascii", count=1, rest="nonsense\n").encode() + b"1 2\n", "unknown line 'nonsense'"),
        (b"ply\nformat ascii 1.0\nelement face 0\nproperty int a\nend_header\n", "no element 'vertex'"),
    ],
)
def test_damaged_ply(tmp_path, content, words):
    path = tmp_path / "a.ply"
    path.write_bytes(content)
    with pytest.raises(Unusable) as caught:
        read_points(path)
    assert words in caught.value.message
    assert caught.value.advice


# --- the dataset


def test_layout(edges):
    dataset = open_dataset(edges)
    assert isinstance(dataset, PolyurethaneDataset)
    assert (dataset.name, dataset.modalities) == ("polyurethane", ("3d",))
    assert dataset.categories() == ["edges"]
    assert open_dataset(edges / "edges").categories() == ["edges"]
    with pytest.raises(DataError, match="no such category; known: edges"):
        dataset.samples("holes")


def test_samples(small, edges):
    refs = small.samples("edges")
    assert len(refs) == 30
    assert len({ref.id for ref in refs}) == 30
    anomalous = [ref for ref in refs if ref.label]
    # the outlier is point 200 of a.ply; contamination marks one point of each scan
    assert anomalous[0].id == "test/anomalous/a-0003"
    assert anomalous[0].part == {"start": 192, "points": 64, "marked": [8]}
    assert [ref.files["xyz"].name for ref in anomalous] == ["a.ply", "b.ply"]
    normals = [ref for ref in refs if not ref.label]
    assert [sum(ref.split == split for ref in normals) for split in ("train", "test")] == [25, 3]
    assert refs == sorted(refs, key=lambda ref: (ref.split == "test", ref.defect, ref.stem))


def test_published_limit(edges):
    """24 of 9216 marked points make a chunk anomalous; the marks of the others stay in the ground truth."""
    path = edges / "edges" / "a.ply"
    counts = (0, 23, 24, 40)
    marked = np.concatenate([9216 * chunk + np.arange(count) for chunk, count in enumerate(counts)])
    labels = {path: ScanLabels(4 * 9216 + 100, marked.astype(np.int64))}
    refs = sorted(PolyurethaneDataset(edges).list_labelled("edges", labels).refs, key=lambda ref: ref.stem)
    assert [ref.label for ref in refs] == [0, 0, 1, 1]
    assert [len(ref.part["marked"]) for ref in refs] == list(counts)


def test_split_is_that_of_scikit_learn(small):
    selection = pytest.importorskip("sklearn.model_selection")
    refs = sorted((ref for ref in small.samples("edges") if not ref.label), key=lambda ref: ref.stem)
    train, test = selection.train_test_split([ref.stem for ref in refs], test_size=0.1, random_state=42)
    assert {ref.stem for ref in refs if ref.split == "train"} == set(train)
    assert {ref.stem for ref in refs if ref.split == "test"} == set(test)


def test_a_sample(small, edges):
    ref = next(ref for ref in small.samples("edges") if ref.stem == "a-0003")
    sample = small.read(ref)
    points = read_points(edges / "edges" / "a.ply")[192:256].astype(np.float64)
    low, high = points.min(axis=0), points.max(axis=0)
    np.testing.assert_allclose(sample.xyz.reshape(-1, 3), (points - low) / (high - low) * 2 - 1, atol=1e-6)
    assert sample.xyz.shape == sample.rgb.shape == (8, 8, 3)
    assert not sample.rgb.any()
    assert np.flatnonzero(sample.mask).tolist() == [8]
    assert not sample.background.any()


def test_check(edges):
    described(edges)
    report = check_dataset(edges)
    assert report.usable
    assert any("told apart by an Isolation Forest, not by people" in finding.message for finding in report.findings)
    assert not any("same content" in finding.message for finding in report.findings)
    (edges / "edges" / "b.ply").write_bytes(b"ply\n")
    report = check_dataset(edges)
    assert [f.file for f in report.findings if f.level == "error"] == [str(edges / "edges" / "b.ply")]
    with pytest.raises(DataError, match=r"b\.ply: is cut off"):
        open_dataset(edges).samples("edges")


def test_short_scan_is_left_out(edges, ply_writer):
    dataset = PolyurethaneDataset(edges)
    assert dataset.samples("edges") == []
    findings = dataset.list_samples("edges").findings
    assert ["points and is left out" in finding.message for finding in findings] == [True, True]


def test_settings(edges):
    assert PolyurethaneDataset(edges).departures() == []
    changed = PolyurethaneDataset(edges, level="high", chunk_points=4096)
    assert len(changed.departures()) == 2
    assert changed.labelling()["contamination"] == 1.5e-4
    other = PolyurethaneDataset(edges, marker="lof")
    assert other.labelling() == {"algorithm": "lof", "neighbours": 30, "contamination": 1e-4}
    assert other.departures() == ["marker: lof instead of the published isolation_forest"]
    with pytest.raises(UsageError, match="marker 'forest'"):
        PolyurethaneDataset(edges, marker="forest")
    with pytest.raises(UsageError, match="square number"):
        PolyurethaneDataset(edges, chunk_points=10)
    with pytest.raises(UsageError, match="level 'middle'"):
        PolyurethaneDataset(edges, level="middle")


def test_local_outlier_factors(edges):
    """The same far point of the first scan, of other marks in the second."""
    text = 'layout = "polyurethane"\nchunk_points = 64\nmarker = "lof"\n'
    (edges / "dataset.toml").write_text(text)
    report = check_dataset(edges)
    assert any("by local outlier factors, not by people" in finding.message for finding in report.findings)
    marked = [ref for ref in open_dataset(edges).samples("edges") if ref.label]
    assert marked[0].id == "test/anomalous/a-0003" and marked[0].part["marked"] == [8]


# --- through the stages


def test_marks_are_computed_once(edges, tmp_path, monkeypatch):
    described(edges)
    store = tmp_path / "store"
    first = list(mmad_cli.load_preprocessed(edges, resized=False, store=store))
    assert len(first) == 30

    def forbidden(*_):
        raise AssertionError("labels were computed again")

    monkeypatch.setattr(chunks, "isolated_points", forbidden)
    polyurethane._labels_in_state.cache_clear()
    for protocol in ("m3dm", "cfm"):
        again = list(mmad_cli.load_preprocessed(edges, protocol, resized=False, store=store))
        assert [sample.id for sample in again] == [sample.id for sample in first]
        for one, other in zip(again, first, strict=True):
            np.testing.assert_array_equal(one.xyz, other.xyz)
            np.testing.assert_array_equal(one.mask, other.mask)
    shutil.copy(edges / "edges" / "a.ply", edges / "edges" / "b.ply")
    with pytest.raises(AssertionError, match="again"):
        open_dataset(edges).samples("edges")


def test_chunks_of_one_file_are_not_mixed_up(edges, tmp_path):
    described(edges)
    clouds = {s.id: s.xyz for s in mmad_cli.load_preprocessed(edges, resized=False, store=tmp_path / "store")}
    dataset = open_dataset(edges)
    for ref in dataset.samples("edges"):
        np.testing.assert_array_equal(clouds[ref.id], dataset.read(ref).xyz)


def test_methods_that_need_an_image_are_refused(edges):
    described(edges)
    with pytest.raises(UsageError, match="btf rgb needs the modality rgb, and the dataset polyurethane") as caught:
        mmad_cli.evaluate(edges, method="btf", variant="rgb", settings={"rgb_backbone": "resnet18.tv_in1k"})
    assert caught.value.exit_code == 2


def test_evaluate(edges, tmp_path):
    described(edges)
    result, _ = mmad_cli.evaluate(
        edges, method="btf", variant="raw", store=tmp_path / "store", out=tmp_path / "run", workers=1
    )
    assert result.dataset.name == "polyurethane"
    assert result.failed_categories == []
    assert any("chunk_points: 64 instead of the published 9216" in reason for reason in result.not_comparable)
    assert result.categories["edges"].n_train == 25


@pytest.mark.slow
def test_variant_of_cmdr_iad(tmp_path, ply_writer, monkeypatch, capfd):
    """From PLY scans in chunks of the published size to a run, with the point network that comes with the tool."""
    from mmad_cli.cli.app import run
    from mmad_cli.results.schema import RunResult

    rng = np.random.default_rng(0)
    for name, chunks_of in (("a", 4), ("b", 3)):
        count = chunks_of * chunks.CHUNK_POINTS + 10
        along, across = np.divmod(np.arange(count), 384)
        height = np.sin(across / 60) + rng.normal(0, 0.005, count)
        # more points than the 24 that make a chunk anomalous, far off the surface
        height[chunks.CHUNK_POINTS + 4000 :][:30] += rng.uniform(40, 60, 30)
        ply_writer(tmp_path / "scans" / "edges" / f"{name}.ply", np.stack([across, along, height], 1), "ascii")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(polyurethane.LEVELS, "low", 1e-3)
    data, place = str(tmp_path / "scans"), ["--workers", "1", "--store", str(tmp_path / "store"), "--out", "run"]
    assert run(["check", data]) == 0
    method = ["--method", "cmdr_iad", "--variant", "polyurethane", "--backbones", "builtin", "--set", "epochs=2"]
    assert run(["evaluate", data, *method, *place]) == 0
    assert "edges" in capfd.readouterr().out
    result = RunResult.from_disk(tmp_path / "run")
    category = result.categories["edges"]
    assert (category.n_train, category.n_test) == (4, 3)
    assert len(category.training["point_decoder/cosine"]) == 2
    assert all(0 <= category.metrics[key] <= 1 for key in ("i_auroc", "p_auroc", "aupro_30_grid99"))
    # another variant needs an image
    assert run(["evaluate", data, "--method", "cmdr_iad", "--backbones", "builtin", *place]) == 2
    assert "needs the modality rgb" in capfd.readouterr().err.replace("\n", " ")
