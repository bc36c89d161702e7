"""What stands in for operations that are lost, so that numbers have no gaps after a rebuild either.

Each lost operation becomes one of kind "lost", which undo passes over; the first, which says whose
data it is, one of kind "init". A version that no operation tells of was made by one of the lost:
that one tells of it again, by the uid that other operations name it by and by its manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from dcpstore.catalog.maintenance.journal import changed_refs
from dcpstore.core.ids import new_uid
from dcpstore.formats.manifest import Manifest

__all__ = ["find_lost", "stand_ins"]

# JSON whose fields `decode_operation` has checked; they are of every kind, hence `Any`.
Json = dict[str, Any]

_MOST = 100_000  # in one gap: the name of a single file can claim that any number of them is lost


def find_lost(listed: Iterable[int], sound: Collection[int]) -> list[int]:
    """Return the numbers of the operations that are lost, up to the last that is there.

    Args:
        listed: the numbers that files are named by.
        sound: those of them whose file holds an operation.
    """
    lost: list[int] = []
    before = 0
    for number in sorted(listed):
        if number - before <= _MOST:
            lost += range(before + 1, number if number in sound else number + 1)
        before = number
    return lost


def stand_ins(
    operations: Sequence[Json], lost: Sequence[int], manifest: Callable[[str], Manifest | None]
) -> tuple[list[Json], dict[str, int]]:
    """Return an operation for each of `lost`, and the versions that nothing tells of, by uid.

    Args:
        operations: all that are sound, in order; there is one.
        lost: the numbers of the others, in order.
        manifest: returns that of a version, or None where there is none or it is damaged.
    """
    uids = _named(operations)
    expired = {u for o in operations if o["kind"] == "expire" for u in o["detail"]["versions"]}
    expired |= {
        u for o in operations if o["kind"] == "gc" for u in (o["detail"] or {}).get("dropped", ())
    }
    made_by = dict(_makers(operations, lost, uids))
    unnamed: dict[str, int] = {}
    made = []
    earlier = iter([*operations, None])
    following = next(earlier)
    at = operations[0]["created_at"]
    tips: dict[str, Mapping[str, Any] | None] = {}
    for number in lost:
        while following is not None and following["operation"] < number:
            at = following["created_at"]
            tips.update((change.name, change.new) for change in changed_refs(following))
            following = next(earlier)
        said = {
            "operation": number,
            "kind": "init" if number == 1 else "lost",
            "target": "",
            "old": None,
            "new": None,
            "author": "",
            "created_at": at,
            "detail": None,
        }
        if (version := made_by.get(number)) is not None:
            uid = uids.get(version)
            if uid is None:
                uid = uids[version] = new_uid()
                unnamed[uid] = version
                found = None
            else:
                found = None if uid in expired else manifest(uid)
            said["new"] = {"uid": uid, "version": version}
            said["version"] = _version_as_json(uid, version, found, at) | _parent(
                version, found, uids, tips
            )
            if found is not None:
                tips[found.draft.branch] = said["new"]
        made.append(said)
    return made, unnamed


def _named(operations: Iterable[Json]) -> dict[int, str]:
    """Return the uids of versions by number: those described, and those only named."""
    operations = list(operations)
    uids = {o["version"]["number"]: o["version"]["uid"] for o in operations if "version" in o}
    known = set(uids.values())
    for said in operations:
        changed = (end for change in changed_refs(said) for end in (change.old, change.new))
        for end in (said["old"], said["new"], *changed):
            if end is not None and end["version"] and end["uid"] not in known:
                known.add(end["uid"])
                uids.setdefault(end["version"], end["uid"])
    return uids


def _makers(
    operations: Iterable[Json], lost: Sequence[int], uids: Mapping[int, str]
) -> Iterator[tuple[int, int]]:
    """Yield each lost operation that made a version, with the number of that version."""
    described: dict[int, int] = {}
    for said in operations:
        if "version" in said:
            described.setdefault(said["version"]["number"], said["operation"])
    last = max(uids, default=0)
    if last - len(described) > len(lost):
        return  # no repository has such versions: the numbers of this journal are made up
    free = (number for number in lost if number > 1)
    before = 0  # versions are made in the order of their numbers
    for version in range(1, last + 1):
        if version in described:
            before = max(before, described[version])
            continue
        maker = next((number for number in free if number > before), None)
        if maker is None:
            return
        before = maker
        yield maker, version


def _version_as_json(uid: str, number: int, manifest: Manifest | None, at: str) -> Json:
    """Return what is known of a version, as its own operation would have said it."""
    fact: Json = {
        "uid": uid,
        "number": number,
        "branch": "main",
        "step": None,
        "message": "",
        "labels": {},
        "metrics": {},
        "author": "",
        "host": "",
        "ranks": 0,
        "nbytes": 0,
        "nbytes_written": 0,
        "nbytes_reused": 0,
        "seconds": {},
        "started_at": at,
        "created_at": at,
        "packs": [],  # those that a manifest names are found all the same
    }
    if manifest is not None:
        draft, content = manifest.draft, manifest.content
        created = content.created_at.isoformat()
        fact |= {
            "branch": draft.branch,
            "step": draft.step,
            "message": draft.message,
            "labels": dict(draft.labels),
            "metrics": dict(draft.metrics),
            "author": draft.author,
            "host": draft.host,
            "ranks": draft.ranks,
            "nbytes": content.nbytes,
            "nbytes_written": content.nbytes_written,
            "nbytes_reused": content.nbytes_reused,
            "seconds": dict(content.seconds),
            "started_at": created,
            "created_at": created,
        }
    return fact


def _parent(
    number: int,
    manifest: Manifest | None,
    uids: Mapping[int, str],
    tips: Mapping[str, Mapping[str, Any] | None],
) -> Json:
    """Return the parent by its uid: as the manifest says, else where the branch was before."""
    parent = None
    if manifest is not None:
        tip = tips.get(manifest.draft.branch)
        parent = manifest.draft.parent or (None if tip is None else tip["version"])
    return {"parent": None if parent is None or parent >= number else uids.get(parent)}
