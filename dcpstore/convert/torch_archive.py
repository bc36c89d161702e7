"""Archives of `torch.save`: their contents, and where the bytes of their tensors are.

Where an archive claims torch's own layout (`.format_version`), torch computes where a storage is
instead of looking. Archives that were packed again keep the claim but not the layout, as did the
exports of older dcpstore, and then other bytes are read without an error. So the places are read
from the records' own headers, and torch gets an outline made here: the records that it reads, and
storages without their bytes. Invariants: a record is stored uncompressed inside the archive and
overlaps no other; no code of an archive runs unless pickle is allowed; and what torch cannot read
raises an error of dcpstore.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch
from typing_extensions import Buffer

from dcpstore.compat.torch_private import placing_storages, storage_place
from dcpstore.convert import pickles
from dcpstore.convert.importing import FileBox, FileTensor
from dcpstore.convert.pickles import Odd
from dcpstore.errors import CorruptionError, DcpstoreError, InvalidInputError, UnsafeDataError
from dcpstore.geometry.boxes import Box

__all__ = [
    "FileView",
    "Loaded",
    "Outline",
    "Record",
    "damaged",
    "is_archive",
    "load_archive",
    "make_outline",
    "open_source",
    "read_records",
    "refuse_odd",
]

_QUANTIZED = "QuantizedMeta"  # in torch's error for tensors that it cannot load without their bytes
_MOST_SPREAD = 1 << 30  # bytes that a tensor may have in memory, though fewer are in the file

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
        CorruptionError: it is truncated, overlaps itself, or is not an archive.
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
        # torch must not swap bytes: on "meta" it would crash
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
    """Return the error for an archive that torch does not read."""
    return CorruptionError(
        f"{name} is damaged, truncated or not an archive of torch.save ({why}); copy it again from "
        "its source."
    )


def _listed(file: IO[bytes], name: str) -> list[zipfile.ZipInfo]:
    """Return the directory's records, all of them uncompressed."""
    try:
        with zipfile.ZipFile(file) as archive:
            listed = archive.infolist()
    # What zipfile raises for invalid headers.
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
    """Return where a record is by its own header; the directory's may have other lengths."""
    file.seek(info.header_offset)
    magic, name, extra = _HEADER.unpack(file.read(_HEADER.size))
    if magic != _MAGIC:
        raise ValueError(f"no record is at {info.header_offset}")
    return Record(info.header_offset + _HEADER.size + name + extra, info.file_size)


def _check_byteorder(file: IO[bytes], records: Mapping[str, Record], name: str) -> None:
    """Refuse big-endian numbers, which FileBox does not read; the default is little-endian."""
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


# What torch.load asks of the module that unpickles.
_PLAIN = SimpleNamespace(__name__=pickles.__name__, Unpickler=pickles.PlainUnpickler)


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """The object in an archive, and where the bytes of its tensors on "meta" are.

    `places` are those of storages in the archive, by those that torch has put on them.
    """

    held: Any  # whatever was saved
    places: Mapping[int, Record]

    def locate_tensor(
        self, tensor: torch.Tensor, path: Path, *, fqn: str, start: int = 0, box: Box | None = None
    ) -> FileBox:
        """Return where a tensor that was loaded on "meta" is.

        Args:
            tensor: of this archive.
            path: the file that holds the archive.
            fqn: for messages.
            start: where the archive begins in the file, in bytes.
            box: which box of a global tensor it is; None is all of it.

        Raises:
            InvalidInputError: a sparse, quantized or otherwise special tensor.
            CorruptionError: the tensor reaches past its storage, or that past its record.
        """
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or (
            tensor.layout is not torch.strided or tensor.is_quantized
        ):
            raise InvalidInputError(
                f"{fqn!r} is a {type(tensor).__name__} of layout {tensor.layout}, which has no "
                "plain bytes in the file; save a plain dense tensor (to_dense, dequantize, "
                "full_tensor)."
            )
        storage = tensor.untyped_storage()
        place = storage_place(storage)
        record = None if place is None else self.places.get(place)
        if record is None:
            raise InvalidInputError(
                f"{fqn!r} was saved on the meta device and has no data; save a real tensor."
            )
        size = path.stat().st_size
        if tensor.nbytes > max(_MOST_SPREAD, size):
            raise InvalidInputError(
                f"{fqn!r} has {tensor.nbytes} bytes, spread by its strides over a file of "
                f"{size}; save tensor.contiguous(), if it should be so large."
            )
        if storage.nbytes() > record.size:
            raise CorruptionError(
                f"{fqn!r} has a storage of {storage.nbytes()} bytes, and {str(path)!r} holds only "
                f"{record.size}; it is truncated or damaged: copy it again from its source."
            )
        offset = start + record.offset
        found = FileBox(
            path,
            box or Box.whole(tensor.shape),
            offset + int(tensor.storage_offset()) * tensor.itemsize,
            tuple(map(int, tensor.stride())),
            is_conj=tensor.is_conj(),
            is_neg=tensor.is_neg(),
        )
        found.check(tensor.dtype, offset + storage.nbytes())
        return found

    def whole_tensor(self, tensor: torch.Tensor, path: Path, *, fqn: str) -> FileTensor:
        """Return a tensor of the archive that is the file `path`."""
        piece = self.locate_tensor(tensor, path, fqn=fqn)
        return FileTensor(tensor.dtype, tuple(tensor.shape), (piece,))


