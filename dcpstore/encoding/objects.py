"""Objects of a program's own classes as plain values, and back.

Enum members, dataclasses, named tuples, and subclasses of str, int, float and bytes are kept. The
name of the class is stored with the parts as text: it is never looked up or imported. Invariant:
an object is only made in a class that the template of a load holds, by the layout of that class,
and no `__init__` of it runs; without such a template the parts come back as they are.
"""

from __future__ import annotations

import dataclasses
import enum
from argparse import Namespace
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MemberDescriptorType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from dcpstore.encoding.scalars import NotPlainError
from dcpstore.errors import MismatchError

__all__ = [
    "OWN_TAGS",
    "Apart",
    "TemplateClasses",
    "class_name",
    "objects_in",
    "take_apart",
]

# Any object or container on one side, decoded JSON of any shape on the other: hence `Any`.

_ENUM, _DATACLASS, _NAMED_TUPLE, _SUBCLASS = "$enum", "$dataclass", "$namedtuple", "$subclass"
OWN_TAGS = (_ENUM, _DATACLASS, _NAMED_TUPLE, _SUBCLASS)
_BASES: dict[type, Callable[[Any], object]] = {
    # a type that programs make subclasses of, and what gives the plain value of one
    str: str.__str__,
    int: int.__int__,
    float: float.__float__,
    bytes: lambda obj: bytes(memoryview(obj)),
}


class Apart(NamedTuple):
    """An object taken apart: by tag, the name of its class, and its fields or its plain value."""

    tag: str
    name: str
    parts: object


def take_apart(obj: Any) -> Apart | None:
    """Return the parts of an object of a program's own class; None where it is of another kind.

    Raises:
        NotPlainError: its parts are not all that it is.
    """
    kind = type(obj)
    name = class_name(kind)
    if isinstance(obj, enum.Enum):  # first: a member may be an int or a str as well
        _check_found(obj, name)
        return Apart(_ENUM, name, obj.value)
    if _is_named_tuple(kind):
        _check_whole(obj, name, (), lambda: tuple.__new__(kind, obj))
        return Apart(_NAMED_TUPLE, name, dict(zip(kind._fields, obj, strict=True)))
    if dataclasses.is_dataclass(kind):
        fields = [field.name for field in dataclasses.fields(kind)]
        _check_whole(obj, name, fields, lambda: object.__new__(kind))
        missing = [field for field in fields if not hasattr(obj, field)]
        if missing:
            raise NotPlainError(f"{name} whose field {missing[0]!r} is not set")
        return Apart(_DATACLASS, name, {field: getattr(obj, field) for field in fields})
    for base, plain in _BASES.items():
        if isinstance(obj, base):
            value = plain(obj)
            _check_whole(obj, name, (), lambda: base.__new__(kind, value))  # noqa: B023
            return Apart(_SUBCLASS, name, value)
    return None


def class_name(kind: Any) -> str:
    """Return the name under which a class, or a function, is stored."""
    named = kind if hasattr(kind, "__qualname__") else type(kind)
    return f"{named.__module__}.{named.__qualname__}"


class TemplateClasses:
    """The classes of the objects in a template, and the device of its tensors.

    Args:
        template: the value that the state has where the stored one belongs, of any type.
    """

    def __init__(self, template: object) -> None:
        self._classes: dict[str, dict[type, None]] = {tag: {} for tag in OWN_TAGS}
        self._factories: dict[Any, None] = {}
        devices: dict[torch.device, None] = {}
        for obj in objects_in(template):
            tag = _tag_of(obj)
            if tag is not None:
                self._classes[tag][type(obj)] = None
            elif type(obj) is defaultdict:
                self._factories[obj.default_factory] = None
            elif isinstance(obj, torch.Tensor) and not obj.is_meta:
                devices[obj.device] = None
        self.device = next(iter(devices)) if len(devices) == 1 else None

    def put_together(self, tag: str, name: str, parts: Any) -> object:
        """Return an object of the class that the template has for it; else its plain parts.

        Raises:
            MismatchError: the template holds such an object of another class, or of other fields.
            TypeError: the parts are not what `take_apart` gives.
        """
        _check_parts(tag, name, parts)
        kind = self._chosen(tag, name, parts)
        if kind is None:
            return tuple(parts.values()) if tag == _NAMED_TUPLE else parts
        try:
            return _MAKERS[tag](kind, parts)
        except Exception as error:  # whatever an enum's own lookup, or a field's setter, raises
            raise _mismatch(
                f"{_shown(tag, name, parts)}, which {class_name(kind)} in the state "
                f"cannot hold ({type(error).__name__}: {error})"
            ) from error

    def factory(self, name: str) -> Any:
        """Return the factory of a defaultdict in the template that has this name, or is the one."""
        named = [one for one in self._factories if class_name(one) == name]
        found = named or [*self._factories]
        return found[0] if len(found) == 1 else None

    def _chosen(self, tag: str, name: str, parts: Any) -> type | None:
        """Return the template's class for an object: of its name, or the only one of its fields."""
        has_fields = tag in (_DATACLASS, _NAMED_TUPLE)
        held = [*self._classes[tag]]
        if not held:
            return None
        named = [kind for kind in held if class_name(kind) == name]
        named = named or [kind for kind in held if name.endswith(f".{kind.__qualname__}")]
        fitting = [kind for kind in named or held if not has_fields or _has_fields(kind, parts)]
        if fitting and (named or (has_fields and len(fitting) == 1)):
            return fitting[0]
        others = ", ".join(_with_fields(kind) for kind in named or held)
        raise _mismatch(f"{_shown(tag, name, parts)} in the version, and the state has {others}")


