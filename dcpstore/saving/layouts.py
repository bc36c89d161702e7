"""How the tensors of one save are cut and encoded: the coordinator's answer to the global plan.

Invariant: every rank that writes a part of a tensor cuts it by the same grids, so that what they
wrote together is the tensor (design, section 4, "Chunks").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from dcpstore.encoding.codecs import choose_codec
from dcpstore.encoding.dtypes import dtype_name, torch_dtype
from dcpstore.geometry.boxes import Box
from dcpstore.geometry.grids import Grid, lay_grids, lay_parts
from dcpstore.planning.checks import item_box
from dcpstore.records import ChunkDefaults, EntryRecord, TensorRecord

__all__ = ["Assignment", "Layout", "blob_layout", "lay_out", "planned_chunks"]


@dataclass(frozen=True, slots=True)
class Layout:
    """The dtype, shape, codec and grids of one tensor; `dtype` is torch's name."""

    dtype: str
    shape: tuple[int, ...]
    codec: str
    grids: tuple[Grid, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return torch_dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class Assignment:
    """What one rank is to write, as part of which version."""

    uid: str
    plan: SavePlan
    layouts: Mapping[str, Layout]


def lay_out(
    plans: Sequence[SavePlan],
    *,
    chunk: ChunkDefaults,
    parent: Iterable[EntryRecord],
    are_whole: bool = True,
) -> dict[str, Layout]:
    """Return the layout of each tensor that `plans` write, by FQN.

    The grids of the `parent` version's entries are kept where dtype and shape are still the same.
    Of tensors that are not whole, for the plans are not those of all ranks, each box is a part.
    """
    written: dict[str, list[WriteItem]] = {}
    for plan in plans:
        for item in plan.items:
            if item.tensor_data is not None:
                written.setdefault(item.index.fqn, []).append(item)
    before = {entry.fqn: entry.tensor for entry in parent if entry.kind == "tensor"}
    layouts = {}
    for fqn, items in written.items():
        data = items[0].tensor_data
        assert data is not None
        dtype, shape = dtype_name(data.properties.dtype), tuple(data.size)
        boxes = [item_box(item) for item in items]
        itemsize = data.properties.dtype.itemsize
        if are_whole:
            kept = _kept_grids(before.get(fqn), dtype, shape)
            grids = lay_grids(shape, itemsize, boxes, target=chunk.nbytes, parent=kept)
        else:
            grids = lay_parts(itemsize, boxes, target=chunk.nbytes)
        layouts[fqn] = Layout(dtype, shape, choose_codec(chunk.codec, dtype), grids)
    return layouts


def blob_layout(nbytes: int, chunk: ChunkDefaults) -> Layout:
    """Return the layout of a blob of `nbytes`, which is stored as a tensor of bytes."""
    return Layout(
        dtype="uint8",
        shape=(nbytes,),
        codec=choose_codec(chunk.codec, "uint8"),
        grids=lay_grids((nbytes,), 1, [Box.whole((nbytes,))], target=chunk.nbytes),
    )


def planned_chunks(layout: Layout, box: Box) -> Iterator[tuple[int, int]]:
    """Yield (part, ordinal) of each chunk inside `box`, which begins and ends on grid lines."""
    for part, grid in enumerate(layout.grids):
        for first, last in grid.ranges(box):
            for ordinal in range(first, last + 1):
                yield part, ordinal


def _kept_grids(before: TensorRecord | None, dtype: str, shape: tuple[int, ...]) -> Sequence[Grid]:
    if before is None or before.dtype != dtype or before.shape != shape:
        return ()
    return before.parts
