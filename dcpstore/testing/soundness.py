"""What must hold of every repository, checked byte by byte."""

from __future__ import annotations

import numpy as np

from dcpstore.catalog.glance import LogLine, glance_at_log
from dcpstore.catalog.maintenance.export import load_content
from dcpstore.catalog.maintenance.fsck import find_faults, list_packs, list_pages
from dcpstore.catalog.maintenance.stored_journal import read_journal
from dcpstore.catalog.read.entries import load_chunks, load_entries
from dcpstore.core.digests import chunk_digest, content_digest
from dcpstore.encoding.codecs import decode
from dcpstore.encoding.dtypes import numpy_dtype
from dcpstore.formats.first_manifest import FirstManifest
from dcpstore.formats.manifest import decode_manifest, manifest_key
from dcpstore.formats.plan import decode_plan
from dcpstore.geometry.boxes import find_overlap
from dcpstore.maintenance.page_reader import PageReader
from dcpstore.records import ChunkRange, NewChunk, NewTensor, StoredChunk, TensorRecord, Version
from dcpstore.repository import Repository
from dcpstore.storage.packs import PackReader

__all__ = ["assert_sound"]


def assert_sound(repo: Repository) -> None:
    """Check what must always hold of a repository in which no save is running.

    Every entry's chunks exist and match their digests, boxes tile their tensors, manifests and
    catalog agree, refs resolve, the journal is whole, and `gc` would delete nothing that a version
    reaches. It reads every byte, so it is for small repositories.

    Raises:
        AssertionError: something of this does not hold.
    """
    with repo.catalog.keep_connection():
        _assert_sound(repo)


def _assert_sound(repo: Repository) -> None:
    versions = repo.log()
    numbers = [version.number for version in versions]
    expired = [
        row[0] for row in repo.sql("SELECT number FROM version WHERE expired_at IS NOT NULL")
    ]
    assert numbers == sorted(numbers, reverse=True)
    assert sorted(numbers + expired) == list(range(1, len(numbers + expired) + 1))
    seen = glance_at_log(repo._target, limit=None)
    assert seen is None or repr(seen) == repr(list(map(as_line, versions)))  # NaN is not itself
    packs = PackReader(repo.storage)
    pages = PageReader(repo.storage)
    checked: set[int] = set()
    for version in versions:
        assert version.parent is None or version.parent < version.number
        entries = load_entries(repo.catalog, version.number)
        assert version.nbytes == sum(e.tensor.nbytes for e in entries if e.tensor is not None)
        _assert_described(repo, packs, pages, version)
        for entry in entries:
            assert (entry.kind == "value") == (entry.tensor is None)
            if entry.tensor is not None and entry.tensor.id not in checked:
                checked.add(entry.tensor.id)
                _assert_whole(repo, packs, entry.tensor, is_whole="/rank-" not in version.branch)
    packs.close()
    for ref in (*repo.tags(), *repo.branches()):
        assert repo.show(ref.name).number == ref.version
    _assert_kept(repo)


def _assert_described(
    repo: Repository, packs: PackReader, pages: PageReader, version: Version
) -> None:
    """Check that the data folder holds what the catalog has of a version.

    If two saves wrote the same chunk at once, a page may name another place of it until `gc`.
    """
    draft, content = load_content(repo.catalog, version.number)
    manifest = decode_manifest(repo.storage.get(manifest_key(version.uid)))
    assert manifest.draft.uid == draft.uid
    if isinstance(manifest, FirstManifest):
        entries, tensors, plan = (
            manifest.content.entries,
            manifest.content.tensors,
            manifest.content.plan,
        )
    else:
        found = pages.tree(manifest.root, manifest.page)
        entries = [entry for one in found.tree.sets for entry in one.entries]
        tensors, plan = found.tensors, decode_plan(repo.storage.get(manifest.plan))
    assert sorted(entries) == sorted(content.entries)
    held = {tensor.digest: tensor for tensor in content.tensors}
    assert {tensor.digest for tensor in tensors} == held.keys()
    for tensor in tensors:
        assert tensor._replace(chunks=()) == held[tensor.digest]._replace(chunks=())
        for chunk, own in zip(tensor.chunks, held[tensor.digest].chunks, strict=True):
            assert chunk == own or chunk_digest(_raw(packs, tensor, chunk)) == own.digest
    assert (plan.digest, sorted(plan.shards)) == (content.plan.digest, sorted(content.plan.shards))


