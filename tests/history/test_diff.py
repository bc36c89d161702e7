"""What a diff says of entries, and that it asks the catalog alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import dcpstore
from dcpstore.cli.app import commands
from dcpstore.errors import CorruptionError, NotFoundError
from dcpstore.repository import Repository
from tests.soundness import Place

SMALL = 64  # bytes of a chunk: 16 elements of float32


@pytest.fixture
def small(database_url: str, tmp_path: Path) -> Iterator[Repository]:
    """A repository with very small chunks."""
    with Place(database_url, str(tmp_path / "data"), chunk_nbytes=SMALL).open() as repo:
        yield repo


def state(**replaced: Any) -> dict[str, Any]:
    """Return a state of three tensors and two values."""
    model = {"a": torch.arange(64.0), "b": torch.ones(8), "c": torch.zeros(2, 3)}
    return {"model": model, "lr": 0.1, "flags": [True, None]} | replaced


def test_every_kind_of_change(small: Repository) -> None:
    dcpstore.save(state(), small)
    model = {"a": torch.arange(64.0), "b": torch.ones(8).bfloat16(), "c": torch.zeros(3, 2)}
    model["a"][40] = 7
    model["d"] = torch.ones(1)
    dcpstore.save({"model": model, "lr": 0.2, "flags": [True, None], "new": "x"}, small)
    diff = small.diff("v1", "v2")
    assert [e.fqn for e in diff.changed] == ["lr", "model.a"]
    assert [e.fqn for e in diff.retyped] == ["model.b"]
    assert [e.fqn for e in diff.reshaped] == ["model.c"]
    assert [e.fqn for e in diff.added] == ["model.d", "new"]
    assert diff.removed == ()
    assert {e.fqn for e in diff.unchanged} == {"flags.0", "flags.1"} or diff.unchanged
    lr = diff.changed[0]
    assert lr.old is not None
    assert lr.new is not None
    assert (json.loads(lr.old.value or ""), json.loads(lr.new.value or "")) == (0.1, 0.2)
    # Of `a`, three chunks of four are the same; nothing else of the new version was held before.
    assert diff.changed[1].nbytes_shared == 48 * 4
    assert (diff.nbytes_shared, diff.nbytes) == (48 * 4, 64 * 4 + 8 * 2 + 6 * 4 + 4)
    back = small.diff("v2", "v1")
    assert [e.fqn for e in back.removed] == ["model.d", "new"]
    assert (diff.old.number, diff.new.number, bool(diff)) == (1, 2, True)
    assert [e.stats for e in diff.entries] == [None] * len(diff.entries)


def test_equal_versions_have_no_difference(small: Repository) -> None:
    dcpstore.save(state(), small)
    dcpstore.save(state(), small)
    diff = small.diff("v1")  # against the tip of main
    assert not diff
    assert diff.new.number == 2
    assert diff.nbytes_shared == diff.nbytes > 0
    assert len(diff.unchanged) == len(diff.entries)
    with pytest.raises(NotFoundError, match="no version v9"):
        small.diff("v1", "v9")


def test_modules_count_their_entries(small: Repository) -> None:
    dcpstore.save(state(), small)
    dcpstore.save(state(lr=0.5, model={"a": torch.zeros(64), "b": torch.ones(8)}), small)
    modules = {m.name: m for m in small.diff("v1", "v2", stats=True).by_module(1)}
    model = modules["model"]
    assert (model.changed, model.removed, model.unchanged) == (1, 1, 1)
    assert model.nbytes == 64 * 4 + 8 * 4 + 6 * 4
    assert model.stats is not None
    assert model.stats.l2 == pytest.approx(float(torch.arange(64.0).norm()))
    assert (modules["lr"].changed, modules["lr"].stats) == (1, None)


def test_no_chunk_is_read_but_those_that_differ_and_only_with_stats(
    small: Repository,
) -> None:
    dcpstore.save(state(), small)
    changed = state()
    changed["model"]["a"][20] += 1  # in the second chunk of four
    dcpstore.save(changed, small)
    with small.trace() as seen:
        assert len(small.diff("v1", "v2").changed) == 1
        assert seen.requests == []
        (entry,) = small.diff("v1", "v2", stats=True).changed
    # the chunk as it was, and as it is
    assert [(request.method, request.nbytes) for request in seen.requests] == [("read", SMALL)] * 2
    assert len({request.key for request in seen.requests}) == 2
    assert entry.stats is not None
    assert (entry.stats.elements, entry.stats.compared, entry.stats.changed) == (64, 16, 1)
    assert entry.stats.l2 == entry.stats.max_abs == 1
    assert entry.stats.share_changed == 1 / 64


def test_the_number_of_queries_does_not_grow(small: Repository) -> None:
    counts = []
    for many in (1, 40):
        names = [f"w{i}" for i in range(many)]
        dcpstore.save({"m": {n: torch.zeros(40) for n in names}}, small, branch=f"b{many}")
        changed = {n: torch.arange(40.0) * (1 + i) for i, n in enumerate(names)}
        dcpstore.save({"m": changed}, small, branch=f"b{many}")
        with small.trace() as seen:
            assert len(small.diff(f"b{many}~1", f"b{many}").changed) == many
        counts.append(len(seen.statements))
    assert counts[0] == counts[1] > 1


def test_damage_is_named_and_only_the_chunks_show_it(small: Repository, place: Place) -> None:
    dcpstore.save(state(), small)
    changed = state()
    changed["model"]["a"] += 1
    dcpstore.save(changed, small)
    for pack in Path(place.data).glob("packs/**/*.pack"):
        pack.write_bytes(bytes(255 - byte for byte in pack.read_bytes()))
    assert small.diff("v1", "v2")
    with pytest.raises(CorruptionError, match=r"v[12]: 'model\.a': chunk \d of part 0 in pack"):
        small.diff("v1", "v2", stats=True)


def test_along_a_branch_each_version_is_compared_with_the_next_that_is_left(
    small: Repository, place: Place
) -> None:
    for step in range(1, 6):
        dcpstore.save(state(lr=step // 4), small, step=step)
    small.expire(keep_every=3)
    small.tag("start", 3)
    dcpstore.save(state(lr=1), small, step=6)
    small.expire(keep_every=3)
    assert [version.number for version in small.log()] == [6, 3]
    dcpstore.save(state(lr=1), small, step=7)

    def run(*args: str) -> Any:
        command = ["diff", "--along", "main", *args]
        return CliRunner(env={"DCPSTORE_REPO": place.url}).invoke(commands, command)

    shown = run("--json")
    assert shown.exit_code == 1
    assert [(one["old"], one["new"]) for one in json.loads(shown.stdout)] == [(3, 6), (6, 7)]
    assert run("v3", "v6").exit_code == 1
    assert run("v6", "v7").exit_code == 0
    alone = run("v6", "v6")
    assert (alone.exit_code, alone.stderr[:27]) == (0, "there is only one version, ")
    backwards = run("v7", "v6")
    assert (backwards.exit_code, "earlier version first" in backwards.stderr) == (2, True)


def test_the_command(small: Repository, place: Place, tmp_path: Path) -> None:
    dcpstore.save(state(), small, step=1)
    changed = state(lr=0.2)
    changed["model"]["a"] *= 1.5
    dcpstore.save(changed, small, step=2)

    def run(*args: str) -> Any:
        return CliRunner(env={"DCPSTORE_REPO": place.url}).invoke(commands, ["diff", *args])

    same = run("v1", "v1")
    assert (same.exit_code, same.output.startswith("v1 -> v1: ")) == (0, True)
    shown = run("v1", "v2", "--stats", "--sort", "relative")
    assert shown.exit_code == 1
    assert [line.split()[1] for line in shown.stdout.splitlines()[1:3]] == ["model.a", "lr"]
    assert " 0.5 " in shown.stdout
    shown = json.loads(run("v1", "v2", "--stats", "--json").stdout)
    (entry,) = [e for e in shown["entries"] if e["fqn"] == "model.a"]
    assert entry["stats"]["relative"] == pytest.approx(0.5)
    assert entry["old"]["dtype"] == "float32"
    rolled = json.loads(run("v1", "v2", "--depth", "1", "--json").stdout)
    assert {m["module"]: m["changed"] for m in rolled["modules"]}["model"] == 1
    along = run("--along", "main")
    assert along.exit_code == 1
    assert "v1 -> v2" in along.stdout
    for name in ("bars.png", "bars.svg"):
        assert run("v1", "v2", "--plot", str(tmp_path / name)).exit_code == 1
    assert run("--along", "main", "--plot", str(tmp_path / "heat.png")).exit_code == 1
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")
    assert (
        b"model.a" in (tmp_path / "bars.svg").read_bytes()
        or b"<svg" in (tmp_path / "bars.svg").read_bytes()
    )
    assert run("v1", "v2", "--plot", str(tmp_path / "x.gif")).exit_code == 2
    assert run("v1", "v1", "--plot", str(tmp_path / "none.png")).exit_code == 2
    assert run().exit_code == 2
    for args, columns in {
        ("v1", "v2"): "change, fqn, old, new, bytes, shared.",
        ("v1", "v2", "--depth", "1"): "module, added, ",
        ("--along", "main"): "versions, added, ",
    }.items():
        refused = run(*args, "--sort", "relative")
        assert (refused.exit_code, f"sort by one of {columns}" in refused.stderr) == (2, True)
    assert run("--along", "main", "--sort", "versions").exit_code == 1


def test_options_that_along_does_not_use_are_refused(small: Repository, place: Place) -> None:
    dcpstore.save(state(), small, step=1)
    dcpstore.save(state(lr=0.2), small, step=2)

    def run(*args: str) -> Any:
        arguments = ["diff", "--along", "main", *args]
        return CliRunner(env={"DCPSTORE_REPO": place.url}).invoke(commands, arguments)

    for args, name in ((("--all",), "--all"), (("--depth", "1"), "--depth")):
        refused = run(*args)
        assert (refused.exit_code, refused.stdout, name in refused.stderr) == (2, "", True)
    assert "modules" in json.loads(run("--depth", "1", "--json").stdout)[0]


def test_the_command_says_where_the_plot_is(
    small: Repository, place: Place, tmp_path: Path
) -> None:
    changed = state()
    changed["model"]["a"] *= 1.5
    dcpstore.save(state(), small, step=1)
    dcpstore.save(changed, small, step=2)
    path = tmp_path / "bars.svg"
    command = ["diff", "v1", "v2", "--plot", str(path)]
    shown = CliRunner(env={"DCPSTORE_REPO": place.url}).invoke(commands, command)
    assert (shown.exit_code, shown.stderr) == (1, f"the plot is in {path}\n")
    assert path.stat().st_size


def test_an_unknown_version_is_an_error(small: Repository, place: Place) -> None:
    def run(*args: str) -> Any:
        return CliRunner(env={"DCPSTORE_REPO": place.url}).invoke(commands, ["diff", *args])

    assert run("v9").exit_code == 1
