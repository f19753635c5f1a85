"""Published methods behind one protocol and one registry."""

from mmad_cli.methods.registry import build, build_config, get_method, method_names, parse_settings

__all__ = ["build", "build_config", "get_method", "method_names", "parse_settings"]
