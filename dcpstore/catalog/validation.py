"""Validation of names, numbers and texts before they reach a database.

Only what both databases can store passes. Otherwise each of them would refuse other values, and at
another time (invariant 9).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import SupportsFloat, TypeVar, get_args

from dcpstore.core.syntax import check_name
from dcpstore.errors import AlreadyExistsError, InvalidInputError
from dcpstore.records import ChunkDefaults, CodecSetting, VersionDraft

__all__ = [
    "as_labels",
    "as_metrics",
    "can_be_kept",
    "check_chunk",
    "check_draft",
    "check_key",
    "check_labels",
    "check_limit",
    "check_metrics",
    "check_steps",
    "check_text",
]

T = TypeVar("T")

_MAX_KEY = 2000  # bytes; an index row of Postgres has at most 2,704, with other columns too
_MAX_CHUNK = 1 << 30  # bytes; Blosc takes at most 2 GiB
_MAX_NUMBER = 2**63 - 1  # the largest integer of both databases, in a column or a comparison


def check_chunk(chunk: ChunkDefaults) -> None:
    """Raise InvalidInputError for an invalid chunk size or codec."""
    if not isinstance(chunk, ChunkDefaults):
        raise InvalidInputError(f"chunk is {chunk!r}; give dcpstore.ChunkDefaults(nbytes=...).")
    if type(chunk.nbytes) is not int or not 1 <= chunk.nbytes <= _MAX_CHUNK:
        raise InvalidInputError(
            f"chunks of {chunk.nbytes!r} bytes; give a whole number from 1 to {_MAX_CHUNK}."
        )
    if chunk.codec not in get_args(CodecSetting):
        known = ", ".join(map(repr, get_args(CodecSetting)))
        raise InvalidInputError(f"unknown codec {chunk.codec!r} for chunks; use one of {known}.")


def check_draft(draft: VersionDraft) -> None:
    """Raise InvalidInputError if a database cannot store a fact of the version."""
    check_name(draft.branch, kind="branch")
    for tag in draft.tags:
        check_name(tag, kind="tag")
    if len(set(draft.tags)) < len(draft.tags):
        raise InvalidInputError(f"duplicate tags in {list(draft.tags)}; name each tag once.")
    if draft.branch in draft.tags:
        raise AlreadyExistsError(
            f"{draft.branch!r} cannot be both the branch and a tag; choose another tag."
        )
    step = draft.step
    # The type itself is compared, for True is an instance of int.
    if step is not None and (type(step) is not int or not 0 <= step <= _MAX_NUMBER):
        raise InvalidInputError(f"step {step!r} is not a whole number from 0 to {_MAX_NUMBER}.")
    check_metrics(draft.metrics)
    check_labels(draft.labels)
    texts = {"message": draft.message, "author": draft.author, "host": draft.host}
    for what, text in texts.items():
        check_text(text, what=what)


def check_limit(limit: int | None) -> None:
    """Raise InvalidInputError for an invalid number of rows; None is all of them."""
    if limit is not None and (type(limit) is not int or not 0 <= limit <= _MAX_NUMBER):
        raise InvalidInputError(
            f"limit is {limit!r}; give a whole number from 0 to {_MAX_NUMBER}, or None for all."
        )


def check_steps(steps: tuple[int | None, int | None]) -> None:
    """Raise InvalidInputError for an invalid range of steps."""
    if not isinstance(steps, tuple | list) or len(steps) != 2:
        raise InvalidInputError(f"steps are {steps!r}; give two, the first and the last one.")
    for step in steps:
        if step is not None and (type(step) is not int or abs(step) > _MAX_NUMBER):
            raise InvalidInputError(
                f"steps are {steps!r}; give the first and the last one, whole numbers up to "
                f"{_MAX_NUMBER}, or None for no end."
            )


def as_metrics(metrics: Mapping[str, SupportsFloat] | None) -> dict[str, float]:
    """Return metrics as floats: of numbers of any library, and of tensors of one element.

    Raises:
        InvalidInputError: they are not a mapping, or a value is not a number that fits a float.
    """
    return {name: _as_float(name, value) for name, value in _as_dict("metrics", metrics).items()}


def as_labels(labels: Mapping[str, object] | None) -> dict[str, str]:
    """Return labels as texts.

    Raises:
        InvalidInputError: they are not a mapping.
    """
    return {name: str(value) for name, value in _as_dict("labels", labels).items()}


def _as_dict(name: str, given: Mapping[str, T] | None) -> Mapping[str, T]:
    if given is not None and not isinstance(given, Mapping):
        raise InvalidInputError(
            f"{name}={given!r} is not a mapping; pass a dict of names and values, or None."
        )
    return given or {}


def _as_float(name: str, value: SupportsFloat) -> float:
    try:
        # By `item`, for float() of a tensor that requires grad, as a loss does, warns.
        return float(value.item() if hasattr(value, "item") else value)
    except OverflowError as error:  # a very long integer, which is not shown
        raise InvalidInputError(
            f"metric {name!r} is too large for a float; give a smaller number."
        ) from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(f"metric {name!r} is {value!r}; give a number.") from error


def check_metrics(metrics: Mapping[str, float]) -> None:
    """Raise InvalidInputError for a metric whose name or value a database cannot store."""
    for name, value in metrics.items():
        check_key(name, what="metric name")
        fits = isinstance(value, float) or (type(value) is int and abs(value) <= sys.float_info.max)
        if not fits:
            raise InvalidInputError(
                f"metric {name!r} is {value!r}; give a number that fits a float."
            )


def check_labels(labels: Mapping[str, str]) -> None:
    """Raise InvalidInputError for a label whose name or text a database cannot store."""
    for name, text in labels.items():
        check_key(name, what="label name")
        check_text(text, what=f"label {name!r}")


def check_key(text: str, *, what: str) -> None:
    """Raise InvalidInputError for text that cannot be an indexed key: too long, or as `check_text`.

    Names of branches and tags are shorter by their grammar.
    """
    check_text(text, what=what)
    nbytes = len(text.encode())
    if nbytes > _MAX_KEY:
        raise InvalidInputError(
            f"the {what} {text[:40]!r}… has {nbytes} bytes, and a database can index at "
            f"most {_MAX_KEY}; shorten it."
        )


def check_text(text: str, *, what: str) -> None:
    """Raise InvalidInputError for text that a database cannot store."""
    if not isinstance(text, str) or not can_be_kept(text):
        raise InvalidInputError(
            f"the {what} {text!r} is not text that a database can store: it must be a string "
            "without NUL characters and lone surrogates."
        )


def can_be_kept(text: str) -> bool:
    """Tell whether both databases can store a text, and so may contain it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text
