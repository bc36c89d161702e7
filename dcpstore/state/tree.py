"""A nested state as flat items and back: the walk that every save and load shares, and its inverse.

FQNs and paths are those of torch's DCP wherever that keeps an item. In addition the walk keeps
empty containers as values of their own, opens tuples and dataclasses that hold tensors, and records
what torch forgets: types of keys, tuples, OrderedDicts, the order of keys. Invariant: items that
were walked come back equal from `nested_state`, or the walk refused them by name.
"""

from __future__ import annotations

import ast
import copy
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, MutableMapping, MutableSequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint.stateful import Stateful

from dcpstore.errors import CorruptionError, InvalidInputError
from dcpstore.records import ObjectPath, StatePath
from dcpstore.state.walk import (
    DEEPEST,
    PLAIN,
    SCALARS,
    is_container,
    is_data,
    items_in,
    nesting_checked,
    walk,
)

__all__ = [
    "FlatPaths",
    "FlatState",
    "Place",
    "flattened",
    "is_empty_container",
    "joined_path",
    "nested_state",
    "path_above",
    "path_below",
    "recorded_paths",
]

# What a part of a path is. A key is text, or a literal of Python such as 3, None or (1, 'a').
_TEXT, _LITERAL = ".", "v"  # in a dict; "." is a place in a list too
_ORDERED_TEXT, _ORDERED_LITERAL = "S", "V"  # in an OrderedDict
_IN_TUPLE = "t"
_MARK = re.compile(r"([.vSVt])(\d{0,9})")  # with the key's number in its dict, where that matters
_NUMBER = re.compile(r"\d")
_FLOATS = {text: float(text) for text in ("nan", "inf", "-inf")}  # which are no literals
_MOST_HOLES = 10_000  # places of a list that hold nothing; more is no list that anybody saved

# Values are of any type: hence `Any` in this module.


class FlatPaths(dict[str, ObjectPath]):
    """The paths of one rank's items by FQN, in torch's form, in the order of the state.

    Attributes:
        marks: of the children of each container that is not a dict of text keys or a list: one for
            all, or by part.
    """

    def __init__(self, paths: Mapping[str, ObjectPath] | Iterable[tuple[str, ObjectPath]] = ()):
        super().__init__(paths)
        self.marks: dict[ObjectPath, str | dict[str | int, str]] = {}

    def recorded(self, fqn: str) -> StatePath:
        """Return the path of an FQN, with what it leads through."""
        path = self[fqn]
        marks = ""
        for i, part in enumerate(path) if self.marks else ():
            mark = self.marks.get(path[:i], _TEXT)
            marks += mark if isinstance(mark, str) else mark.get(part, _TEXT)
        return StatePath(path, "" if marks == _TEXT * len(marks) else marks)


class Place:
    """Where an item stands in the state that was walked: its container, and its own key there."""

    __slots__ = ("container", "key")

    def __init__(self, container: Any, key: Any) -> None:
        self.container = container
        self.key = key

    @property
    def is_open(self) -> bool:
        """Whether the item can be replaced."""
        if isinstance(self.container, _Opened):
            return self.container.is_open
        return isinstance(self.container, MutableMapping | MutableSequence)

    @property
    def kind(self) -> str:
        """The name of the container's class."""
        found = self.container
        return type(found.value if isinstance(found, _Opened) else found).__name__

    def put(self, value: object) -> None:
        """Replace the item."""
        self.container[self.key] = value


class _Opened:
    """A tuple or dataclass that was walked; a new one takes its place as an item is replaced."""

    def __init__(self, value: Any, place: Place | None) -> None:
        self.value = value
        self._place = place

    @property
    def is_open(self) -> bool:
        """Whether its class makes a new one of other items, and that can take its place."""
        assert self._place is not None, "a state is a mapping"
        if not self._place.is_open:
            return False
        key, item = next(iter(items_in(self.value)))
        try:
            return type(_with_item(self.value, key, item)) is type(self.value)
        except Exception:  # whatever the constructor of a class of the caller's raises
            return False

    def __setitem__(self, key: Any, item: object) -> None:
        assert self._place is not None, "a state is a mapping"
        self.value = _with_item(self.value, key, item)
        self._place.put(self.value)


@dataclass(slots=True)
class FlatState:
    """A state as flat items.

    Attributes:
        items: by FQN, in the order of the state.
        paths: of the items.
        places: of the items in the state.
    """

    items: dict[str, Any] = field(default_factory=dict)
    paths: FlatPaths = field(default_factory=FlatPaths)
    places: dict[str, Place] = field(default_factory=dict)


