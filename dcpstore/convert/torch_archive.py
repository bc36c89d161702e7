"""The archives that `torch.save` writes, without their tensors' bytes: where those lie.

Invariant: no code of an archive runs without leave, and what torch cannot read is an error of ours.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch

from dcpstore.convert import pickles
from dcpstore.convert.file_tensors import FileBox, FileTensor
from dcpstore.convert.pickles import Odd
from dcpstore.convert.torch_records import Record, damaged, make_outline, read_records
from dcpstore.errors import CorruptionError, DcpstoreError, InvalidInputError, UnsafeDataError
from dcpstore.geometry.boxes import Box

__all__ = ["Loaded", "is_archive", "load_archive", "open_source", "refuse_odd"]

_MAGIC = b"PK\x03\x04"
# What torch.load asks of the module that unpickles.
_PLAIN = SimpleNamespace(__name__=pickles.__name__, Unpickler=pickles.PlainUnpickler)
_QUANTIZED = "QuantizedMeta"  # what torch says of tensors that it cannot load without their bytes
_MOST_SPREAD = 1 << 30  # bytes that a tensor may have in memory, though fewer lie in the file


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """The object in an archive, and where the bytes of its tensors on "meta" lie.

    `places` are those of storages in the archive, by those that torch has put on them.
    """

    held: Any  # whatever was saved
    places: Mapping[int, Record]

    def locate_tensor(
        self, tensor: torch.Tensor, path: Path, *, fqn: str, start: int = 0, box: Box | None = None
    ) -> FileBox:
        """Return where a tensor that was loaded on "meta" lies.

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
        # torch's documented-in-code attribute of storages loaded on "meta": their place in the file
        record = self.places.get(getattr(storage, "_checkpoint_offset", -1))
        if record is None:
            raise InvalidInputError(
                f"{fqn!r} was saved on the meta device and has no data; save a real tensor."
            )
        size = path.stat().st_size
        if tensor.nbytes > max(_MOST_SPREAD, size):
            raise InvalidInputError(
                f"{fqn!r} has {tensor.nbytes} bytes, spread by its strides over a file of "
                f"{size}; save tensor.contiguous(), if it is meant to be so large."
            )
        if storage.nbytes() > record.size:
            raise CorruptionError(
                f"{fqn!r} has a storage of {storage.nbytes()} bytes, of which {str(path)!r} holds "
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
    """Return the object in an archive, and where the bytes of its tensors lie.

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
    if device == "meta":
        outline = make_outline(file, records)
        source, places = outline.file, outline.places
    try:
        held = torch.load(
            source,
            map_location=device,
            weights_only=False,
            pickle_module=pickle if allow_pickle else _PLAIN,
            mmap=False,
        )
        return Loaded(held, places)
    except UnsafeDataError as error:
        raise UnsafeDataError(
            f"{name} would run code ({error}); if you trust whoever wrote it, import it with "
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
    except Exception as error:  # whatever the code that an allowed pickle names raises
        if not allow_pickle:
            raise damaged(name, _first_line(error)) from error
        raise DcpstoreError(
            f"{name} cannot be built here ({type(error).__name__}: {error}); make what it names "
            "importable, in the version that wrote it."
        ) from error


def is_archive(file: IO[bytes]) -> bool:
    """Tell whether a file, at its beginning, begins as archives do."""
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
            "(tensors_only, --tensors-only), or, if you trust whoever wrote it, import it with "
            "allow_pickle (--allow-pickle)."
        )
