"""Composed tensors to load into: which entries they need, and together again when all are there.

Invariants: a tensor whose parts keep their sizes is filled in place; and one that must be another
tensor is put in its place only when all of its parts have come.
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

from dcpstore.compositions import MARK, Composition, outer_fqns
from dcpstore.encoding.composed import context_difference, put_together
from dcpstore.encoding.kinds import KINDS
from dcpstore.errors import MismatchError
from dcpstore.planning.composed import apart, take_apart
from dcpstore.records import ObjectPath

__all__ = ["Assemblies"]

_GROWN = ("crow_indices", "ccol_indices", "indices", "col_indices", "row_indices", "offsets")


@dataclass(slots=True)
class _Assembly:
    """A composed tensor of a state: what it was, and its mark and parts as they are filled."""

    path: ObjectPath
    tensor: torch.Tensor
    own: Composition
    node: dict[str, Any]
    first: dict[str, Any]  # the parts before anything is filled


class Assemblies:
    """The composed tensors of a state that is loaded.

    Attributes:
        state: the nested state, with each of them as a dict of its mark and its parts.
        outer: the FQN of the composed tensor, by FQN of its mark and parts.
    """

    def __init__(
        self,
        state: Mapping[str, Any],
        stored: Mapping[str, Any],
        stored_name: Callable[[str], str],
    ) -> None:
        self._stored = stored
        self._stored_name = stored_name
        self._held: dict[str, _Assembly] = {}
        self._pending: Counter[str] = Counter()
        self.state = take_apart(state, take=self._parts_of)
        self.outer: dict[str, str] = {}

    def __bool__(self) -> bool:
        return bool(self._held)

    def named(self, fqns: Iterable[str]) -> None:
        """Learn the FQNs by which the state is planned, marks and parts included."""
        if self._held:
            self.outer = {part: fqn for part, fqn in outer_fqns(fqns).items() if fqn in self._held}

    def tensor(self, fqn: str) -> torch.Tensor:
        """Return a composed tensor as the state holds it."""
        return self._held[fqn].tensor

    def path(self, fqn: str) -> ObjectPath | None:
        """Return where a composed tensor stands in the state; None for other FQNs."""
        held = self._held.get(fqn)
        return None if held is None else held.path

    def place(self, fqn: str) -> tuple[dict[str, Any], str]:
        """Return the dict that holds a mark or part, and its key there."""
        outer = self.outer[fqn]
        return self._held[outer].node, fqn[len(outer) + 1 :]

    def name_of(self, fqn: str) -> str:
        """Return the FQN in the version of an FQN in the state; parts go with their tensor."""
        outer = self.outer.get(fqn)
        return self._stored_name(fqn) if outer is None else self._part_name(outer, fqn)

    def difference(self, fqn: str, composition: Composition | None) -> str | None:
        """Return how what is stored for the composed tensor `fqn` differs from what the state has.

        Args:
            fqn: in the state.
            composition: what the version says of it; None where that is not known yet.
        """
        own = self._held[fqn].own
        name = self._stored_name(fqn)
        if f"{name}.{MARK}" not in self._stored:
            kept = self._stored.get(name)
            if kept is None:
                return f"{fqn!r}, a {own.kind} in the state, is not in the version"
            what = "a tensor" if isinstance(kept, TensorStorageMetadata) else "a value"
            return (
                f"{fqn!r} is {what} in the version, and a {own.kind} in the state; load it into a "
                "plain tensor, and convert that"
            )
        difference = None if composition is None else context_difference(composition, own)
        return None if difference is None else f"{fqn!r} {difference}"

    def is_stored(self, fqn: str) -> bool:
        """Tell whether the version holds something for the composed tensor `fqn`."""
        name = self._stored_name(fqn)
        return f"{name}.{MARK}" in self._stored or name in self._stored

    def expect(self, fqns: Iterable[str]) -> None:
        """Count what is to come, an FQN of a mark or part for each read item."""
        self._pending = Counter(self.outer[fqn] for fqn in fqns if fqn in self.outer)

    def arrived(self, fqn: str) -> tuple[str, torch.Tensor] | None:
        """Hear that one item is there; with the last, return the FQN of the tensor, and the tensor.

        Raises:
            MismatchError: what came is another kind of tensor.
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
        node = apart(path, tensor)
        if node is None:
            return None
        fqn = ".".join(map(str, path))
        own = node[MARK]
        if KINDS[own.kind].grows:
            node = {MARK: own, **self._grown(fqn, tensor, node)}
        self._held[fqn] = _Assembly(path, tensor, own, node, dict(node))
        return node

    def _grown(self, fqn: str, tensor: torch.Tensor, node: dict[str, Any]) -> dict[str, Any]:
        """Return places as large as what is stored, for parts that have no size of their own."""
        places = {}
        for part in (*_GROWN, "values", "lengths"):
            kept = self._stored.get(self._part_name(fqn, f"{fqn}.{part}"))
            mine = node.get(part)
            if isinstance(kept, TensorStorageMetadata) and (mine is not None or part == "lengths"):
                dtype = kept.properties.dtype if mine is None else mine.dtype
                places[part] = torch.empty(kept.size, dtype=dtype, device=tensor.device)
            elif mine is not None:
                places[part] = mine
        return places

    def _part_name(self, outer: str, fqn: str) -> str:
        return self._stored_name(outer) + fqn[len(outer) :]

    def _together(self, fqn: str, held: _Assembly) -> torch.Tensor:
        stored: Composition = held.node[MARK]
        difference = context_difference(stored, held.own)
        if difference is not None:
            raise MismatchError.listing([f"{fqn!r} {difference}"])
        parts = {name: part for name, part in held.node.items() if name != MARK}
        if not KINDS[held.own.kind].grows and all(parts[n] is held.first[n] for n in parts):
            return held.tensor  # filled where they are
        # where values are converted, they are by now
        made = _whole(held.tensor, dataclasses.replace(stored, dtype=held.own.dtype), parts)
        return _in_place(held.tensor, made)


def _whole(
    tensor: torch.Tensor, stored: Composition, parts: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return put_together(stored, parts)
    local = tensor._local_tensor
    made = put_together(
        stored,
        {n: part._local_tensor if isinstance(part, DTensor) else part for n, part in parts.items()},
        local.shape,
    )
    return DTensor.from_local(
        made,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.size(),
        stride=tensor.stride(),
    )


@torch.no_grad()
def _in_place(tensor: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """Return `tensor` with what was made, or what was made where it cannot hold it."""
    if tensor.layout in (torch.strided, torch.jagged) or tensor.is_meta:
        if isinstance(tensor, torch.nn.Parameter) and not isinstance(made, torch.nn.Parameter):
            return torch.nn.Parameter(made, requires_grad=tensor.requires_grad)
        return made
    if tensor.layout is torch.sparse_coo:
        tensor.copy_(made)
    else:
        needs_grad = tensor.requires_grad
        tensor.requires_grad_(False)  # torch resizes no other
        tensor.resize_as_sparse_(made).copy_(made)
        tensor.requires_grad_(needs_grad)
    return tensor
