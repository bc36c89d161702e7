"""The load planner: what each rank asks for from a version becomes read items.

It is a subclass of torch's default planner, so that the hooks that torch documents
(`lookup_tensor`, `transform_tensor`, `load_bytes`) work in the same way. Invariant: either the
whole state fits, or one error names everything that does not.
"""

from __future__ import annotations

import difflib
import io
import pickle
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint import default_planner as torch_planner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from dcpstore.encoding.dtypes import PACKED
from dcpstore.errors import InvalidInputError, MismatchError, NotFoundError, UnsafeDataError
from dcpstore.formats.composition import MARK, Composition, imported_value
from dcpstore.geometry.boxes import Box
from dcpstore.state.assemblies import Assemblies
from dcpstore.state.composed import flatten_parts
from dcpstore.state.load_options import LoadOptions, NamesInOptions, name_faults
from dcpstore.state.optimizers import lists_parameters
from dcpstore.state.shards import LocalShard, flat_shards, is_on_meta, is_sharded, local_shards
from dcpstore.state.targets import check_room, make_room, memory_of, target_fault
from dcpstore.state.tree import Place, flattened, is_empty_container
from dcpstore.state.walk import nesting_checked

__all__ = ["DefaultLoadPlanner", "ValueFile", "keeps_local_plans"]

