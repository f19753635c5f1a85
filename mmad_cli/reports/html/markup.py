"""HTML and JSON from texts that nobody has checked: names of categories, files and runs."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping
from typing import Any

# These begin or end markup where a browser reads a script element
_IN_SCRIPT = {"<": r"\u003c", ">": r"\u003e", "&": r"\u0026"}


def clean_text(text: str) -> str:
    """The text without what UTF-8 cannot hold: file names may carry single surrogates, which become U+FFFD."""
    return text.encode("utf-8", errors="surrogatepass").decode("utf-8", errors="replace") if _broken(text) else text


def _broken(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def escape(text: object) -> str:
    """Text for an element or a quoted attribute."""
    return html.escape(clean_text(str(text)), quote=True)


def element(tag: str, content: str = "", attributes: Mapping[str, object] | None = None) -> str:
    """An element around ready markup; an attribute that is None or False is left out, one that is True has no value."""
    parts = [tag]
    for name, value in (attributes or {}).items():
        if value is True:
            parts.append(name)
        elif value is not None and value is not False:
            parts.append(f'{name}="{escape(value)}"')
    return f"<{' '.join(parts)}>{content}</{tag}>"


def text_element(tag: str, text: object, **attributes: object) -> str:
    """An element around plain text. `class_` stands for the attribute `class`."""
    return element(tag, escape(text), {name.rstrip("_").replace("_", "-"): v for name, v in attributes.items()})


def listing(items: Iterable[str], class_: str) -> str:
    """A list of plain texts; nothing where there are none."""
    content = "".join(text_element("li", item) for item in items)
    return element("ul", content, {"class": class_}) if content else ""


def script_json(value: Any) -> str:
    """JSON in ASCII that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character, escaped in _IN_SCRIPT.items():
        text = text.replace(character, escaped)
    return text


def data_block(name: str, value: Any) -> str:
    """A script element that holds data: a browser neither runs it nor shows it."""
    return f'<script type="application/json" id="{escape(name)}">{script_json(value)}</script>'
