"""The command line: one module per sub-command; parse, call a stage, render."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the `mmad` command; ends the process with the exit code of the contract."""
    try:
        from mmad_cli.cli.app import run
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(run(sys.argv[1:]))
