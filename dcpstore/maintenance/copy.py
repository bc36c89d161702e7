"""Copies versions from one repository to another; what the target holds is not written again.

A version keeps its uid and gets a new number; copying it twice does nothing. Each chunk is checked
when it is read. The manifest is durable before the one transaction that makes the copy visible.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.maintenance.export import lineage, load_content
from dcpstore.catalog.maintenance.fsck import PackedChunk
from dcpstore.catalog.maintenance.journal import write_journal
from dcpstore.catalog.read.dedup import find_encoded, find_tensors
from dcpstore.catalog.read.entries import load_whole_tensors
from dcpstore.catalog.read.log_filter import list_log
from dcpstore.catalog.read.ref_lookup import list_refs, resolve
from dcpstore.catalog.write.refs import make_ref
from dcpstore.catalog.write.saves import (
    abort_save,
    advance_branch,
    begin_copy,
    commit_copy,
    kept_lease,
    known_uids,
)
from dcpstore.catalog.write.stale import mark_version_stale
from dcpstore.core.syntax import parse_ref
from dcpstore.core.uids import new_uid
from dcpstore.errors import AlreadyExistsError, ConflictError, CorruptionError, NotFoundError
from dcpstore.maintenance.rewrite import renew_objects
from dcpstore.reading.chunk_reads import check_chunk
from dcpstore.records import (
    ChunkKey,
    ChunkPlace,
    NewChunk,
    NewTensor,
    PackRecord,
    RefLike,
    RefRecord,
    Version,
    VersionContent,
    VersionDraft,
)
from dcpstore.storage.interface import Storage
from dcpstore.storage.packs import PackReader, PackWriter
from dcpstore.zarr.version_objects import write_objects

__all__ = ["CopyReport", "copy_versions"]

Place = tuple[Catalog, Storage]


@dataclass(frozen=True, slots=True)
class CopyReport:
    """What a copy did.

    Attributes:
        copied: versions that were copied: (number in the source, number in the target).
        present: versions that the target had before, with the same two numbers.
        refused: source numbers of versions that expired in the target.
        refs: refs that were made or moved in the target.
        left: refs that were not made or moved, because the target uses the name for something
            else, or lacks the version.
        nbytes_written: bytes of the packs that were written.
    """

    copied: tuple[tuple[int, int], ...]
    present: tuple[tuple[int, int], ...]
    refused: tuple[int, ...]
    refs: tuple[str, ...]
    left: tuple[str, ...]
    nbytes_written: int


def copy_versions(
    source: Place, target: Place, refs: Sequence[RefLike] | None, *, author: str
) -> CopyReport:
    """Copy the versions that `refs` name, without their ancestors; None is all versions and refs.

    Tags and branches among `refs` are made in the target; a branch that exists there moves forward,
    if the copied version is a descendant of its tip.

    Raises:
        NotFoundError: a ref names nothing.
        CorruptionError: a chunk is damaged; versions before it are copied.
    """
    catalog = source[0]
    if refs is None:
        versions, named = list_log(catalog), list_refs(catalog)
    else:
        versions = [resolve(catalog, ref) for ref in refs]
        names = {parsed.name for ref in refs if str(parsed := parse_ref(ref)) == parsed.name}
        named = [ref for ref in list_refs(catalog) if ref.name in names]
    chosen = sorted({v.number: v for v in versions}.values(), key=lambda v: v.number)
    copied, present, refused, nbytes = [], [], [], 0
    numbers: dict[int, int] = {}
    for version in chosen:
        number, status = known_uids(target[0], [version.uid]).get(version.uid, (0, ""))
        if status == "expired":
            refused.append(version.number)
            continue
        if status:
            present.append((version.number, number))
        else:
            number, written = _copy(version, source, target)
            copied.append((version.number, number))
            nbytes += written
        numbers[version.number] = number
    made, left = _copy_refs(named, numbers, target[0], author=author)
    write_journal(*target)
    return CopyReport(
        tuple(copied), tuple(present), tuple(refused), tuple(made), tuple(left), nbytes
    )


def _copy(version: Version, source: Place, target: Place) -> tuple[int, int]:
    """Copy one version; return its number in the target, and the bytes that were written."""
    catalog, storage = target
    draft, content = load_content(source[0], version.number)
    ancestors = lineage(source[0], version.number)
    known = known_uids(catalog, ancestors)
    parent = next((uid for uid in ancestors if uid in known), None)
    # The copy has another uid until it commits, so that gc deletes the packs of a killed copy.
    pending = replace(draft, uid=new_uid(), parent=None, tags=(), expect_tip=None)
    begin_copy(catalog, pending)
    writer = PackWriter(storage, pending.uid, 0)
    try:
        with kept_lease(catalog, pending.uid):
            places, packs = _write_missing(content, source, target, writer)
            renumbered = replace(draft, parent=None if parent is None else known[parent][0])
            made = _commit(
                pending.uid, renumbered, content, target, parent=parent, places=places, packs=packs
            )
    except BaseException as error:
        abort_save(catalog, pending.uid, f"{type(error).__name__}: {error}")
        writer.discard()
        raise
    write_journal(catalog, storage)
    return made.number, sum(pack.nbytes for pack in packs)


def _commit(
    uid: str,
    draft: VersionDraft,
    content: VersionContent,
    target: Place,
    *,
    parent: str | None,
    places: Mapping[ChunkKey, ChunkPlace],
    packs: Sequence[PackRecord],
) -> Version:
    """Write page and manifest and commit; retry once if gc moved chunks in between."""
    catalog, storage = target
    for attempt in (1, 2):
        held = _held(content, catalog, places, packs)
        held = write_objects(catalog, storage, draft, held, uid=uid)
        try:
            return commit_copy(catalog, uid, draft, held, parent=parent)
        except ConflictError:
            there = known_uids(catalog, [draft.uid]).get(draft.uid)
            if there is not None:
                # Another copy was faster, and we overwrote its manifest: write it again.
                mark_version_stale(catalog, there[0])
                renew_objects(catalog, storage)
                raise
            if attempt == 2:
                raise
    raise AssertionError("the second attempt returns or raises")


def _write_missing(
    content: VersionContent, source: Place, target: Place, writer: PackWriter
) -> tuple[dict[ChunkKey, ChunkPlace], Sequence[PackRecord]]:
    """Write the chunks that the target lacks; return the places of all chunks of new tensors."""
    known = find_tensors(target[0], {tensor.digest for tensor in content.tensors})
    new = [tensor for tensor in content.tensors if tensor.digest not in known]
    places = find_encoded(target[0], {(t.codec, c.digest) for t in new for c in t.chunks})
    missing = [(c.pack, c.offset, c, t) for t in new for c in t.chunks]
    with closing(PackReader(source[1])) as packs:
        # Sorted by pack and offset, so that each pack is read from beginning to end.
        for pack, offset, chunk, tensor in sorted(missing, key=lambda one: one[:2]):
            if (tensor.codec, chunk.digest) in places:
                continue
            encoded = packs.read(pack, offset, chunk.length)
            try:
                check_chunk(_described(tensor, chunk), encoded)
            except CorruptionError as error:
                raise CorruptionError(
                    f"pack {pack} at offset {offset}, length {chunk.length}: {error}. 'dcpstore "
                    "verify --deep' shows what it touches; copy other versions by their refs."
                ) from error
            places[tensor.codec, chunk.digest] = writer.append(encoded)
    return places, writer.finish()


def _held(
    content: VersionContent,
    catalog: Catalog,
    places: Mapping[ChunkKey, ChunkPlace],
    packs: Sequence[PackRecord],
) -> VersionContent:
    """Return the content as the target holds it: known tensors as they are stored there."""
    known = find_tensors(catalog, {tensor.digest for tensor in content.tensors})
    stored = {record.digest: record for record in known.values()}
    tensors = load_whole_tensors(catalog, list(stored.values()))
    for tensor in content.tensors:
        if tensor.digest not in known:
            if any((tensor.codec, chunk.digest) not in places for chunk in tensor.chunks):
                raise ConflictError(
                    f"gc deleted the tensor {tensor.digest} in the target meanwhile; copy again."
                )
            moved = [
                NewChunk(c.part, c.ordinal, c.digest, *places[tensor.codec, c.digest])
                for c in tensor.chunks
            ]
            tensors.append(tensor._replace(chunks=moved))
    entries = [
        entry
        if entry.tensor_digest not in known
        else entry._replace(tensor_digest=known[entry.tensor_digest].digest)
        for entry in content.entries
    ]
    return replace(content, entries=entries, tensors=tensors, packs=packs, aliases={})


def _described(tensor: NewTensor, chunk: NewChunk) -> PackedChunk:
    return PackedChunk(
        offset=chunk.offset,
        length=chunk.length,
        digest=chunk.digest,
        algorithm=tensor.algorithm,
        codec=tensor.codec,
        dtype=tensor.dtype,
        chunk_shape=tensor.parts[chunk.part].chunk_shape,
        tensor=0,
        part=chunk.part,
        ordinal=chunk.ordinal,
        checksum=chunk.checksum,
    )


def _copy_refs(
    refs: Iterable[RefRecord], numbers: Mapping[int, int], catalog: Catalog, *, author: str
) -> tuple[list[str], list[str]]:
    """Make or move refs; return those that were made or moved, and those that could not be."""
    there = {ref.name: ref for ref in list_refs(catalog)}
    made, left = [], []
    for ref in refs:
        number, known = numbers.get(ref.version), there.get(ref.name)
        if number is None:
            left.append(ref.name)
        elif known is None:
            try:
                make_ref(catalog, ref.name, ref.kind, version=number, author=author)
                made.append(ref.name)
            except (AlreadyExistsError, NotFoundError):  # another process was faster
                left.append(ref.name)
        elif known == RefRecord(ref.name, ref.kind, number):
            continue
        elif known.kind == ref.kind == "branch" and advance_branch(
            catalog, ref.name, number, author=author
        ):
            made.append(ref.name)
        else:
            left.append(ref.name)
    return made, left
