"""The options of a load: which entries, under which names, and how strictly."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from dcpstore.errors import InvalidInputError

__all__ = ["LoadOptions", "OnDtype", "Rename", "check_globs", "check_rename", "renamed"]

T = TypeVar("T")
OnDtype = Literal["error", "cast"]
Rename = Mapping[str, str] | Callable[[str], str]


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Options of `DefaultLoadPlanner`; FQNs are those of the state.

    Attributes:
        include, exclude: glob patterns; an FQN is loaded if one of `include` matches it (None
            matches all) and none of `exclude` does.
        rename: maps an FQN of the state to the FQN in the version; a mapping or a function.
        strict: whether an FQN that the version lacks is an error, or its item stays as it is.
        on_dtype: whether a different dtype is an error, or the values are converted.

    Raises:
        InvalidInputError: an option is invalid.
    """

    include: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    rename: Rename | None = None
    strict: bool = True
    on_dtype: OnDtype = "error"

    def __post_init__(self) -> None:
        for name, globs in (("include", self.include), ("exclude", self.exclude)):
            check_globs(name, globs)
        check_rename(self.rename, "the state's FQNs to the version's")
        if not isinstance(self.strict, bool):
            raise InvalidInputError(f"strict={self.strict!r}; pass True or False.")
        if not isinstance(self.on_dtype, str) or self.on_dtype not in ("error", "cast"):
            raise InvalidInputError(f"on_dtype={self.on_dtype!r}; write 'error' or 'cast'.")

    def asks_for(self, fqn: str) -> bool:
        """Tell whether the load should fill an FQN of the state."""
        if self.include is not None and not _matches(fqn, self.include):
            return False
        return not (self.exclude and _matches(fqn, self.exclude))

    def stored_name(self, fqn: str) -> str:
        """Return the FQN in the version of an FQN in the state.

        Raises:
            InvalidInputError: `rename` does not return a text.
        """
        return fqn if self.rename is None else renamed(fqn, self.rename)

    def find_stored(self, fqn: str, stored: Mapping[str, T]) -> T | None:
        """Return what `stored`, by FQN in the version, has for an FQN that the state may have.

        Such an FQN is a guess, so a `rename` that raises LookupError for it is not an error.
        """
        try:
            return stored.get(self.stored_name(fqn))
        except LookupError:
            return None


def renamed(fqn: str, rename: Rename) -> str:
    """Return the new FQN for another by `rename`; a mapping keeps the FQNs that it lacks.

    Raises:
        InvalidInputError: the result is not a text.
    """
    name = rename.get(fqn, fqn) if isinstance(rename, Mapping) else rename(fqn)
    if not isinstance(name, str):
        raise InvalidInputError(f"rename maps {fqn!r} to {name!r}; it must return an FQN.")
    return name


def check_rename(rename: object, direction: str) -> None:
    """Check that `rename` is None, a mapping or a function, from `direction`'s FQNs to others.

    Raises:
        InvalidInputError: it is something else.
    """
    if rename is not None and not isinstance(rename, Mapping) and not callable(rename):
        raise InvalidInputError(
            f"rename={rename!r} is neither a mapping nor a function; pass a dict of {direction}, "
            "or a function from one to the other."
        )


def check_globs(name: str, globs: object) -> None:
    """Check that the argument `name` is None or a collection of texts.

    Raises:
        InvalidInputError: it is one text, an iterator, or holds something that is not text.
    """
    if isinstance(globs, str):
        raise InvalidInputError(f"{name}={globs!r} is one text; pass a list: [{globs!r}].")
    if globs is None:
        return
    if not isinstance(globs, Collection):  # an iterator would be empty after the first FQN
        raise InvalidInputError(f"{name}={globs!r} is not a list; pass one of globs: ['model.*'].")
    odd = [glob for glob in globs if not isinstance(glob, str)]
    if odd:
        raise InvalidInputError(f"{name} holds {odd[0]!r}, which is not text; pass globs of FQNs.")


def _matches(fqn: str, globs: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(fqn, glob) for glob in globs)
