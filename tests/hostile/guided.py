"""A small coverage-guided search: inputs that reach new lines of a parser are kept and varied.

By the interpreter's own trace function, so it needs nothing installed; a seed makes it repeatable.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import dcpstore
from tests.hostile.parsers import Parser

ROOT = Path(dcpstore.__file__).parent
TEXTS = (
    "",
    "../../etc/passwd",
    "/etc/passwd",
    "packs/ab/0-0.pack",
    "packs/../catalog.db",
    "\x1b[2J\x1b]0;owned\x07",
    "\0",
    "\ud800",
    "'; DROP TABLE version; --",
    "x" * 5000,
    "9" * 5000,
    "nan",
    "2026-01-01",
    "2026-01-01T00:00:00+00:00",
    "$tuple",
    "$ndarray",
    "$tensor",
    "$dataclass",
    "$enum",
    "$deque",
    "$numpy",
    "<f4",
    '{"$blob":"pickle"}',
)
NUMBERS = (0, -1, 1, 2, 2**31, 2**62, 2**63, 2**64, -(2**63), 1.5, 1e308, 10**400)
BYTES = (
    b"{",
    b"[",
    b'"',
    b"null",
    b"~9",
    b"@step=",
    b"1e999",
    b"\xff",
    b"\0",
    b"[" * 2000,
    b"9" * 5000,
)


@dataclass(frozen=True)
class Found:
    """What a search came to: how many inputs, how many kept, and what broke the parser."""

    tried: int
    kept: int
    broken: tuple[tuple[bytes, BaseException], ...]


def search(parser: Parser, folder: Path, *, runs: int, seed: int) -> Found:
    """Vary the corpus of a parser, and whatever of it leads to new lines, `runs` times."""
    chance = random.Random(seed)
    pool = list(parser.corpus().values())
    seen: set[tuple[int, int]] = set()
    broken: list[tuple[bytes, BaseException]] = []
    begun = len(pool)
    for number in range(runs + begun):
        data = pool[number] if number < begun else varied(chance, pool)
        edges, error = _traced(parser, data, folder)
        if error is not None:
            broken.append((data, error))
        elif number >= begun and edges - seen:
            pool.append(data)
        seen |= edges
    return Found(runs + begun, len(pool) - begun, tuple(broken))


def varied(chance: random.Random, pool: list[bytes]) -> bytes:
    """Return an input that is like one of the pool: its JSON changed somewhere, or its bytes."""
    data = chance.choice(pool)
    for _ in range(chance.choice((1, 1, 2, 4))):
        tree = _parsed(data) if chance.random() < 0.6 else None
        data = _varied_bytes(chance, data, pool) if tree is None else _varied_tree(chance, tree)
    return data


def _parsed(data: bytes) -> Any:
    try:
        tree = json.loads(data)
        json.dumps(tree)  # which may be too deep to be written again
    except (ValueError, RecursionError):
        return None
    return tree


def _varied_tree(chance: random.Random, tree: Any) -> bytes:
    places = list(_places(tree))
    if not places:
        return json.dumps(_nasty(chance)).encode()
    holder, key = chance.choice(places)
    what = chance.randrange(5)
    if what == 0:
        del holder[key]
    elif what == 1 and isinstance(holder, list):
        holder.insert(key, holder[key])
    elif what == 2:
        other, there = chance.choice(places)
        holder[key] = json.loads(json.dumps(other[there]))
    elif what == 3:
        holder[key] = [holder[key]] if chance.random() < 0.5 else {"$tuple": holder[key]}
    else:
        holder[key] = _nasty(chance)
    try:
        return json.dumps(tree).encode()
    except RecursionError:  # what was copied into itself is too deep now
        return b"[" * 2000 + b"]" * 2000


def _places(tree: Any) -> Iterable[tuple[Any, Any]]:
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        keys: Iterable[Any] = ()
        if isinstance(node, dict):
            keys = list(node)
        elif isinstance(node, list):
            keys = range(len(node))
        for key in keys:
            yield node, key
            waiting.append(node[key])


def _nasty(chance: random.Random) -> Any:
    return chance.choice((None, True, [], {}, [[]], *NUMBERS, *TEXTS))


def _varied_bytes(chance: random.Random, data: bytes, pool: list[bytes]) -> bytes:
    first, last = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    what = chance.randrange(5)
    if what == 0 and data:
        at = chance.randrange(len(data))
        return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
    if what == 1:
        return data[:first] + data[last:]
    if what == 2:
        return data[:last] + data[first:]
    if what == 3:
        other = chance.choice(pool)
        return data[:first] + other[chance.randrange(len(other) + 1) :]
    return data[:first] + chance.choice(BYTES) + data[first:]


def _traced(
    parser: Parser, data: bytes, folder: Path
) -> tuple[set[tuple[int, int]], BaseException | None]:
    """Return the pairs of lines that followed one another in the parser, and what broke it."""
    edges: set[tuple[int, int]] = set()
    file = str(ROOT / parser.module)
    before = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal before
        if frame.f_code.co_filename != file:
            return None
        edges.add((before, frame.f_lineno))
        before = frame.f_lineno
        return trace

    error = None
    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        parser.try_on(data, folder)
    except Exception as found:
        error = found
    finally:
        sys.settrace(outer)
    return edges, error
