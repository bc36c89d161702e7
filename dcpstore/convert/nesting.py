"""The nested state of a version, out of its flat entries and their paths.

Flattening makes every key of a dict text and forgets what is empty. An optimizer needs its numbers
back, or it would silently restore nothing: where a dict is an optimizer's state, they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dcpstore.errors import InvalidInputError
from dcpstore.records import ObjectPath

__all__ = ["DEEPEST", "nested_state"]

DEEPEST = 100  # containers one in another, as in values
_MOST_HOLES = 10_000  # places of a list that hold nothing; more is no list that anybody saved


def nested_state(items: Mapping[str, Any], paths: Mapping[str, ObjectPath]) -> dict[str, Any]:
    """Return the state whose flat items and paths these are; what a list lacks is None.

    Raises:
        InvalidInputError: two paths contradict each other.
    """
    root: dict[str | int, Any] = {}
    made = {id(root)}  # the containers made here; a value may be a dict too
    for fqn, item in items.items():
        path = paths[fqn]
        if len(path) > DEEPEST:
            raise InvalidInputError(
                f"{fqn[:200]!r} lies {len(path)} containers deep, past {DEEPEST}; export as "
                "safetensors or zarr, which keep the state flat."
            )
        node = root
        for key in path[:-1]:
            if key not in node:
                node[key] = {}
                made.add(id(node[key]))
            elif id(node[key]) not in made:
                raise _contradiction(fqn, path)
            node = node[key]
        if path[-1] in node:
            raise _contradiction(fqn, path)
        node[path[-1]] = item
    state = _settled(root, made, "")
    assert isinstance(state, dict), "the first key of a path is text"
    return state


def _settled(node: dict[str | int, Any], made: set[int], where: str) -> Any:
    """Return a container with lists where its keys are numbers, and all inside it settled."""
    inside = {
        key: _settled(item, made, f"{where}{key}.") if id(item) in made else item
        for key, item in node.items()
    }
    numbers = [key for key in inside if isinstance(key, int)]
    if not numbers or len(numbers) < len(inside):
        return _with_numbers(inside)
    if min(numbers) < 0 or max(numbers) > len(numbers) + _MOST_HOLES:
        raise InvalidInputError(
            f"the list at {where.removesuffix('.')!r} would have a place {max(numbers)} and holds "
            f"{len(numbers)} items; export as safetensors or zarr, which keep it flat."
        )
    return [inside.get(i) for i in range(max(numbers) + 1)]


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


def _contradiction(fqn: str, path: ObjectPath) -> InvalidInputError:
    return InvalidInputError(
        f"{fqn!r} at {path} lies inside another item, or is one's container; export as safetensors "
        "or zarr, which keep the state flat."
    )
