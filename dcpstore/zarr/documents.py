"""The Zarr v3 documents of a version, and the Zarr key of each chunk.

The same documents are in `VersionStore`, and in the references that `references` makes. A tensor
is an array named by its FQN; one with several parts is a group of that name with one array for each
part. Values are attributes of the root. Two FQNs never share a node name, and no node name has
another meaning in Zarr.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

from dcpstore.encoding.codecs import zarr_codecs
from dcpstore.encoding.dtypes import numpy_dtype
from dcpstore.formats import json_fields
from dcpstore.formats.json_fields import value_tree
from dcpstore.geometry.grids import Grid
from dcpstore.records import EntryRecord, NewTensor, TensorRecord

__all__ = [
    "array_heads",
    "array_name",
    "array_names",
    "chunk_keys",
    "zarr_documents",
]

# What has another meaning in Zarr nodes, URLs, globs or templates; and lone surrogates.
_UNSAFE = re.compile(r'[\x00-\x20\x7f-\x9f"#%&*/:<>?\[\\\]{|}\ud800-\udfff]')


@lru_cache(1 << 14)
def array_name(fqn: str) -> str:
    """Return the name of an FQN's node: percent-escaped where Zarr or fsspec could not hold it."""
    name = _UNSAFE.sub(lambda match: _escaped(match[0]), fqn)
    if not name:
        return "%"  # no other FQN escapes to it
    if name.startswith("__") or name == "zarr.json" or set(name) == {"."} or name.startswith(".z"):
        return "".join(f"%{ord(c):02X}" if c in "_." else c for c in name)
    return name


def array_names(entry: EntryRecord) -> list[str]:
    """Return the path of each part's array; an entry without a tensor has none."""
    if entry.tensor is None:
        return []
    name = array_name(entry.fqn)
    if _is_whole(entry.tensor):
        return [name]
    return [f"{name}/{i}" for i in range(len(entry.tensor.parts))]


def chunk_keys(array: str, grid: Grid) -> Iterator[str]:
    """Yield the Zarr keys of a part's chunks by ordinal; `array` is the path of its array."""
    if grid.is_one_cell:
        yield f"{array}/c{'/0' * len(grid.shape)}"
        return
    for index in itertools.product(*(range(count) for count in grid.counts)):
        yield "/".join((array, "c", *map(str, index)))


def zarr_documents(
    entries: Sequence[EntryRecord], attributes: Mapping[str, object]
) -> dict[str, str]:
    """Return the text of every zarr.json of a version, by key.

    Args:
        entries: of the version.
        attributes: JSON values for the root group, such as its uid and step; the values of the
            version are added as "values", typed JSON by FQN.
    """
    nodes: dict[str, str] = {}
    for entry in entries:
        if entry.tensor is None:
            continue
        tensor, name = entry.tensor, array_name(entry.fqn)
        named = f'"fqn":{json_fields.quoted(entry.fqn)},"torch_dtype":"{tensor.dtype}"'
        if entry.kind == "blob" and entry.value:
            named += f',"blob":{json_fields.encode(value_tree(entry.fqn, entry.value))}'
        if _is_whole(tensor):
            nodes[name] = _array(tensor, tensor.parts[0], f"{{{named}}}")
            continue
        nodes[name] = _group(f'{{{named},"shape":{json_fields.integers(tensor.shape)}}}')
        for array, grid in zip(array_names(entry), tensor.parts, strict=True):
            placed = {"offsets": grid.offsets, "shape": grid.shape}
            nodes[array] = _array(tensor, grid, json_fields.encode(placed))
    values = {e.fqn: value_tree(e.fqn, e.value) for e in entries if e.kind == "value" and e.value}
    root = _group(json_fields.encode({**attributes, "values": values}))
    # The nodes stand in the root too: zarr 3.1 finds no arrays of a split tensor otherwise, for it
    # lists nested folders of a reference file wrongly.
    listed = ",".join(f"{json_fields.quoted(path)}:{node}" for path, node in nodes.items())
    consolidated = f'{{"kind":"inline","must_understand":false,"metadata":{{{listed}}}}}'
    return {"zarr.json": f'{root[:-1]},"consolidated_metadata":{consolidated}}}'} | {
        f"{path}/zarr.json": node for path, node in nodes.items()
    }


def _is_whole(tensor: TensorRecord) -> bool:
    """Tell whether one part at the origin is the whole tensor."""
    return len(tensor.parts) == 1 and tensor.parts[0].shape == tensor.shape


def _group(attributes: str) -> str:
    return f'{{"zarr_format":3,"node_type":"group","attributes":{attributes}}}'


def _array(tensor: TensorRecord, grid: Grid, attributes: str) -> str:
    head = _array_head(tensor.dtype, tensor.codec, grid.shape, grid.chunk_shape)
    return f'{head[:-1]},"attributes":{attributes}}}'


@lru_cache(4096)
def _array_head(
    dtype: str, codec: str, shape: tuple[int, ...], chunk_shape: tuple[int, ...]
) -> str:
    """Return the document of an array but for its attributes; few are distinct."""
    stored = numpy_dtype(dtype)
    zero = stored.type(0).item()
    return json_fields.encode(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": shape,
            "data_type": stored.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": [0.0, 0.0] if isinstance(zero, complex) else zero,
            "codecs": zarr_codecs(codec, dtype),
            "storage_transformers": [],
        }
    )


def _escaped(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode("utf-8", "surrogatepass"))


def array_heads(tensor: NewTensor) -> list[str]:
    """Return the document of the array of each part, but for its attributes."""
    return [
        _array_head(tensor.dtype, tensor.codec, part.shape, part.chunk_shape)
        for part in tensor.parts
    ]
