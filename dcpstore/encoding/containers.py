"""Python's smaller containers: opened into a list or dict of their contents, and closed again.

The contents are encoded like any other value, and so is the list or dict. Closing takes any decoded
JSON and raises TypeError, ValueError or LookupError for what opening never produces.
"""

from __future__ import annotations

from argparse import Namespace
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from dcpstore.encoding.objects import TemplateClasses, class_name

__all__ = ["CONTAINER_TAGS", "close_container", "open_container"]

_FACTORIES: dict[str, Callable[[], object]] = {
    kind.__name__: kind
    for kind in (bool, bytes, complex, dict, float, int, list, set, str, tuple, deque, Counter)
}


def open_container(obj: Any) -> tuple[str, object] | None:
    """Return the tag of a container and all that it holds; None for any other value."""
    found = _OPENED.get(type(obj))
    return None if found is None else (found[0], found[1](obj))


def close_container(tag: str, payload: Any, classes: TemplateClasses) -> object:
    """Return the container that was opened."""
    return _CLOSED[tag](payload, classes)


def _factory_name(factory: Any) -> object:
    """Return what is stored of a factory: its name, in a list where only a template has it."""
    if factory is None:
        return None
    name = getattr(factory, "__name__", "")
    return name if _FACTORIES.get(name) is factory else [class_name(factory)]


def _close_deque(payload: Any, classes: TemplateClasses) -> object:
    maxlen, items = payload
    if not isinstance(items, list) or (maxlen is not None and type(maxlen) is not int):
        raise TypeError("a deque is its maximal length and a list")
    if maxlen is not None and maxlen < len(items):
        raise ValueError(f"a deque of {len(items)} items holds {maxlen} at most")
    return deque(items, maxlen)


def _close_slice(payload: Any, classes: TemplateClasses) -> object:
    start, stop, step = payload
    return slice(start, stop, step)


def _close_counter(payload: Any, classes: TemplateClasses) -> object:
    if not isinstance(payload, dict):
        raise TypeError(f"a Counter of a {type(payload).__name__}")
    return Counter(payload)


def _close_defaultdict(payload: Any, classes: TemplateClasses) -> object:
    name, items = payload
    if not isinstance(items, dict):
        raise TypeError(f"a defaultdict of a {type(items).__name__}")
    if name is None or isinstance(name, str):
        return defaultdict(None if name is None else _FACTORIES[name], items)
    (named,) = name
    factory = classes.factory(named)
    return items if factory is None else defaultdict(factory, items)


def _close_namespace(kind: type) -> Callable[[Any, TemplateClasses], object]:
    def close(payload: Any, classes: TemplateClasses) -> object:
        if not isinstance(payload, dict) or not all(type(name) is str for name in payload):
            raise TypeError("a namespace of other things than names")
        made: object = kind()
        vars(made).update(payload)
        return made

    return close


_CLOSED: dict[str, Callable[[Any, TemplateClasses], object]] = {
    "$deque": _close_deque,
    "$slice": _close_slice,
    "$counter": _close_counter,
    "$defaultdict": _close_defaultdict,
    "$namespace": _close_namespace(Namespace),
    "$simple_namespace": _close_namespace(SimpleNamespace),
}


_OPENED: dict[type, tuple[str, Callable[[Any], object]]] = {
    deque: ("$deque", lambda obj: [obj.maxlen, list(obj)]),
    slice: ("$slice", lambda obj: [obj.start, obj.stop, obj.step]),
    Counter: ("$counter", dict),
    defaultdict: ("$defaultdict", lambda obj: [_factory_name(obj.default_factory), dict(obj)]),
    Namespace: ("$namespace", lambda obj: dict(vars(obj))),
    SimpleNamespace: ("$simple_namespace", lambda obj: dict(vars(obj))),
}


CONTAINER_TAGS = frozenset(_CLOSED)
