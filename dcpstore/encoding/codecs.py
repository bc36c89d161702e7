"""Codecs: raw bytes of a chunk to stored bytes and back, as a Zarr v3 codec chain describes.

The hot path calls numcodecs directly, and `zarr_codecs` describes the same chain to Zarr, so each
reads what the other writes. A chunk that does not shrink is stored as it is, inside the frame of
its codec, so the chain stays valid; a sample decides that before time is spent. Decoding fills a
buffer of the caller and never allocates by what a header claims. Called from worker threads, Blosc
and Zstandard run outside the interpreter lock, each call with a context of its own; numcodecs lets
Blosc start threads only for the main thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from numcodecs import blosc, zstd  # type: ignore[import-untyped]  # it ships no stubs
from typing_extensions import Buffer

from dcpstore.encoding.dtypes import DTYPES, numpy_dtype, torch_dtype
from dcpstore.errors import CorruptionError, InvalidInputError

__all__ = ["CODECS", "check_held", "choose_codec", "decode", "encode", "unencoded", "zarr_codecs"]

CODECS = ("none", "blosc", "zstd")

_WIDE_FLOATS = {row.name for row in DTYPES if row.is_wide_float}
_BLOSC_LEVEL = 5  # of lz4 behind bitshuffle, levels 1 to 7 measure alike in size and speed
_BLOSC_STORED = 0  # the level that leaves the bytes as they are, behind a header
_BLOSC_HEADER = 16
_BLOSC_MEMCPYED = 0x02  # the header's flag for such a frame
_SAMPLES = 4  # pieces of a chunk that are tried first,
_SAMPLE = 32 << 10  # of so many bytes each; smaller chunks are just encoded
_PAYS = 0.97  # of the raw size: what a sample must come below for the chunk to be encoded
_ZSTD_LEVEL = 3
_MOST_SWELL = 1 << 17  # Zstandard's best is 128 KiB out of a block of 4 bytes
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"

_Bytes = npt.NDArray[np.uint8]


def choose_codec(setting: str, dtype: str) -> str:
    """Return the codec's name for tensors of a torch dtype.

    "auto" takes Blosc where it pays: for floats of one and two bytes (a quarter less), integers and
    bool. Wider floats shrink by an eighth and more slowly than a disk writes, so they stay raw.

    Raises:
        InvalidInputError: the setting is neither "auto" nor a known codec.
    """
    if setting == "auto":
        torch_dtype(dtype)  # which refuses an unknown one
        return "none" if dtype in _WIDE_FLOATS else "blosc"
    return _known(setting)


def encode(codec: str, raw: Buffer, itemsize: int) -> Buffer:
    """Return the stored bytes of a chunk; those of codec "none" are `raw` itself, not a copy.

    Args:
        codec: one of `CODECS`.
        raw: contiguous bytes of whole elements.
        itemsize: bytes of one element, for the bit shuffle.

    Raises:
        InvalidInputError: an unknown codec, or a chunk past the 2 GiB that Blosc can hold.
    """
    if _known(codec) == "none":
        return raw
    data = np.frombuffer(memoryview(raw), np.uint8)
    if codec == "zstd":
        encoded: bytes = zstd.compress(data, _ZSTD_LEVEL)
        return encoded
    if data.nbytes > blosc.MAX_BUFFERSIZE:
        raise InvalidInputError(
            f"a chunk of {data.nbytes} bytes is past the {blosc.MAX_BUFFERSIZE} that codec 'blosc' "
            "takes; choose smaller chunks, or codec 'zstd' or 'none'."
        )
    level = _BLOSC_LEVEL if _shrinks(data, itemsize) else _BLOSC_STORED
    return _blosc(data, level, itemsize)


def unencoded(codec: str, encoded: memoryview, nbytes: int) -> memoryview | None:
    """Return the raw bytes of a chunk where they lie as they are among the stored ones, else None.

    Args:
        codec: one of `CODECS`.
        encoded: the stored bytes.
        nbytes: how many raw bytes there must be.

    Raises:
        CorruptionError: a chunk of codec "none" has another length.
    """
    if codec == "none":
        if len(encoded) != nbytes:
            raise CorruptionError(f"{len(encoded)} bytes are stored and {nbytes} are needed")
        return encoded
    is_stored = (
        codec == "blosc"
        and len(encoded) == nbytes + _BLOSC_HEADER
        and bool(encoded[2] & _BLOSC_MEMCPYED)
        and _blosc_held(np.frombuffer(encoded, np.uint8)) == nbytes
    )
    return encoded[_BLOSC_HEADER:] if is_stored else None


def check_held(codec: str, encoded: Buffer, nbytes: int) -> None:
    """Check that stored bytes claim to hold so many raw ones, before room is made for those.

    Raises:
        CorruptionError: they hold more or less.
        InvalidInputError: an unknown codec.
    """
    data = np.frombuffer(memoryview(encoded), np.uint8)
    held = _HELD[_known(codec)](data)
    if held != nbytes or nbytes > _MOST_SWELL * data.nbytes:
        raise CorruptionError(
            f"a chunk of codec {codec!r} holds {held} raw bytes in {data.nbytes} stored ones, but "
            f"{nbytes} are expected; run 'dcpstore verify' to see which versions are damaged."
        )


def decode(codec: str, encoded: Buffer, out: Buffer) -> None:
    """Fill `out`, a writable contiguous buffer, with the raw bytes of a chunk.

    For codec "none" the stored bytes are the raw ones: a caller that wants no copy reads them where
    they lie (`numpy.frombuffer`) instead of calling this.

    Raises:
        CorruptionError: the bytes are broken, or hold more or less than `out` takes.
        InvalidInputError: an unknown codec.
    """
    data = np.frombuffer(memoryview(encoded), np.uint8)
    target = np.frombuffer(memoryview(out), np.uint8)
    check_held(codec, encoded, target.nbytes)
    try:
        _DECODE[codec](data, target)
    except (RuntimeError, ValueError) as error:  # all that numcodecs raises for broken bytes
        raise CorruptionError(
            f"a chunk of {data.nbytes} bytes does not decode with codec {codec!r}: {error}; run "
            "'dcpstore verify' to see which versions are damaged."
        ) from error


def zarr_codecs(codec: str, dtype: str) -> list[dict[str, Any]]:
    """Return the `codecs` member of a Zarr v3 array document; JSON values, hence `Any`.

    Raises:
        InvalidInputError: an unknown codec or dtype.
    """
    itemsize = numpy_dtype(dtype).itemsize
    to_bytes: dict[str, Any] = {"name": "bytes"}
    if itemsize > 1:
        to_bytes["configuration"] = {"endian": "little"}
    match _known(codec):
        case "blosc":
            settings = {
                "typesize": itemsize,
                "cname": "lz4",
                "clevel": _BLOSC_LEVEL,
                "shuffle": "bitshuffle",
                "blocksize": 0,
            }
            return [to_bytes, {"name": "blosc", "configuration": settings}]
        case "zstd":
            settings = {"level": _ZSTD_LEVEL, "checksum": False}
            return [to_bytes, {"name": "zstd", "configuration": settings}]
        case _:
            return [to_bytes]


def _known(codec: str) -> str:
    if codec not in CODECS:
        raise InvalidInputError(f"no codec {codec!r}; there are 'auto', {', '.join(CODECS)}.")
    return codec


def _blosc(data: _Bytes, level: int, itemsize: int) -> bytes:
    encoded: bytes = blosc.compress(
        data, b"lz4", level, blosc.BITSHUFFLE, blosc.AUTOBLOCKS, itemsize
    )
    return encoded


def _shrinks(data: _Bytes, itemsize: int) -> bool:
    """Tell from a few pieces of a chunk whether encoding it pays; a small one is just encoded.

    All pieces must fail to shrink: a chunk that is half zeros is worth its time.
    """
    if data.nbytes < 2 * _SAMPLES * _SAMPLE:
        return True
    step = data.nbytes // _SAMPLES // itemsize * itemsize
    pieces = (data[i * step : i * step + _SAMPLE] for i in range(_SAMPLES))
    return any(
        len(_blosc(piece, _BLOSC_LEVEL, itemsize)) < _PAYS * piece.nbytes for piece in pieces
    )


def _blosc_held(data: _Bytes) -> int | None:
    """Return the raw size that a Blosc header claims; None where it contradicts the real length.

    Blosc trusts the header's sizes, so they are compared with the buffers before it runs.
    """
    if data.nbytes < _BLOSC_HEADER or int.from_bytes(data[12:16].data, "little") != data.nbytes:
        return None
    return int.from_bytes(data[4:8].data, "little")


def _zstd_held(data: _Bytes) -> int | None:
    """Return the raw size in a Zstandard frame header; None where there is none.

    numcodecs accepts a frame that holds less than the buffer, so the size is read here. The layout
    is that of RFC 8878, section 3.1.1.1.
    """
    if data[:4].tobytes() != _ZSTD_MAGIC or data.nbytes < 6:
        return None
    descriptor = int(data[4])
    single = descriptor >> 5 & 1
    width = (single, 2, 4, 8)[descriptor >> 6]
    start = 5 + (1 - single) + (0, 1, 2, 4)[descriptor & 3]
    field = data[start : start + width]
    if not width or field.nbytes < width:
        return None
    return int.from_bytes(field.data, "little") + (256 if width == 2 else 0)


def _copy(data: _Bytes, target: _Bytes) -> None:
    target[:] = data


_HELD: dict[str, Callable[[_Bytes], int | None]] = {
    "none": lambda data: data.nbytes,
    "blosc": _blosc_held,
    "zstd": _zstd_held,
}
_DECODE: dict[str, Callable[[_Bytes, _Bytes], object]] = {
    "none": _copy,
    "blosc": blosc.decompress,
    "zstd": zstd.decompress,
}
