"""The facts of a version as JSON: in its manifest, and in the operations of the journal.

Their names and types come from `VersionInfo` and `VersionStats`; here is how each type is checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from datetime import datetime
from typing import Any, get_type_hints

import msgspec

from dcpstore.core.syntax import check_name
from dcpstore.formats.json_fields import Natural, Number, Text, Time, Uid, float_of, number_of, read
from dcpstore.records import VersionInfo, VersionStats

__all__ = ["decode_info", "decode_stats", "encode_facts"]

# JSON whose members are of every kind, hence `Any`.
Json = Mapping[str, Any]

_AT_REST: dict[Any, Any] = {
    str: Text,
    int: Natural,
    int | None: Natural | None,
    datetime: Time,
    tuple[str, ...]: tuple[Text, ...],
    Mapping[str, str]: dict[Text, Text],
    Mapping[str, float]: dict[Text, Number],
}


def _struct(kind: type[VersionInfo | VersionStats]) -> type[msgspec.Struct]:
    """Return the msgspec struct that checks the facts of a kind.

    One with a default may be missing: tags are operations in the journal, and what was written
    before a fact was there does not have it.
    """
    hints = get_type_hints(kind) | {"uid": Uid, "tags": tuple[str, ...]}
    members = [(fact, _AT_REST.get(hints[fact.name], hints[fact.name])) for fact in fields(kind)]
    return msgspec.defstruct(
        kind.__name__,
        [
            (fact.name, type_)
            if fact.default is fact.default_factory is MISSING
            else (fact.name, type_, fact.default if fact.default_factory is MISSING else {})
            for fact, type_ in members
        ],
        kw_only=True,
    )


_INFO, _STATS = _struct(VersionInfo), _struct(VersionStats)


def encode_facts(*facts: VersionInfo | VersionStats) -> dict[str, Any]:
    """Return facts as JSON holds them, by name."""
    return {
        fact.name: _encode(getattr(one, fact.name))
        for one in facts
        for kind in (VersionInfo, VersionStats)
        if isinstance(one, kind)
        for fact in fields(kind)
    }


def _encode(fact: Any) -> Any:
    if isinstance(fact, datetime):
        return fact.isoformat()
    if isinstance(fact, Mapping):
        return {
            # JSON has no NaN and no infinity
            name: number_of(value) if isinstance(value, float) else value
            for name, value in fact.items()
        }
    return fact


def _read(document: Json | msgspec.Raw, kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Return the facts of a kind; "nan" is a float again."""
    found = msgspec.structs.asdict(read(document, kind))
    for name in ("metrics", "seconds"):
        if name in found:
            found[name] = {key: float_of(number) for key, number in found[name].items()}
    return found


def decode_info(document: Json | msgspec.Raw) -> VersionInfo:
    """Return the facts that are known when a save begins.

    Raises:
        ValueError: a fact is missing, or of the wrong kind.
    """
    found = _read(document, _INFO)
    check_name(found["branch"], kind="branch")
    for tag in found["tags"]:
        check_name(tag, kind="tag")
    return VersionInfo(**found)


def decode_stats(document: Json | msgspec.Raw) -> VersionStats:
    """Return the facts that are known when a save commits.

    Raises:
        ValueError: a fact is missing, or of the wrong kind.
    """
    return VersionStats(**_read(document, _STATS))
