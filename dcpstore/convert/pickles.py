"""Pickles of torch, built from a closed list: what one names is never imported or called.

Where a pickle names anything else, an `Odd` takes its place, so that the tensors around it can be
read, and the FQN of what cannot be read is known.

Invariant: only the classes and functions listed here are called, on arguments that were checked:
none of them runs code or allocates more than the pickle is long. (Storages are checked in
`torch_archive`.)
"""

from __future__ import annotations

import _compat_pickle
import collections
import datetime
import decimal
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any, ClassVar

import numpy as np
import torch

from dcpstore.compat.torch_private import allowed_globals, globals_allowed_by_user
from dcpstore.errors import UnsafeDataError

__all__ = ["Odd", "PlainUnpickler", "Unpickler", "odd_inside"]

# What a pickle holds may be anything: hence `Any` in this module.

# As in values: without long double, text and records.
_PLAIN_DTYPE = re.compile(r"[<>|=]?(?:b1|\?|[iu][1248]|f[248]|c8|c16|[mM]8)")
_MOST_DIMS = 64  # numpy's limit
# Opcodes that call or extend what they find, or allocate by the number that they name.
_LEFT_OUT = (
    b"i"  # INST
    b"o"  # OBJ
    b"P"  # PERSID, of text
    b"\x82\x83\x84"  # EXT1, EXT2, EXT4
    b"\x92"  # NEWOBJ_EX
    b"\x96\x97\x98"  # BYTEARRAY8, NEXT_BUFFER, READONLY_BUFFER
)


@dataclass(frozen=True, slots=True)
class Odd:
    """The placeholder of an object that only code could build; `name` is its class."""

    name: str


