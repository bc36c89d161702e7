"""The command line: one module for each command or close group of them.

`commands` names them, `session` holds what they share on the way in, `output` what they share on
the way out, `failures` what a failure is to the shell. No command loads torch.
"""

from __future__ import annotations

import sys
from gc import freeze
from importlib import import_module

from dcpstore.core.gc_pause import collector_held

__all__ = ["INTERRUPTED", "main"]

INTERRUPTED = 130  # as a shell shows death by SIGINT


def main() -> None:
    """Run the command line; Ctrl-C ends it quietly from its first import on."""
    try:
        with collector_held():
            commands = import_module("dcpstore.cli.app")
        freeze()  # what was loaded stays; to walk through it costs more than many a command
        commands.run()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
