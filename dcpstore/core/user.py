"""The user name under which this process's operations are recorded.

Invariant: there always is a name, and both databases keep it; no change fails without one.
"""

from __future__ import annotations

import getpass
import os

__all__ = ["this_user"]


def this_user() -> str:
    """Return the name of the user, or the number of one who has none (as in many containers)."""
    try:
        name = getpass.getuser()
    except (KeyError, ImportError, OSError):  # the last alone from Python 3.13 on
        return str(os.getuid())
    return name.encode(errors="backslashreplace").decode()