def load_archive(file: IO[bytes], name: str, *, device: str, allow_pickle: bool) -> Loaded:
    """Return the object in an archive, and where the bytes of its tensors are.

    Args:
        file: at its beginning.
        name: for messages.
        device: "meta" leaves the bytes of its tensors where they are.
        allow_pickle: let it run the code that it names.

    Raises:
        UnsafeDataError: it does more than name code, and that is not allowed. Where it names code,
            an `Odd` is held.
        InvalidInputError: it holds quantized tensors, or is of a kind that torch.save never writes.
        CorruptionError: it is damaged.
        DcpstoreError: it names what cannot be built here.
    """
    if not is_archive(file):
        raise damaged(name, "it does not begin as one")
    records = read_records(file, name)
    source: IO[bytes] = file
    places: Mapping[int, Record] = {}
    unpickling: Any = pickle if allow_pickle else _PLAIN
    if device == "meta":
        outline = make_outline(file, records)
        source, places = outline.file, outline.places
        at = {record: place for place, record in places.items()}
        shown = {name: at[record] for name, record in records.items() if record in at}
        unpickling = placing_storages(unpickling, shown)
    try:
        held = torch.load(
            source,
            map_location=device,
            weights_only=False,
            pickle_module=unpickling,
            mmap=False,  # whatever torch is configured to do: it can map only a path
        )
        return Loaded(held, places)
    except UnsafeDataError as error:
        raise UnsafeDataError(
            f"{name} would run code ({error}); if you trust its author, import it with "
            "allow_pickle (--allow-pickle)."
        ) from error
    except pickle.UnpicklingError as error:
        raise damaged(name, _first_line(error)) from error
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, OSError) as error:
        if _QUANTIZED in str(error):
            raise InvalidInputError(
                f"{name} holds quantized tensors, which have no plain bytes; save what "
                "tensor.dequantize() gives, or int_repr() and the scales."
            ) from error
        raise damaged(name, _first_line(error)) from error
    except Exception as error:  # the code that an allowed pickle names can raise anything
        if not allow_pickle:
            raise damaged(name, _first_line(error)) from error
        raise DcpstoreError(
            f"{name} cannot be built here ({type(error).__name__}: {error}); make what it names "
            "importable, in the version that wrote it."
        ) from error


def is_archive(file: IO[bytes]) -> bool:
    """Return whether a file that is at its beginning starts as archives do."""
    begins = file.read(len(_MAGIC)) == _MAGIC
    file.seek(0)
    return begins


def open_source(path: Path) -> io.BufferedReader:
    """Open a file to read.

    Raises:
        DcpstoreError: the system refuses.
    """
    try:
        return path.open("rb")
    except OSError as error:
        raise DcpstoreError(
            f"cannot read {str(path)!r}: {error.strerror}; check the path and this user's rights."
        ) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or [''])[0][:200]}"


def refuse_odd(name: str, odd: Mapping[str, Odd]) -> None:
    """Refuse an archive or a folder in which these FQNs are what only code could build.

    Raises:
        UnsafeDataError: there are some.
    """
    if odd:
        listed = ", ".join(f"{fqn!r} ({one.name})" for fqn, one in [*odd.items()][:8])
        more = f" and {len(odd) - 8} more" if len(odd) > 8 else ""
        raise UnsafeDataError(
            f"{name} names code that would run, for {listed}{more}; leave the values out "
            "(tensors_only, --tensors-only), or, if you trust its author, import it with "
            "allow_pickle (--allow-pickle)."
        )


class FileView(io.RawIOBase):
    """Some bytes of an open file, as a file of their own.

    Torch's own view seeks past its end where it should seek before it, and zip archives are read
    from their end.
    """

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        super().__init__()
        self._file, self._offset, self._length = file, offset, length
        self._at = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Go to a position; a negative one is an OSError, as in a file."""
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if at < 0:
            raise OSError(f"position {at} is negative")
        self._at = at
        return at

    def tell(self) -> int:
        """Return the position of the next byte."""
        return self._at

    def readinto(self, buffer: Buffer, /) -> int:
        """Read up to the end of the view."""
        target = memoryview(buffer).cast("B")
        self._file.seek(self._offset + self._at)
        data = self._file.read(min(len(target), max(self._length - self._at, 0)))
        target[: len(data)] = data
        self._at += len(data)
        return len(data)
