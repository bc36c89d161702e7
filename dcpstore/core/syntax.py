"""The syntax of refs to versions, and of the names of tags and branches.

    ref    := start ("~" digits)? ("@step=" digits)?
    start  := "v"? digits | name | uid
    name   := a letter or "_", then letters, digits and any of . _ - / = + @
    uid    := the first 6 or more of the 32 hex digits of a version's uid

A name never reads as a version number and never contains "@step=", so a ref has one meaning:
`epoch=0-step=8` and `run@home+1` are names, and `a@step=5` is a step of `a`. Text that could also
be a uid is a number or a name if such a version, tag or branch exists, and otherwise a uid. `~n`
is n parents up; `@step=n` is the newest version with that step among the start and its ancestors.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from dcpstore.errors import InvalidInputError

__all__ = [
    "NAME_CHARACTERS",
    "Ref",
    "check_name",
    "nearest_name",
    "parse_ref",
    "rank_name",
]

NAME_CHARACTERS = "A-Za-z0-9._/=+@-"  # for use inside [...] of a regular expression
_STEP = "@step="
_NAME = rf"[A-Za-z_](?:(?!{_STEP})[{NAME_CHARACTERS}])*"
_MAX_NAME = 200
_MAX_NUMBER = 2**63 - 1  # the largest integer of both databases
_UID = r"[0-9a-fA-F]{6,32}"
_REF = re.compile(
    rf"(?P<start>v?(?P<number>[0-9]+)|(?P<name>{_NAME})|{_UID})"
    rf"(?:~(?P<up>[0-9]+))?(?:{_STEP}(?P<step>[0-9]+))?"
)


@dataclass(frozen=True, slots=True)
class Ref:
    """A parsed ref: a version `number`, a `name` or a `uid`, and how far to go up from there.

    `uid` holds the first digits of a uid, even if the text could also be a number or a name.
    """

    number: int | None = None
    name: str | None = None
    uid: str | None = None
    up: int = 0
    step: int | None = None

    def __str__(self) -> str:
        start = self.name or self.uid or f"v{self.number}"  # digits may set both uid and number
        up = f"~{self.up}" if self.up else ""
        return f"{start}{up}" + (f"@step={self.step}" if self.step is not None else "")


def check_name(name: str, *, kind: str) -> str:
    """Return `name` if a `kind` (tag or branch) may have this name.

    Raises:
        InvalidInputError: it breaks the grammar, or reads as a version number; the message has the
            nearest name that is allowed.
    """
    if fault := _name_fault(name):
        raise InvalidInputError(
            f"{kind} name {_short(name)} {fault}; {nearest_name(name)!r} is allowed."
        )
    return name


def nearest_name(text: object) -> str:
    """Return `text` if it is an allowed name, else an allowed name that looks like it."""
    name = unicodedata.normalize("NFKD", str(text)[: 4 * _MAX_NAME])
    name = name.encode("ascii", "ignore").decode().strip()
    name = re.sub(f"[^{NAME_CHARACTERS}]+", "-", name).replace(_STEP, "-" + _STEP[1:])
    name = re.sub(r"([./])\1+", r"\1", name)
    name = re.sub(r"^[^A-Za-z0-9_]+", "", name)[:_MAX_NAME].rstrip("/.")
    if re.match(r"[0-9]", name) or _reads_as_number(name):
        name = f"_{name}"[:_MAX_NAME].rstrip("/.")
    return name or "checkpoint"


def _name_fault(name: object) -> str | None:
    """Return what is wrong with a name, or None if it is allowed."""
    if not isinstance(name, str) or not re.fullmatch(f"[A-Za-z_][{NAME_CHARACTERS}]*", name):
        return "is not a letter or '_' followed by letters, digits and any of '._-/=+@'"
    if _STEP in name:
        return f"contains {_STEP!r}, which means a step in a ref"
    if _reads_as_number(name):
        return "reads as a version number"
    if len(name) > _MAX_NAME:
        return f"is longer than {_MAX_NAME} characters"
    if ".." in name or "//" in name or name.endswith(("/", ".")):
        return "contains '..' or '//', or ends in '/' or '.'"
    return None


def _reads_as_number(name: str) -> bool:
    return re.fullmatch(r"v[0-9]+", name) is not None


def rank_name(name: str, rank: int) -> str:
    """Return the name of the branch or tag that `rank` saves to by itself, without collectives."""
    return f"{name}/rank-{rank}"


def parse_ref(text: object) -> Ref:
    """Parse a ref: `12`, `v12`, a tag, a branch, `main~3`, `main@step=1000` or part of a uid.

    Of what is neither text nor a number, the text is parsed, which is the number of a `Version`.

    Raises:
        InvalidInputError: `text` is not a ref.
    """
    if isinstance(text, int) and abs(text) > _MAX_NUMBER:  # Python refuses to print very long ones
        raise InvalidInputError(f"version numbers end at {_MAX_NUMBER}; give a smaller one.")
    # A bool is an int, and its text would be a valid name.
    match = None if isinstance(text, bool) else _REF.fullmatch(str(text))
    if match is None:
        raise InvalidInputError(
            f"{_short(text)} is not a ref; write a version (12 or v12), a tag, a branch, "
            "'main~3', 'main@step=1000' or the first 6 or more digits of a uid."
        )
    could_be_uid = re.fullmatch(_UID, match["start"]) is not None
    digits = {key: match[key].lstrip("0") for key in ("number", "up", "step") if match[key]}
    # The digits are counted first: int() refuses thousands of them with an error of its own.
    if any(
        len(one) > len(str(_MAX_NUMBER)) or int(one or 0) > _MAX_NUMBER for one in digits.values()
    ):
        raise InvalidInputError(
            f"{_short(text)} has a number over {_MAX_NUMBER}; give a smaller one."
        )
    numbers = {key: int(one or 0) for key, one in digits.items()}
    if match["name"] is not None:
        check_name(match["name"], kind="ref")
    return Ref(
        number=numbers.get("number"),
        name=match["name"],
        uid=match["start"].lower() if could_be_uid else None,
        up=numbers.get("up", 0),
        step=numbers.get("step"),
    )


def _short(text: object) -> str:
    """Return a value as a message shows it; a very long one is cut."""
    shown = repr(text)
    return shown if len(shown) <= _MAX_NAME + 100 else f"{shown[:_MAX_NAME]}…'"
