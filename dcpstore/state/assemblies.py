"""The composed tensors of a state that a load fills: their parts first, then the tensors.

Invariant: a tensor whose parts keep their sizes is filled in place; one that must become another
tensor is replaced only when all of its parts have been read.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from dcpstore.encoding.composed_tensors import KINDS, context_difference, put_together
from dcpstore.errors import MismatchError
from dcpstore.formats.composition import MARK, Composition, outer_fqns
from dcpstore.records import ObjectPath
from dcpstore.state.composed import take_apart, tensor_parts
from dcpstore.state.shards import distributed_like, local_of
from dcpstore.state.walk import fqn_of

__all__ = ["Assemblies"]

# Parts whose sizes follow from the contents, in the order in which torch takes them.
_GROWN = ("crow_indices", "ccol_indices", "indices", "col_indices", "row_indices", "offsets")


@dataclass(slots=True)
class _Assembly:
    """A composed tensor of a state, and its mark and parts as they are filled.

    Attributes:
        tensor: as the state holds it.
        own: its mark before the load.
        node: the dict of its mark and parts, which the load fills.
        first: `node` before anything is filled.
    """

    tensor: torch.Tensor
    own: Composition
    node: dict[str, Any]
    first: dict[str, Any]


class Assemblies:
    """The composed tensors of one state.

    Attributes:
        state: the nested state, with each composed tensor as a dict of its mark and its parts.
        outer: the FQN of the composed tensor, by FQN of its mark and parts.
    """

    def __init__(
        self,
        state: Mapping[str, Any],
        stored: Mapping[str, Any],
        rename: Callable[[str], str],
    ) -> None:
        self._stored = stored
        self._rename = rename
        self._held: dict[str, _Assembly] = {}
        self._pending: Counter[str] = Counter()
        self.state = take_apart(state, take=self._parts_of)
        self.outer: dict[str, str] = {}

    def __bool__(self) -> bool:
        return bool(self._held)

    def set_names(self, fqns: Iterable[str]) -> None:
        """Set the FQNs of the items that are planned, marks and parts included."""
        if self._held:
            self.outer = {part: fqn for part, fqn in outer_fqns(fqns).items() if fqn in self._held}

    def tensor(self, fqn: str) -> torch.Tensor:
        """Return a composed tensor as the state holds it."""
        return self._held[fqn].tensor

    def place(self, fqn: str) -> tuple[dict[str, Any], str]:
        """Return the dict that holds a mark or part, and its key there."""
        outer = self.outer[fqn]
        return self._held[outer].node, fqn[len(outer) + 1 :]

    def stored_name(self, fqn: str) -> str:
        """Return the FQN in the version of an FQN in the state.

        Marks and parts are renamed as their tensor is.
        """
        outer = self.outer.get(fqn)
        return self._rename(fqn) if outer is None else self._part_name(outer, fqn)

    def difference(self, fqn: str, composition: Composition | None) -> str | None:
        """Return how the stored tensor differs from that of the state; None if it fits.

        Args:
            fqn: of the composed tensor in the state.
            composition: the stored mark; None where it is not known yet.
        """
        own = self._held[fqn].own
        name = self._rename(fqn)
        if f"{name}.{MARK}" not in self._stored:
            kept = self._stored.get(name)
            if kept is None:
                return f"{fqn!r}, a {own.kind} in the state, {MismatchError.MISSING}"
            what = "a tensor" if isinstance(kept, TensorStorageMetadata) else "a value"
            return (
                f"{fqn!r} is {what} in the version, and a {own.kind} in the state; load it into a "
                "plain tensor, and convert that"
            )
        difference = None if composition is None else context_difference(composition, own)
        return None if difference is None else f"{fqn!r} {difference}"

    def is_stored(self, fqn: str) -> bool:
        """Tell whether the version holds something for the composed tensor `fqn`."""
        name = self._rename(fqn)
        return f"{name}.{MARK}" in self._stored or name in self._stored

    def expect(self, fqns: Iterable[str]) -> None:
        """Count the read items of each composed tensor; `fqns` has one FQN for each read item."""
        self._pending = Counter(self.outer[fqn] for fqn in fqns if fqn in self.outer)

    def count_read(self, fqn: str) -> tuple[str, torch.Tensor] | None:
        """Count a read item; if it was the last of its tensor, return that tensor and its FQN.

        Raises:
            MismatchError: the stored tensor is of another kind.
        """
        outer = self.outer.get(fqn)
        if outer is None or outer not in self._pending:
            return None
        self._pending[outer] -= 1
        if self._pending[outer]:
            return None
        del self._pending[outer]
        return outer, self._together(outer, self._held[outer])

    def _parts_of(self, path: ObjectPath, tensor: torch.Tensor) -> dict[str, Any] | None:
        node = tensor_parts(path, tensor)
        if node is None:
            return None
        fqn = fqn_of(path)
        own = node[MARK]
        if KINDS[own.kind].grows:
            node = {MARK: own, **self._grown(fqn, tensor, node)}
        self._held[fqn] = _Assembly(tensor, own, node, dict(node))
        return node

    def _grown(self, fqn: str, tensor: torch.Tensor, node: dict[str, Any]) -> dict[str, Any]:
        """Return targets as large as the stored parts, where the state does not fix their sizes."""
        places = {}
        for part in (*_GROWN, "values", "lengths"):
            kept = self._stored.get(self._part_name(fqn, f"{fqn}.{part}"))
            mine = node.get(part)
            # A nested tensor has "lengths" only if its rows have gaps: the version decides.
            if isinstance(kept, TensorStorageMetadata) and (mine is not None or part == "lengths"):
                dtype = kept.properties.dtype if mine is None else mine.dtype
                places[part] = torch.empty(kept.size, dtype=dtype, device=tensor.device)
            elif mine is not None:
                places[part] = mine
        return places

    def _part_name(self, outer: str, fqn: str) -> str:
        return self._rename(outer) + fqn[len(outer) :]

    def _together(self, fqn: str, held: _Assembly) -> torch.Tensor:
        stored: Composition = held.node[MARK]
        difference = context_difference(stored, held.own)
        if difference is not None:
            raise MismatchError.listing([f"{fqn!r} {difference}"])
        parts = {name: part for name, part in held.node.items() if name != MARK}
        if not KINDS[held.own.kind].grows and all(parts[n] is held.first[n] for n in parts):
            return held.tensor  # its own memory was filled
        # Values that were converted have the dtype of the state by now.
        mark = dataclasses.replace(stored, dtype=held.own.dtype)
        if not isinstance(held.tensor, DTensor):
            return _in_place(held.tensor, put_together(mark, parts))
        local_parts = {name: local_of(part) for name, part in parts.items()}
        made = put_together(mark, local_parts, held.tensor._local_tensor.shape)
        return _in_place(held.tensor, distributed_like(held.tensor, made))


@torch.no_grad()
def _in_place(tensor: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """Return `tensor` with the contents of `made`; `made` itself if `tensor` cannot hold them."""
    if tensor.layout in (torch.strided, torch.jagged) or tensor.is_meta:
        if isinstance(tensor, torch.nn.Parameter) and not isinstance(made, torch.nn.Parameter):
            return torch.nn.Parameter(made, requires_grad=tensor.requires_grad)
        return made
    if tensor.layout is torch.sparse_coo:
        tensor.copy_(made)
    else:
        needs_grad = tensor.requires_grad
        tensor.requires_grad_(False)  # torch resizes only tensors without gradient
        tensor.resize_as_sparse_(made).copy_(made)
        tensor.requires_grad_(needs_grad)
    return tensor
