"""The records that cross borders between rooms: frozen, and without behaviour of their own.

What users get (`Version`, `Operation`, `RefRecord`, `Row`) and what the catalog takes and gives
(`TensorRecord`, `EntryRecord`, `StoredChunk`, `VersionDraft`, `VersionContent` ...). Database rows
never leave the catalog; torch and zarr objects never enter it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, SupportsIndex, overload

from dcpstore.core.digests import ALGORITHM
from dcpstore.core.display import (
    counted,
    exact_time,
    html_pairs,
    html_table,
    human_bytes,
    human_metrics,
    human_number,
    some_of,
)
from dcpstore.geometry.boxes import Box
from dcpstore.geometry.grids import Grid

__all__ = [
    "Child",
    "ChunkDefaults",
    "ChunkKey",
    "ChunkPlace",
    "ChunkRange",
    "EntryRecord",
    "EntrySet",
    "EntryTree",
    "ForgetReport",
    "Group",
    "LoadReport",
    "NewChunk",
    "NewEntry",
    "NewTensor",
    "Operation",
    "PackRecord",
    "PartRecord",
    "PlanRecord",
    "RankProgress",
    "RefRecord",
    "RepositoryRecord",
    "Row",
    "RunningSave",
    "ShardRecord",
    "StatePath",
    "StorageRequest",
    "StoredChunk",
    "TensorRecord",
    "Trace",
    "UpgradePlan",
    "Version",
    "VersionContent",
    "VersionDraft",
    "VersionInfo",
    "VersionObjects",
    "VersionStats",
    "as_json",
    "versions_as_html",
]

CodecSetting = Literal["auto", "none", "blosc", "zstd"]
EntryKind = Literal["tensor", "value", "blob"]
ObjectPath = tuple[str | int, ...]
ChunkKey = tuple[str, bytes]  # codec and digest: chunks that have both in common are stored once


class StatePath(tuple[str | int, ...]):
    """A path of which it is recorded what it leads through; it equals the plain tuple.

    Attributes:
        marks: one a part, as `dcpstore.state.tree` writes them; empty where each part is a
            text key of a dict, or a place in a list.
    """

    marks: str = ""

    def __new__(cls, parts: Iterable[str | int], marks: str = "") -> StatePath:
        path = super().__new__(cls, parts)
        if marks:
            path.marks = marks
        return path

    def __reduce__(self) -> tuple[type[StatePath], tuple[ObjectPath, str]]:
        return type(self), (tuple(self), self.marks)

    @staticmethod
    def parsed(found: Any) -> ObjectPath:
        """Return a path out of JSON: a list of names and numbers, or of such a list and its marks.

        Raises:
            ValueError: it is neither.
        """
        marks = ""
        is_recorded = isinstance(found, list) and bool(found) and isinstance(found[0], list)
        if is_recorded:
            found, *rest = found
            if rest:
                (marks,) = rest
        if (
            not isinstance(found, list)
            or (is_recorded and not found)
            or not isinstance(marks, str)
            or not all(type(part) in (str, int) for part in found)
        ):
            raise ValueError("not a list of names and numbers")
        return StatePath(found, marks) if is_recorded else tuple(found)


_SHOWN = 10  # names that a notebook lists
PartRecord = Grid  # a part of a tensor is a chunk grid inside it


@dataclass(frozen=True, slots=True)
class ChunkDefaults:
    """How a repository cuts and encodes: target raw bytes of a chunk, and the codec's name.

    `nbytes` is from 1 to 1 GiB; `codec` is "none", "blosc", "zstd", or "auto", which takes the one
    that pays for each dtype.
    """

    nbytes: int = 8 * 1024 * 1024
    codec: str = "auto"


@dataclass(frozen=True, slots=True)
class RepositoryRecord:
    """The one row about a repository; `data_url` is where its packs and manifests lie."""

    uid: str
    format_version: int
    data_url: str
    chunk: ChunkDefaults
    created_at: datetime


@dataclass(frozen=True, kw_only=True)
class VersionInfo:
    """What is known of a version when its save begins: what is saved, by whom, and where.

    With `VersionStats` the one list of a version's facts: the columns and inserts of the catalog,
    the manifest, the journal, the rebuild and `Version` follow from their fields. A field more
    has a default, for what was written before lacks it; docs/design.md says what else it needs.
    """

    uid: str
    branch: str
    step: int | None = None
    tags: tuple[str, ...] = ()
    message: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    author: str = ""
    host: str = ""
    ranks: int = 1


@dataclass(frozen=True, kw_only=True)
class VersionStats:
    """What is known of a version when its save ends: sizes in bytes, seconds by phase, the time."""

    created_at: datetime
    nbytes: int
    nbytes_written: int
    nbytes_reused: int
    seconds: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class _Numbered:
    number: int
    parent: int | None


@dataclass(frozen=True, kw_only=True)
class Version(VersionStats, VersionInfo, _Numbered):
    """A committed checkpoint.

    `nbytes` are the raw bytes of all its tensors, `nbytes_reused` those of them that the repository
    already held, `nbytes_written` the encoded bytes that this save added. `seconds` are wall-clock
    seconds of the slowest rank by phase; `ranks` is the number of ranks that saved, and `host` the
    machine of the rank that coordinated them.
    """

    def __str__(self) -> str:
        return f"v{self.number}"

    def __repr__(self) -> str:
        facts = [f"{self} of {self.branch!r}"]
        facts += [] if self.step is None else [f"step {self.step}"]
        facts += [f"tags {', '.join(self.tags)}"] if self.tags else []
        facts += [human_metrics(self.metrics)] if self.metrics else []
        facts += [human_bytes(self.nbytes), exact_time(self.created_at)]
        facts += [repr(self.message)] if self.message else []
        return f"<Version {', '.join(facts)}>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        sizes = (self.nbytes, self.nbytes_reused, self.nbytes_written)
        size, reused, written = map(human_bytes, sizes)
        return html_pairs(
            f"Version {self}",
            [
                ("branch", self.branch),
                ("step", "" if self.step is None else str(self.step)),
                ("tags", ", ".join(self.tags)),
                ("message", self.message),
                ("metrics", "\n".join(f"{n} {human_number(v)}" for n, v in self.metrics.items())),
                ("labels", "\n".join(f"{name} {text}" for name, text in self.labels.items())),
                ("bytes", f"{size}, {reused} of them reused; {written} written"),
                ("when", exact_time(self.created_at)),
                ("author", self.author),
                ("ranks", str(self.ranks)),
                ("parent", "" if self.parent is None else f"v{self.parent}"),
            ],
        )


@dataclass(frozen=True, slots=True)
class VersionRef:
    """A `Version` that is given as a ref, reduced to what names it.

    Ranks compare and send this, because their `Version`s may differ in metrics or tags that were
    added meanwhile.
    """

    number: int
    uid: str

    def __str__(self) -> str:
        return f"v{self.number}"

    def __repr__(self) -> str:
        return f"v{self.number} (uid {self.uid})"

    @classmethod
    def reduced(cls, ref: RefLike | None) -> SentRef | None:
        """Return a ref as the ranks send it: a `Version` as a `VersionRef`, others as they are."""
        return cls(ref.number, ref.uid) if isinstance(ref, Version) else ref


RefLike = str | int | Version  # what every call takes that asks for a ref
SentRef = str | int | VersionRef


@dataclass(frozen=True, slots=True)
class RefRecord:
    """A branch or a tag, and the number of the version that it names."""

    name: str
    kind: Literal["branch", "tag"]
    version: int


@dataclass(frozen=True, slots=True)
class ForgetReport:
    """What was forgotten, or would be with `dry_run`.

    `versions` are the forgotten versions as they were, oldest first. `deleted` are the tags and
    branches that went with them, as they were; `moved` are the branches that went back, as they are
    now.
    """

    versions: tuple[Version, ...]
    deleted: tuple[RefRecord, ...]
    moved: tuple[RefRecord, ...]
    dry_run: bool

    @property
    def forgotten(self) -> tuple[int, ...]:
        """The numbers of the forgotten versions."""
        return tuple(version.number for version in self.versions)


@dataclass(frozen=True, slots=True)
class Operation:
    """One mutation of the repository; `old` and `new` are what `target` named before and after."""

    number: int
    kind: str
    target: str
    old: int | None
    new: int | None
    author: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """The immutable content of one tensor, shared by every version in which it is the same.

    `dtype` is torch's name without the module ("bfloat16"); `digest` is the hex content digest, and
    `algorithm` the name of what it and the digests of the chunks are made by.
    """

    id: int
    digest: str
    dtype: str
    shape: tuple[int, ...]
    codec: str
    nbytes: int
    parts: tuple[PartRecord, ...]
    algorithm: str = ALGORITHM


@dataclass(frozen=True, slots=True)
class EntryRecord:
    """One FQN in one version: its tensor (a blob has one too), or its value as JSON text."""

    fqn: str
    path: ObjectPath
    kind: EntryKind
    tensor: TensorRecord | None = None
    value: str | None = None


class StoredChunk(NamedTuple):
    """Where one chunk's encoded bytes lie; a tuple, for a load handles very many of them.

    `checksum` is the one of `core.checksums`; None if the catalog has none, for an older chunk.
    """

    tensor_id: int
    part: int
    ordinal: int
    digest: bytes
    pack: str
    offset: int
    length: int
    checksum: bytes | None = None


class ChunkRange(NamedTuple):
    """Consecutive chunks of one part that a load wants; `first` and `last` both included."""

    tensor_id: int
    part: int
    first: int
    last: int


class ChunkPlace(NamedTuple):
    """Where the encoded bytes of a chunk content lie already, and their checksum if it is known."""

    pack: str
    offset: int
    length: int
    checksum: bytes | None = None


class NewChunk(NamedTuple):
    """One chunk of a tensor that a save commits, with the place of its bytes, new or reused.

    `checksum` is the one of `core.checksums`; None for reused bytes of which none is known.
    """

    part: int
    ordinal: int
    digest: bytes
    pack: str
    offset: int
    length: int
    checksum: bytes | None = None


class NewTensor(NamedTuple):
    """A tensor content that a save commits; `chunks` is empty where the catalog knows `digest`."""

    digest: str
    dtype: str
    shape: tuple[int, ...]
    codec: str
    nbytes: int
    parts: tuple[PartRecord, ...]
    chunks: Sequence[NewChunk] = ()
    algorithm: str = ALGORITHM

    @classmethod
    def of(cls, stored: TensorRecord, chunks: Sequence[NewChunk]) -> NewTensor:
        """Return a stored tensor with its chunks, in order of (part, ordinal)."""
        return cls(
            stored.digest,
            stored.dtype,
            stored.shape,
            stored.codec,
            stored.nbytes,
            stored.parts,
            chunks,
            stored.algorithm,
        )


class NewEntry(NamedTuple):
    """An entry to commit; `tensor_digest` names a `NewTensor` of the same save or a known one."""

    fqn: str
    path: ObjectPath
    kind: EntryKind
    tensor_digest: str | None = None
    value: str | None = None


class Child(NamedTuple):
    """A node of a tree of entries as the node above names it: by the first FQN below it."""

    first: str
    digest: bytes


class EntrySet(NamedTuple):
    """Neighbouring entries, sorted by FQN, and the digest of what they hold."""

    digest: bytes
    entries: Sequence[NewEntry]

    @property
    def child(self) -> Child:
        """This set as its group names it."""
        return Child(self.entries[0].fqn if self.entries else "", self.digest)


class Group(NamedTuple):
    """Neighbouring nodes of one level, and the digest over theirs."""

    digest: bytes
    children: Sequence[Child]

    @property
    def child(self) -> Child:
        """This group as the node above names it."""
        return Child(self.children[0].first, self.digest)


class EntryTree(NamedTuple):
    """The entries of a version as nodes, by level (see `formats.entry_tree`)."""

    sets: Sequence[EntrySet]
    groups: Sequence[Group]
    root: Group


class ShardRecord(NamedTuple):
    """The box of one tensor that one rank wrote."""

    fqn: str
    rank: int
    box: Box


@dataclass(frozen=True, slots=True)
class PlanRecord:
    """A global save plan by digest; versions of an unchanged topology share one."""

    digest: str
    ranks: int
    shards: Sequence[ShardRecord]
    algorithm: str = ALGORITHM


@dataclass(frozen=True, slots=True)
class PackRecord:
    """A pack, page or plan by its key below the data folder, and its length in bytes."""

    key: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class RankProgress:
    """How far one rank of a running save is: `nbytes` of `total` in a phase, since when."""

    rank: int
    phase: str
    nbytes: int
    total: int
    since: datetime


@dataclass(frozen=True, slots=True)
class RunningSave:
    """A save that has begun and not ended; `touched_at` is when its coordinator last said so.

    `progress` is by rank; a save that has not run for a second has none yet.
    """

    uid: str
    branch: str
    step: int | None
    author: str
    host: str
    ranks: int
    started_at: datetime
    touched_at: datetime
    progress: tuple[RankProgress, ...]


@dataclass(frozen=True, kw_only=True)
class VersionDraft(VersionInfo):
    """A version whose save begins; it is stored as pending.

    `parent` and `expect_tip` are version numbers that the caller asked for, or None.
    """

    parent: int | None = None
    expect_tip: int | None = None


@dataclass(frozen=True, slots=True)
class VersionObjects:
    """The objects in the data folder that describe a version: what the catalog notes of them.

    Attributes:
        written: the page and the plan that were written for it; none that others have written.
        nodes: the keys of the pages that hold the new nodes of its tree, and the nodes that these
            name, by digest; if no node is new, that of its root.
        runs: likewise those of the runs that tensors of new nodes have.
        plan: the key of the object that holds its plan.
    """

    written: Sequence[PackRecord]
    nodes: Mapping[bytes, str]
    runs: Mapping[bytes, str]
    plan: str


@dataclass(frozen=True, kw_only=True)
class VersionContent(VersionStats):
    """What one transaction makes visible: the entries and tensors of a finished save.

    `aliases` maps the digest of a content as this save cut it to that of the stored tensor which
    the save found to be the same, cut otherwise. `planner_data` is what a custom planner keeps with
    the version, as typed JSON. Without `objects` the catalog knows no object that describes it, as
    after an upgrade. With a `tree`, which is that of the entries, `tensors` are only those that are
    new, and those that entries name which the parent does not have.
    """

    entries: Sequence[NewEntry]
    tensors: Sequence[NewTensor]
    packs: Sequence[PackRecord]
    plan: PlanRecord
    aliases: Mapping[str, str] = field(default_factory=dict)
    planner_data: str | None = None
    objects: VersionObjects | None = None
    tree: EntryTree | None = None


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load did, or with `dry_run` would do.

    `missing` are FQNs that the state asked for and the version lacks (where that is allowed),
    `unexpected` those of the version that the state did not ask for, `cast` those whose values were
    converted to the state's dtype. `differences` say, for a dry run, what would make the load fail;
    with `strict=False` also what an owner does not hold as it was stored. `unfilled` are tensors of
    modules that are still on the meta device, for the load was not asked to fill them: buffers that
    are not persistent, and what the options left out. `chunks` and `nbytes_read` (encoded bytes)
    are sums over the ranks; `seconds` are of the slowest rank by phase.
    """

    version: Version
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    chunks: int
    nbytes_read: int
    seconds: Mapping[str, float]
    cast: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()
    unfilled: tuple[str, ...] = ()

    def __repr__(self) -> str:
        facts = [f"{counted(self.chunks, 'chunk')}, {human_bytes(self.nbytes_read)} read"]
        facts += [f"{len(fqns)} {name}" for name, fqns in self._lists() if fqns]
        return f"<LoadReport of {self.version}: {'; '.join(facts)}>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        read = f"{counted(self.chunks, 'chunk')}, {human_bytes(self.nbytes_read)}"
        seconds = ", ".join(f"{phase} {value:.2f}" for phase, value in self.seconds.items())
        lists = [(name, some_of(fqns, _SHOWN)) for name, fqns in self._lists()]
        pairs = [("read", read), ("seconds", seconds), *lists]
        return html_pairs(f"Load of {self.version} ({self.version.branch})", pairs)

    def _lists(self) -> list[tuple[str, tuple[str, ...]]]:
        names = ("missing", "unexpected", "cast", "differences", "unfilled")
        return [(name, getattr(self, name)) for name in names]


