"""The archives that `torch.save` writes, without their tensors' bytes: where those lie.

Invariant: no code of an archive runs without leave, and what torch cannot read is an error of ours.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from dcpstore.convert.file_tensors import FileBox, FileTensor
from dcpstore.errors import CorruptionError, DcpstoreError, InvalidInputError, UnsafeDataError
from dcpstore.geometry.boxes import Box

__all__ = [
    "is_archive",
    "load_archive",
    "locate_tensor",
    "open_source",
    "whole_tensor",
]

_MAGIC = b"PK\x03\x04"
_TELLING = "unsupported"  # what torch says of code that it does not run
_QUANTIZED = "QuantizedMeta"  # what torch says of tensors that it cannot load without their bytes
_MOST_SPREAD = 1 << 30  # bytes that a tensor may have in memory, though fewer lie in the file


def load_archive(file: IO[bytes], name: str, *, device: str, allow_pickle: bool) -> Any:
    """Return the object in an archive.

    Args:
        file: at its beginning.
        name: for messages.
        device: "meta" leaves the bytes of its tensors where they are.
        allow_pickle: let it run the code that it names.

    Raises:
        UnsafeDataError: it names code, and that is not allowed.
        InvalidInputError: it holds quantized tensors.
        CorruptionError: it is damaged.
        DcpstoreError: it names what cannot be built here.
    """
    if not is_archive(file):
        raise _damaged(name, ValueError("it does not begin as one"))
    _check_records(file, name)
    try:
        return torch.load(file, map_location=device, weights_only=not allow_pickle)
    except pickle.UnpicklingError as error:
        if _TELLING in str(error).lower():
            raise UnsafeDataError(
                f"{name} names code that would run ({_first_line(error)}); if you trust whoever "
                "wrote it, import it with allow_pickle (--allow-pickle)."
            ) from error
        raise _damaged(name, error) from error
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, OSError) as error:
        if _QUANTIZED in str(error):
            raise InvalidInputError(
                f"{name} holds quantized tensors, which have no plain bytes; save what "
                "tensor.dequantize() gives, or int_repr() and the scales."
            ) from error
        raise _damaged(name, error) from error
    except Exception as error:  # whatever the code that an allowed pickle names raises
        raise DcpstoreError(
            f"{name} cannot be built here ({type(error).__name__}: {error}); make what it names "
            "importable, in the version that wrote it."
        ) from error


def is_archive(file: IO[bytes]) -> bool:
    """Tell whether a file, at its beginning, begins as archives do."""
    begins = file.read(len(_MAGIC)) == _MAGIC
    file.seek(0)
    return begins


def locate_tensor(
    tensor: torch.Tensor, path: Path, *, fqn: str, start: int = 0, box: Box | None = None
) -> FileBox:
    """Return where a tensor that was loaded on "meta" lies.

    Args:
        tensor: of an archive.
        path: the file that holds the archive.
        fqn: for messages.
        start: where the archive begins in the file, in bytes.
        box: which box of a global tensor it is; None is all of it.

    Raises:
        InvalidInputError: a sparse, quantized or otherwise special tensor.
        CorruptionError: the tensor reaches past its storage, or that past the file.
    """
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or (
        tensor.layout is not torch.strided or tensor.is_quantized
    ):
        raise InvalidInputError(
            f"{fqn!r} is a {type(tensor).__name__} of layout {tensor.layout}, which has no plain "
            "bytes in the file; save a plain dense tensor (to_dense, dequantize, full_tensor)."
        )
    storage = tensor.untyped_storage()
    # torch's documented-in-code attribute of storages loaded on "meta": their place in the file
    offset: int | None = getattr(storage, "_checkpoint_offset", None)
    if offset is None:
        raise InvalidInputError(
            f"{fqn!r} was saved on the meta device and has no data; save a real tensor."
        )
    if tensor.nbytes > max(_MOST_SPREAD, path.stat().st_size):
        raise InvalidInputError(
            f"{fqn!r} has {tensor.nbytes} bytes, spread by its strides over a file of "
            f"{path.stat().st_size}; save tensor.contiguous(), if it is meant to be so large."
        )
    first = offset + int(tensor.storage_offset()) * tensor.itemsize
    found = FileBox(
        path,
        box or Box.whole(tensor.shape),
        start + first,
        tuple(map(int, tensor.stride())),
        is_conj=tensor.is_conj(),
        is_neg=tensor.is_neg(),
    )
    found.check(tensor.dtype, start + offset + storage.nbytes())
    found.check(tensor.dtype, path.stat().st_size)
    return found


def whole_tensor(tensor: torch.Tensor, path: Path, *, fqn: str) -> FileTensor:
    """Return a tensor of the archive that is the file `path`."""
    return FileTensor(tensor.dtype, tuple(tensor.shape), (locate_tensor(tensor, path, fqn=fqn),))


def _check_records(file: IO[bytes], name: str) -> None:
    """Check that an archive's records lie in the file as they are, each once.

    Before torch looks, for it inflates compressed records to whatever size they have.

    Raises:
        CorruptionError: it is truncated, or no archive.
        InvalidInputError: records are compressed, which torch.save never does.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    # What zipfile raises for headers that are none.
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, struct.error) as error:
        raise _damaged(name, error) from error
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    packed = [r.filename for r in records if r.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise InvalidInputError(
            f"{name} holds compressed records ({packed[0]!r}), which torch.save never writes; save "
            "it again with torch.save."
        )
    if len({record.filename for record in records}) < len(records):
        raise _damaged(name, ValueError("two records have the same name"))
    if any(record.header_offset + record.file_size > size for record in records):
        raise _damaged(name, ValueError("a record reaches past the end"))


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


def _damaged(name: str, error: Exception) -> CorruptionError:
    return CorruptionError(
        f"{name} is damaged, truncated or no archive of torch.save ({_first_line(error)}); copy it "
        "again from its source."
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if _TELLING in line.lower()]
    return f"{type(error).__name__}: {(telling or lines or [''])[0][:200]}"
