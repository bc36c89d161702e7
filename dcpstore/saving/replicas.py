"""What several ranks hold alike: compared by digest, before anything is written.

Invariant: of an item that all its holders must have in common, the copy of one rank is written only
if it is the same on all of them. Module buffers may differ; all of them come from the lowest rank
that holds them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem
from typing_extensions import Buffer

from dcpstore.collectives import Collectives, in_step, in_turn, name_ranks
from dcpstore.core.digests import hasher
from dcpstore.core.parallel import in_batches, run_ahead
from dcpstore.encoding.dtypes import check_plain
from dcpstore.encoding.values import JSON_BLOB, EncodedValue
from dcpstore.errors import InvalidInputError
from dcpstore.geometry.box_table import Ints, first_equal
from dcpstore.planning.plan_table import GlobalTable, PlanTable
from dcpstore.planning.save_planner import BoxResolver, DefaultSavePlanner
from dcpstore.saving.item_data import encoded_item, error_of, resolves_plainly
from dcpstore.state.optimizers import lists_parameters

__all__ = ["FINGERPRINT", "Replicas", "compare_state", "fingerprint", "fingerprints", "list_names"]

FINGERPRINT = 16  # bytes: enough to detect mistakes, and half of those of a chunk's digest to send
_WHOLE = 1 << 20  # bytes of the largest tensor of which every byte is compared
_SMALL = 64 << 10  # bytes of a tensor that is copied together with others
_BLOCKS = 64
_BLOCK = 4096  # bytes
_SHOWN = 8  # names in one message; more would hide the first
# Integers as torch can index and numpy can hold them, whatever the dtype of the elements means.
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def fingerprint(tensor: torch.Tensor) -> bytes:
    """Return 16 bytes that are equal for tensors of one dtype and shape with equal elements.

    They are BLAKE3 of all elements, in row-major order, of a tensor of at most 1 MiB. Of a larger
    tensor they are BLAKE3 of 64 blocks of 4,096 bytes: with `size = 4096 // itemsize` and
    `step = (numel - size) // 63`, block i is `size` elements from `i * step` on. So a difference is
    certainly found in a tensor of at most 1 MiB, or inside one of the blocks. One that is spread
    evenly over a fraction f of the elements is missed with a probability of about
    `(1 - f) ** (262144 / itemsize)`.
    """
    (digest,) = _digests([tensor.detach()])
    return digest


def _digests(tensors: Sequence[torch.Tensor]) -> list[bytes]:
    """Return the fingerprints of tensors without gradients.

    Small ones, and all of those on a device, are first copied into one tensor: thousands of views
    and transfers would cost more than their bytes.
    """
    elements = [_elements(tensor) for tensor in tensors]
    together: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    digests = [b""] * len(tensors)
    for i, words in enumerate(elements):
        if words.device.type == "cpu" and words.nbytes > _SMALL:
            digests[i] = _digest(words.contiguous().numpy().view(np.uint8).data)
        else:
            together.setdefault((words.device, words.dtype), []).append(i)
    for places in together.values():
        joined = torch.cat([elements[i] for i in places]).cpu().numpy().view(np.uint8).data
        end = 0
        for i in places:
            start, end = end, end + elements[i].nbytes
            digests[i] = _digest(joined[start:end])
    return digests


def _digest(data: Buffer) -> bytes:
    return hasher(data).digest()[:FINGERPRINT]


def _elements(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements that are compared, in one dimension: all, or those of the blocks.

    The order is that of the indices, not that of memory: ranks may hold equal tensors with
    different strides. Only a contiguous tensor is cut without an index for each element.
    """
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    words = tensor.view(_WORDS[tensor.itemsize])
    if words.nbytes <= _WHOLE:
        return words.reshape(-1)
    size = _BLOCK // words.itemsize
    step = (words.numel() - size) // (_BLOCKS - 1)
    if words.is_contiguous():
        return words.as_strided((_BLOCKS, size), (step, 1)).reshape(-1)
    starts = torch.arange(_BLOCKS, device=words.device) * step
    index = starts[:, None] + torch.arange(size, device=words.device)
    return words[torch.unravel_index(index, words.shape)].reshape(-1)


