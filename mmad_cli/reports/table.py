"""Reports as tables for the terminal."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mmad_cli.reports.document import Cell, Document, Section

_STYLES = {"plain": "", "good": "green", "bad": "red", "warn": "yellow"}

_TEXT_WIDTH = 100

_NUMBER = "0.000"


def table_renderable(document: Document) -> RenderableType:
    """All sections. Texts are never read as rich markup: a category may be called `[red]`."""
    return Group(*(part for section in document.sections for part in _parts(section)))


def table_text(document: Document) -> str:
    """The same as plain text, as wide as its widest table: nothing is cut when the output goes to a file."""
    widths = [_width(_table(section)) for section in document.sections]
    text = io.StringIO()
    console = Console(file=text, width=max([_TEXT_WIDTH, *widths]), no_color=True, highlight=False)
    console.print(table_renderable(document))
    return "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())


@dataclass(frozen=True)
class _Fitted:
    """The table of a section; on a console that is too narrow for it, rows as columns or several tables."""

    section: Section

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        whole = [_table(self.section)]
        if self.section.transposable:
            whole.append(_transposed(self.section))
        for table in whole:
            if _width(table) <= options.max_width:
                yield table
                return
        for number, part in enumerate(_by_columns(self.section, options.max_width)):
            if number:
                yield Text("")
            yield _table(part)


def _by_columns(section: Section, width: int) -> list[Section]:
    """The same with as many columns of numbers at a time as fit beside those of text, at least one."""
    text, count = section.text_columns, len(section.header)
    parts, first = [], text
    while first < count:
        end = first + 1
        while end < count and _width(_table(_some_columns(section, first, end + 1))) <= width:
            end += 1
        parts.append(_some_columns(section, first, end))
        first = end
    return parts or [section]


def _some_columns(section: Section, first: int, end: int) -> Section:
    """The columns of text and those from `first` to before `end`."""
    text = section.text_columns
    rows = tuple((*row[:text], *row[first:end]) for row in section.rows)
    return replace(section, header=(*section.header[:text], *section.header[first:end]), rows=rows)


def _width(table: Table) -> int:
    console = Console(file=io.StringIO(), width=100_000)
    return Measurement.get(console, console.options, table).maximum


def _parts(section: Section) -> list[RenderableType]:
    parts: list[RenderableType] = [Text(section.title, style="bold")]
    if section.subtitle:
        parts.append(Text(section.subtitle))
    parts += [Text(warning, style="yellow") for warning in section.warnings]
    parts.append(_Fitted(section))
    parts += [Padding(Text(note, style="dim"), (0, 0, 0, 1), expand=False) for note in section.notes]
    parts.append(Text(""))
    return parts


def _table(section: Section) -> Table:
    table = _empty_table([Text(header) for header in section.header], section.text_columns)
    for index, row in enumerate(section.rows):
        table.add_row(*map(_cell, row), end_section=index + 1 == section.rule_before)
    return table


def _transposed(section: Section) -> Table:
    heads, *columns = zip(*section.rows, strict=True)
    table = _empty_table([Text("category"), *map(_cell, heads)], text_columns=1)
    for name, cells in zip(section.header[1:], columns, strict=True):
        table.add_row(Text(name), *map(_cell, cells))
    return table


def _empty_table(headers: Sequence[Text], text_columns: int) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, header in enumerate(headers):
        is_text = index < text_columns
        # A column of numbers is never narrower than they are: 0.82 above 0 is no number.
        table.add_column(
            header,
            justify="left" if is_text else "right",
            overflow="fold",
            min_width=None if is_text else len(_NUMBER),
        )
    return table


def _cell(cell: Cell) -> Text:
    style = " ".join(filter(None, ["bold" if cell.bold else "", _STYLES[cell.tone]]))
    text = Text(cell.text, style=style)
    if cell.mark:
        text.append(f" {cell.mark}" if not cell.mark.isdigit() else f" ({cell.mark})", style="dim")
    if cell.detail:
        text.append(f"\n{cell.detail}", style="dim")
    return text
