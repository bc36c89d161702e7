"""One value of each kind that a state may hold, and of some that it may not."""

from __future__ import annotations

import array
import datetime as dt
import enum
import io
import random
import struct
import uuid
import zoneinfo
from argparse import Namespace
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PureWindowsPath
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch


class Colour(enum.Enum):
    """A plain enum."""

    RED = 1
    BLUE = (2, "b")


class Level(enum.IntEnum):
    """An enum of integers."""

    LOW = 1
    HIGH = 2


class Mode(enum.StrEnum):
    """An enum of text."""

    TRAIN = "train"


class Perm(enum.Flag):
    """An enum of flags."""

    READ = enum.auto()
    WRITE = enum.auto()


@dataclass
class Config:
    """A dataclass that refuses to be made twice, as its `__init__` must not run."""

    lr: float
    mode: Mode = Mode.TRAIN
    betas: tuple[float, float] = (0.9, 0.95)
    steps: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.steps += 1


@dataclass(frozen=True, slots=True)
class Box:
    """A frozen dataclass without a `__dict__`."""

    sizes: tuple[int, ...]


class Span(NamedTuple):
    """A named tuple."""

    start: int
    stop: int


class Step(int):
    """A subclass of a plain type."""

    def __repr__(self) -> str:
        return f"Step({int(self)})"


def fresh() -> int:
    """Make what a defaultdict lacks."""
    return 3


@dataclass(frozen=True)
class Kind:
    """A kind of value: the words for it, one value, and another one to load into.

    `template` is None where what comes back does not depend on one.
    """

    name: str
    value: Any
    template: Any = None


def canonical(obj: Any) -> object:
    """Return what compares equal for equal values of equal types: nan too, and not -0.0 to 0.0."""
    seen = next((look(obj) for kinds, look in _LOOKS if isinstance(obj, kinds)), obj)
    return type(obj), seen


_LOOKS: list[tuple[Any, Callable[[Any], object]]] = [
    (enum.Enum, id),
    (np.ndarray | np.generic, lambda obj: (obj.dtype, obj.shape, obj.tobytes())),
    (torch.Tensor, lambda obj: (obj.dtype, obj.shape, obj.requires_grad, obj.tolist())),
    (deque, lambda obj: ([canonical(item) for item in obj], obj.maxlen)),
    (list | tuple, lambda obj: [canonical(item) for item in obj]),
    (defaultdict, lambda obj: (canonical(dict(obj)), obj.default_factory)),
    (dict, lambda obj: [(canonical(key), canonical(value)) for key, value in obj.items()]),
    (set | frozenset, lambda obj: sorted(repr(canonical(item)) for item in obj)),
    (Namespace | SimpleNamespace, lambda obj: canonical(vars(obj))),
    (slice, lambda obj: canonical((obj.start, obj.stop, obj.step))),
    (io.BytesIO, lambda obj: (obj.getvalue(), obj.tell())),
    (dt.datetime | dt.time, lambda obj: (obj.isoformat(), obj.fold, obj.tzinfo, obj.tzname())),
    (uuid.UUID, lambda obj: (obj, obj.is_safe)),
    (float, lambda obj: struct.pack("<d", obj)),
    (complex, lambda obj: struct.pack("<dd", obj.real, obj.imag)),
    (Decimal, repr),
]

