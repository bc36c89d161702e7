"""The house's order: floors, fences, public names, and a start without torch."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dcpstore

ROOT = Path(dcpstore.__file__).parent

FLOORS = {
    "errors": 0,
    "geometry": 0,
    "records": 1,
    "core": 1,
    "storage": 2,
    "formats": 3,
    "encoding": 4,
    "catalog": 4,
    "zarr": 5,
    "collectives": 5,
    "state": 5,
    "planning": 6,
    "reading": 6,
    "history": 7,
    "loading": 7,
    "maintenance": 7,
    "saving": 7,
    "repository": 8,
    "api": 9,
    "dcp": 9,
    "asynchronous": 10,
    "state_dict": 10,
    "convert": 10,
    "cli": 11,
    "__main__": 12,
    "__init__": 12,
}
# Rooms of one floor may not import one another, but for these, which build on each other in order.
LADDERS = [("asynchronous", "api"), ("zarr", "collectives")]

# A library, and the only rooms that may import it.
FENCES = {
    "sqlalchemy": {"catalog"},
    "alembic": {"catalog"},
    "zarr": {"zarr", "encoding"},
    "click": {"cli"},
}
# Rooms that stay free of torch.
TORCH_FREE = {"errors", "records", "refs", "geometry", "catalog", "storage", "cli", "progress"}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Return the dotted names that a module imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            if node.module == "dcpstore":
                names |= {f"dcpstore.{alias.name}" for alias in node.names}
    return names


def test_every_room_has_a_floor() -> None:
    assert {room_of(path) for path in modules()} == set(FLOORS)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_from_lower_floors_and_inside_the_fences(path: Path) -> None:
    room = room_of(path)
    for name in imported(path):
        library, _, rest = name.partition(".")
        assert room in FENCES.get(library, {room}), f"{name} is not for {room}"
        assert not (library == "torch" and room in TORCH_FREE), f"{room} stays free of torch"
        if library == "dcpstore" and rest:
            other = rest.split(".")[0]
            lower = FLOORS[other] < FLOORS[room]
            assert other == room or lower or (other, room) in LADDERS, f"{room} imports {other}"


def described(name: str) -> str:
    """Return the section of docs/api.md for a public name, as its code says it."""
    thing = getattr(dcpstore, name)
    text = inspect.cleandoc(thing.__doc__)
    module = getattr(thing, "__module__", thing.__name__)
    if module.startswith("torch."):
        return f"## `{name}`\n\nTorch's own: `{module}.{name}`.\n"
    if inspect.ismodule(thing):
        return f"## `{name}`\n\n{text}\n"
    if inspect.isclass(thing) and issubclass(thing, BaseException):
        text = text.split("\n\n")[0]
        return f"## `{name}`\n\nAn error ({thing.__mro__[1].__name__}). {text}\n"
    members = [
        f"- `{member}{_signature(value)}`: {inspect.cleandoc(value.__doc__).splitlines()[0]}"
        for member, value in (_members(thing) if inspect.isclass(thing) else {}).items()
        if inspect.isfunction(value) and not member.startswith("_")
    ]
    listed = "\n".join(members) + "\n" if members else ""
    head = f"## `{name}`\n\n```python\n{name}{_signature(thing)}\n```\n\n"
    text = text.replace("```", "")
    return f"{head}```text\n{text}\n```\n" + (f"\n{listed}" if listed else "")


def _members(thing: type) -> dict[str, object]:
    """Return what a class of ours holds, its bases first."""
    ours = [base for base in reversed(thing.__mro__) if base.__module__.startswith("dcpstore")]
    return {name: value for base in ours for name, value in vars(base).items()}


def _signature(thing: object) -> str:
    signature = inspect.signature(thing)  # type: ignore[arg-type]
    kept = [p for p in signature.parameters.values() if p.name != "self"]
    return str(signature.replace(parameters=kept)).replace("'", "")


def test_every_public_name_is_documented_as_it_is() -> None:
    assert dcpstore.__all__ == sorted(dcpstore.__all__)
    page = "# The Python face\n\nEvery public name of `dcpstore`, as its code says it.\n"
    page += "".join("\n" + described(name) for name in dcpstore.__all__)
    written = ROOT.parent / "docs" / "api.md"
    if os.environ.get("DCPSTORE_WRITE_DOCS"):
        written.write_text(page)
    assert written.read_text() == page, "run 'make docs' and look at the difference"


def test_modules_stay_readable() -> None:
    long = {str(p): n for p in modules() if (n := len(p.read_text().splitlines())) > 900}
    assert long == {}
    for path in modules():
        assert ast.get_docstring(ast.parse(path.read_text())), path


@pytest.mark.parametrize("module", ["dcpstore", "dcpstore.cli", "dcpstore.repository"])
def test_the_command_line_starts_without_torch(module: str) -> None:
    heavy = "'torch', 'numpy', 'zarr', 'alembic'"
    code = f"import sys, {module}; print([m for m in ({heavy}) if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
