"""Tensors that are made of tensors: taken apart into parts and a description, and put together.

Torch's sparse layouts and jagged nested tensors, and tensors of torchao: a closed list. Invariants:
the result is equal to the original bit for bit; a class comes from the list or from the caller's
own state, never by a name in a checkpoint, whose code is never run.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import json
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dcpstore.encoding.dtypes import dtype_name, torch_dtype
from dcpstore.encoding.values import decode_value, encode_value
from dcpstore.errors import CorruptionError, DcpstoreError, InvalidInputError, UnsafeDataError
from dcpstore.formats.composition import Composition

__all__ = [
    "CONTEXT",
    "JAGGED",
    "KINDS",
    "SPARSE",
    "Kind",
    "class_of",
    "context_difference",
    "describe",
    "is_class",
    "kind_of",
    "named_class",
    "parts_of",
    "put_together",
]

_PLAIN = (torch.Tensor, torch.nn.Parameter)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of composed tensor.

    Attributes:
        name: in marks, and for people.
        module, attr: where its class is; without, it is a layout of torch's own tensors.
        layout: that layout.
        grows: whether the sizes of its parts are part of what it holds.
        contents: what of its context a load takes over, so that it may differ.
        size: where its context repeats the shape of the tensor.
        cuts: how a part is cut where the tensor is split over ranks: "flat" ones have one
            dimension, and follow the elements of the tensor; "whole" ones are alike on all ranks;
            "turned" ones have the last two dimensions in the other order; all others have the
            dimensions of the tensor, or fewer elements along them.
    """

    name: str
    module: str = ""
    attr: str = ""
    layout: torch.layout = torch.strided
    grows: bool = False
    contents: tuple[str, ...] = ()
    size: str | int | None = None
    cuts: Mapping[str, Literal["flat", "whole", "turned"]] = dataclasses.field(default_factory=dict)


_AO = "torchao.quantization.quantize_.workflows"


SPARSE = {
    layout: Kind(str(layout), layout=layout, grows=True, contents=("coalesced",))
    for layout in (
        torch.sparse_coo,
        torch.sparse_csr,
        torch.sparse_csc,
        torch.sparse_bsr,
        torch.sparse_bsc,
    )
}


JAGGED = Kind(
    "torch.nested (jagged)",
    "torch.nested._internal.nested_tensor",
    "NestedTensor",
    layout=torch.jagged,
    grows=True,
    contents=("min_seqlen", "max_seqlen"),
)


_CLASSES = (
    Kind("torchao Int8Tensor", f"{_AO}.int8.int8_tensor", "Int8Tensor"),
    Kind(
        "torchao Int4Tensor",
        f"{_AO}.int4.int4_tensor",
        "Int4Tensor",
        size="shape",
        cuts={"scale": "turned", "zero_point": "turned"},
    ),
    Kind(
        "torchao Int4PlainInt32Tensor",
        f"{_AO}.int4.int4_plain_int32_tensor",
        "Int4PlainInt32Tensor",
        size="shape",
        cuts={"scale": "turned", "zero_point": "turned"},
    ),
    Kind(
        "torchao Int4TilePackedTo4dTensor",
        f"{_AO}.int4.int4_tile_packed_to_4d_tensor",
        "Int4TilePackedTo4dTensor",
        size="shape",
    ),
    Kind(
        "torchao IntxUnpackedToInt8Tensor",
        f"{_AO}.intx.intx_unpacked_to_int8_tensor",
        "IntxUnpackedToInt8Tensor",
    ),
    Kind("torchao Float8Tensor", f"{_AO}.float8.float8_tensor", "Float8Tensor"),
    Kind(
        "torchao WeightWithDynamicFloat8CastTensor",
        "torchao.float8.fsdp_utils",
        "WeightWithDynamicFloat8CastTensor",
    ),
    Kind(
        "torchao OptimState8bit",
        "torchao.optim.subclass_8bit",
        "OptimState8bit",
        cuts={"scale": "flat", "qmap": "whole"},
    ),
    Kind(
        "torchao OptimState4bit",
        "torchao.optim.subclass_4bit",
        "OptimState4bit",
        size=1,
        cuts={"codes": "flat", "scale": "flat", "qmap": "whole"},
    ),
    Kind(
        "torchao OptimStateFp8",
        "torchao.optim.subclass_fp8",
        "OptimStateFp8",
        cuts={"scale": "flat"},
    ),
)


