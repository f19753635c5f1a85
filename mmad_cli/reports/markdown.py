"""Reports as GitHub-flavoured Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mmad_cli.reports.document import Cell, Document, Section


def render_markdown(document: Document) -> str:
    """Sections with a heading, a table and lists of warnings and notes."""
    return "\n".join(_section(section) for section in document.sections)


def escape_markdown(text: str) -> str:
    """Text that Markdown and HTML show as it is, on one line and inside a table cell."""
    text = " ".join(text.split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*|\[\]~$#])", r"\\\1", text)
    # Inside a word an underscore is no emphasis, and names stay readable.
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)


def _section(section: Section) -> str:
    blocks = [f"### {escape_markdown(section.title)}"]
    if section.subtitle:
        blocks.append(escape_markdown(section.subtitle))
    blocks += [f"> **{escape_markdown(warning)}**" for warning in section.warnings]
    blocks.append(_table(section))
    if section.notes:
        blocks.append("\n".join(f"- {escape_markdown(note)}" for note in section.notes))
    return "\n\n".join(blocks) + "\n"


def _table(section: Section) -> str:
    alignment = [":--" if i < section.text_columns else "--:" for i in range(len(section.header))]
    lines = [_line([escape_markdown(text) for text in section.header]), _line(alignment)]
    lines += [_line([_cell(cell) for cell in row]) for row in section.rows]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: Cell) -> str:
    text = escape_markdown(cell.text)
    text = f"**{text}**" if cell.bold and text else text
    text = f"{text}<sup>{escape_markdown(cell.mark)}</sup>" if cell.mark else text
    return f"{text}<br><sub>{escape_markdown(cell.detail)}</sub>" if cell.detail else text
