from __future__ import annotations

import statistics

import numpy as np
import pytest

from mmad_cli.errors import UsageError
from mmad_cli.metrics import all_metrics, image_auroc
from mmad_cli.metrics.bootstrap import count_pixels, draw_weights, image_draws, percentile_interval
from mmad_cli.results.leaderboard import BoardRun, build_leaderboards
from mmad_cli.results.reference import find_references
from mmad_cli.results.runs import SampleScore
from mmad_cli.results.schema import CategoryResult

LABELS = np.repeat([0, 1], [10, 20])


def samples(scores, labels=LABELS):
    defects = ["dent" if label else "good" for label in labels]
    return [
        SampleScore(f"test/{defect}/{index:03d}", defect, int(label), float(score))
        for index, (defect, label, score) in enumerate(zip(defects, labels, scores, strict=True))
    ]


@pytest.fixture
def scored_run(make_run):
    """A run whose I-AUROC is that of its scores; `skill` moves the defective images away from the good ones."""

    def build(skill=1.0, categories=("a", "b"), seed=0, run_id="run", **options):
        rng = np.random.default_rng([seed, int(100 * skill)])
        scores = {name: samples(rng.normal(skill * LABELS, 1.0)) for name in categories}
        values = {
            name: {"i_auroc": image_auroc(LABELS, [row.image_score for row in rows])} for name, rows in scores.items()
        }
        run = make_run(values, dataset=options.pop("dataset", "folder"), seed=seed, **options)
        run.run_id = f"{run_id}-{seed}"
        return BoardRun(run, "3D", scores)

    return build


def board(*runs, published=(), **options):
    (found,) = build_leaderboards(list(runs), published, **options)
    return found


def test_rows_are_ranked_by_the_first_metric(make_run):
    worse = make_run({"a": {"i_auroc": 0.8, "p_auroc": 0.99}}, variant="raw", dataset="folder")
    better = make_run({"a": {"i_auroc": 0.9, "p_auroc": 0.95}}, variant="fpfh", dataset="folder")
    found = board(BoardRun(worse), BoardRun(better))
    assert [row.variant for row in found.rows] == ["fpfh", "raw"]
    assert [row.scores["i_auroc"].rank for row in found.rows] == [1, 2]
    assert [row.scores["p_auroc"].rank for row in found.rows] == [2, 1]
    assert [r.variant for r in board(BoardRun(worse), BoardRun(better), metrics=["p_auroc"]).rows] == ["raw", "fpfh"]


def test_equal_values_as_printed_share_a_rank(make_run):
    values = {"x": 0.9001, "y": 0.9004, "z": 0.85}
    runs = [BoardRun(make_run({"a": {"i_auroc": v}}, variant=n, dataset="folder")) for n, v in values.items()]
    assert [row.scores["i_auroc"].rank for row in board(*runs).rows] == [1, 1, 3]


def test_lower_is_better_for_false_positive_rates(make_run):
    runs = [BoardRun(make_run({"a": {"i_fpr95": v}}, variant=str(v), dataset="folder")) for v in (0.5, 0.1)]
    found = board(*runs, metrics=["i_fpr95"])
    assert [(row.variant, row.scores["i_fpr95"].rank) for row in found.rows] == [("0.1", 1), ("0.5", 2)]


def test_runs_that_differ_in_their_seed_are_one_row_with_spread(scored_run):
    runs = [scored_run(seed=seed) for seed in range(3)]
    (row,) = board(*runs).rows
    means = [run.result.mean["i_auroc"] for run in runs]
    score = row.scores["i_auroc"]
    assert score.value == pytest.approx(statistics.mean(means)) and score.std == pytest.approx(statistics.stdev(means))
    assert row.seeds == (0, 1, 2) and row.run_ids == ("run-0", "run-1", "run-2")
    low, high = score.interval
    assert low < score.value < high


def test_intervals_are_those_of_the_draws_and_repeat(scored_run):
    run = scored_run(categories=("a",))
    low, high = board(run, draws=200, confidence=0.8).rows[0].scores["i_auroc"].interval
    assert (low, high) == board(run, draws=200, confidence=0.8).rows[0].scores["i_auroc"].interval
    scores = [row.image_score for row in run.scores["a"]]
    values = image_draws(LABELS, scores, draw_weights(LABELS, 4000, seed=99))["i_auroc"]
    assert (low, high) == pytest.approx(percentile_interval(values, 0.8), abs=0.02)
    wide = board(run, draws=200, confidence=0.99).rows[0].scores["i_auroc"].interval
    assert wide[0] < low and high < wide[1]


