"""The house's order: floors, fences, public names, and a start without torch."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

import dcpstore

ROOT = Path(dcpstore.__file__).parent
REPO = ROOT.parent
EXAMPLES = [*(REPO / "examples").rglob("*.py"), REPO / ".ci" / "typed_program.py"]
PUBLIC = {"dcpstore", "dcpstore.convert", "dcpstore.state_dict", "dcpstore.testing"}

# From the ground up. The inner rooms of the catalog count as rooms.
FLOORS = {
    "errors": 0,
    "geometry": 0,
    "core": 1,
    "compat": 1,
    "records": 2,
    "storage": 3,
    "formats": 4,
    "encoding": 5,
    "catalog.validation": 5,
    "catalog.db": 6,
    "catalog.schema": 7,
    "catalog.location": 7,
    "catalog": 8,  # an open catalog, and the fast log
    "catalog.read": 9,
    "catalog.write": 10,
    "catalog.maintenance": 11,
    "zarr": 12,
    "collectives": 12,
    "state": 12,
    "planning": 13,
    "reading": 13,
    "history": 14,
    "loading": 14,
    "maintenance": 14,
    "saving": 14,
    "repository": 15,
    "api": 16,
    "dcp": 16,
    "asynchronous": 17,
    "state_dict": 17,
    "convert": 17,
    "cli": 18,
    "testing": 19,  # as high as the entrances, so that no room may import it
    "__main__": 19,
    "__init__": 19,
}
# A library, and the only rooms that may import it.
FENCES = {
    "alembic": {"catalog"},
    "blake3": {"core"},
    "click": {"cli"},
    "hypothesis": {"testing"},
    "matplotlib": {"history"},
    "msgspec": {"formats"},
    "numcodecs": {"encoding"},
    "obstore": {"storage"},
    "pytest": {"testing"},
    "rich": {"core", "cli"},
    "safetensors": {"convert"},
    "sqlalchemy": {"catalog"},
    "xxhash": {"core"},
    "zarr": {"zarr"},
}
UNFENCED = {"dcpstore", "numpy", "torch", "typing_extensions"}
# File names that more than one room has, and why.
SHARED_NAMES = {
    # In `cli` each module is called after what its commands are about, elsewhere after its noun.
    "contents.py": {"catalog.write", "cli"},
    "diff.py": {"history", "cli"},
    "refs.py": {"catalog.write", "cli"},
}
# Rooms that stay free of torch.
TORCH_FREE = {"errors", "records", "core", "geometry", "catalog", "storage", "formats", "cli"}


# The one module that may import private names of torch, and the private attributes of its objects
# that others may use: every supported release has them.
PRIVATE_TORCH = "compat/torch_private.py"
PRIVATE_ATTRIBUTES = {
    "_indices",  # of a sparse tensor, without coalescing it
    "_init_from_local_shards_and_global_metadata",
    "_local_tensor",
    "_metadata",  # of what `Module.state_dict` returns
    "_optimizer_load_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_prepare_init",
    "_process_group",
    "_values",
}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def room_of(path: Path) -> str:
    return room_named(path.relative_to(ROOT).with_suffix("").parts)


def room_named(parts: Sequence[str]) -> str:
    """Return the room of a module below `dcpstore`, by the parts of its name."""
    inner = ".".join(parts[:2])
    return inner if inner in FLOORS else parts[0]


def dotted(path: Path) -> str:
    """Return the name by which a module is imported."""
    parts = ("dcpstore", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


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
        outer = room.split(".")[0]
        if library not in UNFENCED | sys.stdlib_module_names:
            assert outer in FENCES.get(library, ()), f"{name} is not for {room}"
        assert not (library == "torch" and outer in TORCH_FREE), f"{room} stays free of torch"
        if library == "dcpstore" and rest:
            other = room_named(rest.split("."))
            assert other == room or FLOORS[other] < FLOORS[room], f"{room} imports {other}"


def is_private(name: str) -> bool:
    """Tell whether a dotted name has a part that is private."""
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def test_private_names_of_torch_stay_in_one_module() -> None:
    found = set()
    used: set[str] = set()
    for path in modules():
        tree = ast.parse(path.read_text())
        of_torch = {"torch"}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "torch":
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {path for name in names if is_private(name)}
                of_torch |= {alias.asname or alias.name for alias in node.names}
            elif isinstance(node, ast.Import):
                names = {a.name for a in node.names if a.name.split(".")[0] == "torch"}
                found |= {path for name in names if is_private(name)}
                of_torch |= {a.asname for a in node.names if a.name in names and a.asname}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                if node.attr in PRIVATE_ATTRIBUTES:
                    used.add(node.attr)
                elif ast.unparse(node.value).split(".")[0] in of_torch:
                    found.add(path)
    assert {str(path.relative_to(ROOT)) for path in found} == {PRIVATE_TORCH}
    assert used == PRIVATE_ATTRIBUTES


def test_a_file_name_is_used_in_one_room_alone() -> None:
    rooms: dict[str, set[str]] = {}
    for path in modules():
        if path.name != "__init__.py":
            rooms.setdefault(path.name, set()).add(room_of(path))
    assert {name: found for name, found in rooms.items() if len(found) > 1} == SHARED_NAMES
    assert sum(map(len, rooms.values())) == sum(p.name != "__init__.py" for p in modules())


def test_a_folder_of_tests_is_named_after_its_room_or_its_method() -> None:
    folders = {path.parent.name for path in (ROOT.parent / "tests").glob("*/*.py")}
    methods = {"benchmarks", "hostile", "kept", "parallel", "torture"}  # which try all rooms
    assert folders - {room_of(path).split(".")[0] for path in modules()} == methods


def test_a_module_at_the_top_is_the_home_of_public_names() -> None:
    things = [getattr(dcpstore, name) for name in dcpstore.__all__]
    homes = {t.__name__ if inspect.ismodule(t) else t.__module__ for t in things}
    loose = {dotted(path) for path in ROOT.glob("*.py")} - {"dcpstore", "dcpstore.__main__"}
    assert loose - homes == set()


def test_no_module_imports_itself_through_others() -> None:
    """Neither at the top of a module nor later, inside a function; types alone do not count."""
    names = {dotted(path): path for path in modules()}
    imports = {}
    for name, path in names.items():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = []
        found = {
            module if (module := f"{node.module}.{alias.name}") in names else str(node.module)
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        found |= {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        imports[name] = found.intersection(names)
    while leaves := {name for name, others in imports.items() if not others & imports.keys()}:
        imports = {name: others for name, others in imports.items() if name not in leaves}
    assert set(imports) == set()


def docstring(path: Path) -> str:
    """Return the first paragraph of a module's docstring, in one line."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(text.split("\n\n")[0].split())


