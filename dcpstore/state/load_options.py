"""The options of a load: which entries, under which names, and how strictly."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from dcpstore.errors import InvalidInputError
from dcpstore.formats.composition import outer_fqns, stands_for

__all__ = [
    "LoadOptions",
    "NamesInOptions",
    "OnDtype",
    "Rename",
    "check_globs",
    "check_rename",
    "name_faults",
    "renamed",
]

T = TypeVar("T")
OnDtype = Literal["error", "cast"]
Rename = Mapping[str, str] | Callable[[str], str]
_SHOWN = 10  # names that one message lists


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Options of `DefaultLoadPlanner`; FQNs are those of the state.

    Attributes:
        include, exclude: each text is the name of an item or of all below it ("model"), or a glob
            of FQNs ("*.bias"); an FQN is loaded if one of `include` stands for it (None stands for
            all) and none of `exclude` does. A text that stands for no FQN of the version, nor of
            the state on any rank, is an error.
        rename: maps an FQN of the state to the FQN in the version; a mapping or a function. It is
            an error if a mapping has an FQN that no rank's state has, and maps it to one that the
            version lacks.
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

    def names(self, own: Iterable[str], stored: Collection[str]) -> NamesInOptions | None:
        """Return what the options name that the version lacks; None if they name nothing such.

        Args:
            own: the FQNs of this rank's state; read only if the options name something.
            stored: the FQNs of the version.
        """
        chosen = [("include", text) for text in self.include or ()]
        chosen += [("exclude", text) for text in self.exclude]
        renames = self.rename if isinstance(self.rename, Mapping) else {}
        if not chosen and not renames:
            return None
        mine = set(own)
        known = _with_outer(stored)
        found: set[tuple[str, str]] = set()
        lacking: dict[tuple[str, str], object] = {}
        for option, text in chosen:
            if any(stands_for(text, fqn) for fqn in known):
                continue
            if any(stands_for(text, fqn) for fqn in mine):
                found.add((option, text))
            else:
                lacking[option, text] = None
        for fqn, target in renames.items():
            if isinstance(target, str) and target in known:
                continue
            if fqn in mine:
                found.add(("rename", fqn))
            else:
                lacking["rename", fqn] = target
        return NamesInOptions(frozenset(found), lacking) if found or lacking else None

    def find_stored(self, fqn: str, stored: Mapping[str, T]) -> T | None:
        """Return what `stored`, by FQN in the version, has for an FQN that the state may have.

        Such an FQN is a guess, so a `rename` that raises LookupError for it is not an error.
        """
        try:
            return stored.get(self.stored_name(fqn))
        except LookupError:
            return None


@dataclass(frozen=True, slots=True)
class NamesInOptions:
    """What the options of one rank name that the version lacks.

    A rank may hold only a part of the state, such as one stage of a pipeline, so one rank's state
    does not show that a name is wrong; those of all ranks do.

    Attributes:
        found: option and text of what this rank's state has.
        lacking: the same of what it lacks, with the name to which `rename` maps it.
    """

    found: frozenset[tuple[str, str]] = frozenset()
    lacking: Mapping[tuple[str, str], object] = field(default_factory=dict)


def name_faults(
    ranks: Iterable[NamesInOptions | None], own: Iterable[str], stored: Collection[str]
) -> list[str]:
    """Return a line for each text of the options that names nothing on any rank, with near names.

    Args:
        ranks: what the options of each rank name that the version lacks.
        own: the FQNs of this rank's state; read only if there is a fault.
        stored: the FQNs of the version.
    """
    given = [one for one in ranks if one is not None]
    found = frozenset().union(*(one.found for one in given))
    faults = {key: to for one in given for key, to in one.lacking.items() if key not in found}
    if not faults:
        return []
    mine = set(own)
    known = mine | _with_outer(stored)
    lines = []
    for (option, text), target in list(faults.items())[:_SHOWN]:  # to find near names is slow
        if option == "rename":
            lines.append(
                f"rename= maps {text!r} to {target!r}: the state has no such FQN, and the version "
                f"no such entry.{_near(text, mine)} Its keys are FQNs of the state, its values "
                "those of the version."
            )
        else:
            lines.append(
                f"{option}= has {text!r}, which stands for no entry of the version and no FQN of "
                f"the state.{_near(text, known)} See 'dcpstore ls' for the entries."
            )
    more = len(faults) - len(lines)
    return [*lines, f"{more} more name nothing."] if more else lines


def _with_outer(stored: Collection[str]) -> set[str]:
    """Return FQNs of a version with those of its composed tensors."""
    return {*stored, *outer_fqns(stored).values()}


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


def _near(name: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    return f" Did you mean {', '.join(map(repr, close))}?" if close else ""


def _matches(fqn: str, globs: Iterable[str]) -> bool:
    return any(stands_for(glob, fqn) for glob in globs)
