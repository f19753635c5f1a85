"""Reports as LaTeX tables with booktabs rules."""

from __future__ import annotations

from mmad_cli.reports.document import Cell, Document, Section

# Brackets and the asterisk would be read as arguments of the line break or the rule before them.
_ESCAPES = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    "†": r"$\dagger$",
    "±": r"$\pm$",
}


def render_latex(document: Document) -> str:
    r"""Table environments for `\input`; the document needs `\usepackage{booktabs}`."""
    if not document.sections:
        return ""
    return "% needs \\usepackage{booktabs}\n" + "\n".join(_section(s) for s in document.sections)


def escape_latex(text: str) -> str:
    """Text that LaTeX sets as it is, on one line."""
    return "".join(_ESCAPES.get(character, character) for character in " ".join(text.split()))


def _section(section: Section) -> str:
    columns = "l" * section.text_columns + "r" * (len(section.header) - section.text_columns)
    lines = [
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{escape_latex(_caption(section))}}}",
        rf"  \begin{{tabular}}{{{columns}}}",
        r"    \toprule",
        _line(tuple(Cell(text) for text in section.header)),
        r"    \midrule",
    ]
    for index, row in enumerate(section.rows):
        if index == section.rule_before and index:
            lines.append(r"    \midrule")
        lines.append(_line(row))
    lines += [r"    \bottomrule", r"  \end{tabular}"]
    remarks = [*section.warnings, *section.notes]
    lines += [rf"  \par\footnotesize {escape_latex(remark)}" for remark in remarks]
    lines.append(r"\end{table}")
    return "\n".join(lines) + "\n"


def _caption(section: Section) -> str:
    return f"{section.title}. {section.subtitle}." if section.subtitle else f"{section.title}."


def _line(row: tuple[Cell, ...]) -> str:
    return f"    {' & '.join(map(_cell, row))} \\\\"


def _cell(cell: Cell) -> str:
    text = escape_latex(cell.text)
    text = rf"\textbf{{{text}}}" if cell.bold else text
    return rf"{text}\textsuperscript{{{escape_latex(cell.mark)}}}" if cell.mark else text
