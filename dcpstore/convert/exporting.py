"""What an export contains: chooses the entries of a version, and reads their tensors box by box.

Invariant: every byte is verified, as in a load, and at most one box of a tensor is in memory. Packs
are released after each box, so that mapped packs do not fill the memory.
"""

from __future__ import annotations

import inspect
import math
import pickle
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import TypedDict

import torch

from dcpstore.core.display import some_of
from dcpstore.encoding.dtypes import as_bytes, cast_dtype, torch_dtype, wanted_dtype
from dcpstore.errors import InvalidInputError
from dcpstore.formats.composition import matching_fqns, outer_fqns
from dcpstore.geometry.boxes import Box
from dcpstore.reading.box_reads import BoxRequest, read_boxes
from dcpstore.reading.selection import read_values
from dcpstore.records import EntryRecord, ObjectPath, RefLike, TensorRecord, Version
from dcpstore.repository import Repository
from dcpstore.saving.request import shows_options
from dcpstore.state.load_options import Rename, check_globs, check_rename, renamed
from dcpstore.state.tree import path_below
from dcpstore.storage.packs import PackReader

__all__ = [
    "BOX",
    "DEEPEST",
    "ExportOptions",
    "Exported",
    "ExportedTensor",
    "ExportedVersion",
    "find_ties",
    "shows_export_options",
]

