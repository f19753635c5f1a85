"""Many runs and published rows in one table: what each gave, how sure that is, its rank, and what does not compare.

A row is a group of runs that differ in nothing but their seed, or one published row. Its values are the means over
categories, or those of one category. Runs have a spread over their seeds and, where their scores are at hand, an
interval over the test images (`mmad_cli.metrics.bootstrap`); print has neither.

Only rows that compare with each other have a rank. Beside published rows these are the runs that compare with print;
among runs alone, those that saw the same samples in the same way as most of the others.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mmad_cli.errors import unknown_name
from mmad_cli.results.compare import MEAN
from mmad_cli.results.metric_names import DEFAULT_METRICS, METRICS, check_metrics, default_metrics, higher_is_better
from mmad_cli.results.reference import DATASET_CATEGORIES, Reference, fold, match_category
from mmad_cli.results.runs import SampleScore
from mmad_cli.results.schema import RunResult
from mmad_cli.results.seeds import SeedGroup, Spread, group_runs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mmad_cli.metrics.bootstrap import PixelCounts

DEFAULT_CONFIDENCE = 0.95
DEFAULT_DRAWS = 1000

# Values that agree in so many decimals share a rank: print has no more
DECIMALS = 3

# A run's metrics and those of its scores are the same numbers; pixel curves of the intervals have fewer thresholds
_SAME_IMAGE_VALUE = 1e-6
_SAME_PIXEL_VALUE = 2e-3

# Begins the reason that a run with --shots gives; it holds unless the other rows have as many
_SHOTS_REASON = "shots:"
# The reasons of a run that a difference to the other rows says better
_SETTING_REASONS = (_SHOTS_REASON, "limit:", "full resolution:")

_NO_SCORES = "the run folder has no scores.csv"
_NO_MAPS = "needs the anomaly maps (`mmad evaluate --save-maps`) and the dataset that the run was made on"
_NO_DRAWS = "not drawn for this metric"


@dataclass(frozen=True)
class BoardRun:
    """A run with what lies beside its summary, by category: scores, and pixel counts in the order of the scores."""

    result: RunResult
    modality: str = ""
    scores: Mapping[str, Sequence[SampleScore]] = field(default_factory=dict)
    pixels: Mapping[str, PixelCounts] = field(default_factory=dict)
    # counts of the maps as AUPRO reads them, of methods that scale them for it
    aupro_pixels: Mapping[str, PixelCounts] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """One number of a row. `note` says why it is none, or what it is not over.

    `std` is the sample standard deviation over the seeds, `interval` the bootstrap interval over test images, and
    `no_interval` why there is none. `complete`: over all categories that any row is over.
    """

    value: float | None = None
    std: float | None = None
    interval: tuple[float, float] | None = None
    rank: int | None = None
    note: str = ""
    no_interval: str = ""
    complete: bool = True


@dataclass(frozen=True)
class Setting:
    """What rows must agree in to be ranked together; `content` tells test data apart, where that is known."""

    shots: int | None = None
    limit: int | None = None
    full_resolution: bool = False
    content: str | None = None


@dataclass(frozen=True)
class Row:
    """Where the numbers are from, the numbers by metric, and why they do not compare with the other rows.

    `reasons` are all doubts; `ranked` is false where they keep the row out of the ranking.
    """

    method: str
    variant: str
    modality: str
    source: str
    published: bool
    setting: Setting
    recipe: str = ""
    published_as: str = ""
    source_text: str = ""
    run_ids: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    scores: Mapping[str, Score] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    ranked: bool = True


@dataclass(frozen=True)
class Leaderboard:
    """Rows for one dataset, best first by the first metric; `category` is `mean` or the name of one."""

    dataset: str
    category: str
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    confidence: float = DEFAULT_CONFIDENCE
    draws: int = DEFAULT_DRAWS


@dataclass(frozen=True)
class _Board:
    """What the rows of one leaderboard are made for."""

    dataset: str
    category: str
    confidence: float
    draws: int

    @property
    def is_mean(self) -> bool:
        return self.category == MEAN


def build_leaderboards(
    runs: Sequence[BoardRun],
    published: Sequence[Reference] = (),
    metrics: Sequence[str] | None = None,
    categories: Sequence[str] | None = None,
    confidence: float = DEFAULT_CONFIDENCE,
    draws: int = DEFAULT_DRAWS,
) -> list[Leaderboard]:
    """A leaderboard per dataset, and per category of `categories` where these are given.

    Published rows stand with the runs on the dataset that they are for; runs on own data share a leaderboard only
    when they are on the same content. `metrics` are the columns, the first of which sorts the rows (default: those of
    the published rows, without such the usual ones). `draws` of 0 leave out the intervals.

    Raises UsageError for an unknown metric, ValueError for a confidence that is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    if metrics:
        found = {key for run in runs for result in run.result.categories.values() for key in result.metrics}
        metrics = check_metrics(metrics, "--metric", extra=found)
    boards = []
    for dataset, members, references in _by_dataset(runs, published):
        for category in categories or [MEAN]:
            board = _Board(dataset, category, confidence, draws)
            rows = [_run_row(board, group, members) for group in group_runs(run.result for run in members)]
            rows += [_published_row(board, reference) for reference in references]
            boards.append(_leaderboard(board, rows, metrics))
    return boards


