"""`python -m dcpstore` is the command line."""

from __future__ import annotations

from dcpstore.cli import main

if __name__ == "__main__":
    main()
