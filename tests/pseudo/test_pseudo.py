"""Pseudo anomalies: what they change, that they are what the geometry says, and that a seed decides all of it."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from mmad_cli.preprocessing.normals import organised_normals
from mmad_cli.preprocessing.resize import valid_pixels
from mmad_cli.pseudo import Augmentation, pseudo_anomaly
from mmad_cli.pseudo.colour import OPERATIONS, blend, changed_image
from mmad_cli.pseudo.geometry import Pose, cut_hole, move, paste_surface, pixel_axes, raise_bump
from mmad_cli.pseudo.masks import GRID, components, draw_regions, moved, patch_labels, perlin, union
from mmad_cli.pseudo.sheet import contact_sheet
from mmad_cli.types import Sample

SIDE = 120


def dome(side: int = SIDE, *, y_up: bool = False) -> np.ndarray:
    """A bump of a sphere's height on the pixel grid, points at 0.5 mm, the camera at the origin."""
    y, x = (np.mgrid[:side, :side] + 0.5 - side / 2) * 5e-4
    inside = x * x + y * y < (0.4 * side * 5e-4) ** 2
    z = 0.5 + 4 * (x * x + 1.5 * y * y) + 0.2 * x
    xyz = np.stack([x + 0.01, (-y if y_up else y) + 0.02, z], axis=-1)
    return np.where(inside[..., None], xyz, 0).astype(np.float32)


def scan(stem: str = "000", category: str = "dome", **changes: object) -> Sample:
    rng = np.random.default_rng(len(stem))
    sample = Sample(
        category=category,
        split="train",
        defect="good",
        stem=stem,
        rgb=rng.integers(60, 200, (SIDE, SIDE, 3), dtype=np.uint8),
        xyz=dome(),
        mask=np.zeros((SIDE, SIDE), dtype=bool),
    )
    return replace(sample, **changes)


def donor() -> Sample:
    xyz = dome()
    xyz[..., 2] = np.where(valid_pixels(xyz), 0.9 + 30 * (xyz[..., 0] - 0.01) ** 2, 0)
    return scan("donor", rgb=np.full((SIDE, SIDE, 3), 10, np.uint8), xyz=xyz)


class TestMasks:
    def test_noise_reaches_the_threshold_and_not_much_more(self) -> None:
        noise = np.stack([perlin(64, (4, 8), 0.3, np.random.default_rng(i)) for i in range(50)])
        assert np.abs(noise.mean()) < 0.05
        assert 0.8 < np.abs(noise).max() <= np.sqrt(2)

    def test_noise_is_smooth_and_as_fine_as_asked(self) -> None:
        coarse, fine = (perlin(128, (n, n), 0.0, np.random.default_rng(1)) for n in (2, 16))
        assert np.abs(np.diff(coarse)).max() < 0.15
        assert np.abs(np.diff(fine)).mean() > 3 * np.abs(np.diff(coarse)).mean()

    def test_wrong_noise_is_refused(self) -> None:
        with pytest.raises(ValueError, match="frequency"):
            perlin(8, (0, 1), 0.0, np.random.default_rng(0))

    def test_components_are_within_the_bounds(self) -> None:
        mask = np.zeros((GRID, GRID), bool)
        mask[:5, :5], mask[10:30, 10:30], mask[50:150, 50:150] = True, True, True
        assert [int(part.sum()) for part in components(mask)] == [400]

    @pytest.mark.parametrize("seed", range(8))
    def test_regions_lie_on_the_object_and_are_large_enough(self, seed: int) -> None:
        target = np.zeros((GRID, GRID), bool)
        target[60:160, 40:150] = True
        regions = draw_regions(target, np.ones_like(target), 0.4, np.random.default_rng(seed))
        assert not (union(regions) & ~target).any()
        assert union(regions).sum() >= 300
        assert all(1 <= region.mask.sum() <= 1600 for region in regions)

    def test_a_part_that_misses_the_object_is_moved_onto_it(self) -> None:
        target, source = np.zeros((2, GRID, GRID), bool)
        target[10:60, 10:60], source[120:, 120:] = True, True
        regions = draw_regions(target, source, 0.4, np.random.default_rng(3))
        for region in regions:
            assert region.shift != (0, 0)
            back = moved(region.mask, (-region.shift[0], -region.shift[1]))
            assert back.sum() == region.mask.sum()
            assert not (back & ~source).any()

    def test_a_tiny_object_gets_a_region_all_the_same(self) -> None:
        target = np.zeros((GRID, GRID), bool)
        target[100:103, 50:52] = True
        regions = draw_regions(target, np.zeros_like(target), 0.4, np.random.default_rng(0))
        assert (union(regions) == target).all()

    def test_nothing_to_damage(self) -> None:
        with pytest.raises(ValueError, match="target"):
            empty = np.zeros((GRID, GRID), bool)
            draw_regions(empty, empty, 0.4, np.random.default_rng(0))

    def test_labels_are_widened_then_read_at_the_corner_of_each_patch(self) -> None:
        mask = np.zeros((GRID, GRID), bool)
        mask[7, 9] = True
        labels = patch_labels(mask, 56).reshape(56, 56)
        assert labels.nonzero()[0].tolist() == [2]
        assert labels.nonzero()[1].tolist() == [2]
        mask[7, 9], mask[6, 10] = False, True
        assert not patch_labels(mask, 56).any()


class TestGeometry:
    @pytest.mark.parametrize("y_up", [False, True])
    @pytest.mark.parametrize("pose", [Pose(angle=0.5), Pose(flip=True), Pose(0.4, 0.9, (0.05, -0.04))])
    def test_moved_points_are_the_same_object_in_another_place(self, pose: Pose, y_up: bool) -> None:
        xyz = dome(y_up=y_up)
        cloud, _ = move(xyz, np.zeros((SIDE, SIDE, 3), np.uint8), pose, points_too=True)
        before, after = xyz[valid_pixels(xyz)], cloud[valid_pixels(cloud)]
        # pixel and point still belong together
        linear, corner = pixel_axes(xyz)
        ys, xs = np.nonzero(valid_pixels(cloud))
        expected = np.stack([xs + 0.5, ys + 0.5], 1) @ linear.T + corner
        assert np.abs(cloud[ys, xs, :2] - expected).max() < 0.8 * 5e-4
        spread = [np.sqrt(np.linalg.eigvalsh(np.cov(points.T.astype(float)))) for points in (before, after)]
        np.testing.assert_allclose(spread[1], pose.scale * spread[0], rtol=0.02)

    def test_normals_turn_with_the_object(self) -> None:
        angle = 0.6
        cloud, _ = move(dome(), np.zeros((SIDE, SIDE, 3), np.uint8), Pose(angle=angle), points_too=True)
        still = organised_normals(dome(), 9)
        turned = organised_normals(cloud, 9)
        turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
        # the pixel that each pixel comes from
        ys, xs = np.mgrid[:SIDE, :SIDE] + 0.5 - SIDE / 2
        from_x = np.floor(np.cos(angle) * xs + np.sin(angle) * ys + SIDE / 2).astype(int)
        from_y = np.floor(-np.sin(angle) * xs + np.cos(angle) * ys + SIDE / 2).astype(int)
        inner = ndimage.binary_erosion(valid_pixels(cloud), iterations=8)
        expected = still[from_y[inner], from_x[inner]] @ turn.T
        agreement = (turned[inner] * expected).sum(axis=1)
        assert agreement.min() > 0.99
        # without moving the points the normals would point elsewhere
        plain, _ = move(dome(), np.zeros((SIDE, SIDE, 3), np.uint8), Pose(angle=angle), points_too=False)
        assert (organised_normals(plain, 9)[inner] * expected).sum(axis=1).min() < 0.99

    def test_without_the_points_coordinates_stay(self) -> None:
        xyz = dome()
        cloud, _ = move(xyz, np.zeros((SIDE, SIDE, 3), np.uint8), Pose(angle=0.3), points_too=False)
        known = {tuple(point) for point in xyz[valid_pixels(xyz)].tolist()}
        assert {tuple(point) for point in cloud[valid_pixels(cloud)].tolist()} <= known

    def test_the_image_moves_with_the_cloud(self) -> None:
        xyz = dome()
        rgb = (valid_pixels(xyz)[..., None] * np.full(3, 200)).astype(np.uint8)
        cloud, image = move(xyz, rgb, Pose(0.4, 1.1, (0.1, -0.05), True), points_too=True)
        assert ((image[..., 0] > 100) == valid_pixels(cloud)).mean() > 0.98

    def test_sizes_must_agree(self) -> None:
        with pytest.raises(ValueError, match="rgb"):
            move(dome(), np.zeros((3, 3, 3), np.uint8), Pose(angle=1), points_too=False)

    def test_a_pasted_surface_has_the_donors_shape_at_the_scans_level(self) -> None:
        xyz, other = dome(), donor().xyz
        mask = np.zeros((SIDE, SIDE), bool)
        mask[50:70, 40:80] = True
        out, changed = paste_surface(xyz, mask, other, (4, -3), 0.001)
        assert (changed == mask).all()
        np.testing.assert_array_equal(out[..., :2], xyz[..., :2])
        np.testing.assert_array_equal(out[~mask], xyz[~mask])
        level = xyz[valid_pixels(xyz), 2].mean() - other[valid_pixels(other), 2].mean() + 0.001
        np.testing.assert_allclose(out[50:70, 40:80, 2], other[46:66, 43:83, 2] + level, atol=1e-6)

    def test_nothing_is_pasted_where_the_donor_has_no_point(self) -> None:
        other = donor().xyz
        other[:60] = 0
        out, changed = paste_surface(dome(), np.ones((SIDE, SIDE), bool), other, (0, 0), 0.001)
        assert not changed[:60].any()
        np.testing.assert_array_equal(out[:60], dome()[:60])

    def test_a_bump_is_the_gaussian_that_was_asked_for(self) -> None:
        xyz = dome()
        out, changed = raise_bump(xyz, (60, 60), -0.002, 0.003)
        rise = out[..., 2] - xyz[..., 2]
        assert rise[60, 60] == pytest.approx(-0.002, abs=1e-7)
        assert rise[60, 66] == pytest.approx(-0.002 * np.exp(-0.5), abs=1e-7)
        assert changed.sum() == pytest.approx(np.pi * 12**2, rel=0.03)
        assert not rise[~valid_pixels(xyz)].any()

    def test_no_bump_without_a_point(self) -> None:
        out, changed = raise_bump(dome(), (0, 0), 0.002, 0.003)
        assert not changed.any()
        np.testing.assert_array_equal(out, dome())

    def test_a_hole_has_no_points(self) -> None:
        mask = np.zeros((SIDE, SIDE), bool)
        mask[:70, 60:70] = True
        out, lost = cut_hole(dome(), mask)
        assert (lost == (mask & valid_pixels(dome()))).all()
        assert not out[mask].any()