KEPT = [
    Kind("`None`, `bool`, `int`, finite `float`, `str`", [None, True, 3, -0.0, "café"]),
    Kind("`int` past 64 bits", 2**64),
    Kind("NaN and infinite `float`", float("-inf")),
    Kind("`str` with NUL or lone surrogates", "a\0\ud800"),
    Kind("`complex`", 1 - 2j),
    Kind("`bytes`, `bytearray`", bytearray(b"abc")),
    Kind("`io.BytesIO`, at its beginning", io.BytesIO(b"abc")),
    Kind("`list`", [1, [2]]),
    Kind("`tuple`", (1, 2)),
    Kind("`dict` inside a value, its keys text", ({"a": 1},)),
    Kind("`dict` inside a value, of other keys", ({1: "a"},)),
    Kind("`OrderedDict` inside a value", (OrderedDict(a=1),)),
    Kind("`defaultdict` of a plain factory, inside a value", (defaultdict(list, a=[1]),)),
    Kind(
        "`defaultdict` of any other factory, inside a value",
        (defaultdict(fresh, a=1),),
        (defaultdict(fresh),),
    ),
    Kind("`Counter` inside a value", (Counter("aab"),)),
    Kind("`set`, `frozenset`", {1, 2}),
    Kind("`deque`, with its maxlen", deque([1, 2], maxlen=5)),
    Kind("`range`", range(0, 10, 3)),
    Kind("`slice`", slice(1, None)),
    Kind("`...`", ...),
    Kind("`argparse.Namespace`", Namespace(lr=0.1, tags=["a"])),
    Kind("`types.SimpleNamespace`", SimpleNamespace(a=1)),
    Kind("`Path`, `PurePath` and their classes", Path("/data/run")),
    Kind("paths of another platform", PureWindowsPath("C:/data")),
    Kind("`Decimal`", Decimal("1.10")),
    Kind("`Fraction`", Fraction(1, 3)),
    Kind("`uuid.UUID`", uuid.UUID(int=5)),
    Kind(
        "`datetime`, plain or with a fixed offset",
        dt.datetime(2026, 1, 2, 3, tzinfo=dt.timezone(dt.timedelta(hours=1), "CET")),
    ),
    Kind("`date`", dt.date(2026, 1, 2)),
    Kind("`time`", dt.time(1, 2, tzinfo=dt.UTC)),
    Kind("`timedelta`", dt.timedelta(days=1)),
    Kind("`timezone`", dt.timezone(dt.timedelta(hours=-3))),
    Kind("`Enum`, `StrEnum`, `IntEnum`, `Flag`", Level.HIGH, Level.LOW),
    Kind("dataclass", Config(0.1), Config(0.5)),
    Kind("named tuple", Span(1, 2), Span(0, 0)),
    Kind("subclass of `str`, `int`, `float` or `bytes`", Step(7), Step(0)),
    Kind("`torch.dtype`", torch.bfloat16),
    Kind("`torch.device`", torch.device("cuda:1")),
    Kind("`torch.Size`", torch.Size([2, 3])),
    Kind("`torch.memory_format`", torch.channels_last),
    Kind("`torch.layout`", torch.sparse_coo),
    Kind("dense tensor inside a set, a `deque` or a namespace", deque([torch.ones(2)])),
    Kind("numpy scalar", np.float32(0.1)),
    Kind("numpy scalar of text, bytes or time", np.str_("a")),
    Kind("numpy array of numbers, text, bytes or times", np.arange(3, dtype=np.int16)),
    Kind("numpy dtype of those", np.dtype("float32")),
]


@dataclass(frozen=True)
class Refused:
    """A kind of value that only pickle could keep: the words for it, and what makes one."""

    name: str
    make: Callable[[], Any]


class _Own(list[object]):
    """A class of which `pickle` finds the name."""


@dataclass
class _Cached:
    lr: float

    def __post_init__(self) -> None:
        self.cache = 1


class _Named(str):
    pass


def _noted() -> _Named:
    text = _Named("a")
    text.note = 1  # type: ignore[attr-defined]
    return text


def _closed() -> io.BytesIO:
    file = io.BytesIO()
    file.close()
    return file


REFUSED = [
    Refused("a function or a class", lambda: print),
    Refused("any object of another class", object),
    Refused("`torch.Generator`", torch.Generator),
    Refused("`random.Random`", lambda: random.Random(1)),
    Refused("`numpy.random.Generator`", lambda: np.random.default_rng(1)),
    Refused("`numpy.random.RandomState`", lambda: np.random.RandomState(1)),
    Refused("`memoryview`", lambda: memoryview(b"abc")),
    Refused("`array.array`", lambda: array.array("d", [1.0])),
    Refused("`io.StringIO` and other files", lambda: io.StringIO("abc")),
    Refused("`io.BytesIO` that is closed", _closed),
    Refused(
        "`datetime` with a `ZoneInfo`",
        lambda: dt.datetime(2026, 1, 1, tzinfo=zoneinfo.ZoneInfo("UTC")),
    ),
    Refused("dataclass with attributes beside its fields", lambda: _Cached(0.1)),
    Refused("subclass of `str` with attributes", _noted),
    Refused("subclass of `list`, `dict` or `set`", _Own),
    Refused("`UserDict`, `MappingProxyType` inside a value", lambda: (UserDict(a=1),)),
    Refused("other mappings inside a value", lambda: (MappingProxyType({"a": 1}),)),
    Refused("set or keys that are distinct only by their class", lambda: {Colour.RED, 1}),
    Refused(
        "sharded, sparse, meta or other special tensor inside a value",
        lambda: deque([torch.ones(2, device="meta")]),
    ),
    Refused("numpy array of objects", lambda: np.array([object()])),
    Refused("numpy array of several fields", lambda: np.zeros(1, "i4,f4")),
]