_NO_OFFSET = torch.Size((0,))
# What torch's wrappers add to the names in a module's state: compile, DDP, activation
# checkpointing, FSDP1.
_WRAPPERS = ("_orig_mod.", "module.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


class ValueFile(io.BytesIO):
    """A file with torch's bytes of a value, for planners that read values from bytes.

    Attributes:
        value: the value; some plain values cannot be read back from the bytes without pickle.
    """

    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value
        torch.save(value, self)
        self.seek(0)


class DefaultLoadPlanner(torch_planner.DefaultLoadPlanner):
    """Plans a load into DTensor, ShardedTensor, plain tensors and values, nested or flat.

    It differs from torch's planner: one error names everything that does not fit, another dtype is
    an error, strided shards are several boxes, and no pickle is run. The first arguments are
    torch's; `allow_partial_load` accepts missing FQNs, as `LoadOptions(strict=False)` does.

    Attributes:
        missing: FQNs of the state that the version lacks, after `create_local_plan`.
        cast: FQNs whose values are converted to the dtype of the state.
        stored: FQNs of the version that the state asks for.
        optional: the version may lack these FQNs and those below them; `load` sets it, for
            optimizers and `PerRank`.
        compositions: the marks of the composed tensors in the version, by FQN; `load` sets it.
        checks_names: whether it is an error if the options name something that is neither in the
            version nor in the state of any rank. `load` sets it to False where each rank loads its
            own version: the name may be meant for another rank.
        names_in_options: the names in `include`, `exclude` and `rename` that the version does not
            have; `create_local_plan` sets it.
    """

    def __init__(
        self,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        allow_partial_load: bool = False,
        *,
        options: LoadOptions | None = None,
    ) -> None:
        super().__init__(flatten_state_dict, flatten_sharded_tensors, allow_partial_load)
        self.options = options or LoadOptions()
        self.missing: list[str] = []
        self.cast: list[str] = []
        self.stored: set[str] = set()
        self.optional: Sequence[str] = ()
        self.compositions: Mapping[str, Composition] = {}
        self.checks_names = True
        self.names_in_options: NamesInOptions | None = None
        self._places: Mapping[str, Place] = {}  # where each item is in the caller's state
        self._names: list[str] | None = None  # the stored FQNs, sorted when first needed
        self._composed = Assemblies({}, {}, self.options.stored_name)
        # By the id of a meta tensor: the tensor itself, and the one with memory that replaces it.
        self._rooms: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._views: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}  # by FQN and offsets

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Set the state to fill, and torch's description of what is stored.

        Raises:
            InvalidInputError: two items have the same FQN, the state is nested too deep, or it
                contains itself.
        """
        self.original_state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator
        stored = metadata.state_dict_metadata if metadata is not None else {}
        with nesting_checked():
            self._composed = Assemblies(state_dict, stored, self.options.stored_name)
        self._places, self._names = {}, None
        if self.flatten_state_dict:
            flat = flattened(self._composed.state, is_leaf=self._is_stored)
            state_dict, self.mappings, self._places = flat.items, flat.paths, flat.places
            # `_composed.state` is a copy: look up the places in the caller's own state.
            if self._composed:
                own = flattened(self.original_state_dict, is_leaf=self._is_stored)
                self._places = own.places
        elif self._composed:
            state_dict = flatten_parts(self._composed.state)
        if self.flatten_sharded_tensors:
            state_dict = flat_shards(state_dict)
        self.state_dict = state_dict
        self._composed.set_names(state_dict)
        self._rooms, self._views = {}, {}
        self.names_in_options = None
        self.missing, self.cast, self.stored = [], [], set()

    def _is_stored(self, fqn: str) -> bool:
        """Tell whether the version has an entry for exactly this FQN of the state."""
        if self.metadata is None:
            return False
        return self.options.stored_name(fqn) in self.metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        """Return the read items of this rank.

        Raises:
            MismatchError: it names every FQN that is missing, differs in kind, shape or dtype, is
                stored only in part, or cannot be filled element by element.
            InvalidInputError: a value is inside an immutable container; a tensor on the meta device
                is of a class for which memory cannot be allocated.
        """
        assert self.metadata is not None
        stored = self.metadata.state_dict_metadata
        if self.checks_names:
            self.names_in_options = self.options.names(self._own_names(), stored)
        differences: list[str] = []
        items: list[ReadItem] = []
        absent: list[tuple[str, str]] = []
        for fqn, wanted in self.state_dict.items():
            if not self._asks_for(fqn):
                continue
            name = self._composed.stored_name(fqn)
            self.stored.add(name)
            if isinstance(wanted, Composition):
                self._check_composed(self._composed.outer[fqn], differences)
            kept = stored.get(name)
            if kept is None and fqn in self._composed.outer:
                continue  # reported once, for the whole composed tensor
            if kept is None and f"{name}.{MARK}" in stored:
                differences.append(self._is_composed(fqn, name, wanted))
                continue
            if kept is None:
                if not is_empty_container(wanted) or not self._stays_empty(wanted, name, stored):
                    absent.append((fqn, name))
                continue
            difference = self._difference(fqn, wanted, kept)
            if difference is not None:
                differences.append(difference)
            elif isinstance(kept, TensorStorageMetadata):
                items += self._tensor_items(fqn, name, wanted, kept, differences)
            else:
                self._check_place(fqn)
                items.append(_value_item(fqn, name))
        differences += self._missing(absent, stored)
        if differences:
            raise MismatchError.listing(differences)
        # One rank cannot judge the names, for another rank's state may have them. So they travel
        # with the plan, and the coordinator judges.
        return LoadPlan(items, planner_data=self.names_in_options)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans of all ranks as they are.

        Raises:
            NotFoundError: `include`, `exclude` or `rename` names what neither the version nor the
                state of any rank has; the message has the nearest names.
        """
        named = [
            plan.planner_data if isinstance(plan.planner_data, NamesInOptions) else None
            for plan in global_plan
        ]
        self.check_names(named)
        return super().create_global_plan(global_plan)

    def check_names(self, ranks: Iterable[NamesInOptions | None]) -> None:
        """Check that each name in the options is in the version, or in the state of some rank.

        Raises:
            NotFoundError: one is in neither; the message has the nearest names.
        """
        if faults := self.name_faults(ranks):
            raise NotFoundError("\n".join(faults))

    def name_faults(self, ranks: Iterable[NamesInOptions | None]) -> list[str]:
        """Return a message for each name in the options that no rank's state and no entry has."""
        assert self.metadata is not None
        return name_faults(ranks, self._own_names(), self.metadata.state_dict_metadata)

    def _own_names(self) -> Iterator[str]:
        """Yield the FQN of each item of the state; for parts, that of their composed tensor.

        For an empty container it also yields a glob of everything below it, so that an option may
        name "optim.state.*" although this optimizer has no state yet.
        """
        for fqn, item in self.state_dict.items():
            yield self._composed.outer.get(fqn, fqn)
            if is_empty_container(item):
                yield f"{fqn}.*"

    def _stays_empty(self, wanted: object, name: str, stored: Collection[str]) -> bool:
        """Tell whether an empty container that the version lacks stays as it is.

        An empty dict always stays, because torch and older versions of dcpstore store no empty
        dict. An empty list or tuple stays if the version has entries below its FQN.
        """
        if isinstance(wanted, Mapping):
            return True
        if self._names is None:
            self._names = sorted(stored)
        at = bisect_left(self._names, f"{name}.")
        return at < len(self._names) and self._names[at].startswith(f"{name}.")

    def stored_fqn(self, fqn: str) -> str:
        """Return the FQN in the version of an item of `state_dict`."""
        return self._composed.stored_name(fqn)

    def targets(self) -> Iterator[tuple[str, tuple[int, ...], torch.Tensor]]:
        """Yield the FQN, the offsets and the local view of each box that the load will fill."""
        missing = set(self.missing)
        for (fqn, offsets), view in self._views.items():
            if fqn not in missing:
                yield fqn, offsets, view

    def _missing(self, absent: Sequence[tuple[str, str]], stored: Collection[str]) -> list[str]:
        """Record what the version lacks, and return the differences that follow from it.

        A tensor that shares memory with a filled one counts as filled.
        """
        if not absent:
            return []
        filled = {memory_of(view) for view in self._views.values() if view.numel()}
        lacked = []
        for fqn, name in absent:
            wanted = self.state_dict[fqn]
            # A sharded tensor has no single address, so its memory is not compared.
            is_twin = isinstance(wanted, torch.Tensor) and not is_sharded(wanted)
            if is_twin and wanted.numel() and memory_of(wanted) in filled:
                continue
            self.missing.append(fqn)
            if not self._may_lack(fqn):
                lacked.append((fqn, name))
        return [*(_absent(fqn, name, stored) for fqn, name in lacked), *_renames(lacked, stored)]

    def _check_composed(self, fqn: str, differences: list[str]) -> None:
        """Record that a composed tensor is missing, or how it differs from the stored one."""
        if not self._composed.is_stored(fqn):
            self.missing.append(fqn)
            if self._may_lack(fqn):
                return
        composition = self.compositions.get(self.options.stored_name(fqn))
        difference = self._composed.difference(fqn, composition)
        if difference is not None:
            differences.append(difference)

    def _is_composed(self, fqn: str, name: str, wanted: object) -> str:
        known = self.compositions.get(name)
        kind = "composed tensor" if known is None else known.kind
        what = "a tensor" if isinstance(wanted, torch.Tensor) else type(wanted).__name__
        return (
            f"{fqn!r} is a {kind} in the version, and {what} in the state; load it into one of "
            f"that kind, or convert what repo.read(..., [{name!r}]) returns"
        )

    def _asks_for(self, fqn: str) -> bool:
        return self.options.asks_for(self._composed.outer.get(fqn, fqn))

    def _difference(self, fqn: str, wanted: object, kept: object) -> str | None:
        """Return how an item of the state differs from the stored one; None if it fits."""
        difference = _kind_difference(fqn, wanted, kept)
        if difference is not None or not isinstance(kept, TensorStorageMetadata):
            return difference
        assert isinstance(wanted, torch.Tensor)
        dtype = kept.properties.dtype
        if wanted.dtype == dtype:
            return None
        differs = f"{fqn!r} has dtype {dtype} in the version, and {wanted.dtype} in the state"
        if self.options.on_dtype == "error":
            return f"{differs}; on_dtype='cast' converts it"
        if not PACKED.isdisjoint({dtype, wanted.dtype}):
            return f"{differs}, which cannot be converted"
        self.cast.append(self._composed.outer.get(fqn, fqn))
        return None

    def _tensor_items(
        self,
        fqn: str,
        name: str,
        wanted: torch.Tensor,
        kept: TensorStorageMetadata,
        differences: list[str],
    ) -> Iterator[ReadItem]:
        """Yield the items of a tensor, and add to `differences` why it cannot be filled."""
        is_meta = is_on_meta(wanted)
        if is_meta:
            check_room(fqn, wanted)
            self._check_place(fqn)
        stored = [Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in kept.chunks]
        for shard in self._views_of(fqn, wanted):
            fault = None if is_meta else target_fault(shard.data)
            if fault is not None:
                differences.append(f"{fqn!r} {fault}")
            # The stored boxes do not overlap, so volumes show whether they cover the shard.
            lacking = shard.box.volume
            for i, box in enumerate(stored):
                shared = box.intersect(shard.box)
                if shared is not None:
                    lacking -= shared.volume
                    yield ReadItem(
                        type=LoadItemType.TENSOR,
                        dest_index=MetadataIndex(fqn, shard.box.offsets),
                        dest_offsets=torch.Size(shared.relative_to(shard.box).offsets),
                        storage_index=MetadataIndex(name, box.offsets, i),
                        storage_offsets=torch.Size(shared.relative_to(box).offsets),
                        lengths=torch.Size(shared.sizes),
                    )
            if lacking > 0:
                differences.append(
                    f"the version holds only a part of {fqn!r}: {lacking} elements of this rank's "
                    f"box at {shard.box.offsets} of sizes {shard.box.sizes} are missing. Each rank "
                    "saved for itself; load on the same mesh, each rank its own version"
                )

    def _views_of(self, fqn: str, tensor: torch.Tensor) -> list[LocalShard]:
        """Return the local shards of a tensor, and record them for `lookup_tensor`."""
        shards = local_shards(fqn, tensor)
        for shard in shards:
            self._views[fqn, shard.box.offsets] = shard.data
        return shards

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Return the plan, and allocate memory for tensors on the meta device that it fills."""
        missing = set(self.missing)
        self.give_room(
            fqn
            for fqn, tensor in self.state_dict.items()
            if isinstance(tensor, torch.Tensor)
            and is_on_meta(tensor)
            and self._composed.outer.get(fqn, fqn) not in missing
            and self._asks_for(fqn)
        )
        self._composed.expect(item.dest_index.fqn for item in central_plan.items)
        return super().finish_plan(central_plan)

    def give_room(self, fqns: Iterable[str]) -> None:
        """Replace tensors of the state that are on the meta device by uninitialised ones.

        One tensor with several FQNs stays one tensor.
        """
        for fqn in fqns:
            tensor = self.state_dict.get(fqn)  # None for a composed tensor: only its parts are here
            if isinstance(tensor, torch.Tensor) and is_on_meta(tensor):
                # The tensor is kept too: if it were freed, another one might get its id.
                if id(tensor) not in self._rooms:
                    self._rooms[id(tensor)] = (tensor, make_room(tensor))
                _, room = self._rooms[id(tensor)]
                self._set_item(fqn, room)
                self._views_of(fqn, room)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """Return the local view of the box that `index` names."""
        view = self._views.get((index.fqn, tuple(index.offset or ())))
        return super().lookup_tensor(index) if view is None else view

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Record that a tensor is filled; a composed tensor is put together after its last part."""
        self._arrived(read_item.dest_index.fqn)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Set a value from torch's bytes of it.

        Raises:
            UnsafeDataError: reading the bytes would run code.
        """
        if isinstance(value, ValueFile):
            self.load_value(read_item, value.value)
            return
        try:
            loaded = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            raise UnsafeDataError(
                f"value {read_item.dest_index.fqn!r} is a pickle that could run code, or bytes "
                "that another planner wrote in its own form. For a pickle, save plain values "
                "instead; for another planner's bytes, or a pickle that you trust, load with a "
                "planner that reads them."
            ) from error
        self.load_value(read_item, imported_value(read_item.storage_index.fqn, loaded))

    def load_value(self, read_item: ReadItem, value: object) -> None:
        """Set a value in the caller's state, under the caller's own keys.

        One exception: the `params` list of an optimizer's param group. If the stored list shares no
        name with this rank's, it is that of another pipeline stage, and the rank keeps its own.
        """
        fqn = read_item.dest_index.fqn
        own = self.state_dict.get(fqn)
        is_of_another = (
            lists_parameters(fqn, own) and lists_parameters(fqn, value) and not {*own} & {*value}  # type: ignore[misc]  # they are lists
        )
        if not is_of_another:
            self._set_item(fqn, value)
        self._arrived(fqn)

    def missing_tensor(self, fqn: str) -> torch.Tensor | None:
        """Return the tensor of the state by an FQN in `missing`; None for a value."""
        found = self.state_dict[fqn] if fqn in self.state_dict else self._composed.tensor(fqn)
        return found if isinstance(found, torch.Tensor) else None

    def _arrived(self, fqn: str) -> None:
        complete = self._composed.count_read(fqn)
        if complete is not None and complete[1] is not self._composed.tensor(complete[0]):
            self._set_item(*complete)

    def _set_item(self, fqn: str, value: object) -> None:
        own = self.state_dict.get(fqn)  # None for a composed tensor: only its parts are here
        if is_empty_container(value) and is_empty_container(own) and type(value) is type(own):
            return  # the caller's own container already equals the stored one
        self.state_dict[fqn] = value  # `state_dict` is a copy if the state was flattened
        place = self._place(fqn)
        if place is not None:
            place.put(value)

    def _place(self, fqn: str) -> Place | None:
        """Return the place of an item in the caller's state.

        It is None if a subclass has renamed the items of `state_dict`.
        """
        if fqn in self._composed.outer:
            return Place(*self._composed.place(fqn))
        place = self._places.get(fqn)
        if place is None and fqn in self.original_state_dict:
            return Place(self.original_state_dict, fqn)
        return place

    def _check_place(self, fqn: str) -> None:
        place = self._place(fqn)
        if place is not None and not place.is_open:
            raise InvalidInputError(
                f"{fqn!r} is inside a {place.kind}, which is immutable; use a dict or a list there."
            )

    def _may_lack(self, fqn: str) -> bool:
        if self.allow_partial_load or not self.options.strict:
            return True
        return any(fqn == name or fqn.startswith(f"{name}.") for name in self.optional)


def _value_item(fqn: str, name: str) -> ReadItem:
    return ReadItem(
        type=LoadItemType.BYTE_IO,
        dest_index=MetadataIndex(fqn),
        dest_offsets=_NO_OFFSET,
        storage_index=MetadataIndex(name),
        storage_offsets=_NO_OFFSET,
        lengths=_NO_OFFSET,
    )


def _kind_difference(fqn: str, wanted: object, kept: object) -> str | None:
    if not isinstance(kept, TensorStorageMetadata):
        if isinstance(wanted, torch.Tensor):
            return f"{fqn!r} is a value in the version, and a tensor in the state"
        return None
    shape = tuple(kept.size)
    if not isinstance(wanted, torch.Tensor):
        return (
            f"{fqn!r} is a tensor ({kept.properties.dtype}, {shape}) in the version, "
            f"and {type(wanted).__name__} in the state"
        )
    if wanted.size() != kept.size:
        return f"{fqn!r} has shape {shape} in the version, and {tuple(wanted.size())} in the state"
    return None


def _renames(absent: Sequence[tuple[str, str]], stored: Collection[str]) -> list[str]:
    """Return a hint with the `rename` to use, if all names differ only by wrapper prefixes."""
    if not absent:
        return []
    known = set(stored)
    # First the simple cases: one wrapper is in all names of the state, or in all of the version.
    for wrapper in _WRAPPERS:
        if all(wrapper in name and name.replace(wrapper, "") in known for _, name in absent):
            return [f"the version's names lack {wrapper!r}; pass {_call(wrapper, '')}"]
        for key in dict.fromkeys(name.partition(".")[0] for _, name in absent):
            old, new = f"{key}.", f"{key}.{wrapper}"
            if all(name.replace(old, new, 1) in known for _, name in absent):
                return [f"the version's names have {wrapper!r}; pass {_call(old, new)}"]
    # Otherwise several wrappers differ: compare the names without any of them.
    plain: dict[str, str] = {}
    for name in known:
        plain.setdefault(_unwrapped(name), name)
    pairs = [(fqn, plain.get(_unwrapped(name))) for fqn, name in absent]
    if any(found is None for _, found in pairs):
        return []
    fqn, found = pairs[0]
    return [
        f"the names differ only by wrapper prefixes ({', '.join(_WRAPPERS)}); pass rename= a dict "
        f"or a function, such as {{{fqn!r}: {found!r}, ...}}"
    ]


def _call(old: str, new: str) -> str:
    once = ", 1" if new else ""
    return f"rename=lambda fqn: fqn.replace({old!r}, {new!r}{once})"


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def keeps_local_plans(planner: LoadPlanner) -> bool:
    """Tell whether the global plan of a planner is the local plans as they are.

    They are for our planner and for torch's default one, unless a subclass, or the planner itself,
    has another `create_global_plan`.
    """
    made_by = getattr(planner.create_global_plan, "__func__", None)
    return made_by in (
        DefaultLoadPlanner.create_global_plan,
        torch_planner.DefaultLoadPlanner.create_global_plan,
    )


def _absent(fqn: str, name: str, stored: Collection[str]) -> str:
    near = difflib.get_close_matches(name, stored, n=2, cutoff=0.8)
    hint = f" (near: {', '.join(map(repr, near))})" if near else ""
    renamed = f", renamed {name!r}," if name != fqn else ""
    return f"{fqn!r}{renamed} {MismatchError.MISSING}{hint}"