@dataclass(frozen=True, slots=True)
class UpgradePlan:
    """What an upgrade of the catalog from one schema to another would do.

    `versions`, `entries`, `tensors` and `chunks` are what is to be converted. About how many `rows`
    and `nbytes` that makes, and how many `seconds` it takes, is estimated from a sample. All are 0
    where nothing is to be converted.
    """

    before: str
    after: str
    versions: int = 0
    entries: int = 0
    tensors: int = 0
    chunks: int = 0
    rows: int = 0
    nbytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class StorageRequest:
    """One call of a repository's storage that succeeded.

    `method` is "put" (write a whole object), "write" (an object written piece by piece, when it is
    complete), "get" (read a whole object), "read" (read ranges of one), "size", "list" or "delete".
    `nbytes` are those written or read. For "list", `key` is the folder that was listed.
    """

    method: Literal["put", "write", "get", "read", "size", "list", "delete"]
    key: str
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """What a repository asked of its database and of its storage; grows while it is traced.

    `statements` is the SQL of each statement as it was sent, BEGIN and COMMIT among them: on a
    server, each is one round trip. `requests` are the calls of the storage. Threads of one process
    are traced together, in the order of their requests.
    """

    statements: list[str] = field(default_factory=list)
    requests: list[StorageRequest] = field(default_factory=list)