def flattened(
    state: Mapping[Any, Any], *, is_leaf: Callable[[str], bool] | None = None
) -> FlatState:
    """Return the items of a nested state by FQN.

    Mappings, and lists that hold tensors or mappings, are opened, as torch does; tuples, named
    tuples and dataclasses where they hold tensors. An empty container is an item.

    Args:
        state: the state.
        is_leaf: of an FQN, whether a tuple or dataclass there is an item as a whole nevertheless.

    Raises:
        InvalidInputError: two items have the same FQN, or it is nested without end.
    """
    walk = _Walk(is_leaf)
    with nesting_checked():
        walk.open(state, (), "", None)
    return walk.flat


def is_empty_container(value: object) -> bool:
    """Tell whether a value is a mapping or list that holds nothing."""
    return isinstance(value, Mapping | list) and not value


def joined_path(above: ObjectPath, found: StatePath) -> ObjectPath:
    """Return the path of what has the path `found` in a state of one item that is at `above`."""
    if len(found) == 1:
        return above
    marks = above.marks if isinstance(above, StatePath) else ""
    below = found.marks[1:] or _TEXT * (len(found) - 1)
    return StatePath((*above, *found[1:]), (marks or _TEXT * len(above)) + below)


def path_below(path: ObjectPath, depth: int) -> ObjectPath:
    """Return what is left of a path below its first `depth` parts, with what it leads through."""
    if not isinstance(path, StatePath):
        return path[depth:]
    marks = "".join(mark + number for mark, number in _MARK.findall(path.marks)[depth:])
    return StatePath(path[depth:], marks)


def path_above(path: ObjectPath, depth: int) -> ObjectPath:
    """Return the first `depth` parts of a path, with what they lead through."""
    if not isinstance(path, StatePath):
        return path[:depth]
    marks = "".join(mark + number for mark, number in _MARK.findall(path.marks)[:depth])
    return StatePath(path[:depth], marks)


class _Walk:
    """One walk through a state."""

    def __init__(self, is_leaf: Callable[[str], bool] | None) -> None:
        self.flat = FlatState()
        self._is_leaf = is_leaf

    def open(self, value: Any, path: ObjectPath, fqn: str, place: Place | None) -> None:
        """Add all items of a container."""
        flat, prefix = self.flat, f"{fqn}." if path else ""
        container = value
        if isinstance(value, Mapping):
            _mark_keys(value, path, fqn, flat.paths)
        elif not isinstance(value, list):
            container = _Opened(value, place)
            if isinstance(value, tuple):
                flat.paths.marks[path] = _IN_TUPLE
        has_places = isinstance(value, list | tuple)
        for key, item in items_in(value):
            part = key if has_places else str(key)
            name, below, here = f"{prefix}{part}", (*path, part), Place(container, key)
            if self._opens(item, name):
                self.open(item, below, name, here)
                continue
            if name in flat.items:
                raise InvalidInputError(
                    f"two items of the state have the same FQN {name!r}: one at "
                    f"{list(flat.paths[name])}, one at {list(below)}; rename one of the keys."
                )
            flat.items[name] = _plain_empty(item) if isinstance(item, Mapping) else item
            flat.paths[name] = below
            flat.places[name] = here

    def _opens(self, item: object, name: str) -> bool:
        if type(item) in PLAIN or not _is_open(item):
            return False
        if self._is_leaf is None or isinstance(item, Mapping | list):
            return True
        return not self._is_leaf(name)


