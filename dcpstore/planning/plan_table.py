"""Save plans in columns: the local plan of one rank, and the plans of all ranks joined.

A table is sent and joined as a few arrays. Ranks that hold the same tensors send equal bytes for
their names, which are unpickled once. Invariant: row i is item i of the rank's plan.
"""

from __future__ import annotations

import pickle
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from dcpstore.core.digests import hasher
from dcpstore.encoding.dtypes import dtype_name, torch_dtype
from dcpstore.geometry.box_table import BoxTable, Ints, padded
from dcpstore.geometry.boxes import Box
from dcpstore.records import ObjectPath, PlanRecord, ShardRecord
from dcpstore.state.buffers import is_statistic
from dcpstore.state.tree import recorded_paths

__all__ = ["GlobalTable", "Named", "PlanTable", "item_box", "item_nbytes"]

_AT_ONCE = 4096  # shards that are made from columns at a time


def item_box(item: WriteItem) -> Box:
    """Return the box of the global tensor that a tensor item writes."""
    assert item.tensor_data is not None
    return Box(tuple(item.tensor_data.chunk.offsets), tuple(item.tensor_data.chunk.sizes))


def item_nbytes(item: WriteItem) -> int:
    """Return the bytes that an item writes: those of its local box, 0 for a value."""
    if item.tensor_data is None:
        return 0
    return item_box(item).volume * item.tensor_data.properties.dtype.itemsize


class Named(NamedTuple):
    """An FQN with the dtype (torch's name) and shape of its tensor; a value has dtype None."""

    fqn: str
    dtype: str | None = None
    shape: tuple[int, ...] = ()

    @property
    def itemsize(self) -> int:
        """Bytes of one element; 0 for a value, whose bytes a plan does not count."""
        return 0 if self.dtype is None else torch_dtype(self.dtype).itemsize

    @classmethod
    def by(cls, item: WriteItem) -> Named:
        """Return the FQN, dtype and shape of an item."""
        data = item.tensor_data
        if data is None:
            return cls(item.index.fqn)
        return cls(item.index.fqn, dtype_name(data.properties.dtype), tuple(data.size))


@dataclass(frozen=True, slots=True, eq=False)
class PlanTable:
    """The local plan of one rank.

    Attributes:
        names: the pickled list of `Named`, each once, in the order of the items; the fields as
            plain tuples, which are faster to pickle.
        paths: the pickled planner data of the plan.
        rows: one box for each item, of the tensors in `names`; that of a value has no dimensions.
        is_buffer: [rows], whether each is a module's buffer, in which ranks may differ.
    """

    names: bytes
    paths: bytes
    rows: BoxTable
    is_buffer: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, plan: SavePlan, buffers: Collection[str] = ()) -> PlanTable:
        """Return a plan in columns; `buffers` are the FQNs of the buffers of modules."""
        names: dict[Named, int] = {}
        numbers, offsets, sizes, are_buffers = [], [], [], []
        for item in plan.items:
            numbers.append(names.setdefault(Named.by(item), len(names)))
            chunk = None if item.tensor_data is None else item.tensor_data.chunk
            offsets.append(() if chunk is None else chunk.offsets)
            sizes.append(() if chunk is None else chunk.sizes)
            fqn = item.index.fqn
            are_buffers.append(chunk is not None and (fqn in buffers or is_statistic(fqn)))
        dims = max(map(len, sizes), default=0)
        # Pickled here and not with the table: ranks with equal names then send equal bytes.
        rows = BoxTable(
            np.array(numbers, np.int64), padded(offsets, dims, 0), padded(sizes, dims, 1)
        )
        pickled = pickle.dumps(list(map(tuple, names)))
        paths = pickle.dumps(plan.planner_data)
        return cls(pickled, paths, rows, np.array(are_buffers, np.bool_))

    @property
    def digest(self) -> bytes:
        """A digest that is equal for two plans exactly if they are the same."""
        digest = hasher()
        columns = (self.rows.tensor, self.rows.offsets, self.rows.sizes, self.is_buffer)
        for part in (self.names, self.paths, *(_bytes(column) for column in columns)):
            digest.update(len(part).to_bytes(8, "little"))  # or parts could shift into each other
            digest.update(part)
        return digest.digest()


