"""Typed JSON of values that hold no other values: one tag for each type, in both directions.

Numbers, text and bytes are plain JSON where JSON keeps the value exactly; everything else is an
object with one tag. Numpy's scalars, arrays and dtypes, and tensors inside a value, are stored bit
for bit if the bits mean the same on every machine. Make a large tensor an entry of its own.
Decoders take any JSON and raise the errors of the constructors that they call; none of them runs
code or allocates more than the payload's size.
"""

from __future__ import annotations

import io
import math
import random
import re
import struct
from array import array
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import PosixPath, PurePath, PurePosixPath, PureWindowsPath, WindowsPath
from typing import Any
from uuid import UUID, SafeUUID

import numpy as np
import torch

from dcpstore.encoding.dtypes import as_bytes, check_plain, dtype_name, torch_dtype
from dcpstore.errors import InvalidInputError
from dcpstore.formats.composition import MARK, Composition

__all__ = [
    "ARRAYS",
    "ATOMS",
    "Codec",
    "NotPlainError",
    "PlannerBytes",
    "decode_atom",
    "decode_scalar",
    "encode_atom",
    "encode_scalar",
    "from_base64",
    "integer_of",
    "is_plain_json",
    "not_plain",
    "text_of",
    "text_only",
    "to_base64",
]

# A value of any type on one side, JSON of any shape on the other: hence `Any` in this module.

# Postgres refuses NUL; UTF-8 cannot encode lone surrogates.
_UNSAFE_TEXT = re.compile(r"[\0\ud800-\udfff]")
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
    """Bytes that a custom planner made of a value; only that planner can read them."""


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
    """Return the value that `encode_atom` encoded.

    Raises:
        LookupError, TypeError, ValueError: the node is not what `encode_atom` makes.
    """
    if not isinstance(node, dict):
        return node
    ((tag, payload),) = node.items()
    return ATOMS[tag].decode(payload)


def text_of(node: Any) -> str:
    """Decode a node; raise TypeError if it is not text."""
    found = decode_atom(node)
    if not isinstance(found, str):
        raise TypeError(f"{found!r:.60} is not text")
    return found


def integer_of(node: Any) -> int:
    """Decode a node; raise TypeError if it is not an integer."""
    found = decode_atom(node)
    if type(found) is not int:
        raise TypeError(f"{found!r:.60} is not an integer")
    return found


def to_base64(obj: bytes | bytearray | memoryview) -> str:
    """Return bytes as text."""
    return b64encode(obj).decode()


def from_base64(payload: Any) -> bytes:
    """Return the bytes that `to_base64` encoded."""
    return b64decode(payload, validate=True)


def text_only(function: Callable[[str], Any]) -> Callable[[Any], Any]:
    """Return a decoder that refuses anything but text; the constructors would take numbers too."""

    def decode(payload: Any) -> Any:
        if not isinstance(payload, str):
            raise TypeError(f"{payload!r:.60} is not text")
        return function(payload)

    return decode


def _is_odd_nan(obj: object) -> bool:
    """Tell whether a value is a NaN with unusual bits, which its text does not show."""
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


# Without long double, whose bytes hold padding and differ between machines.
_PLAIN_DTYPE = re.compile(r"[<>|](?:b1|[iu][1248]|f[248]|c8|c16|[mM]8(?:\[\w+\])?|[US]\d+)")
_LAST_CODE_POINT = 0x10FFFF


def _plain_dtype(dtype: np.dtype[Any]) -> str:
    if not _PLAIN_DTYPE.fullmatch(dtype.str):
        raise NotPlainError(f"numpy value of dtype {dtype}")
    return dtype.str


def _numpy_dtype(text: str) -> np.dtype[Any]:
    if not _PLAIN_DTYPE.fullmatch(text):
        raise ValueError(f"{text!r} is not a plain dtype")
    return np.dtype(text)


def _encode_numpy(obj: np.generic) -> object:
    dtype = _plain_dtype(obj.dtype)
    if obj.dtype.kind in "mM":  # as Python's own dates they would lose their unit
        return [dtype, to_base64(obj.tobytes())]
    if isinstance(obj, np.str_ | np.bytes_):
        return [dtype, encode_atom(_without_class(obj))]
    node = [dtype, encode_atom(obj.item())]
    if np.isnan(obj) and _decode_numpy(node).tobytes() != obj.tobytes():
        return [dtype, {"$bytes": to_base64(obj.tobytes())}]  # a NaN with unusual bits
    return node


