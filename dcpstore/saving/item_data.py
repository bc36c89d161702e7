"""The data that a planner gives for one write item: checked against its plan, and encoded.

Invariant: what is stored under an FQN is what the plan says of it; an error names the FQN.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from typing import TypeGuard

import torch
from torch.distributed.checkpoint import default_planner as torch_planner
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem

from dcpstore.encoding.values import EncodedValue, PlannerBytes, encode_value
from dcpstore.errors import DcpstoreError, InvalidInputError, UnsafeDataError
from dcpstore.planning.save_planner import DefaultSavePlanner

__all__ = [
    "checked_tensor",
    "encoded_item",
    "error_of",
    "resolves_plainly",
]

_ARCHIVE = b"PK\x03\x04"  # the first bytes of what torch.save writes: a zip archive
_PLAIN_TRANSFORMS = (
    torch_planner.DefaultSavePlanner.transform_object,
    DefaultSavePlanner.transform_object,
)
_PLAIN_RESOLVERS = (
    torch_planner.DefaultSavePlanner.resolve_data,
    DefaultSavePlanner.resolve_data,
)


def resolves_plainly(planner: SavePlanner) -> TypeGuard[torch_planner.DefaultSavePlanner]:
    """Tell whether a planner resolves an item as torch's or ours does.

    Then it can be asked for any item of its state, in any order and more than once.
    """
    return (
        isinstance(planner, torch_planner.DefaultSavePlanner)
        and type(planner).resolve_data in _PLAIN_RESOLVERS
    )


def _gives_plain_values(planner: SavePlanner) -> TypeGuard[torch_planner.DefaultSavePlanner]:
    """Tell whether the planner's bytes of a value are torch's, so that the value can be used."""
    return resolves_plainly(planner) and type(planner).transform_object in _PLAIN_TRANSFORMS


def error_of(item: WriteItem, error: DcpstoreError) -> DcpstoreError:
    """Return an error of the same class whose text begins with the FQN of the item."""
    return type(error)(f"{item.index.fqn!r}: {error}")


def checked_tensor(item: WriteItem, tensor: object, sizes: tuple[int, ...]) -> torch.Tensor:
    """Return what a planner gave for a tensor item, or for a box of `sizes` inside it.

    Raises:
        InvalidInputError: it is not a tensor, or its dtype or shape is not what the plan says.
    """
    assert item.tensor_data is not None
    dtype = item.tensor_data.properties.dtype
    if not isinstance(tensor, torch.Tensor):
        raise InvalidInputError(
            f"the planner gives {type(tensor).__name__} for tensor {item.index.fqn!r}; its "
            "resolve_data must return what its plan says."
        )
    if tensor.dtype != dtype or tuple(tensor.size()) != sizes:
        raise InvalidInputError(
            f"the planner gives {tensor.dtype} {tuple(tensor.size())} for {item.index.fqn!r}, "
            f"and its plan says {dtype} {sizes}; make its plan and its resolve_data agree."
        )
    return tensor


def encoded_item(planner: SavePlanner, item: WriteItem, *, allow_pickle: bool) -> EncodedValue:
    """Return the value of a value item as the catalog keeps it.

    Raises:
        UnsafeDataError: it needs pickle, and `allow_pickle` is False.
        InvalidInputError: it cannot be stored.
    """
    try:
        if _gives_plain_values(planner):
            return encode_value(planner.lookup_object(item.index), allow_pickle=allow_pickle)
        return _encoded_bytes(planner, item, allow_pickle=allow_pickle)
    except (UnsafeDataError, InvalidInputError) as error:
        raise error_of(item, error) from error


def _encoded_bytes(planner: SavePlanner, item: WriteItem, *, allow_pickle: bool) -> EncodedValue:
    """Encode the bytes that a planner made of a value.

    If they are torch's bytes of it, the value itself is stored. Other bytes are stored as they are,
    for the load planner that can read them.
    """
    data = _resolved_bytes(planner, item)
    if data.startswith(_ARCHIVE):
        try:
            value = torch.load(io.BytesIO(data), weights_only=True)
            return encode_value(value, allow_pickle=False)
        except (UnsafeDataError, pickle.UnpicklingError) as error:
            if isinstance(planner, torch_planner.DefaultSavePlanner):
                value = planner.lookup_object(item.index)
                # torch.load refuses some values that torch.save takes, such as an io.BytesIO
                if _is_archive_of(data, value):
                    return encode_value(value, allow_pickle=allow_pickle)
            if not allow_pickle:
                raise UnsafeDataError(
                    "the planner's bytes hold a pickle; give plain values, or save with "
                    "allow_pickle=True."
                ) from error
    return encode_value(PlannerBytes(data), allow_pickle=False)


def _resolved_bytes(planner: SavePlanner, item: WriteItem) -> bytes:
    try:
        data = planner.resolve_data(item)
    except (TypeError, pickle.PicklingError) as error:
        raise InvalidInputError(f"the planner cannot make bytes of it ({error}).") from error
    if not isinstance(data, io.BytesIO):
        raise InvalidInputError(
            f"the planner gives {type(data).__name__} for value {item.index.fqn!r}; its "
            "resolve_data must return io.BytesIO for a BYTE_IO item."
        )
    return data.getvalue()


def _is_archive_of(data: bytes, value: object) -> bool:
    """Tell whether `data` is what torch.save makes of `value`."""
    own = io.BytesIO()
    try:
        torch.save(value, own)
    except (pickle.PicklingError, TypeError, AttributeError, RuntimeError):
        return False  # it does not pickle, so the bytes are of something else
    return _records(data) == _records(own.getvalue())


def _records(archive: bytes) -> dict[str, bytes]:
    """Return the files of an archive, without the id, which is a new one in each archive."""
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        names = [name for name in file.namelist() if not name.endswith("/serialization_id")]
        return {name: file.read(name) for name in names}