def as_line(version: Version) -> LogLine:
    """Return what a glance at the log shows of a version."""
    return LogLine(*(getattr(version, name) for name in LogLine._fields))


def _assert_kept(repo: Repository) -> None:
    """Check that nothing is damaged, gc takes nothing that is reached, the journal is whole."""
    assert repo.verify().damaged == ()
    assert find_faults(repo.catalog) == []
    labels = {(row.version, row.name): row.value for row in repo.sql("SELECT * FROM labels")}
    read = {(v.number, name): text for v in repo.log() for name, text in v.labels.items()}
    assert labels == read  # each is kept twice
    reached = {pack.key for pack in list_packs(repo.catalog)}
    reached |= {manifest_key(version.uid) for version in repo.log()}
    report = repo.gc(grace="100w", dry_run=True)
    going = {pack.key for pack in report.condemned} | set(report.cleared)
    rows = repo.sql(
        "SELECT DISTINCT p.key FROM version v JOIN child g ON g.node = v.root "
        "JOIN child s ON s.node = g.child JOIN entry e ON e.node = s.child "
        "LEFT JOIN run r ON r.tensor = e.tensor "
        "JOIN chunk c ON c.tensor = COALESCE(r.run, e.tensor) JOIN pack p ON p.id = c.pack "
        "WHERE v.expired_at IS NULL"  # what was forgotten has entries until gc
    )
    lost = repo.sql(
        "SELECT id FROM node WHERE id NOT IN (SELECT node FROM loose) "
        "AND NOT EXISTS (SELECT 1 FROM version WHERE root = node.id) "
        "AND NOT EXISTS (SELECT 1 FROM child WHERE child = node.id) "
        "UNION ALL SELECT id FROM tensor WHERE layout IS NOT NULL "
        "AND NOT EXISTS (SELECT 1 FROM entry WHERE tensor = tensor.id) "
        "UNION ALL SELECT id FROM tensor WHERE layout IS NULL "
        "AND NOT EXISTS (SELECT 1 FROM run WHERE run = tensor.id)"
    )
    assert lost == []  # else no gc would ever look at it
    named = {row.key for row in rows}
    assert named <= reached
    assert not going & named
    assert not going & {manifest_key(version.uid) for version in repo.log()}
    assert not going & {page.key for page in list_pages(repo.catalog)}
    (journaled,) = repo.sql("SELECT last_journaled FROM repository")[0]
    journal = read_journal(repo.storage)
    assert (journal.single_faults, journal.span_faults) == ({}, {})
    assert sorted(journal.operations) == list(range(1, journaled + 1))
    assert len(journal.listing.single) + len(journal.listing.spans) < 100


def _assert_whole(
    repo: Repository, packs: PackReader, tensor: TensorRecord, *, is_whole: bool
) -> None:
    cells = [grid.cell(i) for grid in tensor.parts for i in range(grid.size)]
    assert find_overlap(cells) is None
    whole = int(np.prod(tensor.shape, dtype=int))
    assert sum(cell.volume for cell in cells) == (
        whole if is_whole else sum(p.box.volume for p in tensor.parts)
    )
    chunks = load_chunks(
        repo.catalog,
        [
            ChunkRange(tensor.id, part, 0, grid.size - 1)
            for part, grid in enumerate(tensor.parts)
            if grid.size
        ],
    )
    chunks.sort(key=lambda chunk: (chunk.part, chunk.ordinal))
    assert [(c.part, c.ordinal) for c in chunks] == [
        (part, i) for part, grid in enumerate(tensor.parts) for i in range(grid.size)
    ]
    for chunk in chunks:
        assert chunk_digest(_raw(packs, tensor, chunk)) == chunk.digest
    digest = content_digest(tensor.dtype, tensor.shape, tensor.parts, [c.digest for c in chunks])
    assert digest == tensor.digest


def _raw(
    packs: PackReader, tensor: TensorRecord | NewTensor, chunk: StoredChunk | NewChunk
) -> bytearray:
    shape = tensor.parts[chunk.part].chunk_shape
    raw = bytearray(int(np.prod(shape, dtype=int)) * numpy_dtype(tensor.dtype).itemsize)
    decode(tensor.codec, packs.read(chunk.pack, chunk.offset, chunk.length), raw)
    return raw
