"""Write the pages that are made from the code: `docs/cli.md` and `docs/run.schema.json`.

    python tools/generate_docs.py [FOLDER]

The text depends on the code only, not on the width of a terminal or the version of a library, so a test can say
whether the pages are current.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"
WIDTH = 110

HEAD = """\
# Command line

Made from the code by `make docs`; do not edit. The same text is shown by `--help` of every command.

Results go to standard output, progress and notices to standard error. Exit codes are in [ci.md](ci.md#exit-codes).
"""


def commands(command: Any, path: tuple[str, ...] = ("mmad",)) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The command and all below it, with their paths, in the order in which they were registered."""
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


def cli_page() -> str:
    """The text of `docs/cli.md`."""
    from typer.main import get_command

    from mmad_cli.cli.app import app

    found = list(commands(get_command(app)))
    overview = ["| command | does |", "|---|---|"]
    for path, command in found[1:]:
        link = "-".join(path)
        overview.append(f"| [`{' '.join(path)}`](#{link}) | {_cell(_paragraphs(command)[0])} |")
    sections = [_section(path, command) for path, command in found]
    return "\n".join([HEAD, *overview, "", "\n".join(sections)])


def examples(command: Any) -> list[str]:
    """Command lines that the help of a command gives as examples."""
    marked = [text for text in _paragraphs(command) if text.startswith("Example: ")]
    return [text.removeprefix("Example: ") for text in marked]


def _paragraphs(command: Any) -> list[str]:
    return [" ".join(part.split()) for part in (command.help or "").split("\n\n")]


def _section(path: tuple[str, ...], command: Any) -> str:
    lines = [f"## {' '.join(path)}", ""]
    for text in _paragraphs(command):
        if not text.startswith("Example: "):
            lines += [*textwrap.wrap(text, WIDTH, break_on_hyphens=False), ""]
    lines += ["```bash", *examples(command), "```", ""]
    arguments = [_argument(parameter) for parameter in command.params if parameter.param_type_name == "argument"]
    options = [_option(parameter) for parameter in command.params if parameter.param_type_name == "option"]
    options = [option for option in options if option]
    if arguments:
        lines += ["| argument | meaning |", "|---|---|", *arguments, ""]
    if options:
        lines += ["| option | meaning |", "|---|---|", *options, ""]
    return "\n".join(lines)


def _argument(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    shown = name if parameter.required else f"[{name}]" + ("..." if parameter.nargs == -1 else "")
    return f"| `{shown}` | {_meaning(parameter)} |"


def _option(parameter: Any) -> str:
    """A table row; empty for what the command-line library adds to every program."""
    if parameter.name in ("install_completion", "show_completion"):
        return ""
    names = ", ".join(f"`{name}`" for name in parameter.opts)
    value = "" if parameter.is_flag else f" `{parameter.metavar or _value_name(parameter)}`"
    return f"| {names}{value} | {_meaning(parameter)} |"


def _value_name(parameter: Any) -> str:
    return str(max(parameter.opts, key=len)).lstrip("-").upper()


def _meaning(parameter: Any) -> str:
    parts = [" ".join((parameter.help or "").split())]
    if parameter.required and parameter.param_type_name == "option":
        parts.append("Required.")
    if parameter.show_default and not getattr(parameter, "is_flag", False) and parameter.default not in (None, [], ()):
        parts.append(f"Default: `{parameter.default}`.")
    if parameter.envvar:
        parts.append(f"Environment variable: `{parameter.envvar}`.")
    return _cell(" ".join(part for part in parts if part))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def write(folder: Path) -> list[Path]:
    """Write the pages; returns their paths."""
    from mmad_cli.results.schema import json_schema_text

    texts = {"cli.md": cli_page(), "run.schema.json": json_schema_text()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    return [folder / name for name in texts]


if __name__ == "__main__":
    for written in write(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS):
        sys.stdout.write(f"{written}\n")
