"""The synthetic dataset: layout, determinism, exact masks, and that defects show where they are said to show."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from mmad_cli.datasets.synthetic import CATEGORIES, DEFECTS, class_ids, default_spec, generate
from mmad_cli.datasets.synthetic.generate import _whole_or_nothing
from mmad_cli.datasets.synthetic.render import SURFACE_THRESHOLD, Scene, make_scene, render, scan
from mmad_cli.datasets.synthetic.solids import noise, stream
from mmad_cli.errors import DataError, UsageError

SIZE = 96
PAIRS = [(category, defect) for category, part in CATEGORIES.items() for defect in part.defects]


def digests(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "data"
    report = generate(
        out, categories=["hose", "flange"], train=2, validation=1, test_good=1, test_defect=1, size=SIZE, seed=3
    )
    assert report.categories == ("flange", "hose")
    assert report.samples == 2 * (2 + 1 + 1 + 5)
    return out


@pytest.fixture(scope="module")
def scenes() -> dict[tuple[str, str], Scene]:
    return {(category, defect): make_scene(category, "test", defect, 0, 128, 1) for category, defect in PAIRS}


def test_layout_is_that_of_mvtec3d(dataset: Path) -> None:
    for category in ("flange", "hose"):
        root = dataset / category
        assert sorted(p.name for p in root.iterdir()) == ["calibration", "test", "train", "validation"]
        for split, count in (("train", 2), ("validation", 1)):
            assert sorted(p.name for p in (root / split).iterdir()) == ["good"]
            assert sorted(p.name for p in (root / split / "good").iterdir()) == ["rgb", "xyz"]
            stems = [f"{i:03d}" for i in range(count)]
            assert sorted(p.name for p in (root / split / "good" / "rgb").iterdir()) == [f"{s}.png" for s in stems]
            assert sorted(p.name for p in (root / split / "good" / "xyz").iterdir()) == [f"{s}.tiff" for s in stems]
        assert sorted(p.name for p in (root / "test").iterdir()) == sorted([*CATEGORIES[category].defects, "good"])
        for folder in (root / "test").iterdir():
            assert sorted(p.name for p in folder.iterdir()) == ["gt", "rgb", "xyz"]
    assert json.loads((dataset / "synthetic.json").read_text())["categories"]["hose"]["class_ids"] == class_ids("hose")
    assert not list(dataset.parent.glob(".*partial"))


def test_files_have_the_published_types(dataset: Path) -> None:
    ids = class_ids("hose")
    assert ids == {"bend": 255, "contamination": 254, "cut": 253, "hole": 252, "stain": 251}
    for folder in (dataset / "hose" / "test").iterdir():
        with Image.open(folder / "rgb" / "000.png") as image:
            assert image.mode == "RGB" and image.size == (SIZE, SIZE)
        with Image.open(folder / "gt" / "000.png") as image:
            assert image.mode == "L" and image.size == (SIZE, SIZE)
            values = np.unique(np.asarray(image)).tolist()
        assert values == ([0] if folder.name == "good" else [0, ids[folder.name]])
        with tifffile.TiffFile(folder / "xyz" / "000.tiff") as tiff:
            assert not tiff.pages[0].compression.value > 1
            xyz = tiff.asarray()
        assert xyz.shape == (SIZE, SIZE, 3) and xyz.dtype == np.float32


def test_cloud_is_metric_and_missing_points_are_exactly_zero(dataset: Path) -> None:
    clouds = [tifffile.imread(path) for path in sorted(dataset.rglob("*.tiff"))]
    for xyz in clouds:
        zero = xyz == 0
        missing = zero.all(-1)
        # never a point with one coordinate of exactly zero, which readers would drop
        assert np.array_equal(missing, zero.any(-1))
        assert 0.3 < missing.mean() < 0.5
        assert np.isfinite(xyz).all()
        z = xyz[~missing][:, 2]
        assert 0.58 < z.min() < z.max() < 0.72
        pitch = np.diff(xyz[..., 0], axis=1)[~missing[:, 1:] & ~missing[:, :-1]]
        assert np.median(pitch) * SIZE == pytest.approx(0.094, rel=0.03)
        # Y points down: the second coordinate grows with the row
        rows, _ = np.nonzero(~missing)
        assert np.corrcoef(rows, xyz[~missing][:, 1])[0, 1] > 0.99


def test_table_is_a_plane_under_the_part(dataset: Path) -> None:
    xyz = tifffile.imread(dataset / "flange" / "train" / "good" / "xyz" / "000.tiff").astype(np.float64)
    frame = np.ones(xyz.shape[:2], dtype=bool)
    frame[4:-4, 4:-4] = False
    border = xyz[frame & (xyz[..., 2] > 0)]
    design = np.column_stack([border[:, :2], np.ones(len(border))])
    plane, *_ = np.linalg.lstsq(design, border[:, 2], rcond=None)
    error = border[:, 2] - design @ plane
    assert 0.0002 < error.std() < 0.001
    points = xyz[xyz[..., 2] > 0]
    height = (np.column_stack([points[:, :2], np.ones(len(points))]) @ plane - points[:, 2]) / np.sqrt(
        1 + plane[0] ** 2 + plane[1] ** 2
    )
    assert 0.018 < np.quantile(height, 0.999) < 0.025
    # the part stays when everything within 5 mm of the table is removed
    assert 0.1 < (height > 0.005).mean() < 0.6


def test_same_seed_same_bytes_whatever_else_is_made(dataset: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    generate(
        tmp_path / "other",
        categories=["hose"],
        train=1,
        validation=0,
        test_good=0,
        test_defect=2,
        size=SIZE,
        seed=3,
        workers=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, 11) for done in range(12)]
    first, second = digests(dataset), digests(tmp_path / "other")
    shared = [name for name in second if name in first and name != "synthetic.json"]
    assert len(shared) == 2 + 5 * 3 + 1
    assert all(first[name] == second[name] for name in shared)


def test_samples_differ_by_seed_index_and_split() -> None:
    images = [
        render("gear", split, "good", index, 64, seed)[0].tobytes()
        for split, index, seed in (("train", 0, 0), ("train", 0, 1), ("train", 1, 0), ("test", 0, 0))
    ]
    assert len(set(images)) == 4
    assert render("gear", "train", "good", 0, 64, 0)[0].tobytes() == images[0]


def test_good_samples_have_no_mask() -> None:
    for category in CATEGORIES:
        assert not make_scene(category, "test", "good", 0, 64, 0).mask.any()


def test_every_defect_has_a_mask_that_can_be_seen(scenes: dict[tuple[str, str], Scene]) -> None:
    for pair, scene in scenes.items():
        assert scene.mask.sum() >= 10, pair
        assert scene.mask.mean() < 0.15, pair


def test_outside_the_mask_the_surface_is_that_of_the_sound_part(scenes: dict[tuple[str, str], Scene]) -> None:
    for (category, defect), scene in scenes.items():
        before, after = scene.sound_trace, scene.trace
        outside = ~scene.mask & after.part & before.part
        towards = scene.view.directions / np.sqrt((scene.view.directions**2).sum(0))
        cosine = np.abs((before.normal * towards).sum(0))
        # distance of the new point to the tangent plane of the old one
        moved = np.abs(after.depth - before.depth)[outside] * cosine[outside]
        # a few pixels lie on a depth step that moved by less than the threshold
        assert (moved > SURFACE_THRESHOLD + 0.1).mean() < 0.004, (category, defect)
        if not DEFECTS[defect].displaces:
            assert np.array_equal(before.part[~scene.mask], after.part[~scene.mask]) or (
                (before.part != after.part)[~scene.mask].sum() <= 3
            ), (category, defect)


def test_inside_the_mask_the_surface_or_the_colour_changed(scenes: dict[tuple[str, str], Scene]) -> None:
    for (category, defect), scene in scenes.items():
        before, after = scene.sound_trace, scene.trace
        inside = scene.mask
        # the distance function may exceed the true distance by a third
        moved = np.abs(after.depth - before.depth) > 0.2
        swapped = before.part != after.part
        both = inside & after.part
        repainted = np.zeros(inside.size, dtype=bool)
        sound, now = scene.sound.albedo(after.points[:, both]), scene.solid.albedo(after.points[:, both])
        repainted[both] = np.abs(sound - now).max(0) > 0.03
        assert (moved | swapped | repainted)[inside].mean() > 0.97, (category, defect)


def test_defects_show_in_the_modality_they_claim(scenes: dict[tuple[str, str], Scene]) -> None:
    for (category, defect), scene in scenes.items():
        size = scene.view.size
        mask = scene.mask.reshape(size, size)
        rgb, xyz = scan(scene, stream("twin"))
        twin_rgb, twin_xyz = scan(scene, stream("twin"), sound=True)
        change = np.abs(rgb.astype(float) - twin_rgb).mean(-1)[mask]
        colour = change.mean()
        valid = (xyz[..., 2] > 0) & (twin_xyz[..., 2] > 0) & mask
        depth = np.abs(xyz - twin_xyz)[valid][:, 2].mean() if valid.any() else np.inf
        shows = DEFECTS[defect].shows
        if shows == "rgb":
            assert np.array_equal(xyz, twin_xyz), (category, defect)
            assert colour > 5, (category, defect, colour)
        elif shows == "3d":
            assert depth > 0.0004, (category, defect, depth)
            # a dent at an edge moves the edge in the image, so the typical pixel is held tighter than the mean
            assert colour < 10, (category, defect, colour)
            assert np.median(change) < 8, (category, defect)
        else:
            assert depth > 0.0003, (category, defect, depth)
            assert colour > 4, (category, defect, colour)


def test_scan_equals_that_of_the_sound_twin_away_from_the_defect(scenes: dict[tuple[str, str], Scene]) -> None:
    scene = scenes["pebble", "dent"]
    size = scene.view.size
    _, xyz = scan(scene, stream("twin"))
    _, twin = scan(scene, stream("twin"), sound=True)
    rows, columns = np.nonzero(scene.mask.reshape(size, size))
    away = np.ones((size, size), dtype=bool)
    away[max(rows.min() - 12, 0) : rows.max() + 13, max(columns.min() - 12, 0) : columns.max() + 13] = False
    assert away.sum() > size * size / 3
    assert np.array_equal(xyz[away], twin[away])


def test_most_defect_pixels_have_a_point() -> None:
    missing = []
    for category in ("flange", "nugget"):
        for defect in CATEGORIES[category].defects:
            _, xyz, mask = render(category, "test", defect, 1, 128, 0)
            missing.append((xyz[..., 2] == 0)[mask].mean())
    assert np.mean(missing) < 0.35
    assert min(missing) < 0.1


def test_severity_varies() -> None:
    severities = [make_scene("pebble", "test", "dent", index, 64, 0).severity for index in range(6)]
    assert max(severities) - min(severities) > 0.5


def test_camera_parameters_reproject_the_cloud(dataset: Path) -> None:
    camera = json.loads((dataset / "hose" / "calibration" / "camera_parameters.json").read_text())
    xyz = tifffile.imread(dataset / "hose" / "train" / "good" / "xyz" / "000.tiff").astype(np.float64)
    rows, columns = np.nonzero(xyz[..., 2] > 0)
    x, y, z = xyz[rows, columns].T
    focal = camera["focus"] / camera["sx"]
    np.testing.assert_allclose(x / z * focal + camera["cx"], columns, atol=1e-3)
    np.testing.assert_allclose(y / z * focal + camera["cy"], rows, atol=1e-3)


def test_noise_is_periodic_and_continuous() -> None:
    points = stream("points").uniform(-40, 40, (3, 500))
    np.testing.assert_allclose(noise(points, 1.0), noise(points + 64.0, 1.0), atol=1e-5)
    step = np.abs(noise(points, 1.0) - noise(points + 1e-4, 1.0))
    assert step.max() < 1e-3


def test_catalogue_is_consistent() -> None:
    used = {defect for part in CATEGORIES.values() for defect in part.defects}
    assert used == set(DEFECTS)
    assert all(
        4 <= len(part.defects) <= 6 and list(part.defects) == sorted(part.defects) for part in CATEGORIES.values()
    )
    assert {DEFECTS[d].shows for d in used} == {"3d", "rgb", "both"}
    spec = default_spec()
    assert set(spec["categories"]) <= set(CATEGORIES) and len(spec["categories"]) == 6
    json.dumps(spec)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"categories": ["flang"]}, "did you mean 'flange'"),
        ({"categories": []}, "--category"),
        ({"train": 0}, "--train"),
        ({"test_good": -1}, "--test-good"),
        ({"test_defect": 1001}, "--test-defect"),
        ({"size": 32}, "--size"),
        ({"seed": -1}, "--seed"),
        ({"workers": 0}, "--workers"),
    ],
)
def test_wrong_arguments_write_nothing(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        generate(tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_refuses_folders_in_use(dataset: Path, tmp_path: Path) -> None:
    before = digests(dataset)
    with pytest.raises(UsageError, match="not empty"):
        generate(dataset)
    for inside in (dataset / "new", dataset / "hose" / "new", dataset / "hose" / "train" / "good" / "new"):
        with pytest.raises(UsageError, match="inside the dataset"):
            generate(inside)
    occupied = tmp_path / "file"
    occupied.write_text("mine")
    with pytest.raises(UsageError, match="is a file"):
        generate(occupied)
    assert digests(dataset) == before


def test_empty_folder_is_taken(tmp_path: Path) -> None:
    out = tmp_path / "empty"
    out.mkdir()
    generate(out, categories=["gear"], train=1, validation=0, test_good=0, test_defect=0, size=64)
    assert (out / "gear" / "train" / "good" / "rgb" / "000.png").is_file()


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "out", categories=["gear"], train=3, size=64, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match="check space"), _whole_or_nothing(out, out):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []
