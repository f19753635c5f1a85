"""Fusions without a network, the common scale, and the training of the importance-aware one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmad_cli.errors import DataError
from mmad_cli.methods.experts import Look, Normaliser, Scan
from mmad_cli.methods.iaenet.calibration import Calibration, normalised
from mmad_cli.methods.iaenet.config import IAENetConfig
from mmad_cli.methods.iaenet.fusion import fit_alignment, image_product, image_score, joined
from mmad_cli.methods.iaenet.training import as_maps, as_rows, divide, new_fusion, patch_contexts, train

CELLS = 3136


def test_rules() -> None:
    scores = np.array([[1.0, 2.0, 0.0], [3.0, 0.5, 0.0]])
    assert joined(scores, "mean").tolist() == [2.0, 1.25, 0.0]
    assert joined(scores, "max").tolist() == [3.0, 2.0, 0.0]
    assert joined(scores, "product").tolist() == [3.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="rule"):
        joined(scores, "median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shape"):
        joined(scores[0], "mean")


def test_image_scores() -> None:
    scores = np.arange(4000, dtype=np.float32)
    front = scores < 3000
    assert image_score(scores, front) == 2999
    assert image_score(scores, front, "top") == pytest.approx(np.mean([2997, 2998, 2999]))
    assert image_score(scores, np.zeros(4000, bool)) == 3999
    assert image_product(np.stack([scores, scores / 2999]), front) == pytest.approx(2999)


def test_alignment_brings_both_ends_of_the_range_together() -> None:
    rng = np.random.default_rng(0)
    one, two = rng.normal(5, 1, 4000), rng.normal(80, 20, 4000)
    alignment = fit_alignment([one, two], reference=0)
    for k, values in enumerate((one, two)):
        for sign in (-3, 3):
            moved = alignment.scale[k] * (values.mean() + sign * values.std()) + alignment.offset[k]
            assert moved == pytest.approx(one.mean() + sign * one.std())
    scores = np.array([[6.0, 0.0, 1.0], [60.0, 0.0, 140.0]])
    expected = [
        max(6, alignment.scale[1] * 60 + alignment.offset[1]),
        0,
        alignment.scale[1] * 140 + alignment.offset[1],
    ]
    np.testing.assert_allclose(alignment(scores), expected, rtol=1e-5)
    # zeros are cells that no expert scored
    with_zeros = fit_alignment([np.append(one, np.zeros(99)), two], reference=0)
    assert with_zeros.scale == pytest.approx(alignment.scale)
    with pytest.raises(ValueError, match="reference"):
        fit_alignment([one], reference=1)
    with pytest.raises(ValueError, match="expert 1"):
        fit_alignment([one, np.zeros(3)], reference=0)


def test_common_scale_keeps_empty_cells_at_zero_and_never_goes_below() -> None:
    scores = np.array([[0.0, 4.0, 1.0], [0.0, 1.0, 9.0]], dtype=np.float32)
    u = normalised(scores, (Normaliser(2.0, 2.0), Normaliser(0.0, 3.0)))
    np.testing.assert_allclose(u, [[0, 1, 0], [0, 1 / 3, 3]], rtol=1e-6)


def scan(seed: int, *, pseudo: bool = True, noisy: bool = True) -> Scan:
    """Expert 0 sees the defect; expert 1 says something random of every cell."""
    rng = np.random.default_rng(seed)
    grid = np.mgrid[:56, :56]
    front = (np.abs(grid - 28).max(axis=0) < 20).ravel()
    centre = rng.integers(15, 40, 2)[:, None, None]
    label = (np.abs(grid - centre).max(axis=0) < 4).ravel() & front
    good = rng.uniform(0.2, 1.0, CELLS) + 1.5 * label
    other = rng.uniform(0.2, 2.5, CELLS) if noisy else rng.uniform(0.2, 1.0, CELLS) + 1.5 * label
    scores = np.where(front, np.stack([good, other]), 0).astype(np.float32)
    used = np.arange(int(front.sum()))
    neighbours = rng.integers(0, 20, (len(used), 11))
    looks = tuple(Look(used, used, neighbours, np.repeat(s[front][:, None], 11, 1)) for s in scores)
    return Scan(f"train/good/{seed:03d}", scores, front, looks, label if pseudo else None)


def test_calibration() -> None:
    good, pseudo = scan(0, pseudo=False), scan(1)
    both = Calibration.of([good, pseudo])
    kept = int(good.front.sum()) + int((pseudo.front & ~pseudo.labels()).sum())
    assert both.patches.shape == (kept, 2)
    np.testing.assert_array_equal(both.largest[0], good.scores.max(axis=1))
    # damaged patches have no part in it
    assert both.largest[1][0] <= 1.0
    with pytest.raises(DataError, match="normaliser_on=pseudo"):
        Calibration.of([])


def test_pseudo_anomalies_of_one_training_scan_stay_on_one_side() -> None:
    scans, groups = [scan(i) for i in range(12)], [i % 4 for i in range(12)]
    first, second = divide(scans, groups, seed=0)
    assert sorted([*first, *second]) == list(range(12))
    assert not {groups[i] for i in first} & {groups[i] for i in second}
    assert divide(scans, groups, seed=0) == (first, second)
    # of a single training scan the pseudo anomalies themselves are divided
    alone = divide(scans, [0] * 12, seed=0)
    assert sorted([*alone[0], *alone[1]]) == list(range(12))
    assert len(alone[0]) == 6
    # a half without a defect gets all of them
    sound = scan(99)
    empty = Scan(sound.id, sound.scores, sound.front, sound.looks, np.zeros(CELLS, bool))
    halves = divide([scan(1), empty], [0, 1], seed=0)
    assert [0, 1] in halves


SMALL = {"experts": ("image", "fpfh"), "epochs": 12, "batch_samples": 4}


def trained(seed: int = 0, folder=None, noisy: bool = True, **settings):  # type: ignore[no-untyped-def]
    config = IAENetConfig(**{**SMALL, **settings})
    scans = [scan(i, noisy=noisy) for i in range(12)]
    groups, u = [i % 6 for i in range(12)], [one.scores for one in scans]
    if config.variant == "iaf_f":
        rng = np.random.default_rng(5)
        banks = [rng.standard_normal((20, width)).astype(np.float32) for width in (4, 3)]
        rows = [
            [bank[look.neighbours[:, 0]] + 0.1 * rng.standard_normal((len(look.used), bank.shape[1])) for bank, look in
             zip(banks, one.looks, strict=True)]
            for one in scans
        ]  # fmt: skip
        rows = [[part.astype(np.float32) for part in of] for of in rows]
        data = as_rows(scans, groups, u, rows, banks, seed=seed, device="cpu")
        fusion = new_fusion(config, (4, 3), seed=seed)
    else:
        data = as_maps(scans, groups, u, config, seed=seed, device="cpu")
        fusion = new_fusion(config, (4, 3), seed=seed)
    return (*train(fusion, data, config, seed=seed, folder=folder), data)


class TestTraining:
    @pytest.mark.parametrize("settings", [{}, {"weights": "scaled"}, {"variant": "iaf_f", "batch_patches": 2048}])
    def test_an_expert_that_says_nothing_loses_its_weight(self, settings: dict[str, object]) -> None:
        fusion, curves, data = trained(rate=3e-3, **settings)
        batch = data.judged()
        with torch.no_grad():
            parts = [data.patches(fusion.network, one) for one in batch]
            weights = torch.cat([fusion.weights(part.logits) for part in parts])
            u, label = (torch.cat([getattr(part, name) for part in parts]) for name in ("u", "label"))
        assert weights[label].mean(0)[0] > weights[label].mean(0)[1]

        def separation(fused: torch.Tensor) -> float:
            return float((fused[label][:, None] > fused[~label][None]).float().mean())

        assert separation((weights * u).sum(-1)) > separation(u.mean(-1)) + 0.02
        assert set(curves) == {f"fusion/{name}" for name in ("total", "det", "col", "str", "imp", "bal", "kept_epoch")}
        assert curves["fusion/total"][-1] < curves["fusion/total"][0]

    def test_seed_decides_and_streams_are_left_alone(self) -> None:
        torch.manual_seed(3)
        before = torch.get_rng_state()
        first, again, other = (trained(seed, epochs=2)[0].state_dict() for seed in (1, 1, 2))
        assert torch.equal(before, torch.get_rng_state())
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert any(not torch.equal(first[name], other[name]) for name in first)

    def test_an_interrupted_training_ends_the_same(self, tmp_path) -> None:  # type: ignore[no-untyped-def]
        whole, curves, _ = trained(epochs=4)
        seen = []

        def stop(done: int, total: int) -> None:
            seen.append(done)
            if done >= 5:
                raise KeyboardInterrupt

        config = IAENetConfig(**{**SMALL, "epochs": 4})
        scans = [scan(i) for i in range(12)]
        data = as_maps(scans, [i % 6 for i in range(12)], [s.scores for s in scans], config, seed=0, device="cpu")
        with pytest.raises(KeyboardInterrupt):
            train(new_fusion(config, (4, 3), seed=0), data, config, seed=0, folder=tmp_path, progress=stop)
        assert any(tmp_path.iterdir())
        rest, again = train(new_fusion(config, (4, 3), seed=0), data, config, seed=0, folder=tmp_path)
        assert again == curves
        assert all(torch.equal(value, rest.state_dict()[name]) for name, value in whole.state_dict().items())

    def test_the_kept_epoch_is_the_best_or_the_last(self) -> None:
        best, curves, _ = trained(epochs=6)
        last, _, _ = trained(epochs=6, keep="last")
        assert 1 <= curves["fusion/kept_epoch"][0] <= 6
        if curves["fusion/kept_epoch"][0] < 6:
            assert any(not torch.equal(v, last.state_dict()[n]) for n, v in best.state_dict().items())

    def test_contexts_are_those_of_the_whole_map(self) -> None:
        one = scan(0)
        contexts = patch_contexts(one.scores, one.front)
        assert contexts.shape == (int(one.front.sum()), 2, 3)
        cell = int(np.flatnonzero(one.front)[500])
        y, x = divmod(cell, 56)
        around = np.log1p(one.scores.reshape(2, 56, 56)[:, y - 1 : y + 2, x - 1 : x + 2])
        np.testing.assert_allclose(contexts[500, :, 1], around.mean((1, 2)), rtol=1e-5)
        np.testing.assert_allclose(contexts[500, :, 2], around.max((1, 2)), rtol=1e-6)

    def test_pseudo_anomalies_without_a_defect_are_refused(self) -> None:
        sound = scan(0)
        empty = [Scan(sound.id, sound.scores, sound.front, sound.looks, np.zeros(CELLS, bool))] * 2
        config = IAENetConfig(**SMALL)
        data = as_maps(empty, [0, 1], [sound.scores] * 2, config, seed=0, device="cpu")
        with pytest.raises(DataError, match="0 of"):
            train(new_fusion(config, (4, 3), seed=0), data, config, seed=0)
