"""The kinds of tensors that are made of tensors: a closed list, and their classes.

Torch's sparse layouts and jagged nested tensors, and tensors of torchao. Invariant: a class comes
from this list or from the caller's own state, never by a name in a checkpoint.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dcpstore.errors import DcpstoreError

__all__ = [
    "CONTEXT",
    "JAGGED",
    "KINDS",
    "SPARSE",
    "Kind",
    "class_of",
    "is_class",
    "kind_of",
    "named_class",
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


# Classes of what stands in contexts, by their names there. Dataclasses, named tuples and enums.
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