def test_the_mean_over_categories_is_surer_than_one(scored_run):
    run = scored_run(categories=tuple("abcdefgh"))
    mean = board(run).rows[0].scores["i_auroc"].interval
    single = board(run, categories=["a"]).rows[0].scores["i_auroc"].interval
    assert (mean[1] - mean[0]) < 0.6 * (single[1] - single[0])


def test_no_draws_no_intervals(scored_run):
    score = board(scored_run(), draws=0).rows[0].scores["i_auroc"]
    assert score.interval is None and score.no_interval == ""


def test_why_there_is_no_interval_is_said(scored_run, make_run):
    run = scored_run()
    run.result.categories["a"].metrics["p_auroc"] = 0.9
    run.result.categories["b"].metrics["p_auroc"] = 0.9
    run.result.update_mean()
    assert "save-maps" in board(run).rows[0].scores["p_auroc"].no_interval
    bare = BoardRun(run.result)
    assert board(bare).rows[0].scores["i_auroc"].no_interval == "the run folder has no scores.csv"
    other = BoardRun(run.result, scores={**run.scores, "a": samples(LABELS)})
    assert "a: the scores or maps in the run folder give 1.0000" in board(other).rows[0].scores["i_auroc"].no_interval


def test_seeds_with_other_test_images_have_no_interval(scored_run):
    one, two = scored_run(seed=0), scored_run(seed=1)
    shuffled = [row._replace(id=f"{row.id}x") for row in two.scores["a"]]
    changed = BoardRun(two.result, scores={**two.scores, "a": shuffled})
    assert board(one, changed).rows[0].scores["i_auroc"].no_interval == "a: the seeds have other test images"


def test_pixel_intervals_come_from_counts_of_saved_maps(make_run):
    rng = np.random.default_rng(0)
    masks = np.zeros((30, 32, 32), dtype=bool)
    masks[LABELS == 1, 8:14, 8:14] = True
    maps = rng.normal(2.0 * masks, 1.0)
    scores = maps.max(axis=(1, 2))
    values = all_metrics(LABELS, scores, masks, maps).values
    run = make_run({"a": values}, dataset="folder")
    found = BoardRun(run, scores={"a": samples(scores)}, pixels={"a": count_pixels(masks, maps)})
    keys = ["p_auroc", "aupro_30", "aupro_30_grid100", "p_ap"]
    row = board(found, metrics=keys).rows[0]
    for key in keys[:3]:
        low, high = row.scores[key].interval
        assert low < values[key] < high and high - low < 0.2
    assert row.scores["p_ap"].no_interval == "not drawn for this metric"


# -- published rows ------------------------------------------------------------------------------------------------


def test_published_rows_stand_on_the_board_of_their_dataset(make_run, mvtec3d_categories):
    run = make_run({key: {"i_auroc": 0.9, "p_auroc": 0.9, "aupro_30_grid100": 0.9} for key in mvtec3d_categories})
    published = [*find_references("btf-readme", "--include"), *find_references("mafr-paper", "--include")]
    mvtec, eyecandies = build_leaderboards([BoardRun(run)], published)
    assert (mvtec.dataset, eyecandies.dataset) == ("mvtec3d", "eyecandies")
    assert mvtec.metrics == ("i_auroc", "p_auroc", "aupro_30_grid100")
    assert [row.scores["i_auroc"].rank for row in mvtec.rows[:3]] == [1, 2, 3]
    first, second = mvtec.rows[:2]
    assert first.source == "mafr-paper:rgb+3d" and first.published and first.modality == "RGB+3D"
    assert second.run_ids == ("run-1",) and second.reasons == () and second.ranked
    assert first.scores["p_auroc"].value is None
    assert second.scores["p_auroc"].rank == 11, "ten of the rows of BTF have more than 0.9"


def test_beside_print_a_run_that_is_not_comparable_has_no_rank(make_run, mvtec3d_categories):
    run = make_run({key: {"i_auroc": 0.99} for key in mvtec3d_categories}, not_comparable=["stand-in weights: x"])
    published = find_references("m3dm-paper:dino", "--include")
    row = board(BoardRun(run), published=published).rows[0]
    assert not row.ranked and row.scores["i_auroc"].rank is None and row.reasons == ("stand-in weights: x",)
    # among runs alone the same doubt is told but does not matter
    row = board(BoardRun(run)).rows[0]
    assert row.ranked and row.scores["i_auroc"].rank == 1 and row.reasons == ("stand-in weights: x",)


