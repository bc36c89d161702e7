"""Every attack, by its name."""

from tests.hostile import on_imports, on_repositories

__all__ = ["ATTACKS"]

ATTACKS = {**on_imports.ATTACKS, **on_repositories.ATTACKS}