def floors_table() -> str:
    rows: dict[int, list[str]] = {}
    for room, floor in FLOORS.items():
        path = ROOT / room.replace(".", "/")
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if room not in {"__init__", "__main__"}:
            rows.setdefault(floor, []).append(f"`{room}`: {docstring(file)}")
    table = "| floor | rooms |\n|---|---|\n"
    return table + "".join(f"| {floor} | {'<br>'.join(each)} |\n" for floor, each in rows.items())


def imports_drawing() -> str:
    """Draw which rooms import which, without what follows from a path of other arrows."""
    below: dict[str, set[str]] = {room: set() for room in FLOORS}
    for path in modules():
        for name in imported(path):
            library, _, rest = name.partition(".")
            if library == "dcpstore" and rest:
                below[room_of(path)].add(room_named(rest.split(".")))
    below = {room: others - {room} for room, others in below.items()}
    reached: dict[str, set[str]] = {}
    for room in sorted(FLOORS, key=lambda room: FLOORS[room]):
        reached[room] = below[room].union(*(reached[other] for other in below[room]))
    lines = [
        f"  {room} --> {other}\n"
        for room in sorted(FLOORS, key=lambda room: (-FLOORS[room], room))
        for other in sorted(below[room], key=lambda other: (-FLOORS[other], other))
        if room not in {"__init__", "__main__"}
        if not any(other in reached[between] for between in below[room])
    ]
    return "```mermaid\nflowchart TD\n" + "".join(lines) + "```\n"