_BY_CLASS = {kind.attr: kind for kind in (JAGGED, *_CLASSES)}


KINDS = {kind.name: kind for kind in (*SPARSE.values(), JAGGED, *_CLASSES)}


# Classes that occur in contexts, by their names there: dataclasses, named tuples and enums.
CONTEXT = {
    **dict.fromkeys(
        ("PerAxis", "PerBlock", "PerGroup", "PerRow", "PerTensor", "PerToken"),
        "torchao.quantization.granularity",
    ),
    "QuantizeTensorToInt8Kwargs": f"{_AO}.int8.int8_tensor",
    "QuantizeTensorToFloat8Kwargs": f"{_AO}.float8.float8_tensor",
    "IntxUnpackedToInt8TensorActivationQuantization": f"{_AO}.intx.intx_unpacked_to_int8_tensor",
    "KernelPreference": "torchao.quantization.quantize_.common.kernel_preference",
    "MappingType": "torchao.quantization.quant_primitives",
    "Float8MMConfig": "torchao.float8.inference",
    "ScaledMMConfig": "torchao.float8.float8_training_tensor",
    "LinearMMConfig": "torchao.float8.float8_training_tensor",
}


def kind_of(tensor: torch.Tensor) -> Kind | None:
    """Return which kind of composed tensor this is; None for all others, plain ones too."""
    cls = type(tensor)
    if cls in _PLAIN:
        return None if tensor.layout is torch.strided else SPARSE.get(tensor.layout)
    kind = _BY_CLASS.get(cls.__name__)  # torchao's give another module than theirs as their own
    return kind if kind is not None and is_class(cls, kind.module, kind.attr) else None


def is_class(cls: type, module: str, attr: str) -> bool:
    """Tell whether a class is the one of this name, which then is imported already."""
    return getattr(sys.modules.get(module), attr, None) is cls


def class_of(kind: Kind) -> Any:
    """Return the class of a kind, which is imported by its name in the list above.

    Raises:
        DcpstoreError: its library is not installed, or has no such class.
    """
    return named_class(kind.module, kind.attr, what=f"a {kind.name}")


def named_class(module: str, attr: str, *, what: str) -> Any:
    library = module.partition(".")[0]
    try:
        return getattr(importlib.import_module(module), attr)
    except (ImportError, AttributeError) as error:
        raise DcpstoreError(
            f"{what} needs {library} ({error}): pip install {library}, in the version that wrote "
            "it, or read the parts of the tensor by their names."
        ) from error


Parts = dict[str, torch.Tensor]


@torch.no_grad()
def parts_of(kind: Kind, tensor: torch.Tensor) -> tuple[Parts, Any]:
    """Return the parts of a tensor, which share its memory, and its context."""
    if kind.layout is torch.sparse_coo:
        # Not `indices()`: that refuses a tensor that is not coalesced.
        plain = tensor.detach()
        context: Any = {"coalesced": tensor.is_coalesced()}
        return {"indices": plain._indices(), "values": plain._values()}, context
    if kind.layout in (torch.sparse_csr, torch.sparse_bsr):
        plain = tensor.detach()
        places = {"crow_indices": plain.crow_indices(), "col_indices": plain.col_indices()}
        return {**places, "values": plain.values()}, {}
    if kind.layout in (torch.sparse_csc, torch.sparse_bsc):
        plain = tensor.detach()
        places = {"ccol_indices": plain.ccol_indices(), "row_indices": plain.row_indices()}
        return {**places, "values": plain.values()}, {}
    names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]  # of these classes
    parts = {name: getattr(tensor, name).detach() for name in names}
    if kind is JAGGED:
        # what torch knows of the lengths is kept in the sizes of tensors without elements
        known = {
            name: int(parts.pop(f"_{name}_tensor").shape[0])
            for name in ("min_seqlen", "max_seqlen")
            if f"_{name}_tensor" in parts
        }
        renamed = {name.removeprefix("_"): part for name, part in parts.items()}
        return renamed, {"ragged_idx": context["ragged_idx"], **known}
    return parts, _without_size(kind, context)


