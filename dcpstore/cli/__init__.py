"""The command line: one module for each command or close group of them.

`commands` names them, `session` holds what they share on the way in, `output` what they share on
the way out, `failures` what a failure is to the shell. No command loads torch.
"""

from __future__ import annotations

from dcpstore.cli.commands import main

__all__ = ["main"]