def _check_parts(tag: str, name: object, parts: object) -> None:
    is_fit = type(name) is str
    if tag in (_DATACLASS, _NAMED_TUPLE):
        is_fit &= type(parts) is dict and all(type(field) is str for field in parts)
    elif tag == _SUBCLASS:
        is_fit &= type(parts) in _BASES
    if not is_fit:
        raise TypeError(f"{parts!r:.60} is not what a {tag} is made of")


def _mismatch(text: str) -> MismatchError:
    difference = f"is a {text}; have the same class there, or None to be given its plain value"
    return MismatchError(difference, [difference])


def _tag_of(obj: Any) -> str | None:
    kind = type(obj)
    if isinstance(obj, enum.Enum):
        return _ENUM
    if _is_named_tuple(kind):
        return _NAMED_TUPLE
    if dataclasses.is_dataclass(kind):
        return _DATACLASS
    is_plain = kind in _BASES or isinstance(obj, bool | np.generic)
    if isinstance(obj, tuple(_BASES)) and not is_plain:
        return _SUBCLASS
    return None


def _is_named_tuple(kind: Any) -> bool:
    return issubclass(kind, tuple) and isinstance(getattr(kind, "_fields", None), tuple)


def _check_found(member: enum.Enum, name: str) -> None:
    """Check that the class of a member finds it by its value."""
    try:
        is_found = type(member)(member.value) is member
    except Exception:  # whatever the class's own lookup raises
        is_found = False
    if not is_found:
        raise NotPlainError(f"{name} that its own value {member.value!r:.60} does not name")


def _check_whole(obj: object, name: str, fields: Iterable[str], make: Callable[[], object]) -> None:
    """Check that an object holds only its fields, and that `make` can build such an object."""
    others = sorted(_attributes(obj) - set(fields))
    if others:
        raise NotPlainError(
            f"{name} with attributes that are not fields ({', '.join(others)[:200]})",
            "make them fields, or remove them",
        )
    try:
        make()
    except TypeError as error:
        raise NotPlainError(f"{name}, which keeps more than its fields") from error


def _attributes(obj: object) -> set[str]:
    """Return the names of what an object holds, in its dict and in its slots."""
    names = set(getattr(obj, "__dict__", ()))
    for base in type(obj).__mro__:
        for name, member in vars(base).items():
            if isinstance(member, MemberDescriptorType) and hasattr(obj, member.__name__):
                names.add(name)
    return names


def objects_in(value: object) -> Iterator[Any]:
    """Yield a value and everything in it, at any depth, each object once."""
    pending: list[object] = [value]
    seen: dict[int, object] = {}  # the objects too, so that no other gets the id of one
    while pending:
        obj = pending.pop()
        if id(obj) not in seen:
            seen[id(obj)] = obj
            yield obj
            pending += _inside(obj)


def _inside(obj: Any) -> Iterable[object]:
    if isinstance(obj, Mapping):
        return [*obj.keys(), *obj.values()]
    if isinstance(obj, list | tuple | set | frozenset | deque):
        return obj
    if isinstance(obj, Namespace | SimpleNamespace):
        return vars(obj).values()
    if isinstance(obj, enum.Enum):
        return [obj.value]
    if dataclasses.is_dataclass(type(obj)):
        return [getattr(obj, field.name, None) for field in dataclasses.fields(obj)]
    return ()


def _has_fields(kind: Any, parts: Mapping[str, object]) -> bool:
    if _is_named_tuple(kind):
        return bool(kind._fields == tuple(parts))
    return {field.name for field in dataclasses.fields(kind)} == set(parts)


def _with_fields(kind: Any) -> str:
    if _is_named_tuple(kind):
        return f"{class_name(kind)}({', '.join(kind._fields)})"
    if dataclasses.is_dataclass(kind):
        return f"{class_name(kind)}({', '.join(field.name for field in dataclasses.fields(kind))})"
    return class_name(kind)


def _shown(tag: str, name: str, parts: Any) -> str:
    if tag in (_DATACLASS, _NAMED_TUPLE):
        return f"{name}({', '.join(parts)})"
    return f"{name} of value {parts!r:.60}"


def _make_dataclass(kind: type, parts: Mapping[str, object]) -> object:
    made: object = object.__new__(kind)
    for field, value in parts.items():
        object.__setattr__(made, field, value)  # a frozen one too
    return made


def _make_subclass(kind: Any, value: object) -> object:
    base: Any = type(value)  # one of `_BASES`
    made: object = base.__new__(kind, value)
    return made


_MAKERS: dict[str, Callable[[Any, Any], object]] = {
    _ENUM: lambda kind, value: kind(value),
    _DATACLASS: _make_dataclass,
    _NAMED_TUPLE: lambda kind, parts: tuple.__new__(kind, parts.values()),
    _SUBCLASS: _make_subclass,
}
