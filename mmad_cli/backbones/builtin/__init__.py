"""The built-in backbones: small networks that the package carries, trained on procedural data only.

They need no download and no third party's permission. `card.json` says how they were made and what they reach;
`mmad pretrain` makes them again. Importing this package imports no network library.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

Network = Literal["builtin_rgb", "builtin_points"]

RGB: Literal["builtin_rgb"] = "builtin_rgb"
POINTS: Literal["builtin_points"] = "builtin_points"
NAMES: tuple[Network, ...] = (RGB, POINTS)

HERE = Path(__file__).parent


def is_builtin(name: str) -> bool:
    """Whether `name` is a network of the package."""
    return name in NAMES


@lru_cache(maxsize=1)
def card() -> dict[str, Any]:
    """The model card: data, recipe, results, licence, and name and digest of the files."""
    return cast("dict[str, Any]", json.loads((HERE / "card.json").read_text(encoding="utf-8")))
