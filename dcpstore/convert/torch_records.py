"""The records of an archive of `torch.save`: where they lie, and what torch is shown of them.

Where an archive claims torch's own layout (`.format_version`), torch does not look where a storage
lies but computes it. Archives that were packed again keep the claim and not the layout, as did the
exports of older dcpstore, and then other bytes are read without a word. So the places are taken
from the records' own headers, and torch is shown an outline, made here: the records that it reads,
and the storages by name alone.

Invariant: a record lies inside the archive, as it is, and overlaps no other.
"""

from __future__ import annotations

import io
import re
import struct
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import IO

from dcpstore.errors import CorruptionError, InvalidInputError

__all__ = ["Outline", "Record", "damaged", "make_outline", "read_records"]

_HEADER = struct.Struct("<4s22xHH")  # a record's own: its magic, then the lengths of name and extra
_MAGIC = b"PK\x03\x04"
_UNREADABLE = 0x0001 | 0x0020 | 0x0040 | 0x2000  # flags: encrypted, patched, both again
_BYTEORDER = "byteorder"
_READ = ("data.pkl", "version", ".data/version")  # what torch reads to find out what is held
_SCRIPT = "constants.pkl"
_STORAGE = re.compile(r"data/[!-~]{1,200}")
_ROOT = "archive"


@dataclass(frozen=True, slots=True)
class Record:
    """A record of an archive: where its bytes begin in it, and how many they are."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Outline:
    """An archive without its storages' bytes; `places` are theirs, by the ones that torch sees."""

    file: io.BytesIO
    places: Mapping[int, Record]


def read_records(file: IO[bytes], name: str) -> dict[str, Record]:
    """Return the records of an archive by the names that torch knows them by.

    Args:
        file: read from its beginning, and left there.
        name: for messages.

    Raises:
        CorruptionError: it is truncated, overlaps itself, or is no archive.
        InvalidInputError: torch.save writes no such archive: it is compressed, or a program.
    """
    listed = _listed(file, name)
    try:
        placed = [(info, _placed(file, info)) for info in listed]
    except (ValueError, OSError, struct.error) as error:
        raise damaged(name, error) from error
    size = file.seek(0, io.SEEK_END)
    spans = sorted((info.header_offset, found.offset + found.size) for info, found in placed)
    if any(end > begin for (_, end), (begin, _) in pairwise([*spans, (size, size)])):
        raise damaged(name, "a record reaches into another, or past the end")
    file.seek(0)
    root, slash, _ = listed[0].filename.partition("/") if listed else ("", "", "")
    records = {
        info.filename.removeprefix(root + slash): found
        for info, found in placed
        if info.filename.startswith(root + slash)
    }
    if _SCRIPT in records:
        raise InvalidInputError(
            f"{name} is a TorchScript program; load it with torch.jit.load, and save its "
            "state_dict() with torch.save."
        )
    _check_byteorder(file, records, name)
    return records


def make_outline(file: IO[bytes], records: Mapping[str, Record]) -> Outline:
    """Return the outline of an archive, out of its records; `file` is left at its beginning."""
    shown = io.BytesIO()
    places: dict[int, Record] = {}
    with zipfile.ZipFile(shown, "w", zipfile.ZIP_STORED) as archive:
        # torch is to swap nothing: on "meta" that is a crash
        archive.writestr(f"{_ROOT}/{_BYTEORDER}", sys.byteorder)
        for name, record in records.items():
            if name in _READ:
                archive.writestr(f"{_ROOT}/{name}", _read(file, record))
            elif _STORAGE.fullmatch(name):
                archive.writestr(f"{_ROOT}/{name}", b"")
                places[shown.tell()] = record  # it is empty: where it ends is where it begins
    file.seek(0)
    shown.seek(0)
    return Outline(shown, places)


def damaged(name: str, why: Exception | str) -> CorruptionError:
    """Return the error that an archive is none that torch reads."""
    return CorruptionError(
        f"{name} is damaged, truncated or no archive of torch.save ({why}); copy it again from "
        "its source."
    )


def _listed(file: IO[bytes], name: str) -> list[zipfile.ZipInfo]:
    """Return what the directory says of the records, each of which lies in the file as it is."""
    try:
        with zipfile.ZipFile(file) as archive:
            listed = archive.infolist()
    # What zipfile raises for headers that are none.
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, struct.error) as error:
        raise damaged(name, error) from error
    packed = [info.filename for info in listed if info.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise InvalidInputError(
            f"{name} holds compressed records ({packed[0]!r}), which torch.save never writes; save "
            "it again with torch.save."
        )
    if len({info.filename for info in listed}) < len(listed):
        raise damaged(name, "two records have the same name")
    if any(info.flag_bits & _UNREADABLE for info in listed):
        raise damaged(name, "a record is encrypted")
    if any(info.file_size != info.compress_size for info in listed):
        raise damaged(name, "a record has two sizes")
    return listed


def _placed(file: IO[bytes], info: zipfile.ZipInfo) -> Record:
    """Return where a record lies by its own header; the directory's may have other lengths."""
    file.seek(info.header_offset)
    magic, name, extra = _HEADER.unpack(file.read(_HEADER.size))
    if magic != _MAGIC:
        raise ValueError(f"no record is at {info.header_offset}")
    return Record(info.header_offset + _HEADER.size + name + extra, info.file_size)


def _check_byteorder(file: IO[bytes], records: Mapping[str, Record], name: str) -> None:
    """Refuse numbers that FileBox does not read; without the record they are little-endian."""
    record = records.get(_BYTEORDER)
    found = _read(file, record) if record and record.size <= len("little") else b""
    file.seek(0)
    if record is None or found == b"little":
        return
    if found != b"big":
        raise damaged(name, "its byteorder is neither little nor big")
    raise InvalidInputError(
        f"{name} was written on a machine of big-endian numbers; load it with torch.load here, and "
        "save it again with torch.save."
    )


def _read(file: IO[bytes], record: Record) -> bytes:
    file.seek(record.offset)
    return file.read(record.size)
