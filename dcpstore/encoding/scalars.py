"""The typed JSON of values that hold no other values: one tag a type, and both directions.

A payload is itself plain JSON. Decoders take any JSON and raise the errors of the constructors that
they call; none of them runs code or allocates more than the payload's size calls for.
"""

from __future__ import annotations

import math
import re
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import numpy as np
import torch

from dcpstore.compositions import MARK, Composition

__all__ = ["NotPlainError", "PlannerBytes", "decode_scalar", "encode_scalar"]

# A value of any type on one side, JSON of any shape on the other: hence `Any` in this module.

_UNSAFE_TEXT = re.compile(r"[\0\ud800-\udfff]")  # Postgres refuses NUL, UTF-8 lone surrogates
# Without long double, whose bytes hold padding and differ between machines.
_PLAIN_DTYPE = re.compile(r"[<>|](?:b1|[iu][1248]|f[248]|c8|c16|[mM]8(?:\[\w+\])?)")
_TORCH_DTYPES: dict[str, torch.dtype] = {
    str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)
}


class NotPlainError(Exception):
    """A value that typed JSON does not carry; the argument names its type."""


class PlannerBytes(bytes):
    """What a planner made of a value in a form of its own; only a planner can read it again."""


@dataclass(frozen=True, slots=True)
class _Codec:
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


def encode_scalar(obj: object) -> object:
    """Return the JSON of a value that holds no others.

    Raises:
        NotPlainError: its type has no typed JSON.
    """
    kind = type(obj)
    if (
        obj is None
        or isinstance(obj, bool)
        or (kind is int and -(2**63) <= obj < 2**63)  # type: ignore[operator]
        or (kind is float and math.isfinite(obj))  # type: ignore[arg-type]
        or (kind is str and not _UNSAFE_TEXT.search(obj))  # type: ignore[call-overload]
    ):
        return obj
    tag = "$numpy" if isinstance(obj, np.generic) else _TAGS.get(kind)
    if tag is None:
        raise NotPlainError(f"{kind.__module__}.{kind.__qualname__}")
    return {tag: _CODECS[tag].encode(obj)}


def decode_scalar(tag: str, payload: object) -> object:
    """Return the value of a tagged payload.

    Raises:
        LookupError, TypeError, ValueError, ArithmeticError, RuntimeError: it is not one.
    """
    return _CODECS[tag].decode(payload)


def _to_text(obj: bytes | bytearray) -> str:
    return b64encode(obj).decode()


def _from_text(payload: Any) -> bytes:
    return b64decode(payload, validate=True)


def _parse(function: Callable[[str], Any]) -> Callable[[Any], Any]:
    """Return a decoder that takes text only: constructors take numbers and more besides."""

    def decode(payload: Any) -> Any:
        if not isinstance(payload, str):
            raise TypeError(f"{payload!r} is no text")
        return function(payload)

    return decode


def _decode_complex(payload: Any) -> complex:
    real, imag = map(_parse(float), payload)
    return complex(real, imag)


def _encode_datetime(obj: datetime) -> object:
    zone = obj.tzinfo
    if zone is not None:
        offset = zone.utcoffset(None) if type(zone) is timezone else None
        if offset is None or zone.tzname(None) != timezone(offset).tzname(None):
            raise NotPlainError(f"datetime with time zone {zone!r}")
    return [obj.isoformat(), obj.fold]


def _decode_datetime(payload: Any) -> datetime:
    text, fold = payload
    return datetime.fromisoformat(text).replace(fold=fold)


def _plain_dtype(dtype: np.dtype[Any]) -> str:
    if not _PLAIN_DTYPE.fullmatch(dtype.str):
        raise NotPlainError(f"numpy value of dtype {dtype}")
    return dtype.str


def _numpy_dtype(text: str) -> np.dtype[Any]:
    if not _PLAIN_DTYPE.fullmatch(text):
        raise ValueError(f"no plain dtype {text!r}")
    return np.dtype(text)


def _encode_numpy(obj: np.generic) -> object:
    dtype = _plain_dtype(obj.dtype)
    if obj.dtype.kind in "mM":  # as Python's own dates they would lose their unit
        return [dtype, _to_text(obj.tobytes())]
    return [dtype, encode_scalar(obj.item())]


def _decode_numpy(payload: Any) -> np.generic:
    text, value = payload
    dtype = _numpy_dtype(text)
    if dtype.kind in "mM":
        scalar: np.generic = np.frombuffer(_from_text(value), dtype)[0]
        return scalar
    if isinstance(value, dict):
        ((tag, inner),) = value.items()
        value = decode_scalar(tag, inner)
    if not isinstance(value, bool | int | float | complex):
        raise TypeError(f"no number {value!r}")
    with np.errstate(over="raise"):  # no number that was encoded is past its own dtype
        number: np.generic = dtype.type(value)
    return number


def _encode_array(obj: np.ndarray[Any, Any]) -> object:
    return [_plain_dtype(obj.dtype), list(obj.shape), _to_text(obj.tobytes())]


def _decode_array(payload: Any) -> np.ndarray[Any, Any]:
    text, shape, data = payload
    return np.frombuffer(_from_text(data), _numpy_dtype(text)).reshape(shape).copy()


_CODECS: dict[str, _Codec] = {
    "$int": _Codec(hex, _parse(lambda text: int(text, 16))),
    "$float": _Codec(repr, _parse(float)),
    "$str": _Codec(
        lambda obj: _to_text(obj.encode("utf-8", "surrogatepass")),
        lambda payload: _from_text(payload).decode("utf-8", "surrogatepass"),
    ),
    "$bytes": _Codec(_to_text, _from_text),
    "$planner": _Codec(_to_text, lambda payload: PlannerBytes(_from_text(payload))),
    "$bytearray": _Codec(_to_text, lambda payload: bytearray(_from_text(payload))),
    "$complex": _Codec(
        lambda obj: [repr(obj.real), repr(obj.imag)],
        _decode_complex,
    ),
    "$datetime": _Codec(_encode_datetime, _decode_datetime),
    "$date": _Codec(date.isoformat, _parse(date.fromisoformat)),
    "$timedelta": _Codec(
        lambda obj: [obj.days, obj.seconds, obj.microseconds], lambda payload: timedelta(*payload)
    ),
    "$decimal": _Codec(str, _parse(Decimal)),
    "$dtype": _Codec(str, _TORCH_DTYPES.__getitem__),
    "$device": _Codec(str, _parse(torch.device)),
    MARK: _Codec(Composition.to_json, Composition.of_json),
    "$numpy": _Codec(_encode_numpy, _decode_numpy),
    "$ndarray": _Codec(_encode_array, _decode_array),
}
_TAGS: dict[type, str] = {
    int: "$int",
    float: "$float",
    str: "$str",
    bytes: "$bytes",
    PlannerBytes: "$planner",
    Composition: MARK,
    bytearray: "$bytearray",
    complex: "$complex",
    datetime: "$datetime",
    date: "$date",
    timedelta: "$timedelta",
    Decimal: "$decimal",
    torch.dtype: "$dtype",
    torch.device: "$device",
    np.ndarray: "$ndarray",
}
