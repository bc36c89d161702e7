"""The typed JSON of numpy's scalars, arrays and dtypes, and of tensors that lie inside a value.

Kept are those whose bytes mean the same on every machine. An array or a tensor is stored with all
of its bytes: a tensor of any size belongs into the state as an entry of its own.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import torch

from dcpstore.encoding.atoms import (
    Codec,
    NotPlainError,
    decode_atom,
    encode_atom,
    from_base64,
    text_only,
    to_base64,
)
from dcpstore.encoding.dtypes import as_bytes, check_plain, dtype_name, torch_dtype
from dcpstore.errors import InvalidInputError

__all__ = ["ARRAYS"]

# Without long double, whose bytes hold padding and differ between machines.
_PLAIN_DTYPE = re.compile(r"[<>|](?:b1|[iu][1248]|f[248]|c8|c16|[mM]8(?:\[\w+\])?|[US]\d+)")
_LAST_CODE_POINT = 0x10FFFF


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
        return [dtype, to_base64(obj.tobytes())]
    if isinstance(obj, np.str_ | np.bytes_):
        return [dtype, encode_atom(_without_class(obj))]
    node = [dtype, encode_atom(obj.item())]
    if np.isnan(obj) and _decode_numpy(node).tobytes() != obj.tobytes():
        return [dtype, {"$bytes": to_base64(obj.tobytes())}]  # a NaN with bits of its own
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
        raise TypeError(f"no number {value!r}")
    with np.errstate(over="raise"):  # no number that was encoded is past its own dtype
        number: np.generic = dtype.type(value)
    return number


def _without_class(obj: np.str_ | np.bytes_) -> str | bytes:
    """Return the text or bytes, with the zeros at the end that numpy leaves out of `item()`."""
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