def fences_table() -> str:
    table = "| library | imported only in |\n|---|---|\n"
    table += "".join(f"| `{name}` | {_listed(FENCES[name])} |\n" for name in sorted(FENCES))
    table += f"\nTorch is never imported in {_listed(TORCH_FREE)}, so that the shell and tools\n"
    return table + "which only read start fast.\n"


def _listed(rooms: set[str]) -> str:
    return ", ".join(f"`{room}`" for room in sorted(rooms))


def modules_table() -> str:
    table = "| module | what it is |\n|---|---|\n"
    for path in sorted(modules(), key=lambda path: (FLOORS[room_of(path)], dotted(path))):
        mark = " **(public)**" if dotted(path) in PUBLIC else ""
        table += f"| `{dotted(path)}`{mark} | {docstring(path)} |\n"
    return table


def imported_from(text: str) -> set[str]:
    """Return the modules of dcpstore that the lines of a program import."""
    found = re.findall(r"^\s*(?:from|import) (dcpstore[\w.]*)", text, re.MULTILINE)
    return {name.removesuffix(".") for name in found}


def test_public_modules_say_what_is_public_and_nobody_is_shown_another() -> None:
    promised = (REPO / "docs" / "versioning.md").read_text()
    for name in PUBLIC:
        assert f"`{name}`" in promised or f"`{name}.__all__`" in promised
        assert f"`{name}`" in str(dcpstore.__doc__) or name == "dcpstore"
        module = importlib.import_module(name)
        assert module.__all__ == sorted(module.__all__)
        assert [part for part in module.__all__ if not hasattr(module, part)] == []
    pages = [
        REPO / "README.md",
        *(REPO / "docs").glob("*.md"),
        *(REPO / "docs").glob("guides/*.md"),
    ]
    shown = {page: imported_from(page.read_text()) for page in pages}
    shown |= {program: imported_from(program.read_text()) for program in EXAMPLES}
    private = {page.name: names - PUBLIC for page, names in shown.items() if names - PUBLIC}
    # the author of a storage is inside dcpstore
    assert private == {"testing.md": {"dcpstore.storage.local"}}


def test_the_version_is_written_once() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["hatch"]["version"]["path"] == "dcpstore/__init__.py"
    citation = (REPO / "CITATION.cff").read_text()
    assert re.findall("^version: (.*)$", citation, re.MULTILINE) == [dcpstore.__version__]
    changelog = (REPO / "CHANGELOG.md").read_text()
    released = re.findall(r"^## (\d\S*)", changelog, re.MULTILINE)
    assert released[0] == dcpstore.__version__


def test_workflows_and_hooks_run_what_is_there() -> None:
    targets = set(re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.MULTILINE))
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    pythons = [
        line.rsplit(" ", 1)[1]
        for line in project["classifiers"]
        if re.search(r"Python :: 3\.\d+$", line)
    ]
    run: dict[str, set[str]] = {}
    for file in sorted((REPO / ".github" / "workflows").glob("*.yml")):
        workflow = yaml.safe_load(file.read_text())
        assert {"name", True, "permissions", "jobs"} <= workflow.keys()  # YAML reads "on" as True
        for job in workflow["jobs"].values():
            assert "runs-on" in job or (REPO / job["uses"]).is_file()
            matrix = job.get("strategy", {}).get("matrix", {}).get("python", pythons)
            assert matrix == pythons
            steps = [step["run"] for step in job.get("steps", []) if "run" in step]
            made = {name for step in steps for name in re.findall(r"\bmake ([\w-]+)", step)}
            run.setdefault(workflow["name"], set()).update(made)
    assert run == {
        "docs": {"docs-site"},
        "release": {"dist"},
        "tests": {"compat", "lint", "slow", "test", "wheel"},
    }
    assert set().union(*run.values()) <= targets
    hooks = yaml.safe_load((REPO / ".pre-commit-config.yaml").read_text())["repos"]
    entries = [hook["entry"].split() for repo in hooks for hook in repo["hooks"]]
    assert [repo["repo"] for repo in hooks] == ["local"]
    assert {entry[0] for entry in entries} <= {f".venv/bin/{t}" for t in ("ruff", "mypy", "pytest")}
    paths = [word for entry in entries for word in entry if word.startswith("tests/")]
    assert [path for path in paths if not (REPO / path).exists()] == []


