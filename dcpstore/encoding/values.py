"""Plain Python values as typed JSON text, and back with their exact types.

What JSON can express is written plainly, so that SQL finds 0.001; anything else is an object of one
key that begins with "$", such as {"$tuple": [1, 2]}. Decoding builds plain values and runs no code:
text that this module did not write raises `CorruptionError`, and a pickle is read only if the
caller allows it.
"""

from __future__ import annotations

import json
import pickle
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, NoReturn

import torch

from dcpstore.encoding.objects import OWN_TAGS, TemplateClasses, class_name, take_apart
from dcpstore.encoding.scalars import (
    ARRAYS,
    NotPlainError,
    PlannerBytes,
    decode_scalar,
    encode_scalar,
    is_plain_json,
)
from dcpstore.errors import CorruptionError, DcpstoreError, InvalidInputError, UnsafeDataError

__all__ = [
    "JSON_BLOB",
    "EncodedValue",
    "PlannerBytes",
    "check_safe",
    "decode_value",
    "depends_on_template",
    "encode_value",
]

_LONGEST = 64 * 1024  # bytes of typed JSON that a catalog keeps as text
_DEEPEST = 100  # levels of containers
JSON_BLOB, _PICKLE_BLOB = '{"$blob":"json"}', '{"$blob":"pickle"}'


def _size(items: Iterable[Any]) -> torch.Size:
    """Return a torch.Size; torch accepts integers over 64 bits, but then cannot read them."""
    found = torch.Size(items)
    if any(not -(2**63) <= n < 2**63 for n in found):
        raise ValueError("a size past 64 bits")
    return found


# Containers of items and of pairs; a plain list, and a dict whose keys are plain text, need no tag.
_ITEMS: dict[str, Callable[[Iterable[Any]], object]] = {
    "$tuple": tuple,
    "$size": _size,
    "$set": set,
    "$frozenset": frozenset,
}
_PAIRS: dict[str, Callable[[Iterable[Any]], object]] = {
    "$dict": dict,
    "$ordered_dict": OrderedDict,
}
_ITEM_TAGS: dict[type, str] = {
    tuple: "$tuple",
    torch.Size: "$size",
    set: "$set",
    frozenset: "$frozenset",
}


class _Container(NamedTuple):
    """How a less common container becomes a list or dict (`open`), and is made of it (`close`).

    `close` takes any decoded JSON, and raises TypeError, ValueError or LookupError for what `open`
    never returns. It gets the classes of the template too.
    """

    tag: str
    open: Callable[[Any], object]
    close: Callable[[Any, TemplateClasses], object]


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


# The factories of a defaultdict that are found by name: none of them runs a program's code.
_FACTORIES: dict[str, Callable[[], object]] = {
    kind.__name__: kind
    for kind in (bool, bytes, complex, dict, float, int, list, set, str, tuple, deque, Counter)
}


def _open_defaultdict(obj: defaultdict[Any, Any]) -> object:
    """Return the factory's name and the items; the name is in a list if a template must give it."""
    factory: Any = obj.default_factory
    name = getattr(factory, "__name__", "")
    if factory is not None and _FACTORIES.get(name) is not factory:
        return [[class_name(factory)], dict(obj)]
    return [name or None, dict(obj)]


def _close_defaultdict(payload: Any, classes: TemplateClasses) -> object:
    name, items = payload
    if not isinstance(items, dict):
        raise TypeError(f"a defaultdict of a {type(items).__name__}")
    if name is None or isinstance(name, str):
        return defaultdict(None if name is None else _FACTORIES[name], items)
    (named,) = name
    factory = classes.factory(named)
    return items if factory is None else defaultdict(factory, items)


def _namespace(kind: type, tag: str) -> _Container:
    def close(payload: Any, classes: TemplateClasses) -> object:
        if not isinstance(payload, dict) or not all(type(name) is str for name in payload):
            raise TypeError("a namespace whose names are not all text")
        made: object = kind()
        vars(made).update(payload)
        return made

    return _Container(tag, lambda obj: dict(vars(obj)), close)


_CONTAINERS: dict[type, _Container] = {
    deque: _Container("$deque", lambda obj: [obj.maxlen, list(obj)], _close_deque),
    slice: _Container("$slice", lambda obj: [obj.start, obj.stop, obj.step], _close_slice),
    Counter: _Container("$counter", dict, _close_counter),
    defaultdict: _Container("$defaultdict", _open_defaultdict, _close_defaultdict),
    Namespace: _namespace(Namespace, "$namespace"),
    SimpleNamespace: _namespace(SimpleNamespace, "$simple_namespace"),
}
_CONTAINERS_BY_TAG = {container.tag: container for container in _CONTAINERS.values()}


class _HeldTensorError(NotPlainError):
    """A tensor inside a value, of a kind that is not stored as plain bytes."""


@dataclass(frozen=True, slots=True)
class EncodedValue:
    """A value for the catalog: its JSON `text`, or a blob's bytes with their format as `text`."""

    kind: Literal["value", "blob"]
    text: str
    data: bytes | None = None


