"""Leaderboards as tables, tidy CSV and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from mmad_cli.reports.data import csv_text, exact
from mmad_cli.reports.document import NOT_AVAILABLE, NOT_COMPARABLE, Cell, Document, Notes, Section, format_number
from mmad_cli.results.compare import MEAN
from mmad_cli.results.leaderboard import Leaderboard, Row, Score
from mmad_cli.results.metric_names import label

NO_RANK = "–"

COLUMNS = (
    "dataset",
    "category",
    "metric",
    "rank",
    "method",
    "variant",
    "recipe",
    "modality",
    "source",
    "published",
    "published_as",
    "seeds",
    "value",
    "std",
    "low",
    "high",
    "confidence",
    "ranked",
    "not_comparable",
    "note",
)


def leaderboard_document(boards: Sequence[Leaderboard]) -> Document:
    """A section per leaderboard."""
    return Document(tuple(_section(board) for board in boards))


def leaderboard_csv(boards: Sequence[Leaderboard]) -> str:
    """One number per line, with full precision; an empty field is unknown or does not apply."""
    return csv_text(COLUMNS, [line for board in boards for line in _lines(board)])


def leaderboard_json(boards: Sequence[Leaderboard]) -> str:
    """A list with the boards, their rows and the numbers by metric."""
    return json.dumps([_board_data(board) for board in boards], indent=2, ensure_ascii=False, allow_nan=False) + "\n"


# -- table ---------------------------------------------------------------------------------------------------------


def _section(board: Leaderboard) -> Section:
    notes = Notes()
    what = "mean over categories" if board.category == MEAN else f"category {board.category}"
    return Section(
        title=f"Leaderboard on {board.dataset}",
        subtitle=f"{what}, ranked by {label(board.metrics[0])}",
        header=("rank", "method", "variant", "modality", "source", *map(label, board.metrics)),
        rows=tuple(_cells(board, row, notes) for row in board.rows),
        text_columns=5,
        warnings=_warnings(board),
        notes=(*notes.lines(), *_explanations(board), *_sources(board)),
    )


def _cells(board: Leaderboard, row: Row, notes: Notes) -> tuple[Cell, ...]:
    rank = row.scores[board.metrics[0]].rank
    return (
        Cell(NO_RANK if rank is None else str(rank)),
        Cell(row.method, mark=NOT_COMPARABLE if row.reasons else ""),
        Cell(f"{row.variant} ({row.recipe})" if row.recipe not in ("", "official") else row.variant),
        Cell(row.modality),
        Cell(_source(row)),
        *(_score_cell(board, row, metric, notes) for metric in board.metrics),
    )


def _score_cell(board: Leaderboard, row: Row, metric: str, notes: Notes) -> Cell:
    score = row.scores[metric]
    if score.value is None:
        # What a source did not print needs no note
        return Cell(NO_RANK) if row.published else Cell(NOT_AVAILABLE, mark=notes.mark(score.note or "not computed"))
    text = format_number(score.value)
    return Cell(
        text if score.std is None else f"{text} ± {format_number(score.std)}",
        bold=score.rank == 1 and sum(other.scores[metric].rank is not None for other in board.rows) > 1,
        mark=notes.mark(score.note) if score.note else "",
        detail=f"{format_number(score.interval[0])} to {format_number(score.interval[1])}" if score.interval else "",
    )


def _source(row: Row) -> str:
    """The source without the variant, which has its own column."""
    if not row.published:
        return row.source
    group, *parts = row.source.split(":")
    if row.variant in parts:
        parts.remove(row.variant)
    return ":".join([group, *parts])


def _name(row: Row) -> str:
    return f"{row.method} {row.variant}".strip() + f" ({_source(row)})"


def _warnings(board: Leaderboard) -> tuple[str, ...]:
    """Why rows do not compare; rows with the same reasons share a line."""
    by_reasons: dict[tuple[tuple[str, ...], bool], list[str]] = {}
    for row in board.rows:
        if row.reasons:
            by_reasons.setdefault((row.reasons, row.ranked), []).append(_name(row))
    return tuple(
        f"{NOT_COMPARABLE} {', '.join(names)}: not comparable with "
        f"{'published numbers' if ranked else 'the ranked rows'}: {'; '.join(reasons)}"
        for (reasons, ranked), names in by_reasons.items()
    )


def _explanations(board: Leaderboard) -> list[str]:
    scores = [score for row in board.rows for score in row.scores.values()]
    texts = []
    if any(score.std is not None for score in scores):
        texts.append("±: sample standard deviation over the seeds of the runs.")
    if any(score.interval for score in scores):
        texts.append(
            f"a to b: {100 * board.confidence:g} % interval over test images, from {board.draws} bootstrap draws "
            "within the good and within the anomalous images of each category. Print does not give one."
        )
    return texts + _missing_intervals(board)


def _missing_intervals(board: Leaderboard) -> list[str]:
    """Which numbers of runs have no interval and why; one line per reason."""
    found: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for row in board.rows:
        for metric, score in row.scores.items():
            if score.no_interval:
                metrics, names = found.setdefault(score.no_interval, ({}, {}))
                metrics[label(metric)] = names[_name(row)] = None
    runs = sum(not row.published for row in board.rows)
    return [
        f"No interval for {', '.join(metrics)}{'' if len(names) == runs else ' of ' + ', '.join(names)}: {reason}."
        for reason, (metrics, names) in found.items()
    ]


def _sources(board: Leaderboard) -> list[str]:
    found = {(row.source.partition(":")[0], row.source_text) for row in board.rows if row.published}
    return [f"{name}: {text}" for name, text in sorted(found)]


# -- data ----------------------------------------------------------------------------------------------------------


def _lines(board: Leaderboard) -> Iterator[tuple[Any, ...]]:
    for row in board.rows:
        for metric in board.metrics:
            score = row.scores[metric]
            low, high = score.interval or (None, None)
            yield (
                board.dataset,
                board.category,
                metric,
                "" if score.rank is None else score.rank,
                row.method,
                row.variant,
                row.recipe,
                row.modality,
                row.source,
                str(row.published).lower(),
                row.published_as,
                " ".join(map(str, row.seeds)),
                *map(exact, (score.value, score.std, low, high)),
                exact(board.confidence) if score.interval else "",
                str(row.ranked).lower(),
                "; ".join(row.reasons),
                score.note,
            )


def _board_data(board: Leaderboard) -> dict[str, Any]:
    return {
        "dataset": board.dataset,
        "category": board.category,
        "metrics": list(board.metrics),
        "confidence": board.confidence,
        "draws": board.draws,
        "rows": [_row_data(row) for row in board.rows],
    }


def _row_data(row: Row) -> dict[str, Any]:
    return {
        "method": row.method,
        "variant": row.variant,
        "recipe": row.recipe or None,
        "modality": row.modality or None,
        "source": row.source,
        "source_text": row.source_text or None,
        "published": row.published,
        "published_as": row.published_as or None,
        "run_ids": list(row.run_ids),
        "seeds": list(row.seeds),
        "ranked": row.ranked,
        "not_comparable": list(row.reasons),
        "scores": {metric: _score_data(score) for metric, score in row.scores.items()},
    }


def _score_data(score: Score) -> dict[str, Any]:
    return {
        "value": score.value,
        "std": score.std,
        "interval": None if score.interval is None else list(score.interval),
        "rank": score.rank,
        "note": score.note or None,
        "no_interval": score.no_interval or None,
    }