@pytest.mark.parametrize(
    ("page", "name", "table"),
    [
        ("design.md", "floors", floors_table),
        ("design.md", "imports", imports_drawing),
        ("design.md", "fences", fences_table),
        ("modules.md", "modules", modules_table),
    ],
)
def test_the_house_is_documented_as_it_is(page: str, name: str, table: Callable[[], str]) -> None:
    file = ROOT.parent / "docs" / page
    text = file.read_text()
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    head, rest = text.split(start)
    written = f"{head}{start}{table()}{end}{rest.split(end)[1]}"
    if os.environ.get("DCPSTORE_WRITE_DOCS"):
        file.write_text(written)
        text = written
    assert text == written, "run 'make docs' and look at the difference"


def names_in(path: Path) -> set[str]:
    """Return what a module defines: classes, functions, arguments and attributes."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.alias):  # torch's names
            found.add(node.name)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
    return found


def test_the_data_flow_is_told_by_names_of_the_code() -> None:
    text = (ROOT.parent / "docs" / "design.md").read_text()
    flow = text.split("## The data flow\n")[1].split("### What can go wrong")[0]
    drawings = re.findall(r"^```text\n(.*?)^```$", flow, re.MULTILINE | re.DOTALL)
    told = {re.split(r"\W", name)[0] for name in re.findall(r"`(\w[^`\n]*)`", flow)}
    drawn = set(re.findall(r"\b(?:[a-z]+_\w+|[A-Z][a-z]+[A-Z]\w+)\b", "".join(drawings)))
    known = set().union(*map(names_in, modules()))
    assert len(drawings) == 2
    assert len(drawn) > 20
    assert (told | drawn) - known == set()


def test_public_names_are_sorted() -> None:
    assert dcpstore.__all__ == sorted(dcpstore.__all__)


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


def test_what_tests_need_is_loaded_by_nothing_else() -> None:
    code = (
        "import sys, dcpstore; [getattr(dcpstore, name) for name in dcpstore.__all__]; "
        "import dcpstore.convert, dcpstore.cli.app; "
        "print([m for m in ('pytest', 'hypothesis', 'dcpstore.testing') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_where_to_change_what_names_what_is_there() -> None:
    page = (ROOT.parent / "docs" / "design.md").read_text()
    section = page.split("## Where to change what")[1]
    named = set(re.findall(r"`((?:dcpstore|tests|migrations|docs)/[^`]*|pyproject.toml)`", section))
    assert len(named) > 20
    assert [path for path in sorted(named) if not (ROOT.parent / path).exists()] == []


def test_every_library_that_is_imported_is_asked_for() -> None:
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    shipped = [extras[name] for name in ("postgres", "s3", "plot", "testing")]
    asked = {
        re.match(r"[\w-]+", line)[0].replace("-", "_").lower()
        for line in [*project["dependencies"], *(name for extra in shipped for name in extra)]
    }
    assert (set(FENCES) | UNFENCED) - {"dcpstore"} - asked == set()


def test_nobody_reads_a_word_that_contributing_forbids() -> None:
    table = (ROOT.parent / "CONTRIBUTING.md").read_text().split("| write | not |\n|---|---|\n")[1]
    forbidden = [row.split("|")[2].strip() for row in table.splitlines()[:6]]
    assert "whoever" in forbidden
    banned = re.compile(rf"\b({'|'.join(forbidden)})\b", re.IGNORECASE)
    pages = [ROOT.parent / "README.md", *(ROOT.parent / "docs").rglob("*.md"), *modules()]
    found = {
        f"{page.relative_to(ROOT.parent)}:{number}": match[0]
        for page in pages
        for number, line in enumerate(page.read_text().splitlines(), 1)
        if (match := banned.search(line.replace("_", "x")))  # names of tests stay
    }
    assert found == {}