def encode_value(obj: object, *, allow_pickle: bool) -> EncodedValue:
    """Return a value as typed JSON, or as a blob if that is long or the value needs pickle.

    What is plain is listed in docs/values.md. A subclass does not count as its base class. An
    object of a program's own class is plain if it holds only its fields, or only a plain value.

    Raises:
        UnsafeDataError: the value is not plain, and `allow_pickle` is false.
        InvalidInputError: it contains itself, is nested too deep, or does not pickle.
    """
    try:
        text = _dump(_encode(obj, ()))
    except NotPlainError as error:
        if not allow_pickle:
            raise UnsafeDataError(_not_plain(error, obj)) from None
        return EncodedValue("blob", _PICKLE_BLOB, _pickled(obj))
    data = text.encode()
    if len(data) > _LONGEST:
        return EncodedValue("blob", JSON_BLOB, data)
    return EncodedValue("value", text)


def decode_value(
    text: str, data: bytes | None = None, *, allow_pickle: bool, template: object = None
) -> object:
    """Return the value that `encode_value` encoded.

    Args:
        text: the text of the `EncodedValue`.
        data: the bytes of a blob.
        allow_pickle: unpickle a pickled blob, which runs whatever code it names.
        template: a value whose classes are used to make objects; without it, an object comes back
            as the plain values that it holds.

    Raises:
        UnsafeDataError: it is a pickle, and `allow_pickle` is false.
        MismatchError: an object is not of the class that the template holds.
        CorruptionError: `encode_value` never returns such a text.
        DcpstoreError: a pickle names what cannot be imported or built here.
    """
    if not allow_pickle:
        check_safe(text)
    if text == _PICKLE_BLOB:
        return _unpickled(data)
    try:
        source = _present(data).decode() if text == JSON_BLOB else text
        return _Decoder(template).decode(json.loads(source, parse_constant=_refuse), 0)
    # What json and constructors raise for broken text, wrong payloads and hostile nesting.
    except (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError) as error:
        raise CorruptionError(
            f"a value does not decode ({type(error).__name__}: {error}): {text[:80]!r}; run "
            "'dcpstore verify' to see which versions are damaged."
        ) from error


def depends_on_template(text: str) -> bool:
    """Tell whether the text of a value (not of a blob) holds objects of a program's classes.

    It searches for the tags only, so it may be True for plain text that contains one.
    """
    return any(tag in text for tag in OWN_TAGS)


def check_safe(text: str) -> None:
    """Check that the text of a value decodes without running code.

    Raises:
        UnsafeDataError: it is a pickle.
    """
    if text == _PICKLE_BLOB:
        raise UnsafeDataError(
            "a value is a pickle, which runs code when it is read; if you trust the author of the "
            "version, load with allow_pickle=True."
        )


def _encode(obj: Any, around: tuple[int, ...]) -> object:
    """Return JSON for a value; `around` are the ids of the containers that it is in."""
    kind = type(obj)
    tag = _ITEM_TAGS.get(kind)
    if tag is None and kind not in (list, dict, OrderedDict):
        return _encode_other(obj, around)
    inside = _entered(obj, around)
    if kind is dict and all(map(_is_plain_key, obj)):
        return {key: _encode(value, inside) for key, value in obj.items()}
    if kind in (dict, OrderedDict):
        pairs = [[_encode(key, inside), _encode(value, inside)] for key, value in obj.items()]
        _check_apart(obj, [key for key, _ in pairs])
        return {"$dict" if kind is dict else "$ordered_dict": pairs}
    items = [_encode(item, inside) for item in obj]
    if kind in (set, frozenset):
        _check_apart(obj, items)
        items.sort(key=_dump)  # equal sets give equal text, whatever order they iterate in
    return items if tag is None else {tag: items}


def _encode_other(obj: Any, around: tuple[int, ...]) -> object:
    """Return JSON for a value that is not a list, tuple, dict or set."""
    if is_plain_json(obj):
        return obj
    container = _CONTAINERS.get(type(obj))
    if container is not None:
        return {container.tag: _encode(container.open(obj), _entered(obj, around))}
    if around and isinstance(obj, torch.Tensor):
        try:
            return {"$tensor": ARRAYS["$tensor"].encode(obj)}
        except NotPlainError as error:
            raise _HeldTensorError(str(error)) from error
    try:
        return encode_scalar(obj)
    except NotPlainError:
        apart = take_apart(obj)
        if apart is None:
            raise
    inside = _entered(obj, around)
    return {apart.tag: [encode_scalar(apart.name), _encode(apart.parts, inside)]}


def _entered(obj: object, around: tuple[int, ...]) -> tuple[int, ...]:
    """Return `around` and the id of this container: the containers that its items are in.

    Raises:
        InvalidInputError: it contains itself, or is nested too deep.
    """
    if id(obj) in around:
        raise InvalidInputError(
            f"a {type(obj).__name__} contains itself and cannot be stored; break the loop."
        )
    if len(around) >= _DEEPEST:
        raise InvalidInputError(
            f"a value is nested deeper than {_DEEPEST} containers; flatten it before saving."
        )
    return (*around, id(obj))