class Unpickler(pickle._Unpickler):
    """Builds what `known` returns for a name, and calls nothing else.

    It is the one in Python, since the one in C allocates what an opcode asks for: ten bytes of
    pickle can take gigabytes.
    """

    stack: list[Any]
    memo: dict[int, Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Any]] = {
        opcode: load
        for opcode, load in pickle._Unpickler.dispatch.items()
        if opcode not in _LEFT_OUT
    }

    def __init__(self, file: Any, **options: Any) -> None:
        super().__init__(file, **options)
        self._callable: set[int] = set()  # by id: what `known` returned, none of which is freed

    def known(self, module: str, name: str) -> Any:
        """Return what a name stands for: a class, a function, or a value."""
        raise NotImplementedError

    def may_call(self, found: Any) -> bool:
        """Return whether the pickle may call this class or function, and not only name it."""
        return True

    def may_build(self, inst: Any) -> bool:
        """Return whether the pickle may set the state of this object."""
        raise NotImplementedError

    def find_class(self, module: str, name: str) -> Any:
        found = self.known(module, name)
        if callable(found) and self.may_call(found):
            self._callable.add(id(found))
        return found

    def _load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments)

    def _load_newobj(self) -> None:
        arguments = self.stack.pop()
        kind = self.stack.pop()
        self.append(self._call(kind, arguments, is_new=True))

    def _call(self, called: Any, arguments: Any, *, is_new: bool = False) -> Any:
        if isinstance(called, Odd):
            return called
        if id(called) not in self._callable or not isinstance(arguments, tuple):
            raise UnsafeDataError(f"it calls {called!r}"[:200])
        odd = None if called in _TAKES_ODD else next(filter(None, map(_odd, arguments)), None)
        if odd is not None:
            return odd
        if is_new and isinstance(called, type):
            return called.__new__(called, *arguments)
        return called(*arguments)

    def _load_build(self) -> None:
        inst = self.stack[-2]
        if isinstance(inst, Odd):
            self.stack.pop()
        elif self.may_build(inst):
            self._set_state(inst)
        else:
            raise UnsafeDataError(f"it sets the state of a {type(inst).__name__}")

    def _set_state(self, inst: Any) -> None:
        super().load_build()  # type: ignore[misc]  # the stubs lack it

    def _load_setitems(self) -> None:
        items = self.pop_mark()
        self._set_items(items)

    def _load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Odd):
            return
        if type(target) not in (dict, collections.OrderedDict, collections.Counter):
            raise UnsafeDataError(f"it sets items of a {type(target).__name__}")
        target.update(zip(items[::2], items[1::2], strict=True))

    def _load_append(self) -> None:
        self._append_all([self.stack.pop()])

    def _load_appends(self) -> None:
        self._append_all(self.pop_mark())

    def _append_all(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Odd):
            return
        if type(target) not in (list, collections.deque):
            raise UnsafeDataError(f"it appends to a {type(target).__name__}")
        target.extend(items)

    def _load_additems(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is not set:
            raise UnsafeDataError(f"it adds to a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(items)

    dispatch[pickle.REDUCE[0]] = _load_reduce
    dispatch[pickle.NEWOBJ[0]] = _load_newobj
    dispatch[pickle.BUILD[0]] = _load_build
    dispatch[pickle.SETITEM[0]] = _load_setitem
    dispatch[pickle.SETITEMS[0]] = _load_setitems
    dispatch[pickle.APPEND[0]] = _load_append
    dispatch[pickle.APPENDS[0]] = _load_appends
    dispatch[pickle.ADDITEMS[0]] = _load_additems


class PlainUnpickler(Unpickler):
    """Builds tensors and plain values, and an `Odd` for everything else."""

    def known(self, module: str, name: str) -> Any:
        """Return what a name stands for; names of old pickles too."""
        if (module, name) in _compat_pickle.NAME_MAPPING:
            module, name = _compat_pickle.NAME_MAPPING[module, name]
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        full = f"{module}.{name}"
        if full in _PLAIN:
            return _PLAIN[full]
        found = allowed_globals().get(full)
        if found is not None:
            return found
        return globals_allowed_by_user().get(full, Odd(full))

    def may_call(self, found: Any) -> bool:
        """Return whether the pickle may call this class or function, and not only name it.

        Tensors and storages take a number for the size of what they allocate.
        """
        return (
            isinstance(found, FunctionType)
            or any(found is kind for kind in _CALLED)
            or any(found is kind for kind in globals_allowed_by_user().values())
        )

    def may_build(self, inst: Any) -> bool:
        """Return whether the pickle may set the state of this object."""
        kinds = (torch.nn.Parameter, collections.OrderedDict, np.ndarray)
        return (
            type(inst) in kinds
            or isinstance(inst, np.dtype)
            or type(inst) in globals_allowed_by_user().values()
        )

    def _set_state(self, inst: Any) -> None:
        if not isinstance(inst, np.ndarray | np.dtype):
            super()._set_state(inst)
            return
        state = self.stack.pop()
        if isinstance(inst, np.dtype):
            _check_dtype_state(state)
            inst.__setstate__(state)  # type: ignore[attr-defined]  # the stubs lack it
            return
        _, shape, dtype, is_fortran, data = state
        if isinstance(dtype, Odd):  # of objects, or of records
            self.stack[-1] = dtype
            self.memo.update({at: dtype for at, held in self.memo.items() if held is inst})
            return
        _check_extent(shape, dtype, data)
        whole: Any = (1, shape, dtype, bool(is_fortran), data)
        inst.__setstate__(whole)


def odd_inside(value: object) -> Odd | None:
    """Return an `Odd` that a value is or holds, if there is one."""
    waiting, seen = [value], set()
    while waiting:
        found = waiting.pop()
        if isinstance(found, Odd):
            return found
        if id(found) in seen:
            continue
        if isinstance(found, Mapping):
            waiting.extend((*found.keys(), *found.values()))
        elif isinstance(found, list | tuple | set | frozenset | collections.deque):
            waiting.extend(found)
        else:
            continue
        seen.add(id(found))
    return None


def _odd(argument: object) -> Odd | None:
    """Return an `Odd` among the arguments of a call, one level deep: a type, or a dtype."""
    if isinstance(argument, tuple):
        return next((inner for inner in argument if isinstance(inner, Odd)), None)
    return argument if isinstance(argument, Odd) else None


def _encode(text: str, encoding: str) -> bytes:
    """Return bytes, as old protocols write them."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError(f"bytes in {encoding!r:.20}")
    return text.encode("latin1")


def _bytearray(*given: Any) -> bytearray:
    if given and type(given[0]) is bytes and len(given) == 1:
        return bytearray(given[0])
    if given:
        return bytearray(_encode(*given))
    return bytearray()


def _default_dict(*factory: object) -> dict[Any, Any]:
    """Return a plain dict; the factory for missing keys is code."""
    return {}


def _items(kind: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that makes a `kind` of the items of a list, if any are given."""

    def make(*given: Any) -> Any:
        if any(not isinstance(one, list | tuple | dict | None) for one in given):
            raise TypeError(f"{kind.__name__} whose items are not a list or dict")
        return kind(*given)

    return make


def _deque(items: Any = (), most: int | None = None) -> collections.deque[Any]:
    if not isinstance(items, list | tuple) or not isinstance(most, int | None):
        raise TypeError("a deque whose items are not a list")
    return collections.deque(items, most)


def _of(kind: Callable[..., Any], *allowed: type) -> Callable[..., Any]:
    """Return a function that calls `kind` on arguments of these types alone."""

    def make(*given: Any) -> Any:
        if any(type(one) not in allowed for one in given):
            raise TypeError(f"{getattr(kind, '__name__', kind)} of something else")
        return kind(*given)

    return make


def _dtype(code: Any, align: object = False, copy: object = True) -> Any:
    """Return a new dtype, whose state may be set; an `Odd` where it is not plain."""
    if type(code) is not str or not _PLAIN_DTYPE.fullmatch(code):
        return Odd(f"numpy.dtype {code!r:.40}")
    return np.dtype(code, copy=True)


def _check_dtype_state(state: Any) -> None:
    """Check that a state holds only a byte order, and a unit of time."""
    version, order, *inside = state[:5]
    if version not in (3, 4) or order not in ("<", ">", "|", "=") or inside != [None] * 3:
        raise ValueError("a dtype whose state is not plain")
    if state[5:8] not in ((-1, -1, 0), (8, 8, 0)):
        raise ValueError("a dtype with another size")
    if len(state) == 9:
        empty, (unit, count, *more) = state[8]
        is_plain = type(unit) is bytes and re.fullmatch(rb"[A-Za-z]{1,10}", unit)
        if empty not in ({}, None) or not is_plain or type(count) is not int or count < 1:
            raise ValueError("a dtype with an invalid unit")
        if any(type(one) is not int for one in more):
            raise ValueError("a dtype with an invalid unit")
    elif len(state) != 8:
        raise ValueError("a dtype with a longer state")


def _scalar(dtype: Any, data: Any = b"") -> Any:
    if not isinstance(dtype, np.dtype) or type(data) is not bytes or len(data) != dtype.itemsize:
        raise ValueError("a scalar whose length differs from its dtype's")
    return np.frombuffer(data, dtype)[0]


def _array(kind: Any, shape: Any, code: Any) -> Any:
    """Return an array that is empty until its state is set."""
    if kind is not _ARRAY or shape != (0,):
        raise ValueError("an array of another class")
    return np.empty(0, np.int8)


def _buffered(data: Any, dtype: Any, shape: Any, order: Any) -> Any:
    """Return an array of protocol 5, whose bytes came with it."""
    _check_extent(shape, dtype, bytes(data) if isinstance(data, bytes | bytearray) else data)
    if order not in ("C", "F"):
        raise ValueError("an array of another order")
    return np.frombuffer(data, dtype).reshape(shape, order=order)


def _check_extent(shape: Any, dtype: Any, data: Any) -> None:
    if not isinstance(dtype, np.dtype) or type(data) is not bytes or type(shape) is not tuple:
        raise ValueError("an array of invalid parts")
    if len(shape) > _MOST_DIMS or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError("an array without a valid shape")
    count = 1
    for n in shape:
        count *= n
    if count * dtype.itemsize != len(data):
        raise ValueError("an array with more or fewer bytes than its shape needs")


_ARRAY = ("the class of arrays",)
_PLAIN: dict[str, Any] = {
    "_codecs.encode": _encode,
    "builtins.bytearray": _bytearray,
    "builtins.bytes": _of(bytes),  # without arguments: as old protocols write none
    "builtins.complex": _of(complex, float),
    "builtins.frozenset": _items(frozenset),
    "builtins.range": _of(range, int),
    "builtins.set": _items(set),
    "collections.Counter": _items(collections.Counter),
    "collections.OrderedDict": collections.OrderedDict,
    "collections.defaultdict": _default_dict,
    "collections.deque": _deque,
    "datetime.date": _of(datetime.date, bytes),
    "datetime.datetime": _of(datetime.datetime, bytes, datetime.timezone),
    "datetime.timedelta": _of(datetime.timedelta, int),
    "datetime.timezone": _of(datetime.timezone, datetime.timedelta, str),
    "decimal.Decimal": _of(decimal.Decimal, str),
    "numpy.dtype": _dtype,
    "numpy.ndarray": _ARRAY,
    **{
        f"numpy.{core}.{function}": build
        for core in ("core", "_core")
        for function, build in (
            ("multiarray._reconstruct", _array),
            ("multiarray.scalar", _scalar),
            ("numeric._frombuffer", _buffered),
        )
    },
}
_CALLED = (collections.OrderedDict, torch.Size, torch.device, torch.nn.Parameter)
_TAKES_ODD = (_default_dict,)