def _plain_empty(item: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Return an empty mapping as it is stored, whatever its class."""
    return OrderedDict() if isinstance(item, OrderedDict) else {}


def _mark_keys(value: Mapping[Any, Any], path: ObjectPath, fqn: str, paths: FlatPaths) -> None:
    """Record what a mapping is, and of which types its keys are."""
    text, literal = (
        (_ORDERED_TEXT, _ORDERED_LITERAL) if isinstance(value, OrderedDict) else (_TEXT, _LITERAL)
    )
    if all(type(key) is str for key in value):
        if text != _TEXT:
            paths.marks[path] = text
        return
    marks: dict[str | int, str] = {}
    own: dict[str, Any] = {}
    for key in value:
        part = str(key)
        if part in own:
            raise InvalidInputError(
                f"the keys {own[part]!r} and {key!r} of {fqn or 'the state'!r} make the same FQN "
                f"{f'{fqn}.{part}' if path else part!r}; rename one of them."
            )
        own[part] = key
        marks[part] = literal if _is_literal(key, part) else text
    kinds = set(marks.values())
    paths.marks[path] = marks if len(kinds) > 1 else kinds.pop()


def _is_literal(key: Any, text: str) -> bool:
    """Tell whether a key that is no text can be read from its text again."""
    if type(key) is int:
        return True
    if isinstance(key, str):
        return False
    try:
        return bool(_literal(text) == key or key != key)  # noqa: PLR0124 (a NaN)
    except ValueError:
        return False


def _literal(text: str) -> Any:
    """Return the key of a text.

    Raises:
        ValueError: no key has this text.
    """
    if text.isdecimal() and text.isascii() and (text[0] != "0" or text == "0"):
        return int(text)
    if text in _FLOATS:
        return _FLOATS[text]
    try:
        key = ast.literal_eval(text)
        hash(key)
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"{text[:80]!r} is not the text of a key") from error
    if repr(key) != text:
        raise ValueError(f"{text[:80]!r} is not the text of a key")
    return key


def _is_open(value: Any) -> bool:
    """Tell whether what lies in a value is walked, instead of the value as a whole."""
    if isinstance(value, Mapping):
        return bool(value)
    if isinstance(value, list):
        held = walk(value, enters=_is_list, skips=SCALARS)
        return any(
            isinstance(item, torch.Tensor | Mapping) or _holds_tensor(item) for _, item in held
        )
    return _holds_tensor(value)


def _is_list(value: object) -> bool:
    return isinstance(value, list)


def _holds_tensor(value: Any) -> bool:
    """Tell whether a tensor lies in a container or dataclass."""
    return _is_searched(value) and any(
        isinstance(item, torch.Tensor)
        for _, item in walk(value, enters=_is_searched, skips=SCALARS)
    )


def _is_searched(value: object) -> bool:
    return is_container(value) or (is_data(value) and not isinstance(value, Stateful))


def _with_item(value: Any, key: Any, item: object) -> Any:
    """Return a tuple or dataclass of the same class with one item replaced."""
    if not isinstance(value, tuple):
        new = copy.copy(value)
        object.__setattr__(new, key, item)  # which a frozen one allows too
        return new
    items = [*value[:key], item, *value[key + 1 :]]
    make = getattr(value, "_make", type(value))  # a named tuple takes its items one by one
    return make(items)


def recorded_paths(plans: Iterable[Any]) -> dict[str, ObjectPath]:
    """Return the path of each FQN, from what each rank's planner gave.

    Those of `FlatPaths` say all that they lead through, and the order of keys.

    Raises:
        InvalidInputError: ranks have the same FQN in different places.
    """
    found: dict[str, ObjectPath] = {}
    for given in plans:
        for fqn, path in (given or {}).items():
            known = found.get(fqn)
            if known is None:
                found[fqn] = given.recorded(fqn) if isinstance(given, FlatPaths) else path
            elif known != path:
                raise InvalidInputError(
                    f"the ranks have {fqn!r} in different places: {list(known)} and {list(path)}; "
                    "rename one of the keys."
                )
    return _with_order(found)


def _with_order(paths: dict[str, ObjectPath]) -> dict[str, ObjectPath]:
    """Number the keys of each container whose order is not that of its FQNs."""
    kept, by_name = _orders(paths), _orders({fqn: paths[fqn] for fqn in sorted(paths)})
    odd = {
        above: {part: i for i, part in enumerate(parts)}
        for above, parts in kept.items()
        if [*parts] != [*by_name[above]]
    }
    if not odd:
        return paths
    found = {}
    for fqn, path in paths.items():
        if not isinstance(path, StatePath) or _NUMBER.search(path.marks):  # of an import
            found[fqn] = path
            continue
        marks = path.marks or _TEXT * len(path)
        numbers = [str(odd.get(path[:i], {}).get(part, "")) for i, part in enumerate(path)]
        numbered = [f"{mark}{number}" for mark, number in zip(marks, numbers, strict=True)]
        found[fqn] = StatePath(path, "".join(numbered) if any(numbers) else path.marks)
    return found


def _orders(paths: Mapping[str, ObjectPath]) -> dict[ObjectPath, dict[str | int, None]]:
    """Return the keys of each mapping in the order in which the paths come to them."""
    found: dict[ObjectPath, dict[str | int, None]] = {}
    for path in paths.values():
        for i, part in enumerate(path):
            if isinstance(part, str):
                found.setdefault(path[:i], {})[part] = None
    return found


class _Node:
    """A container that is being put together: what lies in it, and the marks of its parts."""

    __slots__ = ("built", "inside", "is_recorded", "marks", "path")

    def __init__(self, path: ObjectPath) -> None:
        self.path = path
        self.inside: dict[str | int, Any] = {}
        self.marks: dict[str | int, tuple[str, int]] = {}
        self.is_recorded = False
        self.built: Any = None


def nested_state(items: Mapping[str, Any], paths: Mapping[str, ObjectPath]) -> Any:
    """Return the state whose flat items and paths these are: containers, keys and order as saved.

    Paths that older code or torch recorded say neither types of keys nor tuples: then every key is
    text, but those of an optimizer's state, and what has numbered places is a list. What a list
    lacks is None. An empty container at a path where others hold items is one with theirs.

    Raises:
        CorruptionError: two paths contradict each other, or no state can have one.
    """
    root = _Node(())
    nodes = [root]
    for fqn, item in items.items():
        path = paths[fqn]
        marks = _marks(fqn, path)
        node = root
        for i, part in enumerate(path):
            node.is_recorded |= isinstance(path, StatePath)
            node.marks.setdefault(part, marks[i])
            inner = node.inside.get(part, _NOTHING)
            is_last = i == len(path) - 1
            if inner is _NOTHING and is_last:
                node.inside[part] = item
            elif is_last and isinstance(inner, _Node) and is_empty_container(item):
                pass
            elif not is_last and (inner is _NOTHING or is_empty_container(inner)):
                node.inside[part] = inner = _Node(path[: i + 1])
                nodes.append(inner)
            elif is_last or not isinstance(inner, _Node):
                raise CorruptionError(
                    f"{fqn!r} at {list(path[:20])} lies inside another item, or is its container; "
                    "read the version flat, or export it as safetensors or zarr, which are flat."
                )
            node = inner
    for node in reversed(nodes):  # what lies deeper was made later
        node.built = _built(node)
    return root.built


_NOTHING = object()


def _marks(fqn: str, path: ObjectPath) -> list[tuple[str, int]]:
    """Return the mark of each part of a path, and the part's number among its siblings."""
    if not 0 < len(path) <= DEEPEST:
        raise CorruptionError(
            f"{fqn[:200]!r} lies {len(path)} containers deep, and a state has 1 to {DEEPEST}; "
            "read the version flat."
        )
    text = path.marks if isinstance(path, StatePath) else ""
    if not text:
        return [(_TEXT, _LAST)] * len(path)
    found = [(mark, int(number) if number else _LAST) for mark, number in _MARK.findall(text)]
    if len(found) != len(path) or _MARK.sub("", text):
        raise CorruptionError(
            f"{fqn[:200]!r} has a path of {len(path)} parts with the marks {text[:80]!r}, which do "
            "not describe them; read the version flat, or run 'dcpstore verify'."
        )
    return found


_LAST = 10**9  # of a part without a number: after those that have one, in the order they come


def _built(node: _Node) -> Any:
    """Return the container of a node whose own nodes have been built."""
    inside = {
        part: item.built if isinstance(item, _Node) else item for part, item in node.inside.items()
    }
    places = [part for part in inside if isinstance(part, int)]
    if places and len(places) == len(inside):
        if min(places) < 0 or max(places) > len(places) + _MOST_HOLES:
            raise CorruptionError(
                f"the list at {_shown(node)} would have a place {max(places, key=abs)} and holds "
                f"{len(places)} items; read the version flat, or export it as safetensors or zarr, "
                "which are flat."
            )
        items = [inside.get(i) for i in range(max(places) + 1)]
        return tuple(items) if node.marks[places[0]][0] == _IN_TUPLE else items
    parts = sorted(inside, key=lambda part: node.marks[part][1])
    try:
        pairs = [(_key(part, node.marks[part][0]), inside[part]) for part in parts]
    except ValueError as error:
        raise CorruptionError(f"a key at {_shown(node)} is damaged: {error}.") from error
    is_ordered = any(mark in (_ORDERED_TEXT, _ORDERED_LITERAL) for mark, _ in node.marks.values())
    found: dict[Any, Any] = OrderedDict(pairs) if is_ordered else dict(pairs)
    if len(found) < len(pairs):
        raise CorruptionError(
            f"two keys at {_shown(node)} are equal: {[key for key, _ in pairs]!r:.200}; read the "
            "version flat."
        )
    return found if node.is_recorded else _with_numbers(found)


def _key(part: str | int, mark: str) -> Any:
    is_literal = mark in (_LITERAL, _ORDERED_LITERAL)
    return _literal(part) if is_literal and isinstance(part, str) else part


def _with_numbers(node: dict[Any, Any]) -> dict[Any, Any]:
    """Return a dict; an optimizer's with its parameters' numbers as keys, as torch wants them."""
    groups = node.get("param_groups")
    if not isinstance(groups, list) or not all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    ):
        return node
    names = {str(n): n for group in groups for n in group["params"] if type(n) is int}
    state = node.get("state", {})
    if not isinstance(state, dict):
        return node
    return {**node, "state": {names.get(key, key): item for key, item in state.items()}}


def _shown(node: _Node) -> str:
    return repr(".".join(map(str, node.path)))[:200] if node.path else "the top"