def _check_apart(obj: object, nodes: list[Any]) -> None:
    """Check that keys, or members of a set, still differ when they come back as plain values."""
    if not any(depends_on_template(_dump(node)) for node in nodes):
        return
    try:
        count = len({_Decoder(None).decode(node, 0) for node in nodes})
    except TypeError:  # a dataclass comes back as a dict, which cannot be a key
        count = 0
    if count < len(nodes):
        raise NotPlainError(
            f"{type(obj).__name__} whose keys or members would not stay distinct and hashable as "
            "plain values"
        )


class _Decoder:
    """Builds values from JSON; objects get the classes of the template, if there is one."""

    def __init__(self, template: object) -> None:
        self._template = template
        self._found: TemplateClasses | None = None

    def decode(self, node: Any, depth: int) -> object:
        if not isinstance(node, list | dict):
            return node
        if depth > _DEEPEST:
            raise ValueError(f"nested deeper than {_DEEPEST}")
        if isinstance(node, list):
            return [self.decode(item, depth + 1) for item in node]
        if not any(key.startswith("$") for key in node):
            return {key: self.decode(value, depth + 1) for key, value in node.items()}
        ((tag, payload),) = node.items()
        return self._tagged(tag, payload, depth)

    def _tagged(self, tag: str, payload: Any, depth: int) -> object:
        if tag in _ITEMS or tag in _PAIRS:
            return self._collected(tag, payload, depth)
        if container := _CONTAINERS_BY_TAG.get(tag):
            return container.close(self.decode(payload, depth + 1), self._classes)
        if tag in OWN_TAGS:
            name, parts = payload
            return self._classes.put_together(tag, name, self.decode(parts, depth + 1))
        found = decode_scalar(tag, payload)
        return self._placed(found) if isinstance(found, torch.Tensor) else found

    def _collected(self, tag: str, payload: Any, depth: int) -> object:
        if not isinstance(payload, list):
            raise TypeError(f"{tag} of {type(payload).__name__}")
        if tag in _ITEMS:
            return _ITEMS[tag](self.decode(item, depth + 1) for item in payload)
        return _PAIRS[tag](
            (self.decode(key, depth + 1), self.decode(value, depth + 1)) for key, value in payload
        )

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor on the device of the template's tensors, if that is one device."""
        device = self._classes.device
        if device is None or device == tensor.device:
            return tensor
        moved = tensor.detach().to(device)
        if isinstance(tensor, torch.nn.Parameter):
            return torch.nn.Parameter(moved, requires_grad=tensor.requires_grad)
        return moved.requires_grad_(tensor.requires_grad)

    @property
    def _classes(self) -> TemplateClasses:
        """The classes of the template, which is searched once, when the first one is needed."""
        if self._found is None:
            self._found = TemplateClasses(self._template)
        return self._found


def _is_plain_key(key: object) -> bool:
    return type(key) is str and not key.startswith("$") and is_plain_json(key)


def _not_plain(error: NotPlainError, obj: object) -> str:
    """Return the message for a value `obj` that holds something that is not plain data."""
    advice = error.advice or "convert it to tensors, numbers, text, lists or dicts"
    what = f"a value of type {error} is not plain data"
    if isinstance(error, _HeldTensorError):
        what = f"a {error} is inside a value, such as a set or deque,"
        advice = "keep tensors in lists, tuples and dicts only, where each is saved by itself"
    if _pickles(obj):
        return f"{what} and would need pickle; {advice}, or save with allow_pickle=True."
    return f"{what} and cannot be pickled; {advice}, or leave it out of the state."


class _Nowhere:
    """A file that keeps nothing, so that a large value is not in memory a second time."""

    def write(self, data: bytes | memoryview) -> int:
        return len(data)


def _pickles(obj: object) -> bool:
    """Tell whether a value can be pickled, so that `allow_pickle` would help."""
    try:
        pickle.Pickler(_Nowhere(), protocol=4).dump(obj)
    except Exception:  # whatever the object's own hooks raise
        return False
    return True


def _dump(node: object) -> str:
    return json.dumps(node, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _present(data: bytes | None) -> bytes:
    if data is None:
        raise ValueError("the bytes of a blob are missing")
    return data


def _pickled(obj: object) -> bytes:
    try:
        return pickle.dumps(obj, protocol=4)
    except Exception as error:  # whatever the object's own hooks raise
        raise InvalidInputError(
            f"a value of type {type(obj).__qualname__} does not pickle ({error}); leave it out of "
            "the state, or give it a state_dict."
        ) from error


def _unpickled(data: bytes | None) -> object:
    if data is None:
        raise CorruptionError("the bytes of a pickled value are missing; run 'dcpstore verify'.")
    try:
        value: object = pickle.loads(data)
        return value
    except (pickle.UnpicklingError, EOFError) as error:
        raise CorruptionError(
            f"a pickled value of {len(data)} bytes is damaged ({error}); run 'dcpstore verify'."
        ) from error
    except Exception as error:  # whatever the named code raises
        raise DcpstoreError(
            f"a pickled value cannot be built here ({type(error).__name__}: {error}); make what it "
            "names importable, in the version that wrote it."
        ) from error
