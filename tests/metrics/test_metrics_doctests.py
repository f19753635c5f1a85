from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["roc", "pro", "summary"])
def test_docstring_examples(name):
    result = doctest.testmod(importlib.import_module(f"mmad_cli.metrics.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