def fingerprints(
    items: Sequence[WriteItem], planner: SavePlanner, pool: Executor, *, allow_pickle: bool
) -> bytes:
    """Return 16 bytes for each item; zeros for an item that is not compared.

    Those are lists of parameters, and all items of a planner that resolves items in its own way.

    Raises:
        UnsafeDataError: a value needs pickle, and `allow_pickle` is False.
        InvalidInputError: a tensor has no plain bytes, or a value cannot be stored.
    """
    found = np.zeros((len(items), FINGERPRINT), np.uint8)
    if isinstance(planner, BoxResolver) or not resolves_plainly(planner):
        return found.tobytes()
    tensors: list[tuple[int, torch.Tensor]] = []
    for i, item in enumerate(items):
        if item.tensor_data is None:
            if lists_parameters(item.index.fqn, planner.lookup_object(item.index)):
                continue  # the stages of a pipeline have different ones
            value = encoded_item(planner, item, allow_pickle=allow_pickle)
            found[i] = np.frombuffer(_value_digest(value), np.uint8)
        elif isinstance(tensor := planner.resolve_data(item), torch.Tensor):
            tensors.append((i, _checked(item, tensor)))

    def digest(batch: Sequence[tuple[int, torch.Tensor]]) -> bytes:
        return b"".join(_digests([tensor for _, tensor in batch]))

    batches = in_batches(tensors, lambda pair: min(pair[1].nbytes, _WHOLE))
    for batch, digests in run_ahead(pool, digest, batches):
        rows = np.frombuffer(digests, np.uint8).reshape(-1, FINGERPRINT)
        found[[i for i, _ in batch]] = rows
    return found.tobytes()


