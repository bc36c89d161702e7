"""A nested state as flat items and back: flattening for every save and load, and its inverse.

FQNs and paths are those of torch's DCP for every item that DCP keeps. In addition, flattening keeps
empty containers as items, opens tuples and dataclasses that hold tensors, and records what torch
does not: types of keys, tuples, OrderedDicts, the order of keys. Invariant: `nested_state` returns
items that were flattened in an equal state, or flattening has refused them by name.
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
    fqn_of,
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

# The kind of a part of a path. A key is a text, or a Python literal such as 3, None or (1, 'a').
_TEXT, _LITERAL = ".", "v"  # in a dict; "." is an index in a list too
_ORDERED_TEXT, _ORDERED_LITERAL = "S", "V"  # in an OrderedDict
_IN_TUPLE = "t"
_MARK = re.compile(r"([.vSVt])(\d{0,9})")  # with the key's position in its dict, where recorded
_NUMBER = re.compile(r"\d")
_FLOATS = {text: float(text) for text in ("nan", "inf", "-inf")}  # these are not literals
_MOST_HOLES = 10_000  # empty positions in a list; more is damage or an attack, not a saved list

# Values are of any type: hence `Any` in this module.


class FlatPaths(dict[str, ObjectPath]):
    """The paths of one rank's items by FQN, in torch's form, in the order of the state.

    Attributes:
        marks: the kinds of the children of each container that is not a list or a dict of text
            keys: one mark for all, or one for each part.
    """

    def __init__(self, paths: Mapping[str, ObjectPath] | Iterable[tuple[str, ObjectPath]] = ()):
        super().__init__(paths)
        self.marks: dict[ObjectPath, str | dict[str | int, str]] = {}

    def recorded(self, fqn: str) -> StatePath:
        """Return the path of an FQN, with the kinds of its parts."""
        path = self[fqn]
        marks = ""
        # Nearly all states have only dicts of text keys and lists, and so no marks.
        for i, part in enumerate(path) if self.marks else ():
            mark = self.marks.get(path[:i], _TEXT)
            marks += mark if isinstance(mark, str) else mark.get(part, _TEXT)
        return StatePath(path, "" if marks == _TEXT * len(marks) else marks)


class Place:
    """The position of an item in the caller's state: its container, and its own key there."""

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
    """A tuple or dataclass that was opened; a new one replaces it whenever an item is replaced."""

    def __init__(self, value: Any, place: Place | None) -> None:
        self.value = value
        self._place = place

    @property
    def is_open(self) -> bool:
        """Whether a new object of its class can be made, and can replace it in its container."""
        assert self._place is not None, "a state is a mapping"
        if not self._place.is_open:
            return False
        # Try it with an item of its own: there is no other way to know.
        key, item = next(iter(items_in(self.value)))
        try:
            return type(_with_item(self.value, key, item)) is type(self.value)
        except Exception:  # the constructor of a caller's class may raise anything
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
        places: of the items, in the caller's state.
    """

    items: dict[str, Any] = field(default_factory=dict)
    paths: FlatPaths = field(default_factory=FlatPaths)
    places: dict[str, Place] = field(default_factory=dict)


def flattened(
    state: Mapping[Any, Any], *, is_leaf: Callable[[str], bool] | None = None
) -> FlatState:
    """Return the items of a nested state by FQN.

    Mappings, and lists that hold tensors or mappings, are opened, as torch does; so are tuples,
    named tuples and dataclasses that hold tensors. An empty container is an item.

    Args:
        state: the state.
        is_leaf: takes the FQN of a tuple or dataclass; whether that is an item as a whole although
            it holds tensors.

    Raises:
        InvalidInputError: two items have the same FQN, the state is nested too deep, or it contains
            itself.
    """
    flat = FlatState()
    with nesting_checked():
        _flatten(flat, state, (), "", None, is_leaf=is_leaf)
    return flat


def is_empty_container(value: object) -> bool:
    """Tell whether a value is an empty mapping or list."""
    return isinstance(value, Mapping | list) and not value


def joined_path(above: ObjectPath, found: StatePath) -> ObjectPath:
    """Return the path of an item inside another item.

    Args:
        above: the path of the outer item.
        found: the path of the inner item in a state that holds the outer item alone.
    """
    if len(found) == 1:
        return above
    marks = above.marks if isinstance(above, StatePath) else ""
    below = found.marks[1:] or _TEXT * (len(found) - 1)
    return StatePath((*above, *found[1:]), (marks or _TEXT * len(above)) + below)


def path_below(path: ObjectPath, depth: int) -> ObjectPath:
    """Return the rest of a path after its first `depth` parts, with the kinds of the parts."""
    if not isinstance(path, StatePath):
        return path[depth:]
    marks = "".join(mark + number for mark, number in _MARK.findall(path.marks)[depth:])
    return StatePath(path[depth:], marks)


def path_above(path: ObjectPath, depth: int) -> ObjectPath:
    """Return the first `depth` parts of a path, with their kinds."""
    if not isinstance(path, StatePath):
        return path[:depth]
    marks = "".join(mark + number for mark, number in _MARK.findall(path.marks)[:depth])
    return StatePath(path[:depth], marks)


def _flatten(
    flat: FlatState,
    value: Any,
    path: ObjectPath,
    fqn: str,
    place: Place | None,
    *,
    is_leaf: Callable[[str], bool] | None,
) -> None:
    """Add all items of a container to `flat`."""
    prefix = f"{fqn}." if path else ""
    container = value
    if isinstance(value, Mapping):
        _mark_keys(value, path, fqn, flat.paths)
    elif not isinstance(value, list):
        container = _Opened(value, place)
        if isinstance(value, tuple):
            flat.paths.marks[path] = _IN_TUPLE
    has_indices = isinstance(value, list | tuple)
    for key, item in items_in(value):
        part = key if has_indices else str(key)
        name, below, here = f"{prefix}{part}", (*path, part), Place(container, key)
        if (
            type(item) not in PLAIN
            and _is_open(item)
            and (is_leaf is None or isinstance(item, Mapping | list) or not is_leaf(name))
        ):
            _flatten(flat, item, below, name, here, is_leaf=is_leaf)
            continue
        if name in flat.items:
            raise InvalidInputError(
                f"two items of the state have the same FQN {name!r}: one at "
                f"{list(flat.paths[name])}, one at {list(below)}; rename one of the keys."
            )
        flat.items[name] = _plain_empty(item) if isinstance(item, Mapping) else item
        flat.paths[name] = below
        flat.places[name] = here


def _plain_empty(item: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Return an empty mapping in the form in which it is stored: a dict or an OrderedDict."""
    return OrderedDict() if isinstance(item, OrderedDict) else {}