class Row(tuple[Any, ...]):
    """One row of a query: values by position, by column name, or as an attribute.

    A column that is named as a method of a row is (`count`, `index`, `keys`, `items`) is read
    by name: `row["count"]`.
    """

    columns: tuple[str, ...]

    def __new__(cls, columns: Sequence[str], values: Sequence[Any]) -> Row:
        row = super().__new__(cls, values)
        row.columns = tuple(columns)
        return row

    def __reduce__(self) -> tuple[type[Row], tuple[tuple[str, ...], tuple[Any, ...]]]:
        return type(self), (self.columns, tuple(self))

    @overload
    def __getitem__(self, key: SupportsIndex | str, /) -> Any: ...
    @overload
    def __getitem__(self, key: slice, /) -> tuple[Any, ...]: ...
    def __getitem__(self, key: SupportsIndex | slice | str, /) -> Any:
        if isinstance(key, str):
            try:
                return super().__getitem__(self.columns.index(key))
            except ValueError:
                raise KeyError(f"no column {key!r}; there are {', '.join(self.columns)}") from None
        return super().__getitem__(key)

    def __getattr__(self, name: str) -> Any:
        if name != "columns" and name in self.columns:
            return self[name]
        raise AttributeError(f"no column {name!r}")

    def keys(self) -> tuple[str, ...]:
        """Return the column names, so that `dict(row)` works."""
        return self.columns

    def items(self) -> Iterator[tuple[str, Any]]:
        """Yield each column name with its value."""
        return zip(self.columns, self, strict=True)

    def __repr__(self) -> str:
        return f"Row({', '.join(f'{k}={v!r}' for k, v in self.items())})"


