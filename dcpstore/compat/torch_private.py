"""Torch's private names, and names that some supported release of torch lacks.

Invariant: no other module imports such a name, and everything here works on every release that
`pyproject.toml` allows. Where releases differ, the newest decides what a name is, and the fallback
for the older ones stands beside it. `make compat TORCH=x.y` runs the tests on one release.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch
from torch import _weights_only_unpickler as _pickles
from torch._utils import _rebuild_tensor_v2 as rebuild_tensor_v2
from torch._utils import _rebuild_tensor_v3 as rebuild_tensor_v3
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
    "layout_from_name",
    "make_stager",
    "newer_arguments",
    "rebuild_tensor_v2",
    "rebuild_tensor_v3",
    "set_format_version",
    "sharded_metadata",
    "takes_argument",
]

# Arguments of `save` and `async_save` that a supported release lacks: the first release that has
# them, and the value that asks for what the older ones do.
_NEWER_ARGUMENTS: dict[str, tuple[str, object]] = {
    "async_stager": ("2.9", None),
    "no_dist": ("2.9", False),
    "use_collectives": ("2.9", True),
}

if TYPE_CHECKING or hasattr(_saver, "AsyncSaveResponse"):
    AsyncSaveResponse = _saver.AsyncSaveResponse
else:  # before 2.9 `async_save` returns the future of the save alone

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
    if not hasattr(_staging, "DefaultStager"):
        return _OldStager(is_pinned=is_pinned, is_on_device=is_on_device)
    return _staging.DefaultStager(
        _staging.StagingOptions(
            use_pinned_memory=is_pinned,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=is_on_device,
        )
    )


class _OldStager:
    """What `DefaultStager` does without a thread, for releases before 2.9."""

    def __init__(self, *, is_pinned: bool, is_on_device: bool) -> None:
        self._is_on_device = is_on_device
        root = logging.getLogger()
        level = root.level
        module: Any = importlib.import_module("torch.distributed.checkpoint._state_dict_stager")
        root.setLevel(level)  # which that import sets to INFO, for the whole program

        class Stager(module.StateDictStager):  # type: ignore[misc]
            def _offload_tensor(self, x: Any, memo: dict[int, Any], **options: Any) -> Any:
                if x.data_ptr():
                    return super()._offload_tensor(x, memo, **options)
                # A DTensor, or a tensor without elements. These releases would lose its shape.
                copied = memo[id(x)] = x.new_empty(x.size(), device="cpu")
                for name in [*vars(x), *getattr(type(x), "__slots__", ())]:
                    if hasattr(x, name):
                        value = self.deepcopy_with_tensor_offload(getattr(x, name), memo, **options)
                        setattr(copied, name, value)
                return copied

        self._stager: Any = Stager(pin_memory=is_pinned, share_memory=False)

    def stage(self, state: Any) -> Any:
        """Return a copy of `state` in memory of the host."""
        copied = self._stager.stage(state, non_blocking=self._is_on_device)
        if self._is_on_device:
            torch.accelerator.synchronize()
        return copied


def allowed_globals() -> dict[str, Any]:
    """Return what torch's own weights-only loading builds, by qualified name."""
    found: dict[str, Any] = _pickles._get_allowed_globals()
    return found


def globals_allowed_by_user() -> dict[str, Any]:
    """Return what this process has allowed by `torch.serialization.add_safe_globals`."""
    found: dict[str, Any] = _pickles._get_user_allowed_globals()  # type: ignore[no-untyped-call]
    return found


layout_from_name = torch.serialization._get_layout
