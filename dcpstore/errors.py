"""The exception tree: one class for each thing that a handler would do.

Every message says what failed, the value seen and the next step, and every error survives pickling,
for an error of one rank is raised on all of them. Messages may change between releases; each class
has a `kind`, which does not, for programs to tell errors apart.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import ClassVar

__all__ = [
    "AlreadyExistsError",
    "ConflictError",
    "CorruptionError",
    "DcpstoreError",
    "InvalidInputError",
    "MismatchError",
    "NotFoundError",
    "RankFailure",
    "SchemaError",
    "UnsafeDataError",
]


class DcpstoreError(Exception):
    """Any error that dcpstore raises on purpose.

    Attributes:
        kind: a word for what went wrong, the same in every release (`docs/versioning.md`); the
            command line prints it in the errors of `--json`.
    """

    kind: ClassVar[str] = "error"


class NotFoundError(DcpstoreError, LookupError):
    """A version, ref, entry or repository does not exist; the message lists the nearest names."""

    kind = "not_found"

    @classmethod
    def near(cls, kind: str, name: str, known: Iterable[str], next_step: str) -> NotFoundError:
        """Return the error for an unknown `name` of a `kind`, with its nearest `known` names."""
        close = cls.nearest(name, known)
        hint = f" Did you mean {', '.join(repr(n) for n in close)}?" if close else ""
        return cls(f"no {kind} {name!r}.{hint} {next_step}")

    @staticmethod
    def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.5) -> list[str]:
        """Return up to three `known` names that are spelled like `name`, in any case of letters.

        `cutoff` is how alike they are at least, from 0 to 1.
        """
        spelled: dict[str, list[str]] = {}
        for one in known:
            spelled.setdefault(one.casefold(), []).append(one)
        close = difflib.get_close_matches(name.casefold(), spelled, n=3, cutoff=cutoff)
        return [one for key in close for one in spelled[key]][:3]


class AlreadyExistsError(DcpstoreError):
    """A name that must be new is taken."""

    kind = "already_exists"


class ConflictError(DcpstoreError):
    """A ref moved meanwhile; the message says what to do."""

    kind = "conflict"


class InvalidInputError(DcpstoreError, ValueError):
    """An argument is invalid."""

    kind = "invalid_input"


class MismatchError(DcpstoreError):
    """The state to fill and the version differ: every missing FQN, shape and dtype at once.

    Attributes:
        differences: one line for each FQN that does not fit.
    """

    kind = "mismatch"
    MISSING: ClassVar[str] = "is not in the version"  # in the line of an FQN that is missing

    def __init__(self, message: str, differences: Sequence[str] = ()) -> None:
        self.differences = tuple(differences)
        super().__init__(message)

    @classmethod
    def listing(cls, differences: Iterable[str]) -> MismatchError:
        """Return the one error about all `differences`, each named once."""
        lines = tuple(dict.fromkeys(differences))
        text = "\n  ".join(lines)
        lacks = any(cls.MISSING in line for line in lines)
        hint = "; strict=False leaves what is missing, rename= finds other names" if lacks else ""
        return cls(
            f"the state does not fit the version in {_count(lines, 'place')}:\n  {text}\n"
            f"Change the state, or load a version that fits ('dcpstore ls' lists what one holds)"
            f"{hint}.",
            lines,
        )

    @classmethod
    def after_load(cls, differences: Iterable[str]) -> MismatchError:
        """Return the one error about what owners do not hold as it was stored."""
        lines = tuple(dict.fromkeys(differences))
        text = "\n  ".join(lines)
        return cls(
            "the state was loaded, but its owners do not hold what was stored, in "
            f"{_count(lines, 'place')}:\n  {text}\nCorrect load_state_dict() of their owner, or "
            "leave them out by exclude=; strict=False reports them instead.",
            lines,
        )

    def __reduce__(self) -> tuple[type[MismatchError], tuple[str, tuple[str, ...]]]:
        return type(self), (str(self), self.differences)


def _count(lines: Sequence[str], noun: str) -> str:
    return f"{len(lines)} {noun}{'' if len(lines) == 1 else 's'}"


class SchemaError(DcpstoreError):
    """The database is older, newer or not ours; the message names the command that helps."""

    kind = "schema"


class CorruptionError(DcpstoreError):
    """Stored bytes are missing, short, or not what their digest says."""

    kind = "corruption"


class UnsafeDataError(DcpstoreError):
    """Writing or reading needs pickle, and `allow_pickle` is False."""

    kind = "unsafe_data"


class RankFailure(DcpstoreError):
    """A step failed on some ranks; raised on every rank.

    Attributes:
        failures: each failed rank's own error, by rank.
    """

    kind = "rank_failure"

    def __init__(
        self, step: str, failures: Mapping[int, BaseException], *, headline: str | None = None
    ) -> None:
        self.step = step
        self.failures = dict(failures)
        lines = [headline or f"{step} failed on {len(self.failures)} of the ranks:"]
        self._headline = lines[0]
        for rank, error in sorted(self.failures.items()):
            lines.append(f"  rank {rank}: {type(error).__name__}: {error}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        return partial(type(self), headline=self._headline), (self.step, self.failures)