def as_json(value: object) -> object:
    """Return a record, or what it holds, as JSON shows it to programs.

    Times are in ISO format and UTC, NaN and infinity are null, bytes are in hex.
    """
    match value:
        case datetime():
            plain: object = value.astimezone(UTC).isoformat(timespec="microseconds")
        case float():
            plain = value if math.isfinite(value) else None
        case None | str() | int():
            plain = value
        case bytes():
            plain = value.hex()
        case Mapping():
            plain = {str(key): as_json(item) for key, item in value.items()}
        case list() | tuple():
            plain = [as_json(item) for item in value]
        case _ if is_dataclass(value):
            plain = {field.name: as_json(getattr(value, field.name)) for field in fields(value)}
        case _:
            plain = str(value)
    return plain


def versions_as_html(title: str, versions: Iterable[Version], *, below: str) -> str:
    """Return the table of versions that a notebook shows, with a line below it."""
    rows = [
        (
            str(version),
            version.branch,
            "-" if version.step is None else str(version.step),
            ", ".join(version.tags) or "-",
            exact_time(version.created_at),
            human_bytes(version.nbytes),
            human_metrics(version.metrics) or "-",
            version.message,
        )
        for version in versions
    ]
    columns = ("VERSION", "BRANCH", "STEP", "TAGS", "WHEN", "BYTES", "METRICS", "MESSAGE")
    return html_table(title, columns if rows else (), rows, below=below)
