"""The command line: one module for each command or close group of them.

`app` has the table of commands, `session` what they share as input and how a failure ends, and
`output` how they print. Only the commands that move tensors load torch.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from gc import freeze
from importlib import import_module

__all__ = ["INTERRUPTED", "main"]

INTERRUPTED = 130  # as a shell shows death by SIGINT


def main() -> None:
    """Run the command line; Ctrl-C ends it with one line, from its first import on."""
    try:
        commands = import_module("dcpstore.cli.app")
        freeze()  # what was loaded stays; the collector need not walk through it
        commands.run()
    except KeyboardInterrupt:
        with suppress(OSError, AttributeError):  # standard error is closed, or None
            sys.stderr.write("interrupted\n")
        sys.exit(INTERRUPTED)