def _mark_keys(value: Mapping[Any, Any], path: ObjectPath, fqn: str, paths: FlatPaths) -> None:
    """Record the class of a mapping and the types of its keys."""
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
                f"the keys {own[part]!r} and {key!r} of {fqn or 'the state'!r} give the same FQN "
                f"{f'{fqn}.{part}' if path else part!r}; rename one of them."
            )
        own[part] = key
        marks[part] = literal if _is_literal(key, part) else text
    kinds = set(marks.values())
    paths.marks[path] = marks if len(kinds) > 1 else kinds.pop()


def _is_literal(key: Any, text: str) -> bool:
    """Tell whether a key is not a text, but can be restored from its text."""
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
    if repr(key) != text:  # such as "1_0" or "0x1": literals too, but not the text of a key
        raise ValueError(f"{text[:80]!r} is not the text of a key")
    return key


def _is_open(value: Any) -> bool:
    """Tell whether the contents of a value become items, instead of the value as a whole."""
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
    """Tell whether a container or dataclass holds a tensor, at any depth."""
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
        object.__setattr__(new, key, item)  # works for frozen dataclasses too
        return new
    items = [*value[:key], item, *value[key + 1 :]]
    make = getattr(value, "_make", type(value))  # a named tuple's constructor takes no list
    return make(items)


def recorded_paths(plans: Iterable[Any]) -> dict[str, ObjectPath]:
    """Return the path of each FQN, from the planner data of each rank.

    Planner data of class `FlatPaths` adds the kinds of the parts and the order of keys.

    Raises:
        InvalidInputError: ranks have the same FQN at different paths.
    """
    found: dict[str, ObjectPath] = {}
    for paths in plans:
        for fqn, path in (paths or {}).items():
            known = found.get(fqn)
            if known is None:
                found[fqn] = paths.recorded(fqn) if isinstance(paths, FlatPaths) else path
            elif known != path:
                raise InvalidInputError(
                    f"the ranks have {fqn!r} in different places: {list(known)} and {list(path)}; "
                    "rename one of the keys."
                )
    return _with_order(found)