def _decode_numpy(payload: Any) -> np.generic:
    text, value = payload
    dtype = _numpy_dtype(text)
    if dtype.kind in "mM":
        scalar: np.generic = np.frombuffer(from_base64(value), dtype)[0]
        return scalar
    value = decode_atom(value)
    if dtype.kind in "US":
        return _numpy_text(dtype, value)
    if isinstance(value, bytes):
        bits: np.generic = np.frombuffer(value, dtype, count=1)[0]
        return bits
    if not isinstance(value, bool | int | float | complex):
        raise TypeError(f"{value!r} is not a number")
    with np.errstate(over="raise"):  # an encoded number always fits its own dtype
        number: np.generic = dtype.type(value)
    return number


def _without_class(obj: np.str_ | np.bytes_) -> str | bytes:
    """Return the text or bytes with trailing zeros, which `item()` drops."""
    return str.__str__(obj) if isinstance(obj, np.str_) else bytes.__add__(obj, b"")


def _numpy_text(dtype: np.dtype[Any], value: object) -> np.generic:
    kind, plain = (np.str_, str) if dtype.kind == "U" else (np.bytes_, bytes)
    if type(value) is not plain or (found := kind(value)).dtype != dtype:
        raise TypeError(f"{value!r:.60} is not of dtype {dtype}")
    return found


def _encode_array(obj: np.ndarray[Any, Any]) -> object:
    if not obj.itemsize:
        raise NotPlainError(f"numpy array of dtype {obj.dtype}, whose elements have no bytes")
    return [_plain_dtype(obj.dtype), list(obj.shape), to_base64(obj.tobytes())]


def _decode_array(payload: Any) -> np.ndarray[Any, Any]:
    text, shape, data = payload
    dtype = _numpy_dtype(text)
    found = np.frombuffer(from_base64(data), dtype)
    if dtype.kind == "U" and (found.view(f"{text[0]}u4") > _LAST_CODE_POINT).any():
        raise ValueError("an array of text holds what is not a character")
    return found.reshape(shape).copy()


def _encode_tensor(tensor: torch.Tensor) -> object:
    kind = type(tensor)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if kind not in (torch.Tensor, torch.nn.Parameter):
        raise NotPlainError(name)
    try:
        check_plain(tensor)
    except InvalidInputError as error:
        raise NotPlainError(f"{name} ({str(error).rstrip('.')})") from error
    words = ["parameter"] if kind is torch.nn.Parameter else []
    words += ["requires_grad"] if tensor.requires_grad and tensor.is_leaf else []
    data = to_base64(as_bytes(tensor.detach().cpu()).tobytes())
    return [dtype_name(tensor.dtype), list(tensor.shape), data, words]


def _decode_tensor(payload: Any) -> torch.Tensor:
    name, shape, data, words = payload
    raw, dtype = from_base64(data), torch_dtype(name)
    if not set(words) <= {"parameter", "requires_grad"}:
        raise ValueError(f"unknown words {words!r:.60}")
    if any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"{shape!r:.60} is not a shape")
    if math.prod(shape) * dtype.itemsize != len(raw):
        raise ValueError(f"{len(raw)} bytes are not a tensor of shape {shape!r:.60}")
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    target = as_bytes(tensor)
    target[...] = np.frombuffer(raw, target.dtype).reshape(shape)
    is_trained = "requires_grad" in words
    if "parameter" in words:
        return torch.nn.Parameter(tensor, requires_grad=is_trained)
    return tensor.requires_grad_(is_trained)


ARRAYS: dict[str, Codec] = {
    "$numpy": Codec(_encode_numpy, _decode_numpy),
    "$numpy_dtype": Codec(_plain_dtype, text_only(_numpy_dtype)),
    "$ndarray": Codec(_encode_array, _decode_array),
    "$tensor": Codec(_encode_tensor, _decode_tensor),
}


_PATHS: dict[str, tuple[type[PurePath], type[PurePath]]] = {
    # the class, and its substitute where the platform has no such files
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
        LookupError, TypeError, ValueError, ArithmeticError, RuntimeError: the payload is not what
            `encode_scalar` makes.
    """
    return _CODECS[tag].decode(payload)


def not_plain(obj: object) -> NotPlainError:
    """Return the error that names the type of a value, and what to save in its place."""
    kind = type(obj)
    advice = next((text for kinds, text in _ADVICE if isinstance(obj, kinds)), "")
    return NotPlainError(f"{kind.__module__}.{kind.__qualname__}", advice)


def _named(kind: type) -> dict[str, Any]:
    """Return torch's own objects of a type, by their text."""
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
    """Tell whether the offset as text is the whole zone: without a name, and in whole seconds."""
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
        raise NotPlainError(f"{type(obj).__name__} whose text {text!r} makes another path")
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
        raise NotPlainError("io.BytesIO that is closed", "save it before close()") from error


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