def known_category(name: str, runs: Sequence[BoardRun], published: Sequence[Reference]) -> None:
    """Raise UsageError, with the near names, for a category that no row has."""
    known = {category for run in runs for category in run.result.dataset.categories}
    known |= {category for row in published for metric in row.metrics.values() for category in metric.categories}
    if match_category(name, known) is None:
        raise unknown_name("category", name, known, "--category")


def _by_dataset(
    runs: Sequence[BoardRun], published: Sequence[Reference]
) -> list[tuple[str, list[BoardRun], list[Reference]]]:
    found: dict[tuple[str, str], tuple[str, list[BoardRun], list[Reference]]] = {}
    for run in runs:
        dataset = run.result.dataset
        # Content that is not all there is said of the row; other data under one name is another table
        content = "" if dataset.name in DATASET_CATEGORIES else dataset.digest
        found.setdefault((dataset.name, content), (dataset.name, [], []))[1].append(run)
    for reference in published:
        found.setdefault((reference.dataset, ""), (reference.dataset, [], []))[2].append(reference)
    return list(found.values())


def _leaderboard(board: _Board, rows: Sequence[Row], metrics: Sequence[str] | None) -> Leaderboard:
    chosen = tuple(metrics or _usual_metrics(rows))
    rows = [replace(row, scores={key: row.scores.get(key) or Score() for key in chosen}) for row in rows]
    rows = _with_ranks(_with_reasons(rows), chosen)
    rows.sort(key=_best_first(chosen[0]))
    return Leaderboard(board.dataset, board.category, chosen, tuple(rows), board.confidence, board.draws)


def _usual_metrics(rows: Sequence[Row]) -> list[str]:
    """The metrics of print, or where there is none the usual ones that any row has."""
    printed = {key for row in rows if row.published for key in row.scores}
    has = printed or {key for row in rows for key, score in row.scores.items() if score.value is not None}
    chosen = METRICS if printed else default_metrics({row.method for row in rows})
    return [key for key in chosen if key in has] or list(DEFAULT_METRICS[:1])


def _best_first(metric: str) -> Callable[[Row], tuple[bool, float]]:
    sign = -1 if higher_is_better(metric) else 1

    def key(row: Row) -> tuple[bool, float]:
        value = row.scores[metric].value
        return value is None, sign * round(value or 0.0, DECIMALS)

    return key


# -- rows ----------------------------------------------------------------------------------------------------------


def _published_row(board: _Board, reference: Reference) -> Row:
    scores = {}
    for key, metric in reference.metrics.items():
        category = match_category(board.category, metric.categories)
        value = metric.mean if board.is_mean else metric.categories[category] if category else None
        if value is not None:
            scores[key] = Score(value)
    return Row(
        method=reference.method,
        variant=reference.variants[0] if reference.variants else "",
        modality=reference.modality.upper(),
        source=reference.name,
        published=True,
        published_as=reference.published_as,
        setting=Setting(shots=reference.shots),
        source_text=reference.source_text.removeprefix(f"{reference.published_as}: "),
        scores=scores,
    )


def _run_row(board: _Board, group: SeedGroup, members: Sequence[BoardRun]) -> Row:
    first = group.runs[0]
    several = len(group.runs) > 1
    of_group = [next(m for m in members if m.result is run) for run in group.runs]
    return Row(
        method=first.method.shown,
        variant=first.method.variant,
        modality=of_group[0].modality.upper(),
        source=f"{len(group.runs)} runs, seeds {', '.join(map(str, group.seeds))}" if several else first.run_id,
        published=False,
        setting=Setting(first.shots, first.limit, first.full_resolution, _content(board, first)),
        recipe=first.method.recipe,
        run_ids=tuple(run.run_id for run in group.runs),
        seeds=group.seeds,
        scores=_run_scores(board, group, of_group),
        reasons=tuple(dict.fromkeys(reason for run in group.runs for reason in _run_reasons(run))),
    )