def test_few_shot_runs_are_ranked_with_few_shot_rows(make_run, mvtec3d_categories):
    published = [r for r in find_references("cif-paper", "--include") if r.shots == 2]
    values = {key: {"i_auroc": 0.8} for key in mvtec3d_categories}
    few = make_run(values, shots=2, not_comparable=["shots: 2 training samples per category"])
    full = make_run(values, variant="raw")
    rows = {row.variant: row for row in board(BoardRun(few), BoardRun(full), published=published).rows}
    assert rows["fpfh"].ranked and rows["fpfh"].reasons == ()
    assert not rows["raw"].ranked
    assert rows["raw"].reasons == ("all samples for training, most rows here have 2 samples",)


def test_a_mean_over_fewer_categories_is_not_ranked(make_run):
    run = make_run({"bagel": {"i_auroc": 0.999}})
    (score,) = [row.scores["i_auroc"] for row in board(BoardRun(run)).rows]
    assert score.rank is None and score.note == "mean over 1 of 10 categories"


def test_boards_of_categories_take_printed_categories(make_run, mvtec3d_categories):
    run = make_run({name: {"i_auroc": 0.1 * index} for index, name in enumerate(mvtec3d_categories)})
    published = find_references("btf-readme:fpfh:raw", "--include")
    boards = build_leaderboards([BoardRun(run)], published, metrics=["i_auroc"], categories=["Cable-Gland", "tire"])
    assert [found.category for found in boards] == ["Cable-Gland", "tire"]
    values = {row.published: row.scores["i_auroc"].value for row in boards[0].rows}
    assert values == {True: 0.533, False: 0.1}


# -- runs among themselves -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shots": 5}, "5 samples for training, most rows here have all samples"),
        ({"limit": 2}, "limit 2, most rows here have none"),
        ({"full_resolution": True}, "metrics at scan size, most rows here at 224 x 224"),
    ],
)
def test_runs_under_other_conditions_are_flagged_and_not_ranked(make_run, options, words):
    values = {"a": {"i_auroc": 0.9}}
    runs = [make_run(values, variant=name, dataset="folder") for name in ("x", "y")]
    odd = make_run({"a": {"i_auroc": 0.95}}, variant="odd", dataset="folder", **options)
    rows = board(*map(BoardRun, [*runs, odd])).rows
    assert [(row.variant, row.ranked, row.scores["i_auroc"].rank) for row in rows] == [
        ("odd", False, None), ("x", True, 1), ("y", True, 1),
    ]  # fmt: skip
    assert rows[0].reasons == (words,)


def test_other_content_is_another_board_or_a_flag(make_run):
    own = [make_run({"a": {"i_auroc": 0.9}}, dataset="folder", variant=str(index)) for index in range(2)]
    own[1].dataset.digest = "other"
    assert len(build_leaderboards([BoardRun(run) for run in own])) == 2
    known = [make_run({"a": {"i_auroc": 0.9}}, variant=str(index)) for index in range(3)]
    known[2].dataset.digest = "other"
    rows = board(*map(BoardRun, known)).rows
    assert [row.reasons for row in rows] == [(), (), ("other data than most runs here",)]


def test_failed_and_missing_categories_are_told(make_run):
    run = make_run({"a": {"i_auroc": 0.9}, "b": {"i_auroc": 0.8}, "c": {"i_auroc": 0.7}}, dataset="folder")
    run.set_category("b", CategoryResult(status="failed", error="no memory"))
    del run.categories["c"]
    run.update_mean()
    row = board(BoardRun(run)).rows[0]
    assert row.reasons == ("no result for b, c",)
    assert row.scores["i_auroc"].note == "mean over 1 of 3 categories"
    score = board(BoardRun(run), categories=["b"]).rows[0].scores["i_auroc"]
    assert score.value is None and score.note == "failed: no memory"


def test_wrong_arguments(make_run):
    run = BoardRun(make_run({"a": {"i_auroc": 0.9}}))
    with pytest.raises(UsageError, match="did you mean 'i_auroc'"):
        build_leaderboards([run], metrics=["i_aurok"])
    with pytest.raises(ValueError, match="between 0 and 1, got 95"):
        build_leaderboards([run], confidence=95)
    with pytest.raises(UsageError, match=r"--include: unknown reference 'btf-readm'; did you mean .*'btf-readme'"):
        find_references("btf-readm", "--include")
