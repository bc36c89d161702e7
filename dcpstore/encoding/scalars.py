"""The typed JSON of values that hold no other values: one tag a type, and both directions.

A payload is itself plain JSON. Decoders take any JSON and raise the errors of the constructors that
they call; none of them runs code or allocates more than the payload's size calls for.
"""

from __future__ import annotations

import io
import random
from array import array
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import PosixPath, PurePath, PurePosixPath, PureWindowsPath, WindowsPath
from typing import Any
from uuid import UUID, SafeUUID

import numpy as np
import torch

from dcpstore.compositions import MARK, Composition
from dcpstore.encoding.arrays import ARRAYS
from dcpstore.encoding.atoms import (
    ATOMS,
    Codec,
    NotPlainError,
    PlannerBytes,
    encode_atom,
    from_base64,
    integer_of,
    is_plain_json,
    text_of,
    text_only,
    to_base64,
)

__all__ = ["decode_scalar", "encode_scalar", "not_plain"]

# A value of any type on one side, JSON of any shape on the other: hence `Any` in this module.

_PATHS: dict[str, tuple[type[PurePath], type[PurePath]]] = {
    # the class, and what stands for it where the platform has no such files
    "PosixPath": (PosixPath, PurePosixPath),
    "WindowsPath": (WindowsPath, PureWindowsPath),
    "PurePosixPath": (PurePosixPath, PurePosixPath),
    "PureWindowsPath": (PureWindowsPath, PureWindowsPath),
}
# What to save instead of objects that hold more than a value.
_ADVICE: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (torch.Generator, "save what its get_state() gives"),
    (random.Random, "save what its getstate() gives"),
    (np.random.Generator, "save its bit_generator.state"),
    (np.random.RandomState, "save what its get_state() gives"),
    ((memoryview, array), "save bytes(...) of it"),
    (io.IOBase, "save its contents, as text, bytes or io.BytesIO"),
)


def encode_scalar(obj: object) -> object:
    """Return the JSON of a value that holds no others.

    Raises:
        NotPlainError: its type has no typed JSON.
    """
    if is_plain_json(obj):
        return obj
    kind = type(obj)
    if kind is float or kind is int or kind is str:
        return encode_atom(obj)
    tag = _TAGS.get(kind)
    if isinstance(obj, np.generic):
        tag = "$numpy"
    elif isinstance(obj, np.dtype):
        tag = "$numpy_dtype"
    if tag is None:
        raise not_plain(obj)
    return {tag: _CODECS[tag].encode(obj)}


def decode_scalar(tag: str, payload: object) -> object:
    """Return the value of a tagged payload.

    Raises:
        LookupError, TypeError, ValueError, ArithmeticError, RuntimeError: it is not one.
    """
    return _CODECS[tag].decode(payload)


def not_plain(obj: object) -> NotPlainError:
    """Return the error that names the type of a value, and what to save in its place."""
    kind = type(obj)
    advice = next((text for kinds, text in _ADVICE if isinstance(obj, kinds)), "")
    return NotPlainError(f"{kind.__module__}.{kind.__qualname__}", advice)


def _named(kind: type) -> dict[str, Any]:
    """Return torch's own objects of a kind, by the names that they show."""
    return {str(value): value for value in vars(torch).values() if isinstance(value, kind)}


def _encode_moment(obj: datetime | time) -> object:
    zone = obj.tzinfo
    if zone is not None and type(zone) is not timezone:
        raise NotPlainError(
            f"{type(obj).__name__} with time zone {zone!r}",
            "save what astimezone(datetime.UTC) gives, and the zone's name as text",
        )
    if zone is None or _shows_whole(zone):
        return [obj.isoformat(), obj.fold]
    return [obj.replace(tzinfo=None).isoformat(), obj.fold, _encode_timezone(zone)]


def _shows_whole(zone: timezone) -> bool:
    """Tell whether the offset in a text says all of a zone: it has no name, and whole seconds."""
    offset = zone.utcoffset(None)
    return not offset.microseconds and zone.tzname(None) == timezone(offset).tzname(None)


def _decode_moment(kind: type[datetime] | type[time]) -> Callable[[Any], Any]:
    def decode(payload: Any) -> Any:
        text, fold, *zone = payload
        moment = kind.fromisoformat(text).replace(fold=fold)
        return moment.replace(tzinfo=_decode_timezone(*zone)) if zone else moment

    return decode


