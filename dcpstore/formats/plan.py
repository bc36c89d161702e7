"""Plans: the shard index of a topology, in an object that the versions of this topology share.

The save that first has a plan writes it, under its own uid. So no other save writes the same
object, and garbage collection treats it like every object of a version.
"""

from __future__ import annotations

import msgspec

from dcpstore.errors import CorruptionError, SchemaError
from dcpstore.formats import json_fields
from dcpstore.formats.json_fields import Digest, Natural, Naturals, Text
from dcpstore.formats.sealed import check_seal, seal
from dcpstore.records import PlanRecord, ShardRecord

__all__ = ["decode_plan", "encode_plan", "plan_key"]

_FORMAT = 1


class _Format(msgspec.Struct):
    format: Natural


class _Named(msgspec.Struct):
    digest: Digest
    algorithm: Text
    ranks: Natural


class _Plan(msgspec.Struct):
    """A plan with the FQN, rank, offsets and sizes of each shard."""

    named: _Named
    shards: list[tuple[Text, Natural, Naturals, Naturals]]


def plan_key(uid: str) -> str:
    """Return the key of the plan that the save of this uid writes."""
    return f"plans/{uid}.json"


def encode_plan(plan: PlanRecord) -> bytes:
    """Return the bytes of a plan."""
    named = {"digest": plan.digest, "algorithm": plan.algorithm, "ranks": plan.ranks}
    head = f'"format":{_FORMAT},"named":{json_fields.encode(named)},"shards":['
    shards = ",".join(map(_encode_shard, plan.shards))
    return seal("plan", _FORMAT, [head.encode(), shards.encode(), b"]}"])


def decode_plan(data: bytes) -> PlanRecord:
    """Return a plan.

    Raises:
        CorruptionError: it is damaged or is not a plan.
        SchemaError: a newer dcpstore wrote it.
    """
    version = check_seal(data, "plan", what="plan")
    try:
        found = json_fields.decoded(data, _Format).format
        if found != version:  # the digest does not cover the number in the seal
            raise ValueError(f"its format is {version} in the seal, and {found} inside")
        if found > _FORMAT:
            raise SchemaError(f"a plan has format {found}, newer than {_FORMAT}; update dcpstore.")
        plan = json_fields.decoded(data, _Plan)
        shards = [
            ShardRecord(fqn, rank, json_fields.box(offsets, sizes))
            for fqn, rank, offsets, sizes in plan.shards
        ]
    except (TypeError, ValueError, RecursionError) as error:
        raise CorruptionError(
            f"a plan lacks a member or has an invalid one ({type(error).__name__}: {error}); "
            "restore it from a copy, or let 'dcpstore gc' write it from the catalog."
        ) from error
    return PlanRecord(plan.named.digest, plan.named.ranks, shards, plan.named.algorithm)


def _encode_shard(shard: ShardRecord) -> str:
    offsets, sizes = map(json_fields.integers, (shard.box.offsets, shard.box.sizes))
    return f"[{json_fields.quoted(shard.fqn)},{shard.rank},{offsets},{sizes}]"
