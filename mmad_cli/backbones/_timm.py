"""Importing timm where the compiled part of torchvision does not fit the installed torch.

timm needs torchvision's image transforms only, which are Python. A torchvision built for another torch (a CPU build
of torch beside the CUDA build of torchvision is the usual case) fails at import because two operators that its
Python part refers to are not registered. Registering their schemas lets the rest of torchvision load.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any, Literal

TorchvisionState = Literal["complete", "python only", "missing"]

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPERATORS = ("nms", "qnms")


def import_timm() -> Any:
    """The timm module; makes torchvision importable first where its compiled operators are missing."""
    torchvision_state()
    return importlib.import_module("timm")


@functools.cache
def torchvision_state() -> TorchvisionState:
    """How torchvision could be imported: `complete`, `python only` (no compiled operators) or `missing`."""
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return "missing"
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        _forget("torchvision")
        _define_operators()
        importlib.import_module("torchvision")
        return "python only"
    return "python only" if _defined else "complete"


# kept alive: a torch.library.Library takes its operators with it when it is collected
_defined: list[Any] = []


def _define_operators() -> None:
    import torch

    if _defined:
        return
    library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for operator in _OPERATORS:
        library.define(operator + _SCHEMA)
    _defined.append(library)


def _forget(package: str) -> None:
    for name in [name for name in sys.modules if name == package or name.startswith(package + ".")]:
        del sys.modules[name]