class TestColour:
    @pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
    def test_every_operation_changes_the_image(self, operation) -> None:  # type: ignore[no-untyped-def]
        image = np.random.default_rng(0).uniform(0.2, 0.7, (40, 40, 3))
        out = operation(image, np.random.default_rng(2))
        assert out.shape == image.shape
        assert np.isfinite(out).all()
        assert np.abs(out - image).max() > 0.02

    def test_three_operations_stay_within_8_bits(self) -> None:
        rgb = scan().rgb
        out = [changed_image(rgb, np.random.default_rng(i)) for i in range(4)]
        assert all(one.dtype == np.uint8 and one.shape == rgb.shape for one in out)
        assert not np.array_equal(out[0], out[1])

    def test_blending_weighs_the_donor_on_the_mask_only(self) -> None:
        mask = np.zeros((4, 4), bool)
        mask[1, 2] = True
        out = blend(np.full((4, 4, 3), 100, np.uint8), np.full((4, 4, 3), 200, np.uint8), mask, 0.75)
        assert out[1, 2].tolist() == [175, 175, 175]
        assert (out[~mask] == 100).all()


class TestPseudoAnomaly:
    def test_only_the_mask_changes_and_all_of_it(self) -> None:
        good = scan()
        made = pseudo_anomaly(good, Augmentation(pose="none"), [donor(), donor()])
        assert made.mask.sum() > 100
        np.testing.assert_array_equal(made.xyz[~made.mask], good.xyz[~made.mask])
        np.testing.assert_array_equal(made.rgb[~made.mask], good.rgb[~made.mask])
        assert (made.xyz[made.mask, 2] != good.xyz[made.mask, 2]).all()
        np.testing.assert_array_equal(made.xyz[..., :2], good.xyz[..., :2])
        assert made.info["pseudo"] == "surface"
        assert made.label == 0

    def test_the_input_is_left_alone(self) -> None:
        good = scan()
        for array in (good.xyz, good.rgb, good.mask):
            array.setflags(write=False)
        pseudo_anomaly(good, Augmentation(), [donor()])
        assert not good.mask.any()

    def test_seed_index_and_sample_decide_everything(self) -> None:
        augmentation = Augmentation(seed=3, index=1, geometry="consistent")
        first = pseudo_anomaly(scan(), augmentation, [donor()])
        np.random.seed(5)
        again = pseudo_anomaly(scan(), augmentation, [donor()])
        for name in ("xyz", "rgb", "mask"):
            np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
        others = [
            pseudo_anomaly(scan(), augmentation.model_copy(update={"seed": 4}), [donor()]),
            pseudo_anomaly(scan(), augmentation.model_copy(update={"index": 2}), [donor()]),
            pseudo_anomaly(scan("001"), augmentation, [donor()]),
        ]
        assert not any(np.array_equal(first.mask, other.mask) for other in others)

    @pytest.mark.parametrize("kind", ["bump", "hole"])
    def test_kinds(self, kind: str) -> None:
        augmentation = Augmentation(pose="none", **{f"{kind}_probability": 1.0})  # type: ignore[arg-type]
        made = pseudo_anomaly(scan(), augmentation, [donor()])
        assert made.info["pseudo"] == kind
        assert made.mask.any()
        assert valid_pixels(made.xyz)[made.mask].all() == (kind == "bump")
        changed = (made.xyz != scan().xyz).any(axis=-1)
        assert changed[made.mask].mean() > 0.99

    def test_classes_with_one_direction_are_turned_less(self) -> None:
        """The pose range follows the published list of classes."""

        def spread(category: str) -> float:
            tops = []
            for index in range(12):
                sample = scan(category=category)
                marked = sample.rgb.copy()
                marked[:] = 0
                marked[20:30, 55:65] = 255
                made = pseudo_anomaly(replace(sample, rgb=marked), Augmentation(index=index), [donor()])
                bright = np.argwhere((made.rgb[..., 0] > 200) & ~made.mask)
                if len(bright):
                    tops.append(bright.mean(axis=0))
            return float(np.std(tops, axis=0).max())

        assert spread("bagel") > 2 * spread("rope")

    def test_a_donor_of_another_size_and_a_cloud_padded_further_than_its_image(self) -> None:
        small = scan("small", rgb=np.zeros((60, 60, 3), np.uint8), xyz=dome(60), mask=np.zeros((60, 60), bool))
        made = pseudo_anomaly(scan(xyz=np.pad(dome(), ((10, 10), (10, 10), (0, 0)))), Augmentation(), [small, small])
        assert made.xyz.shape == made.rgb.shape == (SIDE, SIDE, 3)
        assert made.mask.any()

    def test_without_donors_the_scan_is_its_own(self) -> None:
        made = pseudo_anomaly(scan(), Augmentation(donors="self", pose="none"))
        assert made.mask.any()
        assert (made.xyz[made.mask, 2] != scan().xyz[made.mask, 2]).any()

    def test_no_point_is_an_error_that_names_the_sample(self) -> None:
        with pytest.raises(ValueError, match="train/good/000"):
            pseudo_anomaly(scan(xyz=np.zeros((SIDE, SIDE, 3), np.float32)), Augmentation(), [donor()])

    def test_settings_are_checked(self) -> None:
        # the word on the command line reads as no value
        assert Augmentation.model_validate({"pose": None}).pose == "none"
        with pytest.raises(ValueError, match="must not exceed 1"):
            Augmentation(bump_probability=0.7, hole_probability=0.5)

    def test_the_limit_counts_over_all_copies(self) -> None:
        made = [Augmentation(index=k, limit=5).wanted(i, 3) for k in range(3) for i in range(3)]
        assert made == [True] * 5 + [False] * 4

    def test_a_limit_is_no_part_of_the_key(self) -> None:
        assert Augmentation(limit=5).canonical() == Augmentation().canonical()


def test_contact_sheet() -> None:
    pair = (scan(), pseudo_anomaly(scan(), Augmentation(), [donor()]))
    sheet = contact_sheet([pair, pair], side=50)
    assert sheet.shape == (2 * 54, 5 * 54, 3)
    assert (sheet[:50, 4 * 54 : 5 * 54 - 4, 0] != sheet[:50, 2 * 54 : 3 * 54 - 4, 0]).any()
    with pytest.raises(ValueError, match="pairs"):
        contact_sheet([])
