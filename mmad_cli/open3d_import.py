"""Importing Open3D without the web server that it brings for notebooks."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

_NOTEBOOKS = "open3d.visualization.draw_plotly"
_ONE_AT_A_TIME = threading.Lock()


def import_open3d() -> Any:
    """The open3d module; its type stubs lag behind its code.

    Open3D imports Dash, and with it IPython where there is one, for three functions that draw in notebooks: half of
    its start-up time, in every worker process. They are imported when one of them is first called.
    """
    with _ONE_AT_A_TIME:
        postponed = "open3d" not in sys.modules and _NOTEBOOKS not in sys.modules
        if postponed:
            sys.modules[_NOTEBOOKS] = _Postponed(_NOTEBOOKS)
        try:
            return importlib.import_module("open3d")
        finally:
            if postponed:
                del sys.modules[_NOTEBOOKS]


class _Postponed(ModuleType):
    """Stands in for a module of functions while its package is imported."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            # asked for by the import system
            raise AttributeError(name)

        def call(*arguments: Any, **options: Any) -> Any:
            package = sys.modules[self.__name__.rpartition(".")[0]]
            shadowed = dict(vars(package))
            function = getattr(importlib.import_module(self.__name__), name)
            # importing a submodule puts it in the place of the function of its name
            vars(package).update(shadowed)
            return function(*arguments, **options)

        return call