@dataclass(eq=False)
class GlobalTable:
    """The plans of all ranks joined.

    Attributes:
        ranks: the number of ranks.
        names: of all items, each FQN once unless the ranks disagree about its dtype or shape.
        rows: one box for each item, by rank, of the tensors in `names`.
        rank: [rows], the rank of the item.
        position: [rows], the position of the item in the plan of its rank.
        is_buffer: [rows], whether its rank reports it as a module's buffer.
        planner_data: the different planner data of the ranks, as their planners made them.
    """

    ranks: int
    names: list[Named]
    rows: BoxTable
    rank: Ints
    position: Ints
    is_buffer: npt.NDArray[np.bool_]
    planner_data: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, tables: Sequence[PlanTable]) -> GlobalTable:
        """Join the local plans of all ranks, by rank."""
        numbers: dict[Named, int] = {}
        known: dict[bytes, Ints] = {}  # the numbers of a rank's names, by the pickled list
        for table in tables:
            if table.names not in known:
                names = map(Named._make, pickle.loads(table.names))
                known[table.names] = np.array(
                    [numbers.setdefault(name, len(numbers)) for name in names], np.int64
                )
        # All below is done in columns: a loop over the items of all ranks would take seconds.
        counts = [len(table.rows) for table in tables]
        own = BoxTable.joined([table.rows for table in tables])
        tensor = np.concatenate([known[table.names][table.rows.tensor] for table in tables])
        return cls(
            ranks=len(tables),
            names=list(numbers),
            rows=BoxTable(tensor, own.offsets, own.sizes),
            rank=np.repeat(np.arange(len(tables)), counts),
            position=np.concatenate([np.arange(count) for count in counts]),
            is_buffer=np.concatenate([table.is_buffer for table in tables]),
            # Equal planner data is unpickled once, in the order of the ranks.
            planner_data=[pickle.loads(data) for data in {table.paths: None for table in tables}],
        )

    @cached_property
    def shapes(self) -> Ints:
        """[names, dims]: the shapes, padded with 1 past their own dimensions."""
        return padded([name.shape for name in self.names], self.rows.dims, 1)

    @cached_property
    def is_tensor(self) -> npt.NDArray[np.bool_]:
        """[names]: whether each is a tensor."""
        return np.array([name.dtype is not None for name in self.names], bool)

    @cached_property
    def nbytes(self) -> Ints:
        """[rows]: the bytes that each item writes, 0 for a value."""
        itemsize = np.array([name.itemsize for name in self.names], np.int64)
        return self.rows.volumes * itemsize[self.rows.tensor]

    @cached_property
    def starts(self) -> Ints:
        """[ranks + 1]: the first row of each rank, and the number of all rows."""
        return np.searchsorted(self.rank, np.arange(self.ranks + 1))

    @cached_property
    def paths(self) -> Mapping[str, ObjectPath]:
        """The path of each FQN, where the ranks' planner data have it."""
        return recorded_paths(self.planner_data)

    @cached_property
    def record(self) -> PlanRecord:
        """The shard index: which rank writes which box, independent of the order of its items.

        Its digest is that of the number of ranks and the FQNs, then of the columns of the index.
        """
        names = sorted((name.fqn, i) for i, name in enumerate(self.names) if name.dtype is not None)
        number = np.full(len(self.names), -1)
        number[[i for _, i in names]] = np.arange(len(names))
        tensor = number[self.rows.tensor]
        # `lexsort` sorts by its last key first: by tensor, then rank, then box.
        order = np.lexsort((*self.rows.sizes.T, *self.rows.offsets.T, self.rank, tensor))
        order = order[tensor[order] >= 0]  # values have no box
        rows = self.rows.take(order)
        digest = hasher(repr((self.ranks, [fqn for fqn, _ in names])).encode())
        columns = (tensor[order], self.rank[order], rows.offsets, rows.sizes)
        for column in columns:
            digest.update(_bytes(column))
        shards = _Shards(
            [(fqn, len(self.names[i].shape)) for fqn, i in names],
            self.rank[order],
            BoxTable(tensor[order], rows.offsets, rows.sizes),
        )
        return PlanRecord(digest.hexdigest(), self.ranks, shards)

    def take(self, rows: Ints) -> GlobalTable:
        """Return these rows, ascending."""
        return replace(
            self,
            rows=self.rows.take(rows),
            rank=self.rank[rows],
            position=self.position[rows],
            is_buffer=self.is_buffer[rows],
        )

    def kept(self, rank: int) -> Ints:
        """Return the positions of the items of `rank` in its local plan."""
        return self.position[self.starts[rank] : self.starts[rank + 1]]

    def numbers_of(self, rank: int) -> Ints:
        """Return the numbers of the names of the items of `rank`, in order."""
        return self.rows.tensor[self.starts[rank] : self.starts[rank + 1]]

    def boxes(self, rows: Ints) -> list[Box]:
        """Return the boxes of some rows of one tensor."""
        dims = len(self.names[self.rows.tensor[rows[0]]].shape) if len(rows) else 0
        return self.rows.boxes(rows, dims)

    def rows_of(self, number: int) -> Ints:
        """Return the rows of one name, by rank."""
        order, starts = self._by_name
        return order[starts[number] : starts[number + 1]]

    @cached_property
    def _by_name(self) -> tuple[Ints, Ints]:
        """The rows sorted by name, and the first of each name; the last number is the end."""
        order = np.argsort(self.rows.tensor, kind="stable")
        return order, np.searchsorted(self.rows.tensor[order], np.arange(len(self.names) + 1))


class _Shards(Sequence[ShardRecord]):
    """The shards of a plan, made from columns as they are asked for.

    Most saves need none of them, and those of a thousand ranks would fill hundreds of megabytes.
    """

    def __init__(self, names: Sequence[tuple[str, int]], rank: Ints, rows: BoxTable) -> None:
        """Take the FQN and the number of dimensions of each tensor, and the columns of all rows."""
        self._names = names
        self._rank = rank
        self._rows = rows

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # as a list has none

    def __len__(self) -> int:
        return len(self._rank)

    @overload
    def __getitem__(self, index: int) -> ShardRecord: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[ShardRecord]: ...

    def __getitem__(self, index: int | slice) -> ShardRecord | Sequence[ShardRecord]:
        if isinstance(index, slice):
            return _Shards(
                self._names, self._rank[index], self._rows.take(np.arange(len(self))[index])
            )
        return next(iter(self[index : index + 1 or None]))

    def __iter__(self) -> Iterator[ShardRecord]:
        for start in range(0, len(self), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            columns = (self._rows.tensor, self._rank, self._rows.offsets, self._rows.sizes)
            for number, rank, offsets, sizes in zip(
                *(column[part].tolist() for column in columns), strict=True
            ):
                fqn, dims = self._names[number]
                yield ShardRecord(fqn, rank, Box(tuple(offsets[:dims]), tuple(sizes[:dims])))


def _bytes(column: npt.NDArray[np.generic]) -> bytes:
    return np.ascontiguousarray(column).tobytes()
