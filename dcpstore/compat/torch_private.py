"""Torch's private names, and names that some supported release of torch lacks.

Invariant: no other module imports such a name, and everything here works on every release that
`pyproject.toml` allows. Where releases differ, the newest decides what a name is, and the fallback
for the older ones stands beside it. `make compat TORCH=x.y` runs the tests on one release.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import io
import logging
import pickle
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import cache, partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import _weights_only_unpickler as _pickles
from torch._utils import _rebuild_tensor_v2 as rebuild_tensor_v2
from torch._utils import _rebuild_tensor_v3 as rebuild_tensor_v3
from torch.distributed import distributed_c10d as _c10d
from torch.distributed._shard.sharded_tensor import metadata as sharded_metadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor, ShardedTensorBase
from torch.distributed._shard.sharded_tensor.shard import Shard as ShardOf
from torch.distributed.checkpoint import filesystem as _filesystem
from torch.distributed.checkpoint import staging as _staging
from torch.distributed.checkpoint import state_dict_saver as _saver
from torch.distributed.checkpoint._sharded_tensor_utils import (
    _flatten_sharded_tensors as flatten_sharded_tensors,
)
from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING as MEMORY_FORMATS
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.distributed_c10d import Store
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard

from dcpstore.errors import InvalidInputError

__all__ = [
    "MEMORY_FORMATS",
    "AsyncSaveResponse",
    "LocalShardsWrapper",
    "ShardOf",
    "ShardedTensor",
    "ShardedTensorBase",
    "StorageInfo",
    "StridedShard",
    "allowed_globals",
    "flatten_sharded_tensors",
    "globals_allowed_by_user",
    "group_store",
    "layout_from_name",
    "make_stager",
    "newer_arguments",
    "placing_storages",
    "rebuild_tensor_v2",
    "rebuild_tensor_v3",
    "set_format_version",
    "sharded_metadata",
    "splits_uneven_strides",
    "storage_place",
    "takes_argument",
]

_PLACE = "_checkpoint_offset"  # of a storage; what torch itself calls it

# Arguments of `save` and `async_save` that a supported release lacks: the first release that has
# them, and the value that asks for what the older ones do.
_NEWER_ARGUMENTS: dict[str, tuple[str, object]] = {
    "async_stager": ("2.9", None),
    "no_dist": ("2.9", False),
    "use_collectives": ("2.9", True),
}

if TYPE_CHECKING or hasattr(_saver, "AsyncSaveResponse"):
    AsyncSaveResponse = _saver.AsyncSaveResponse
else:  # before 2.9, `async_save` returns the future of the save alone

    @dataclasses.dataclass
    class AsyncSaveResponse:
        """The two futures of an asynchronous save, as newer releases of torch have them."""

        staging_completion: Future[None]
        upload_completion: Future[None]


def takes_argument(call: Callable[..., Any], name: str) -> bool:
    """Tell whether torch's `call` has an argument of this name."""
    return name in inspect.signature(call).parameters


def newer_arguments(call: Callable[..., Any], **given: object) -> dict[str, Any]:
    """Return those of the `given` keyword arguments that torch's `call` takes.

    Raises:
        InvalidInputError: this release lacks an argument, and the value asks for more than it does.
    """
    kept = {name: value for name, value in given.items() if takes_argument(call, name)}
    for name in given.keys() - kept.keys():
        since, usual = _NEWER_ARGUMENTS[name]
        if given[name] is not usual:
            raise InvalidInputError(
                f"{name}={given[name]!r} needs torch {since} or newer where torch itself saves, "
                f"and this is torch {torch.__version__}; leave it out, or install a newer torch."
            )
    return kept


def set_format_version(metadata: Metadata) -> Metadata:
    """Write torch's version of its checkpoint format into `metadata`, and return it.

    Releases before 2.9 have no such version, and their `Metadata` has no field for it.
    """
    if hasattr(_filesystem, "CURRENT_DCP_VERSION"):
        metadata.version = _filesystem.CURRENT_DCP_VERSION
    return metadata


def make_stager() -> Any:
    """Return a new stager: it copies states into memory of the host, which it uses again.

    Its `stage(state)` returns the copy when it is whole; an AssertionError says that a storage was
    resized since its buffer was made. It is `Any` because releases differ in its class.
    """
    is_pinned, is_on_device = torch.cuda.is_available(), torch.accelerator.is_available()
    if not _torch_stages_all():
        return _MendedStager(is_pinned=is_pinned, is_on_device=is_on_device)
    return _staging.DefaultStager(
        _staging.StagingOptions(
            use_pinned_memory=is_pinned,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=is_on_device,
        )
    )


@cache
def _torch_stages_all() -> bool:
    """Tell whether torch's stager takes a tensor that is not a leaf and keeps empty shapes.

    That of 2.9 does neither, and 2.8 has none.
    """
    if not hasattr(_staging, "DefaultStager"):
        return False
    stager = _staging.DefaultStager(_staging.StagingOptions(False, False, False, False))
    parameter = torch.nn.Parameter(torch.empty(0, 1, device="cpu"))
    try:
        staged: Any = stager.stage({"leaf": parameter, "view": parameter[:, :1]})
    except RuntimeError:  # of a view, which torch's copy refuses
        return False
    return all(tensor.shape == (0, 1) for tensor in staged.values())