def _content(board: _Board, run: RunResult) -> str | None:
    """What tells the test data of two runs apart: the digest, or of a single category its counts."""
    if board.is_mean:
        return run.dataset.digest
    category = match_category(board.category, run.dataset.categories)
    return None if category is None else str(run.dataset.categories[category])


def _run_reasons(run: RunResult) -> list[str]:
    reasons = list(run.not_comparable) or ([] if run.comparable else ["no reason was recorded"])
    lost = [*run.failed_categories, *run.missing_categories]
    return [*reasons, *([f"no result for {', '.join(lost)}"] if lost else [])]


def _run_scores(board: _Board, group: SeedGroup, of_group: Sequence[BoardRun]) -> dict[str, Score]:
    category = None if board.is_mean else match_category(board.category, group.categories)
    if category is None and not board.is_mean:
        return {}
    spreads = group.mean if category is None else group.categories[category]
    draws = _Draws(board, group, of_group)
    return {key: _run_score(board, group, draws, key, category, spread) for key, spread in spreads.items()}


def _run_score(
    board: _Board, group: SeedGroup, draws: _Draws, metric: str, category: str | None, spread: Spread
) -> Score:
    if spread.mean is None:
        return Score(note=_absence(group, metric, category))
    over = [category] if category else [name for name, of in group.categories.items() if of[metric].count]
    interval, why_not = draws.interval(metric, over, tuple(spread.values))
    notes = []
    if spread.count < len(group.seeds):
        notes.append(f"over {spread.count} of {len(group.seeds)} seeds")
    expected = _categories_of_mean(board, group) if category is None else over
    if len(over) < len(expected):
        notes.append(f"mean over {len(over)} of {len(expected)} categories")
    return Score(spread.mean, spread.std, interval, note="; ".join(notes), no_interval=why_not, complete=not notes)


def _categories_of_mean(board: _Board, group: SeedGroup) -> list[str]:
    """All categories that a mean on this dataset is over."""
    here = list(dict.fromkeys([*group.categories, *(n for run in group.runs for n in run.dataset.categories)]))
    folded = {fold(name) for name in here}
    return [*here, *(name for name in DATASET_CATEGORIES.get(board.dataset, ()) if fold(name) not in folded)]


def _absence(group: SeedGroup, metric: str, category: str | None) -> str:
    if category is None:
        return "no category has a value"
    result = group.runs[0].categories.get(category)
    if result is not None and result.status == "failed":
        return f"failed: {result.error}"
    return "not computed by the run" if result is None else result.metrics_null_reasons.get(metric, "not defined")


# -- intervals -----------------------------------------------------------------------------------------------------


class _Draws:
    """Bootstrap draws of one row. All rows draw the same images of a category, and so do its seeds."""

    def __init__(self, board: _Board, group: SeedGroup, members: Sequence[BoardRun]) -> None:
        self._board, self._group = board, group
        self._members = {member.result.seed: member for member in members}
        self._known: dict[tuple[str, int], dict[str, NDArray[Any]]] = {}

    def interval(
        self, metric: str, categories: Sequence[str], seeds: Sequence[int]
    ) -> tuple[tuple[float, float] | None, str]:
        """The interval of the mean over categories and seeds, or why there is none."""
        if not self._board.draws:
            return None, ""
        import numpy as np

        from mmad_cli.metrics.bootstrap import percentile_interval

        parts = []
        for category in categories:
            problem = self._problem(metric, category, seeds)
            if problem:
                return None, problem
            parts.append(np.mean([self._of(category, seed)[metric] for seed in seeds], axis=0))
        return percentile_interval(np.mean(parts, axis=0)[1:], self._board.confidence), ""

    def _problem(self, metric: str, category: str, seeds: Sequence[int]) -> str:
        """Why a metric of a category cannot be drawn; empty when it can."""
        for seed in seeds:
            member = self._members[seed]
            if category not in member.scores:
                return _NO_SCORES
            if _images(member, category) != _images(self._members[seeds[0]], category):
                return f"{category}: the seeds have other test images"
            found = self._of(category, seed)
            if metric not in found:
                return _NO_MAPS if metric in _PIXEL_METRICS and category not in member.pixels else _NO_DRAWS
            tolerance = _SAME_PIXEL_VALUE if metric in _PIXEL_METRICS else _SAME_IMAGE_VALUE
            expected = member.result.categories[category].metrics[metric] or 0.0
            # The first draw is the test set itself
            if abs(found[metric][0] - expected) > tolerance:
                return f"{category}: the scores or maps in the run folder give {found[metric][0]:.4f}"
        return ""

    def _of(self, category: str, seed: int) -> dict[str, NDArray[Any]]:
        if (category, seed) not in self._known:
            self._known[category, seed] = _draw(self._members[seed], category, self._board.draws)
        return self._known[category, seed]