def _encode_timezone(obj: timezone) -> list[Any]:
    offset = obj.utcoffset(None)
    parts: list[Any] = [offset.days, offset.seconds, offset.microseconds]
    has_name = obj.tzname(None) != timezone(offset).tzname(None)
    return [*parts, encode_atom(obj.tzname(None))] if has_name else parts


def _decode_timezone(payload: Any) -> timezone:
    days, seconds, microseconds, *name = payload
    return timezone(timedelta(days, seconds, microseconds), *map(text_of, name))


def _encode_path(obj: PurePath) -> object:
    text = str(obj)
    if str(type(obj)(text)) != text or type(obj)(text) != obj:
        raise NotPlainError(f"{type(obj).__name__} that its own text {text!r} does not name")
    return [type(obj).__name__, encode_atom(text)]


def _decode_path(payload: Any) -> PurePath:
    name, text = payload
    kind, stand_in = _PATHS[name]
    try:
        return kind(text_of(text))
    except NotImplementedError:  # another platform's
        return stand_in(text_of(text))


def _decode_uuid(payload: Any) -> UUID:
    text, safety = payload
    return UUID(text_only(str)(text), is_safe=SafeUUID(safety))


def _encode_fraction(obj: Fraction) -> object:
    return [encode_atom(obj.numerator), encode_atom(obj.denominator)]


def _decode_fraction(payload: Any) -> Fraction:
    numerator, denominator = map(integer_of, payload)
    return Fraction(numerator, denominator)


def _decode_ellipsis(payload: Any) -> object:
    if payload != "":
        raise ValueError(f"an ellipsis of {payload!r:.60}")
    return ...


def _encode_range(obj: range) -> object:
    return [encode_atom(part) for part in (obj.start, obj.stop, obj.step)]


def _decode_range(payload: Any) -> range:
    start, stop, step = map(integer_of, payload)
    return range(start, stop, step)


def _encode_file(obj: io.BytesIO) -> object:
    try:
        return to_base64(obj.getbuffer().tobytes())
    except ValueError as error:
        raise NotPlainError(
            "io.BytesIO that is closed", "save it before close(), or leave it out"
        ) from error


_CODECS: dict[str, Codec] = {
    **ATOMS,
    **ARRAYS,
    MARK: Codec(Composition.to_json, Composition.of_json),
    "$bytesio": Codec(_encode_file, lambda payload: io.BytesIO(from_base64(payload))),
    "$path": Codec(_encode_path, _decode_path),
    "$uuid": Codec(lambda obj: [str(obj), obj.is_safe.value], _decode_uuid),
    "$datetime": Codec(_encode_moment, _decode_moment(datetime)),
    "$date": Codec(date.isoformat, text_only(date.fromisoformat)),
    "$time": Codec(_encode_moment, _decode_moment(time)),
    "$timezone": Codec(_encode_timezone, _decode_timezone),
    "$timedelta": Codec(
        lambda obj: [obj.days, obj.seconds, obj.microseconds], lambda payload: timedelta(*payload)
    ),
    "$decimal": Codec(str, text_only(Decimal)),
    "$fraction": Codec(_encode_fraction, _decode_fraction),
    "$range": Codec(_encode_range, _decode_range),
    "$ellipsis": Codec(lambda obj: "", _decode_ellipsis),
    "$dtype": Codec(str, _named(torch.dtype).__getitem__),
    "$memory_format": Codec(str, _named(torch.memory_format).__getitem__),
    "$layout": Codec(str, _named(torch.layout).__getitem__),
    "$device": Codec(str, text_only(torch.device)),
}
_TAGS: dict[type, str] = {
    bytes: "$bytes",
    PlannerBytes: "$planner",
    Composition: MARK,
    bytearray: "$bytearray",
    complex: "$complex",
    io.BytesIO: "$bytesio",
    PosixPath: "$path",
    WindowsPath: "$path",
    PurePosixPath: "$path",
    PureWindowsPath: "$path",
    UUID: "$uuid",
    datetime: "$datetime",
    date: "$date",
    time: "$time",
    timezone: "$timezone",
    timedelta: "$timedelta",
    Decimal: "$decimal",
    Fraction: "$fraction",
    range: "$range",
    type(...): "$ellipsis",
    torch.dtype: "$dtype",
    torch.memory_format: "$memory_format",
    torch.layout: "$layout",
    torch.device: "$device",
    np.ndarray: "$ndarray",
}
