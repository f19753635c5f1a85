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
    "`": r"\textasciigrave{}",
    "–": "--",
    "†": r"$\dagger$",
    "±": r"$\pm$",
}

# Of the characters beyond ASCII those that pdflatex sets without further packages
_LETTERS = frozenset(
    "ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜÝßàáâãäåæçèéêëìíîïñòóôõöøùúûüýÿĀāĆćČčĎďĒēĚěĞğĪīİŁłŃńŇňŌōŐőŒœŘřŚśŞşŠšŤťŪūŮůŰűŹźŻżŽž"
)

# In characters, at the usual size of letters
_PAGE_WIDTH = 85


def render_latex(document: Document) -> str:
    r"""Table environments for `\input`; the first line says which packages the document needs."""
    if not document.sections:
        return ""
    packages = "booktabs,graphicx" if any(map(_is_wide, document.sections)) else "booktabs"
    return f"% needs \\usepackage{{{packages}}}\n" + "\n".join(_section(s) for s in document.sections)


def escape_latex(text: str) -> str:
    """Text that LaTeX sets as it is, on one line; characters that its standard fonts lack as their code, `U+65E5`."""
    plain = " ".join(text.split())
    # Two hyphens would be set as a dash
    return "".join(_escape(c) if c + before != "--" else "{}-" for before, c in zip(" " + plain, plain, strict=False))


def _escape(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    known = " " <= character <= "~" or character in _LETTERS
    return character if known else f"U+{ord(character):04X}"


def _section(section: Section) -> str:
    columns = "l" * section.text_columns + "r" * (len(section.header) - section.text_columns)
    wide = _is_wide(section)
    lines = [
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{escape_latex(_caption(section))}}}",
        # Only as much smaller as the page wants it
        *([r"  \resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"] if wide else []),
        rf"  \begin{{tabular}}{{{columns}}}",
        r"    \toprule",
        _line(tuple(Cell(text) for text in section.header)),
        r"    \midrule",
    ]
    for index, row in enumerate(section.rows):
        if index == section.rule_before and index:
            lines.append(r"    \midrule")
        lines.append(_line(row))
        if any(cell.detail for cell in row):
            lines.append(r"    \addlinespace")
    lines += [r"    \bottomrule", r"  \end{tabular}" + ("}" if wide else "")]
    remarks = [*section.warnings, *section.notes]
    if remarks:
        lines.append(r"  \par\smallskip")
    lines += [rf"  {{\footnotesize\raggedright {escape_latex(remark)}\par}}" for remark in remarks]
    lines.append(r"\end{table}")
    return "\n".join(lines) + "\n"


def _is_wide(section: Section) -> bool:
    """Whether a table may be wider than a page."""
    rows = [tuple(Cell(text) for text in section.header), *section.rows]
    widths = [max(max(len(cell.text), len(cell.detail)) for cell in column) for column in zip(*rows, strict=True)]
    return sum(widths) + 2 * len(widths) > _PAGE_WIDTH


def _caption(section: Section) -> str:
    return f"{section.title}: {section.subtitle}." if section.subtitle else f"{section.title}."


def _line(row: tuple[Cell, ...]) -> str:
    return f"    {' & '.join(map(_cell, row))} \\\\"


def _cell(cell: Cell) -> str:
    text = escape_latex(cell.text)
    text = rf"\textbf{{{text}}}" if cell.bold else text
    text = rf"{text}\textsuperscript{{{escape_latex(cell.mark)}}}" if cell.mark else text
    if not cell.detail:
        return text
    # A small table of its own: needs no further package
    return rf"\begin{{tabular}}[t]{{@{{}}r@{{}}}}{text}\\\scriptsize {escape_latex(cell.detail)}\end{{tabular}}"