def describe(
    kind: Kind, tensor: torch.Tensor, parts: Iterable[str], context: object
) -> Composition:
    """Return the composition of a tensor; `tensor` is the whole one, which ranks may share.

    Raises:
        InvalidInputError: its context or dtype cannot be stored.
    """
    shape = tuple(n if type(n) is int else None for n in tensor.shape)
    try:
        text = encode_value(_plain(context), allow_pickle=False).text
    except UnsafeDataError as error:
        raise InvalidInputError(str(error)) from error
    return Composition(kind.name, shape, dtype_name(tensor.dtype), tuple(parts), text)


def _without_size(kind: Kind, context: Any) -> Any:
    if kind.size is None:
        return context
    if isinstance(context, dict):
        return {key: value for key, value in context.items() if key != kind.size}
    return [value for i, value in enumerate(context) if i != kind.size]


def _with_size(kind: Kind, context: Any, size: torch.Size) -> Any:
    if isinstance(kind.size, str):
        return {**context, kind.size: size}
    if isinstance(kind.size, int):
        return [*context[: kind.size], size, *context[kind.size :]]
    return context


def put_together(
    composition: Composition, parts: Mapping[str, torch.Tensor], size: torch.Size | None = None
) -> torch.Tensor:
    """Return the tensor of a mark and its parts, all of them as one process holds them.

    Args:
        composition: what the mark says.
        parts: by name.
        size: of this process' tensor, where ranks hold it together.

    Raises:
        CorruptionError: the parts do not fit one another.
        DcpstoreError: its class is of another version of dcpstore, is not installed, or does not
            take such parts.
    """
    kind = KINDS.get(composition.kind)
    if kind is None:
        raise DcpstoreError(
            f"a tensor of kind {composition.kind!r}, which this dcpstore does not know; update "
            "dcpstore, or read its parts by their names."
        )
    if None in composition.shape and kind is not JAGGED:
        raise CorruptionError(f"a {kind.name} of shape {composition.shape}; run 'dcpstore verify'.")
    whole = torch.Size(n or 0 for n in composition.shape) if size is None else size
    context = _decoded(composition)
    try:
        with warnings.catch_warnings():  # torch warns once that sparse layouts are in beta
            warnings.simplefilter("ignore")
            made: torch.Tensor = _made(kind, context, parts, whole)
    except DcpstoreError:
        raise
    except Exception as error:  # whatever a class raises of parts that it does not expect
        raise CorruptionError(
            f"a {kind.name} cannot be made of its parts ({type(error).__name__}: {error}); where "
            "'dcpstore verify' finds no damage, another version of its library wrote it."
        ) from error
    is_right = made.dtype == torch_dtype(composition.dtype) and (
        kind is JAGGED or made.shape == whole
    )
    if not is_right:
        raise CorruptionError(
            f"a {kind.name} of {composition.dtype} {tuple(whole)} was put together as {made.dtype} "
            f"{tuple(made.shape)}; run 'dcpstore verify'."
        )
    return made


def _made(kind: Kind, context: Any, parts: Mapping[str, torch.Tensor], size: torch.Size) -> Any:
    if kind.layout is torch.sparse_coo:
        return torch.sparse_coo_tensor(
            parts["indices"],
            parts["values"],
            size,
            is_coalesced=bool(context["coalesced"]),
            check_invariants=True,  # torch trusts them later
        )
    if kind.layout in SPARSE:
        rows = kind.layout in (torch.sparse_csr, torch.sparse_bsr)
        return torch.sparse_compressed_tensor(
            parts["crow_indices" if rows else "ccol_indices"],
            parts["col_indices" if rows else "row_indices"],
            parts["values"],
            size,
            layout=kind.layout,
            check_invariants=True,
        )
    if kind is JAGGED:
        return _jagged(context, **parts)
    cls = class_of(kind)
    return cls.__tensor_unflatten__(dict(parts), _with_size(kind, context, size), size, None)


