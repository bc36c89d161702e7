"""The name of the user, under which versions and operations are recorded by default."""

from __future__ import annotations

import getpass
import os

__all__ = ["this_user"]


def this_user() -> str:
    """Return the name of the user; the numeric id where the system has no name for it.

    That is so in many containers, which run under an id that their list of users lacks.
    """
    try:
        name = getpass.getuser()
    except (KeyError, ImportError, OSError):  # from Python 3.13 on only OSError
        return str(os.getuid())
    # A name that is not UTF-8 arrives with lone surrogates, which no database stores.
    return name.encode(errors="backslashreplace").decode()
