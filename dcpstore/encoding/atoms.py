"""The typed JSON of numbers, text and bytes, of which all other typed JSON is made.

Plain JSON where JSON keeps the value exactly; else an object of one tag. Decoders take any JSON and
raise the errors of the constructors that they call; none of them runs code or allocates more than
the payload's size calls for.
"""

from __future__ import annotations

import math
import re
import struct
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = [
    "ATOMS",
    "Codec",
    "NotPlainError",
    "PlannerBytes",
    "decode_atom",
    "encode_atom",
    "from_base64",
    "integer_of",
    "is_plain_json",
    "text_of",
    "text_only",
    "to_base64",
]

# A value of any type on one side, JSON of any shape on the other: hence `Any` in this module.

_UNSAFE_TEXT = re.compile(r"[\0\ud800-\udfff]")  # Postgres refuses NUL, UTF-8 lone surrogates
_NAN = struct.pack("<d", math.nan)  # the bits of the NaN that float("nan") gives


class NotPlainError(Exception):
    """A value that typed JSON does not carry; the first argument names its type.

    Attributes:
        advice: what to save in its place.
    """

    def __init__(self, name: str, advice: str = "") -> None:
        super().__init__(name)
        self.advice = advice


class PlannerBytes(bytes):
    """What a planner made of a value in a form of its own; only a planner can read it again."""


@dataclass(frozen=True, slots=True)
class Codec:
    """Both directions of one tag: a value to the JSON of its payload, and back."""

    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


def is_plain_json(obj: object) -> bool:
    """Tell whether JSON itself keeps a value exactly."""
    kind = type(obj)
    return (
        obj is None
        or kind is bool
        or (kind is int and -(2**63) <= obj < 2**63)  # type: ignore[operator]
        or (kind is float and math.isfinite(obj))  # type: ignore[arg-type]
        or (kind is str and not _UNSAFE_TEXT.search(obj))  # type: ignore[call-overload]
    )


def encode_atom(obj: Any) -> Any:
    """Return the JSON of an exact int, float, str, bytes, bytearray or complex."""
    if is_plain_json(obj):
        return obj
    tag = "$nan" if _is_odd_nan(obj) else f"${type(obj).__name__}"
    return {tag: ATOMS[tag].encode(obj)}


def decode_atom(node: Any) -> Any:
    """Return the value of what `encode_atom` made.

    Raises:
        LookupError, TypeError, ValueError: it is not one.
    """
    if not isinstance(node, dict):
        return node
    ((tag, payload),) = node.items()
    return ATOMS[tag].decode(payload)


def text_of(node: Any) -> str:
    """Return the text that `encode_atom` made a node of."""
    found = decode_atom(node)
    if not isinstance(found, str):
        raise TypeError(f"{found!r:.60} is not text")
    return found


def integer_of(node: Any) -> int:
    """Return the integer that `encode_atom` made a node of."""
    found = decode_atom(node)
    if type(found) is not int:
        raise TypeError(f"{found!r:.60} is not an integer")
    return found


def to_base64(obj: bytes | bytearray | memoryview) -> str:
    """Return bytes as text."""
    return b64encode(obj).decode()


def from_base64(payload: Any) -> bytes:
    """Return the bytes that `to_base64` made text of."""
    return b64decode(payload, validate=True)


def text_only(function: Callable[[str], Any]) -> Callable[[Any], Any]:
    """Return a decoder that takes text only: constructors take numbers and more besides."""

    def decode(payload: Any) -> Any:
        if not isinstance(payload, str):
            raise TypeError(f"{payload!r:.60} is not text")
        return function(payload)

    return decode


def _is_odd_nan(obj: object) -> bool:
    """Tell whether a value is a NaN with bits of its own, which its text does not show."""
    return type(obj) is float and math.isnan(obj) and struct.pack("<d", obj) != _NAN


def _decode_nan(payload: Any) -> float:
    raw = bytes.fromhex(payload)
    if len(raw) != len(_NAN) or not math.isnan(value := struct.unpack("<d", raw)[0]):
        raise ValueError(f"{payload!r:.60} is not the bits of a NaN")
    return float(value)


def _encode_complex(obj: complex) -> object:
    parts = (obj.real, obj.imag)
    return [encode_atom(part) if _is_odd_nan(part) else repr(part) for part in parts]


def _decode_complex(payload: Any) -> complex:
    real, imag = (
        _decode_nan(part["$nan"]) if isinstance(part, dict) else text_only(float)(part)
        for part in payload
    )
    return complex(real, imag)


ATOMS: dict[str, Codec] = {
    "$int": Codec(hex, text_only(lambda text: int(text, 16))),
    "$float": Codec(repr, text_only(float)),
    "$nan": Codec(lambda obj: struct.pack("<d", obj).hex(), _decode_nan),
    "$str": Codec(
        lambda obj: to_base64(obj.encode("utf-8", "surrogatepass")),
        lambda payload: from_base64(payload).decode("utf-8", "surrogatepass"),
    ),
    "$bytes": Codec(to_base64, from_base64),
    "$planner": Codec(to_base64, lambda payload: PlannerBytes(from_base64(payload))),
    "$bytearray": Codec(to_base64, lambda payload: bytearray(from_base64(payload))),
    "$complex": Codec(_encode_complex, _decode_complex),
}