def _with_order(paths: dict[str, ObjectPath]) -> dict[str, ObjectPath]:
    """Number the keys of each dict whose order is not the order of its FQNs.

    The catalog returns entries sorted by FQN, so the order of all others needs no record.
    """
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
        if not isinstance(path, StatePath) or _NUMBER.search(path.marks):  # numbered at import
            found[fqn] = path
            continue
        marks = path.marks or _TEXT * len(path)
        numbers = [str(odd.get(path[:i], {}).get(part, "")) for i, part in enumerate(path)]
        numbered = [f"{mark}{number}" for mark, number in zip(marks, numbers, strict=True)]
        found[fqn] = StatePath(path, "".join(numbered) if any(numbers) else path.marks)
    return found


def _orders(paths: Mapping[str, ObjectPath]) -> dict[ObjectPath, dict[str | int, None]]:
    """Return the keys of each mapping in the order in which they appear in the paths."""
    found: dict[ObjectPath, dict[str | int, None]] = {}
    for path in paths.values():
        for i, part in enumerate(path):
            if isinstance(part, str):
                found.setdefault(path[:i], {})[part] = None
    return found


class _Node:
    """A container under construction: its contents, and the marks of its parts."""

    __slots__ = ("built", "inside", "is_recorded", "marks", "path")

    def __init__(self, path: ObjectPath) -> None:
        self.path = path
        self.inside: dict[str | int, Any] = {}
        self.marks: dict[str | int, tuple[str, int]] = {}
        self.is_recorded = False
        self.built: Any = None


def nested_state(items: Mapping[str, Any], paths: Mapping[str, ObjectPath]) -> Any:
    """Return the state with these flat items and paths: containers, keys and order as saved.

    Paths recorded by older code or by torch have neither the types of keys nor tuples: then every
    key is a text, except in an optimizer's state, and a container with integer parts is a list. A
    missing item of a list is None. Ranks may contribute to one container, so one that is empty at
    some rank is joined with the items of the others.

    Raises:
        CorruptionError: two paths contradict each other, or a path is impossible.
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
            # Inner containers become nodes, also in the place of one that is empty on some rank.
            if inner is _NOTHING and is_last:
                node.inside[part] = item
            elif is_last and isinstance(inner, _Node) and is_empty_container(item):
                pass
            elif not is_last and (inner is _NOTHING or is_empty_container(inner)):
                node.inside[part] = inner = _Node(path[: i + 1])
                nodes.append(inner)
            elif is_last or not isinstance(inner, _Node):
                raise CorruptionError(
                    f"{fqn!r} at {list(path[:20])} is inside another item, or contains it; read "
                    "the version flat, or export it as safetensors or zarr, which are flat."
                )
            node = inner
    for node in reversed(nodes):  # children were added after their parents, so build them first
        node.built = _built(node)
    return root.built


_NOTHING = object()


def _marks(fqn: str, path: ObjectPath) -> list[tuple[str, int]]:
    """Return the mark of each part of a path, and the part's number among its siblings."""
    if not 0 < len(path) <= DEEPEST:
        raise CorruptionError(
            f"{fqn[:200]!r} is nested in {len(path)} containers, and a state allows 1 to "
            f"{DEEPEST}; read the version flat."
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


_LAST = 10**9  # sorts a part without a number after those that have one, in their own order


def _built(node: _Node) -> Any:
    """Return the container of a node whose own nodes have been built."""
    inside = {
        part: item.built if isinstance(item, _Node) else item for part, item in node.inside.items()
    }
    indices = [part for part in inside if isinstance(part, int)]
    if indices and len(indices) == len(inside):
        if min(indices) < 0 or max(indices) > len(indices) + _MOST_HOLES:
            raise CorruptionError(
                f"the list at {_shown(node)} would have the index {max(indices, key=abs)} and has "
                f"{len(indices)} items; read the version flat, or export it as safetensors or "
                "zarr, which are flat."
            )
        items = [inside.get(i) for i in range(max(indices) + 1)]
        return tuple(items) if node.marks[indices[0]][0] == _IN_TUPLE else items
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
    """Return a dict; if it is an optimizer's state, with parameter numbers as integer keys."""
    groups = node.get("param_groups")
    if not isinstance(groups, list) or not all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    ):
        return node
    # Such paths have text keys; the numbers of the parameters tell which of them were integers.
    names = {str(n): n for group in groups for n in group["params"] if type(n) is int}
    state = node.get("state", {})
    if not isinstance(state, dict):
        return node
    return {**node, "state": {names.get(key, key): item for key, item in state.items()}}


def _shown(node: _Node) -> str:
    return repr(fqn_of(node.path))[:200] if node.path else "the top"
