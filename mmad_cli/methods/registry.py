"""Methods by name: ours listed here, third parties' through the entry-point group `mmad.methods`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from mmad_cli.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from mmad_cli.methods.base import Method, MethodConfig, MethodDefinition

ENTRY_POINT_GROUP = "mmad.methods"

# name -> "module:attribute" of a MethodDefinition; imported only when asked for
_BUILT_IN = {
    "btf": "mmad_cli.methods.btf:DEFINITION",
    "cfm": "mmad_cli.methods.cfm.method:DEFINITION",
    "cmdr_iad": "mmad_cli.methods.cmdr_iad.method:DEFINITION",
    "g2sf": "mmad_cli.methods.g2sf.method:DEFINITION",
    "iaenet": "mmad_cli.methods.iaenet.method:DEFINITION",
    "m3dm": "mmad_cli.methods.m3dm.method:DEFINITION",
    "mafr": "mmad_cli.methods.mafr.method:DEFINITION",
    "patchcore": "mmad_cli.methods.patchcore:DEFINITION",
}


def method_names() -> list[str]:
    """Every registered method, sorted."""
    return sorted({*_BUILT_IN, *(point.name for point in metadata.entry_points(group=ENTRY_POINT_GROUP))})


def get_method(name: str) -> MethodDefinition:
    """The definition of a method. Raises UsageError with the nearest names."""
    if name in _BUILT_IN:
        module, attribute = _BUILT_IN[name].split(":")
        definition: MethodDefinition = getattr(import_module(module), attribute)
        return definition
    for point in metadata.entry_points(group=ENTRY_POINT_GROUP):
        if point.name == name:
            loaded: MethodDefinition = point.load()
            return loaded
    raise unknown_name("method", name, method_names(), "--method")


def build_config(
    definition: MethodDefinition, variant: str | None, recipe: str, settings: Mapping[str, Any]
) -> MethodConfig:
    """Configuration of a variant and recipe with single fields set by the user.

    Raises UsageError for an unknown variant, recipe or field (with the near ones) and for a value that does not fit.
    """
    from pydantic import ValidationError

    variant = variant or definition.default_variant
    if variant not in definition.variants:
        raise unknown_name(f"variant of {definition.name}", variant, definition.variants, "--variant")
    if recipe not in definition.recipes:
        raise unknown_name("recipe", recipe, definition.recipes, "--recipe")
    fields = definition.config.model_fields
    for name in settings:
        if name not in fields or name == "variant":
            raise unknown_name(f"field of {definition.name}", name, [f for f in fields if f != "variant"], "--set")
    switches = definition.recipes[recipe]  # type: ignore[index]
    try:
        return definition.config.model_validate({**switches, **settings, "variant": variant})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "configuration"
        raise UsageError(f"--set {place}={first.get('input')!r}: {first['msg']}") from error


def parse_settings(items: list[str]) -> dict[str, Any]:
    """`key=value` items as typed values: JSON where it parses, a list where commas stand, else text."""
    settings: dict[str, Any] = {}
    for item in items:
        name, sign, text = item.partition("=")
        if not sign or not name.strip():
            raise UsageError(f"--set {item}: write it as key=value")
        settings[name.strip()] = _parse_value(text.strip())
    return settings


def _parse_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        pass
    if text.lower() in ("none", "null"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if "," in text:
        return [_parse_value(part.strip()) for part in text.split(",")]
    return text


def build(definition: MethodDefinition, config: MethodConfig, device: str = "cpu") -> Method:
    """An unfitted method."""
    return definition.build(config, device)
