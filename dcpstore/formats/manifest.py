"""Manifests: one small object a version, from which all that it holds is found.

A manifest has the facts of the version, and names the root of its tree of entries with the page
that holds that node. What the nodes hold is in pages (`formats.page`), the plan in an object of its
own (`formats.plan`). A digest over the rest comes first, so that damage is found before anything is
used. Format 1 (`formats.first_manifest`) is read, and no longer written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import msgspec

from dcpstore.errors import CorruptionError, SchemaError
from dcpstore.formats import json_fields
from dcpstore.formats.first_manifest import FirstManifest, decode_first, is_first
from dcpstore.formats.json_fields import Digest, Natural, PackKey, PageKey, PlanKey, Text
from dcpstore.formats.sealed import check_seal, seal
from dcpstore.formats.version import decode_info, decode_stats, encode_facts
from dcpstore.records import PackRecord, VersionDraft, VersionInfo, VersionStats

__all__ = ["Manifest", "decode_manifest", "encode_manifest", "manifest_key"]

_FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a manifest says.

    Attributes:
        draft: what was known when the save began, with the branch and parent as they are now.
        stats: what was known when it ended.
        root: the digest of the node at the root of the version's tree of entries.
        page: the key of the page that holds this node.
        plan: the key of the object that holds the plan.
        packs: those that the save wrote.
        aliases, planner_data: as in `VersionContent`.
    """

    draft: VersionDraft
    stats: VersionStats
    root: bytes
    page: str
    plan: str
    packs: Sequence[PackRecord]
    aliases: Mapping[str, str] = field(default_factory=dict)
    planner_data: str | None = None


def manifest_key(uid: str) -> str:
    """Return the key of a version's manifest."""
    return f"manifests/{uid}.json"


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the bytes of a manifest."""
    body = {
        "format": _FORMAT,
        **encode_facts(manifest.draft, manifest.stats),
        "parent": manifest.draft.parent,
        "root": manifest.root.hex(),
        "page": manifest.page,
        "plan": manifest.plan,
        "written": [[pack.key, pack.nbytes] for pack in manifest.packs],
        "aliases": dict(manifest.aliases),
        "planner_data": manifest.planner_data,
    }
    return seal("manifest", _FORMAT, [json_fields.encode(body)[1:].encode()])


def decode_manifest(data: bytes) -> Manifest | FirstManifest:
    """Return what a manifest says.

    Raises:
        CorruptionError: it is damaged or is not a manifest.
        SchemaError: a newer dcpstore wrote it.
    """
    try:
        if is_first(data):
            return decode_first(data)
        version = check_seal(data, "manifest", what="manifest")
        found = json_fields.decoded(data, _Format).format
        if found != version:  # the digest does not cover the number in the seal
            raise ValueError(f"its format is {version} in the seal, and {found} inside")
        if found > _FORMAT:
            raise SchemaError(
                f"a manifest has format {found}, newer than {_FORMAT}; update dcpstore."
            )
        return _decode(data)
    except (LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise CorruptionError(
            f"a manifest lacks a member or has an invalid one ({type(error).__name__}: {error}); "
            "restore it from a copy, or take the version from the catalog."
        ) from error


class _Format(msgspec.Struct):
    format: Natural


class _Members(msgspec.Struct):
    """What a manifest has besides the facts of its version, which `formats.version` reads."""

    parent: Natural | None
    root: Digest
    page: PageKey
    plan: PlanKey
    written: list[tuple[PackKey, Natural]]
    aliases: dict[Digest, Digest]
    planner_data: Text | None


def _decode(data: bytes) -> Manifest:
    raw = msgspec.Raw(data)
    info, stats, members = decode_info(raw), decode_stats(raw), json_fields.read(raw, _Members)
    facts = {fact.name: getattr(info, fact.name) for fact in fields(VersionInfo)}
    return Manifest(
        draft=VersionDraft(**facts, parent=members.parent),
        stats=stats,
        root=bytes.fromhex(members.root),
        page=members.page,
        plan=members.plan,
        packs=[PackRecord(*pack) for pack in members.written],
        aliases=members.aliases,
        planner_data=members.planner_data,
    )
