"""The objects in the data folder that describe a version: plan, page, and manifest.

They are written in this order, each durable before the next, and all of them before the transaction
that names them (design, invariant 2). What the catalog has in another page is only named. With the
first plan of a topology goes what explains the data folder: a text, and a script that writes the
reference of any version.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from importlib.resources import files

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.read.dedup import find_tensors
from dcpstore.catalog.read.entries import load_whole_tensors
from dcpstore.catalog.read.stored_pages import StoredPage, find_objects, find_runs
from dcpstore.core.digests import RUN
from dcpstore.errors import ConflictError
from dcpstore.formats.entry_tree import EntrySet, EntryTree, Group, grow
from dcpstore.formats.manifest import Manifest, encode_manifest, manifest_key
from dcpstore.formats.page import encode_page, page_key, runs_of
from dcpstore.formats.plan import encode_plan, plan_key
from dcpstore.records import (
    NewTensor,
    PackRecord,
    VersionContent,
    VersionDraft,
    VersionObjects,
)
from dcpstore.storage.interface import Storage
from dcpstore.zarr.documents import array_heads

__all__ = ["write_objects", "write_page"]

_README = """\
Checkpoints in this folder
==========================

This folder holds the versions of a dcpstore repository: tensors and values of model checkpoints.

    packs/         the tensors: encoded chunks, one after another
    pages/         entries of versions, and where their chunks lie; versions share them
    plans/         which rank wrote which part of which tensor
    manifests/     one file a version: its facts, and the page at which it begins
    operations/    the journal: everything that was done to the repository, in order
    references/    of tagged versions: references that plain Zarr and fsspec read

With dcpstore, `dcpstore rebuild` makes a lost catalog again from this folder.

Without it, Python alone writes a kerchunk reference of any version, by number or uid:

    python references.py 12 > v12.json

With that, zarr and fsspec read the version:

    import zarr
    group = zarr.open_group("reference://", storage_options={"fo": "v12.json"}, mode="r")
    print(group["model.embed.weight"][:])
"""


def write_objects(
    catalog: Catalog,
    storage: Storage,
    draft: VersionDraft,
    content: VersionContent,
    *,
    uid: str | None = None,
) -> VersionContent:
    """Write what describes a version, as far as it is new; return the content to be committed.

    That has `objects`. Of its tensors it has those that new entry sets name, with all their chunks,
    those that came with chunks, and those that have an alias.

    Args:
        catalog: of the repository.
        storage: of the repository.
        draft: of the version, with the branch and parent as they are now.
        content: of the version; a known tensor may lack its chunks.
        uid: under which the page and the plan are stored; that of the version if None.

    Raises:
        ConflictError: gc deleted a tensor that the content has.
    """
    uid = uid or draft.uid
    tree = content.tree or grow(content.entries)
    places, plan = find_objects(catalog, _digests(tree), content.plan.digest)
    sets, groups = _new_nodes(tree, places)
    tensors = _whole_tensors(catalog, content.tensors, sets)
    key = page_key(uid)
    runs = {run.digest for t in tensors.values() if len(t.chunks) > RUN for run in runs_of(t)}
    of_runs = dict.fromkeys(runs, key) | find_runs(catalog, runs)
    written = []
    if plan is None:
        plan = plan_key(uid)
        script = files("dcpstore.zarr").joinpath("references.py").read_bytes()
        storage.put("README.txt", _README.encode())
        storage.put("references.py", script)
        written.append(_put(storage, plan, encode_plan(content.plan)))
    named = {child.digest for _, one in groups for child in one.children} | {tree.root.digest}
    of_nodes = {digest: places.get(digest, key) for digest in named}
    if groups:
        elsewhere = {digest: page for digest, page in (of_nodes | of_runs).items() if page != key}
        page = encode_page(
            key,
            sets=sets,
            groups=groups,
            tensors=tensors,
            elsewhere=elsewhere,
            documents=array_heads,
        )
        written.append(_put(storage, key, page))
    manifest = Manifest(
        draft=draft,
        stats=content,
        root=tree.root.digest,
        page=of_nodes[tree.root.digest],
        plan=plan,
        packs=content.packs,
        aliases=content.aliases,
        planner_data=content.planner_data,
    )
    storage.put(manifest_key(draft.uid), encode_manifest(manifest))
    # Of the others, which lie in nodes that are known, the transaction needs those that moved.
    aliased = set(content.aliases.values())
    rest = [t for t in content.tensors if t.chunks or t.digest in aliased]
    return replace(
        content,
        tensors=[*tensors.values(), *(t for t in rest if t.digest not in tensors)],
        objects=VersionObjects(written, of_nodes, of_runs, plan),
    )


def write_page(storage: Storage, key: str, page: StoredPage) -> int:
    """Write a page again, as the catalog has it now; return its length."""
    data = encode_page(
        key,
        sets=page.sets,
        groups=page.groups,
        tensors=page.tensors,
        elsewhere=page.elsewhere,
        documents=array_heads,
        runs=page.runs,
    )
    return _put(storage, key, data).nbytes


def _put(storage: Storage, key: str, data: bytes) -> PackRecord:
    storage.put(key, data)
    return PackRecord(key, len(data))


def _digests(tree: EntryTree) -> list[bytes]:
    groups = (*tree.groups, tree.root)
    return [*(one.digest for one in tree.sets), *(one.digest for one in groups)]


def _new_nodes(
    tree: EntryTree, places: Mapping[bytes, str]
) -> tuple[list[EntrySet], list[tuple[int, Group]]]:
    """Return the nodes that are to be in the page of this version; groups with their levels.

    What an upgraded catalog has in no page counts as new.
    """
    if tree.root.digest in places:
        return [], []
    groups = [one for one in tree.groups if one.digest not in places]
    below = {child.digest for one in groups for child in one.children} - places.keys()
    sets = {one.digest: one for one in tree.sets if one.digest in below}
    # Equal nodes of one tree are one node.
    distinct = {one.digest: one for one in groups}
    return [*sets.values()], [*((1, one) for one in distinct.values()), (2, tree.root)]


def _whole_tensors(
    catalog: Catalog, given: Collection[NewTensor], sets: Iterable[EntrySet]
) -> dict[str, NewTensor]:
    """Return the tensors that these sets name, with all their chunks, by digest."""
    held = {tensor.digest: tensor for tensor in given}
    named = {e.tensor_digest for one in sets for e in one.entries if e.tensor_digest is not None}
    lacking = {
        digest
        for digest in named
        if digest not in held
        or (not held[digest].chunks and any(part.size for part in held[digest].parts))
    }
    known = find_tensors(catalog, lacking)
    whole = load_whole_tensors(catalog, list(known.values()))
    if len(whole) < len(lacking):
        raise ConflictError(
            f"gc deleted the tensor {min(lacking - known.keys())} while it was being reused. Save "
            "again, or copy again."
        )
    given_whole = {digest: held[digest] for digest in named - lacking}
    return given_whole | {tensor.digest: tensor for tensor in whole}