_PIXEL_METRICS = tuple(key for key in METRICS if not key.startswith("i_"))


def _images(member: BoardRun, category: str) -> list[tuple[str, int]]:
    return [(sample.id, sample.label) for sample in member.scores[category]]


def _draw(member: BoardRun, category: str, draws: int) -> dict[str, NDArray[Any]]:
    """All metrics of every draw of one category and seed, after those of the test set itself."""
    import numpy as np

    from mmad_cli.metrics.bootstrap import draw_weights, image_draws, pixel_draws

    labels = [sample.label for sample in member.scores[category]]
    weights = np.vstack([np.ones(len(labels)), draw_weights(labels, draws, seed=zlib.crc32(category.encode()))])
    found: dict[str, NDArray[Any]] = {}
    if len(set(labels)) == 2:
        found |= image_draws(labels, [sample.image_score for sample in member.scores[category]], weights)
    if category in member.pixels:
        found |= pixel_draws(member.pixels[category], weights)
    if category in member.aupro_pixels:
        scaled = pixel_draws(member.aupro_pixels[category], weights)
        found |= {key: values for key, values in scaled.items() if key.startswith("aupro")}
    return found


# -- ranks ---------------------------------------------------------------------------------------------------------


def _with_reasons(rows: Sequence[Row]) -> list[Row]:
    """Rows with all doubts. Beside print every doubt costs the rank, among runs those about the samples do."""
    beside_print = any(row.published for row in rows)
    usual = _usual_setting([row.setting for row in rows])
    made = []
    for row in rows:
        among = _other_settings(row.setting, usual)
        said = _SETTING_REASONS if among else (_SHOTS_REASON,)
        own = [reason for reason in row.reasons if not reason.startswith(said)]
        doubts = among + (own if beside_print else [])
        made.append(replace(row, reasons=(*own, *among), ranked=not doubts))
    return made


def _usual_setting(settings: Sequence[Setting]) -> Setting:
    """What most rows have, each part by itself; of equally many the first."""

    def most(values: Iterable[Any]) -> Any:
        return Counter(values).most_common(1)[0][0]

    known = [setting.content for setting in settings if setting.content is not None]
    return Setting(
        shots=most(setting.shots for setting in settings),
        limit=most(setting.limit for setting in settings),
        full_resolution=most(setting.full_resolution for setting in settings),
        content=most(known) if known else None,
    )


def _other_settings(setting: Setting, usual: Setting) -> list[str]:
    reasons = []
    if setting.shots != usual.shots:
        reasons.append(f"{_samples(setting.shots)} for training, most rows here have {_samples(usual.shots)}")
    if setting.limit != usual.limit:
        reasons.append(f"limit {setting.limit or 'none'}, most rows here have {usual.limit or 'none'}")
    if setting.full_resolution != usual.full_resolution:
        reasons.append(f"metrics at {_size(setting)}, most rows here at {_size(usual)}")
    if setting.content is not None and setting.content != usual.content and not reasons:
        reasons.append("other data than most runs here")
    return reasons


def _samples(shots: int | None) -> str:
    return "all samples" if shots is None else f"{shots} samples"


def _size(setting: Setting) -> str:
    return "scan size" if setting.full_resolution else "224 x 224"


def _with_ranks(rows: Sequence[Row], metrics: Sequence[str]) -> list[Row]:
    """Rank 1 is the best; equal values share a rank and the next one is as much higher."""
    ranks = {metric: _ranks([_ranked_value(row, metric) for row in rows], metric) for metric in metrics}
    return [
        replace(row, scores={key: replace(score, rank=ranks[key][index]) for key, score in row.scores.items()})
        for index, row in enumerate(rows)
    ]


def _ranked_value(row: Row, metric: str) -> float | None:
    score = row.scores[metric]
    return score.value if row.ranked and score.complete else None


def _ranks(values: Sequence[float | None], metric: str) -> list[int | None]:
    sign = 1 if higher_is_better(metric) else -1
    rounded = [None if value is None else sign * round(value, DECIMALS) for value in values]
    present = [value for value in rounded if value is not None]
    return [None if value is None else 1 + sum(other > value for other in present) for value in rounded]