class _MendedStager:
    """What `DefaultStager` does without a thread, for releases that have none or a weaker one."""

    def __init__(self, *, is_pinned: bool, is_on_device: bool) -> None:
        self._is_on_device = is_on_device
        root = logging.getLogger()
        level = root.level
        module: Any = importlib.import_module("torch.distributed.checkpoint._state_dict_stager")
        root.setLevel(level)  # which that import sets to INFO, for the whole program

        # without its `no_grad`, which `stage` has too: a call less for each level of a deep state
        copy_of_any = module.StateDictStager.deepcopy_with_tensor_offload.__wrapped__

        class Stager(module.StateDictStager):  # type: ignore[misc]
            def deepcopy_with_tensor_offload(
                self,
                x: Any,
                memo: dict[int, Any] | None = None,
                _: object = None,
                non_blocking: bool = False,
            ) -> Any:
                memo = {} if memo is None else memo
                if not isinstance(x, torch.Tensor):
                    return copy_of_any(self, x, memo, non_blocking=non_blocking)
                # These releases would also ask the tensor for a copy, which only leaves give.
                if id(x) not in memo:
                    self._offload_tensor(x, memo, non_blocking=non_blocking)
                    self._keep_alive(x, memo)
                return memo[id(x)]

            def _offload_tensor(self, x: Any, memo: dict[int, Any], non_blocking: bool) -> Any:
                if x.data_ptr():
                    return super()._offload_tensor(x, memo, non_blocking=non_blocking)
                # A DTensor, or a tensor without elements. These releases would lose its shape.
                copied = memo[id(x)] = x.new_empty(x.size(), device="cpu")
                for name in [*vars(x), *getattr(type(x), "__slots__", ())]:
                    if hasattr(x, name):
                        value = self.deepcopy_with_tensor_offload(
                            getattr(x, name), memo, non_blocking=non_blocking
                        )
                        setattr(copied, name, value)
                return copied

        self._stager: Any = Stager(pin_memory=is_pinned, share_memory=False)

    def stage(self, state: Any) -> Any:
        """Return a copy of `state` in memory of the host."""
        copied = self._stager.stage(state, non_blocking=self._is_on_device)
        if self._is_on_device:
            torch.accelerator.synchronize()
        return copied


def group_store(group: dist.ProcessGroup) -> Store:
    """Return the store that the ranks of a group share."""
    if hasattr(group, "get_group_store"):
        return group.get_group_store()
    return _c10d._get_process_group_store(group)  # before 2.9


def storage_place(storage: torch.UntypedStorage) -> int | None:
    """Return where in its archive a storage begins that `torch.load` made on "meta"."""
    place: int | None = getattr(storage, _PLACE, None)
    return place


@cache
def _torch_places_storages() -> bool:
    archive = io.BytesIO()
    torch.save(torch.ones(1), archive)
    archive.seek(0)
    loaded = torch.load(archive, map_location="meta", weights_only=True)
    return storage_place(loaded.untyped_storage()) is not None


def placing_storages(module: Any, places: Mapping[str, int]) -> Any:
    """Return the pickle module for a `torch.load` to "meta" after which storages have their place.

    Newer releases of torch place them themselves. For older ones, its unpickler is that of
    `module`, in Python, and notes the place of each storage that it meets.

    Args:
        module: `pickle`, or what has an `Unpickler` of its own.
        places: where each storage begins, by the name of its record.
    """
    return module if _torch_places_storages() else _placing(module, places)


def _placing(module: Any, places: Mapping[str, int]) -> Any:
    """Return the pickle module for the torch that places no storages on "meta"."""

    def placed(load: Callable[[tuple[Any, ...]], Any], saved: tuple[Any, ...]) -> Any:
        storage = load(saved)
        setattr(storage._untyped_storage, _PLACE, places.get(f"data/{saved[2]}"))
        return storage

    base: Any = pickle._Unpickler if module is pickle else module.Unpickler

    class Placing(base):  # type: ignore[misc]
        def __setattr__(self, name: str, value: Any) -> None:
            is_load = name == "persistent_load"  # which torch sets on its unpickler
            super().__setattr__(name, partial(placed, value) if is_load else value)

    return SimpleNamespace(__name__=module.__name__, Unpickler=Placing)


@cache
def splits_uneven_strides() -> bool:
    """Tell whether a strided shard of unequal pieces lies as in the newest torch.

    In 2.8 and 2.9 a dimension is cut into all pieces at once; later each run is cut by itself. The
    two differ where the pieces are not of equal size.
    """
    strided = StridedShard(0, split_factor=2)
    parts, _ = strided._split_tensor(torch.arange(2, device="cpu"), 2, with_padding=False)
    return [part.tolist() for part in parts] == [[0, 1], []]


def allowed_globals() -> dict[str, Any]:
    """Return what torch's own weights-only loading builds, by qualified name."""
    found: dict[str, Any] = _pickles._get_allowed_globals()
    return found


def globals_allowed_by_user() -> dict[str, Any]:
    """Return what this process has allowed by `torch.serialization.add_safe_globals`."""
    found: dict[str, Any] = _pickles._get_user_allowed_globals()  # type: ignore[no-untyped-call]
    return found


layout_from_name = torch.serialization._get_layout