_SHOWN = 5  # beginnings of names that an error lists
BOX = 64 << 20  # bytes of a tensor that are read at once; more if its chunks are larger
DEEPEST = 100  # levels of containers that a nested format may have, as in values


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export did.

    `tensors`, `values` and `files` are numbers; `nbytes` counts the raw bytes of the tensors that
    were written, tied ones once.
    """

    version: Version
    path: str
    format: str
    files: int
    tensors: int
    values: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ExportedTensor:
    """A tensor of a version, in the dtype that it is exported in."""

    entry: EntryRecord
    dtype: torch.dtype

    @property
    def fqn(self) -> str:
        """Its FQN."""
        return self.entry.fqn

    @property
    def stored(self) -> TensorRecord:
        """Its stored content."""
        assert self.entry.tensor is not None
        return self.entry.tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """In elements."""
        return self.stored.shape

    @property
    def nbytes(self) -> int:
        """Of its elements, in the dtype of the export."""
        return math.prod(self.shape) * self.dtype.itemsize

    def boxes(self, most: int = BOX) -> list[Box]:
        """Return boxes of about `most` bytes, in the order of its elements in a row-major file.

        They end where chunks end, so that each chunk is read once, unless the parts of the tensor
        have chunks of very different sizes.
        """
        if not math.prod(self.shape):
            return []
        # The elements of a box are contiguous in a row-major file only if the tensor is cut along
        # its first dimension that is longer than one.
        dim = next((i for i, n in enumerate(self.shape) if n > 1), None)
        if dim is None:
            return [Box.whole(self.shape)]
        n = self.shape[dim]
        row = math.prod(self.shape[dim + 1 :]) * torch_dtype(self.stored.dtype).itemsize
        cells = {min(part.chunk_shape[dim], part.shape[dim]) for part in self.stored.parts}
        step = math.lcm(*cells)
        if step * row > most:  # then some chunks of the other parts are read twice
            step = max(cells)
        rows = max(most // row // step, 1) * step
        return [
            Box(
                tuple(first if i == dim else 0 for i in range(len(self.shape))),
                tuple(min(rows, n - first) if i == dim else m for i, m in enumerate(self.shape)),
            )
            for first in range(0, n, rows)
        ]


class ExportOptions(TypedDict, total=False):
    """The arguments that every export has, stated here once.

    Attributes:
        dtype: what floating tensors are converted to, such as "bf16"; None keeps every dtype.
        tensors_only: export tensors only, without values.
        include, exclude: which entries; each text is the name of an entry or of all below it
            ("model"), or a glob of FQNs ("*.bias"). By default all entries are exported.
        rename: the FQN in the export of an FQN in the version, as a mapping or a function. The
            entry loses its nested path.
        strip_prefix: removed from the FQNs that begin with it ("model."), and from nested paths;
            after `include` and `exclude` have chosen, and before `rename`.
    """

    dtype: str | torch.dtype | None
    tensors_only: bool
    include: Sequence[str] | None
    exclude: Sequence[str]
    rename: Rename | None
    strip_prefix: str


class ExportedVersion:
    """The entries of a version that an export writes.

    Args:
        repo: the repository of the version.
        ref: the version.
        options: as `ExportOptions` explains them.

    Raises:
        NotFoundError: no such version, or a text of `include` or `exclude` that matches nothing.
        InvalidInputError: an option is invalid, or gives one FQN to two entries; or no name begins
            with `strip_prefix`.
    """

    def __init__(
        self,
        repo: Repository,
        ref: RefLike | None,
        *,
        dtype: str | torch.dtype | None = None,
        tensors_only: bool = False,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        rename: Rename | None = None,
        strip_prefix: str = "",
    ) -> None:
        wanted = wanted_dtype(dtype)
        check_globs("include", include)
        check_globs("exclude", exclude)
        check_rename(rename, "the version's FQNs to the export's")
        if not isinstance(strip_prefix, str):
            raise InvalidInputError(f"strip_prefix={strip_prefix!r}; pass text, such as 'model.'.")
        self._repo = repo
        self.version = repo.show(ref)
        entries = repo.entries(self.version.number)
        outer = outer_fqns(entry.fqn for entry in entries)
        names = {outer.get(entry.fqn, entry.fqn) for entry in entries}
        chosen = _chosen(names, include, exclude, where=str(self.version))
        self._stored: dict[str, EntryRecord] = {}  # by the FQN in the export
        exported = []
        for entry in entries:
            whole = outer.get(entry.fqn, entry.fqn)
            if whole not in chosen or (tensors_only and entry.kind != "tensor"):
                continue
            moved = _renamed(entry, whole, rename, strip_prefix)
            other = self._stored.setdefault(moved.fqn, entry)
            if other is not entry:
                raise InvalidInputError(
                    f"{other.fqn!r} and {entry.fqn!r} would both be exported as {moved.fqn!r}; "
                    "rename one of them, or leave it out (exclude, --exclude)."
                )
            exported.append(moved)
        _check_prefix(strip_prefix, [outer.get(one.fqn, one.fqn) for one in self._stored.values()])
        self.tensors = [
            ExportedTensor(
                entry,
                # Parts of a composed tensor are not converted: its mark describes them.
                cast_dtype(
                    torch_dtype(entry.tensor.dtype),
                    None if self._stored[entry.fqn].fqn in outer else wanted,
                ),
            )
            for entry in exported
            if entry.kind == "tensor" and entry.tensor is not None
        ]
        self.plain = [entry for entry in exported if entry.kind != "tensor"]
        self.paths: dict[str, ObjectPath] = {entry.fqn: entry.path for entry in exported}
        self._optimizers = {
            entry.path[:i]
            for entry in entries  # also those that are left out: `param_groups` may be among them
            for i, key in enumerate(entry.path[:DEEPEST])
            if _is(key, "param_groups")
        }

    def is_optimizer_state(self, tensor: ExportedTensor) -> bool:
        """Tell whether a tensor belongs to the state of an optimizer, such as a moment."""
        path = self._stored[tensor.fqn].path[:DEEPEST]
        return any(path[:i] in self._optimizers and _is(key, "state") for i, key in enumerate(path))

    def nested_paths(self) -> dict[str, ObjectPath]:
        """Return the nested path of each FQN, for a format that keeps the nesting.

        Raises:
            InvalidInputError: a path is too long.
        """
        for fqn, path in self.paths.items():
            if len(path) > DEEPEST:
                raise InvalidInputError(
                    f"{fqn[:200]!r} is {len(path)} containers deep, more than {DEEPEST}; export as "
                    "safetensors or zarr, which keep the state flat."
                )
        return self.paths

    def read(self, tensor: ExportedTensor, box: Box) -> torch.Tensor:
        """Return the elements of a box, verified, in the dtype of the export."""
        target = torch.empty(box.sizes, dtype=tensor.dtype, device="cpu")
        if box.volume:
            with closing(PackReader(self._repo.storage)) as packs:
                # the stored entry, so that an error names the FQN in the version
                request = BoxRequest(self._stored[tensor.fqn], box, target)
                read_boxes([request], self._repo.catalog, packs, version=self.version.number)
        return target

    def raw(self, tensor: ExportedTensor) -> Iterator[memoryview]:
        """Yield the row-major bytes of a tensor, box after box."""
        for box in tensor.boxes():
            yield as_bytes(self.read(tensor, box)).reshape(-1).view("uint8").data

    def values(self, entries: Sequence[EntryRecord], *, allow_pickle: bool) -> list[object]:
        """Return the values of entries.

        Raises:
            UnsafeDataError: one is a pickle, and that is not allowed.
        """
        with closing(PackReader(self._repo.storage)) as packs:
            return read_values(
                [self._stored[entry.fqn] for entry in entries],
                self._repo.catalog,
                packs,
                version=self.version.number,
                allow_pickle=allow_pickle,
            )

    @contextmanager
    def pickling(self, values: Mapping[str, object]) -> Iterator[None]:
        """Raise `InvalidInputError` if the block fails because one of `values` cannot be pickled.

        Torch's formats are pickles, and some values that need no pickle here cannot be pickled.
        """
        try:
            yield
        except (TypeError, pickle.PicklingError):
            for fqn, value in values.items():
                try:
                    pickle.dumps(value, protocol=2)  # the protocol of torch.save
                except Exception as error:  # the object's own hooks can raise anything
                    raise InvalidInputError(
                        f"{fqn!r}: a value does not pickle ({error}), as files of torch need; "
                        "leave the values out (tensors_only, --tensors-only), or export as "
                        "safetensors or zarr."
                    ) from error
            raise

    def report(
        self, path: object, form: str, *, files: int, tensors: Sequence[ExportedTensor]
    ) -> Exported:
        """Return the report of an export that wrote the bytes of `tensors`."""
        return Exported(
            version=self.version,
            path=str(path),
            format=form,
            files=files,
            tensors=len(self.tensors),
            values=len(self.plain),
            nbytes=sum(tensor.nbytes for tensor in tensors),
        )


shows_export_options = shows_options(
    ExportOptions,
    {name: one.default for name, one in inspect.signature(ExportedVersion).parameters.items()},
)


def find_ties(version: ExportedVersion) -> dict[str, str]:
    """Return, by FQN, the FQN of the tensor that it is tied to: the first of the same content.

    A repository stores contents and not memory, so ties are guessed from equal contents, and only
    if a wrong guess is unlikely. Tensors that are equal by chance must not be tied: an optimizer
    would then update both at once, and a model would miss one of them. So these are never tied:
    optimizer state, tensors whose elements are all the same, and tensors whose FQNs differ only in
    numbers, such as a buffer that every layer has.
    """
    same: dict[int, list[ExportedTensor]] = {}
    for tensor in version.tensors:
        if not version.is_optimizer_state(tensor):
            same.setdefault(tensor.stored.id, []).append(tensor)
    ties: dict[str, str] = {}
    for tensors in same.values():
        first, rest = tensors[0], tensors[1:]
        others = [t.fqn for t in rest if _without_numbers(t.fqn) != _without_numbers(first.fqn)]
        if others and not _is_constant(version, first):
            ties |= dict.fromkeys(others, first.fqn)
    return ties


def _chosen(
    fqns: Collection[str], include: Sequence[str] | None, exclude: Sequence[str], *, where: str
) -> set[str]:
    """Return the FQNs that some of `include` match (None: all), and none of `exclude`."""
    chosen = set(fqns) if include is None else set()
    for text in include or ():
        chosen |= matching_fqns(fqns, text, where=where)
    for text in exclude:
        chosen -= matching_fqns(fqns, text, where=where)
    return chosen


def _check_prefix(prefix: str, names: Sequence[str]) -> None:
    """Raise InvalidInputError for a prefix that no name of an export begins with."""
    if not prefix or not names or any(name.startswith(prefix) for name in names):
        return
    first = dict.fromkeys(
        head + dot for head, dot, _ in (name.partition(".") for name in sorted(names))
    )
    raise InvalidInputError(
        f"no exported name begins with {prefix!r}; they begin with "
        f"{some_of([repr(head) for head in first], _SHOWN)}."
    )


def _renamed(
    entry: EntryRecord, whole: str, rename: Rename | None, strip_prefix: str
) -> EntryRecord:
    """Return an entry under its FQN in the export; `whole` is that of its composed tensor, if any.

    If the prefix is removed, the entry keeps the rest of its nested path, provided that the prefix
    consists of whole parts of the path and the rest begins with a text key of a dict. Otherwise its
    path is its new FQN alone.
    """
    name, path = whole, entry.path
    if strip_prefix and whole.startswith(strip_prefix) and whole != strip_prefix:
        name = whole.removeprefix(strip_prefix)
        depths = range(1, len(path))
        above = (i for i in depths if ".".join(map(str, path[:i])) + "." == strip_prefix)
        depth = next(above, None)
        path = (name,) if depth is None else path_below(path, depth)
        if not isinstance(path[0], str):
            path = (name,)
    if rename is not None and (new := renamed(name, rename)) != name:
        name, path = new, (new,)
    rest = entry.fqn[len(whole) :]  # of a part of a composed tensor
    if rest and path == (name,):
        path = (name + rest,)
    return entry if name == whole else replace(entry, fqn=name + rest, path=path)


def _is(key: str | int, name: str) -> bool:
    """Return whether a key of an optimizer's state is `name`, or begins with it and a dot.

    Torch's flattened optimizer state has such longer keys.
    """
    return isinstance(key, str) and (key == name or key.startswith(f"{name}."))


def _without_numbers(fqn: str) -> str:
    return re.sub(r"\d+", "#", fqn)


def _is_constant(version: ExportedVersion, tensor: ExportedTensor) -> bool:
    """Return whether all elements are the same, or there are none."""
    first: torch.Tensor | None = None
    for box in tensor.boxes():
        # as bytes, because NaN != NaN
        elements = version.read(tensor, box).reshape(-1).view(torch.uint8)
        elements = elements.reshape(-1, tensor.dtype.itemsize)
        first = elements[:1].clone() if first is None else first
        if not bool((elements == first).all()):
            return False
    return True