def _checked(item: WriteItem, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that has plain bytes; `check_state` has checked all plain `torch.Tensor`s."""
    if type(tensor) is not torch.Tensor:
        try:
            check_plain(tensor)
        except InvalidInputError as error:
            raise error_of(item, error) from error
    return tensor


def _value_digest(value: EncodedValue) -> bytes:
    """Return 16 bytes that are equal for equal values of one type; the order of a dict is ignored.

    A value that needs pickle is compared by its pickle.
    """
    text, data = value.text, value.data or b""
    if text == JSON_BLOB:
        text, data = data.decode(), b""
    if "{" in text:  # else it has no dict, and needs no sorting
        text = json.dumps(_ordered(json.loads(text)), sort_keys=True)
    return hasher(text.encode() + b"\0" + data).digest()[:FINGERPRINT]


def _ordered(node: Any) -> Any:
    """Return typed JSON in which the pairs of every plain dict are sorted."""
    if isinstance(node, list):
        return [_ordered(inner) for inner in node]
    if not isinstance(node, dict):
        return node
    return {
        key: sorted(_ordered(inner), key=json.dumps) if key == "$dict" else _ordered(inner)
        for key, inner in node.items()
    }


def compare_state(
    state: Mapping[str, Any],
    ranks: Collectives,
    *,
    buffers: Collection[str],
    allow_pickle: bool,
) -> list[str]:
    """Check that the ranks hold the same in a plain state; for a save whose plan torch makes.

    Returns:
        The FQNs of the module buffers that differ.

    Raises:
        InvalidInputError: anything else differs; names it and the ranks.
    """
    planner = DefaultSavePlanner()
    items: Sequence[WriteItem]
    replicas: Replicas

    def plan() -> PlanTable:
        nonlocal items
        planner.set_up_planner(dict(state), is_coordinator=ranks.leads)
        local = planner.create_local_plan()
        items = local.items
        return PlanTable.of(local, buffers)

    def find(tables: list[PlanTable]) -> list[Ints]:
        nonlocal replicas
        replicas = Replicas.of(GlobalTable.of(tables))
        return [replicas.of_rank(rank) for rank in range(ranks.size)]

    def digest() -> bytes:
        with ThreadPoolExecutor(torch.get_num_threads(), "dcpstore-compare") as pool:
            held = [items[i] for i in places.tolist()]
            return fingerprints(held, planner, pool, allow_pickle=allow_pickle)

    places = in_turn(ranks, "plan", plan, find)
    return in_step(
        ranks, "digest", digest, lambda by_rank: sorted(replicas.differing_buffers(by_rank))
    )


@dataclass(frozen=True, slots=True, eq=False)
class Replicas:
    """The items of all local plans that more than one rank has: one row per item, sorted by rank.

    Attributes:
        fqns: of the items, by the number in `name`.
        name, rank, position: [rows], the number of the FQN, the rank, and the index in its plan.
        group: [rows], a number that the rows of one box of one tensor, or of one value, share.
        is_buffer: [rows], whether its rank says that it is a module buffer.
        starts: [ranks + 1], the first row of each rank, and at last the number of rows.
        reported: the buffers that were named in the log, so that each is named once.
    """

    fqns: Sequence[str]
    name: Ints
    rank: Ints
    position: Ints
    group: Ints
    is_buffer: npt.NDArray[np.bool_]
    starts: Ints
    reported: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, table: GlobalTable) -> Replicas:
        """Return the replicas in the plans of all ranks, before one rank is chosen for each."""
        first = first_equal(table.rows)
        holders = np.bincount(first, minlength=len(first))
        # An empty box has nothing to compare.
        rows = np.flatnonzero((holders[first] > 1) & (table.rows.volumes > 0))
        _, group = np.unique(first[rows], return_inverse=True)
        rank = table.rank[rows]
        return cls(
            fqns=[name.fqn for name in table.names],
            name=table.rows.tensor[rows],
            rank=rank,
            position=table.position[rows],
            group=group,
            is_buffer=table.is_buffer[rows],
            starts=np.searchsorted(rank, np.arange(table.ranks + 1)),
        )

    def of_rank(self, rank: int) -> Ints:
        """Return the indices, in the plan of `rank`, of the replicas that it holds."""
        return self.position[self.starts[rank] : self.starts[rank + 1]]

    def differing_buffers(self, by_rank: Sequence[bytes]) -> dict[str, list[int]]:
        """Compare what all ranks hold; return the buffers that differ, with the ranks they are on.

        Args:
            by_rank: by rank, the `fingerprints` of its replicas.

        Raises:
            InvalidInputError: anything else differs; names it and the ranks.
        """
        if not len(self.rank):
            return {}
        digests = np.frombuffer(b"".join(by_rank), np.uint64).reshape(-1, FINGERPRINT // 8)
        assert len(digests) == len(self.rank), "each rank sends one digest for each of its replicas"
        known = np.flatnonzero(digests.any(axis=1))  # zeros: the rank could not compare it
        # All holders of an item are compared with the first one that could compare it.
        group = self.group[known]
        first = np.full(len(self.rank), len(self.rank))
        np.minimum.at(first, group, known)
        is_odd = (digests[known] != digests[first[group]]).any(axis=1)
        buffers: dict[str, list[int]] = {}
        problems: dict[str, str] = {}
        for odd in np.unique(group[is_odd]):
            rows = known[group == odd]
            fqn = self.fqns[self.name[rows[0]]]
            if self.is_buffer[rows].all():
                buffers[fqn] = self.rank[rows].tolist()
            else:
                problems.setdefault(fqn, _described(self.rank[rows], digests[rows]))
        if problems:
            raise InvalidInputError(_message(problems))
        return buffers


def _described(ranks: Ints, digests: npt.NDArray[np.uint64]) -> str:
    """Return which ranks hold the same, such as "ranks 0, 2 differs from rank 1"."""
    holders: dict[bytes, list[int]] = {}
    for rank, digest in zip(ranks.tolist(), digests, strict=True):
        holders.setdefault(digest.tobytes(), []).append(rank)
    if len(holders) > _SHOWN:
        return f"{len(holders)} contents on {name_ranks(ranks.tolist())}"
    return " differs from ".join(map(name_ranks, holders.values()))


def _message(problems: dict[str, str]) -> str:
    listed = list_names([f"{fqn!r} ({text})" for fqn, text in sorted(problems.items())])
    return (
        f"the ranks hold different contents of {listed}, and one of them would be saved for all. "
        "Make them the same on every rank, or wrap what each rank has of its own, such as a random "
        "state, in dcpstore.PerRank(...)."
    )


def list_names(names: Sequence[str]) -> str:
    """Return the first names in one line, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
