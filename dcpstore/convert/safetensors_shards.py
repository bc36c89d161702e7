"""How a version is cut into safetensors files, and what each of them is called."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dcpstore.convert.exporting import ExportedTensor
from dcpstore.errors import InvalidInputError

__all__ = ["parse_size", "shard_names", "shards_of"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}


def parse_size(size: int | str) -> int:
    """Return a size in bytes: a number, or a text such as "5GB" (powers of 1000) or "5GiB".

    Raises:
        InvalidInputError: it is neither, or not positive.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", str(size).strip().upper())
    unit = (_UNITS | _BINARY).get(found[2]) if found else None
    nbytes = int(float(found[1]) * unit) if found and unit else 0
    if nbytes <= 0:
        raise InvalidInputError(f"size {size!r} is none; give bytes, or such as '5GB' or '512MiB'.")
    return nbytes


def shards_of(tensors: Sequence[ExportedTensor], most: int) -> list[list[ExportedTensor]]:
    """Return the tensors of each file: in the order of their names, up to `most` bytes a file.

    Inside a file wide dtypes come first, so that each tensor begins at a multiple of its own width,
    as whoever maps the file wants it. A tensor larger than `most` has a file to itself.
    """
    shards: list[list[ExportedTensor]] = [[]]
    held = 0
    for tensor in tensors:
        if shards[-1] and held + tensor.nbytes > most:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += tensor.nbytes
    return [sorted(shard, key=lambda t: (-t.dtype.itemsize, t.fqn)) for shard in shards]


def shard_names(count: int) -> list[str]:
    """Return the names of so many files, as Hugging Face's libraries look for them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