def _jagged(
    context: Mapping[str, int],
    values: torch.Tensor,
    offsets: torch.Tensor,
    lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    dim = context["ragged_idx"]
    ends = offsets[1:] if lengths is None else offsets[: lengths.numel()] + lengths
    checked = torch.cat([offsets[:1], ends, offsets])  # torch trusts them later
    if (
        not 1 <= dim <= values.dim()
        or bool((offsets.diff() < 0).any())
        or int(checked.min()) < 0
        or int(checked.max()) > values.shape[dim - 1]
    ):
        raise ValueError("offsets outside of the values")
    return torch.nested.nested_tensor_from_jagged(
        values,
        offsets,
        lengths,
        jagged_dim=dim,
        min_seqlen=context.get("min_seqlen"),
        max_seqlen=context.get("max_seqlen"),
    )


def _plain(context: Any) -> Any:
    """Return a context with objects of the known classes as plain dicts."""
    cls = type(context)
    if cls.__name__ in CONTEXT and is_class(cls, CONTEXT[cls.__name__], cls.__name__):
        if isinstance(context, enum.Enum):
            return {"class": cls.__name__, "member": context.name}
        is_tuple = isinstance(context, tuple)
        names = cls._fields if is_tuple else [field.name for field in dataclasses.fields(context)]
        fields = {name: getattr(context, name) for name in names}
        return {"class": cls.__name__, "fields": _plain(fields)}
    if cls is dict:
        return {key: _plain(value) for key, value in context.items()}
    if cls in (list, tuple):
        return cls(map(_plain, context))
    return context


def _rich(context: Any) -> Any:
    """Return the context that `_plain` was given."""
    if isinstance(context, dict) and context.keys() in ({"class", "fields"}, {"class", "member"}):
        name = context["class"]
        cls = named_class(CONTEXT[name], name, what=f"a {name}")
        return cls[context["member"]] if "member" in context else cls(**_rich(context["fields"]))
    if isinstance(context, dict):
        return {key: _rich(value) for key, value in context.items()}
    if type(context) in (list, tuple):
        return type(context)(map(_rich, context))
    return context


def _decoded(composition: Composition) -> Any:
    try:
        return _rich(decode_value(composition.context, allow_pickle=False))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CorruptionError(
            f"the context of a {composition.kind} does not decode ({error}); run 'dcpstore verify'."
        ) from error


def context_difference(stored: Composition, own: Composition) -> str | None:
    """Return how a stored composed tensor differs from that of a state, or None where it fits."""
    if stored.kind != own.kind:
        return f"is a {stored.kind} in the version, and a {own.kind} in the state"
    if stored.shape != own.shape:
        return f"has shape {_sizes(stored)} in the version, and {_sizes(own)} in the state"
    kind = KINDS[own.kind]
    if not kind.grows and stored.parts != own.parts:
        return f"has the parts {stored.parts} in the version, and {own.parts} in the state"
    theirs, ours = (_items(json.loads(one.context)) for one in (stored, own))
    names = [
        name
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name) and name not in kind.contents
    ]
    settings = [{name: one.get(name) for name in names} for one in (theirs, ours)]
    how = f"is a {own.kind} with {settings[0]} in the version, and with {settings[1]} in the state"
    return how if names else None


def _items(context: Any) -> dict[str, Any]:
    return context if isinstance(context, dict) else {str(i): v for i, v in enumerate(context)}


def _sizes(composition: Composition) -> str:
    return f"({', '.join('*' if n is None else str(n) for n in composition.shape)})"
