"""Attacks by what a repository holds: its catalog, its data folder, its journal; and on exports."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import dcpstore
from dcpstore import convert
from dcpstore.errors import CorruptionError, DcpstoreError, InvalidInputError, UnsafeDataError
from dcpstore.formats.journal_entry import decode_operation
from dcpstore.formats.journal_segment import Span, segment_key
from dcpstore.maintenance.rebuild import rebuild
from tests.hostile.attacks import NAMES, Attack, Touch, entering, rows, saved
from tests.hostile.parsers import sign_operation, sign_segment

ATTACKS: dict[str, Attack] = {}

attack = entering(ATTACKS)

UPDATE_LR = "UPDATE entry SET value = ? WHERE fqn = (SELECT id FROM fqn WHERE name = 'lr')"


@attack
def a_pickle_as_a_blob_of_a_version(folder: Path) -> None:
    repo = folder / "repo"
    dcpstore.save({"x": Touch(folder / "stolen")}, repo, allow_pickle=True)
    with dcpstore.open(repo) as opened:
        for call in (
            opened.read,
            lambda: dcpstore.load({"x": 0}, opened),
            lambda: convert.export_torch(opened, None, folder / "o.pt"),
            lambda: convert.export_dcp(opened, None, folder / "o"),
            lambda: convert.export_safetensors(opened, None, folder / "o.safetensors"),
        ):
            with pytest.raises((UnsafeDataError, InvalidInputError)):
                call()
        assert opened.show().number == 1
        assert opened.verify(deep=True).damaged == ()
    assert not (folder / "stolen").exists()
    with dcpstore.open(repo) as opened:  # the pickle is one indeed
        opened.read(allow_pickle=True)
    assert (folder / "stolen").exists()


@attack
def a_pickle_in_a_value_row(folder: Path) -> None:
    repo = saved(folder)
    for text in ('{"$blob":"pickle"}', '{"$blob": "pickle"}', '[{"$blob":"pickle"}]'):
        with rows(repo) as catalog:
            catalog.execute(UPDATE_LR, (text,))
        with dcpstore.open(repo) as opened, pytest.raises((UnsafeDataError, CorruptionError)):
            opened.read()


@attack
def a_link_out_of_the_data_folder(folder: Path) -> None:
    repo = Path(saved(folder))
    shutil.move(repo / "packs", folder / "elsewhere")
    (repo / "packs").symlink_to(folder / "elsewhere")
    with dcpstore.open(repo) as opened:
        with pytest.raises(CorruptionError, match="leads out"):
            opened.read()
        with pytest.raises(DcpstoreError):
            dcpstore.save({"w": torch.ones(3)}, opened)
    assert len(list((folder / "elsewhere").rglob("*.pack"))) == 1


@attack
def pipes_in_the_place_of_files(folder: Path) -> None:
    repo = Path(saved(folder))
    folders = ("packs/*", "manifests", "pages", "plans", "operations")
    for path in [path for folder in folders for path in repo.glob(f"{folder}/*")]:
        path.unlink()
        os.mkfifo(path)  # opening one to read waits for a writer
    with dcpstore.open(repo) as opened:
        with pytest.raises(CorruptionError, match="not a regular file"):
            opened.read(None, ["w"])
        with pytest.raises(CorruptionError, match="not a regular file"):
            dcpstore.load({"w": torch.ones(6)}, opened)
        assert opened.verify(deep=True).damaged
    with pytest.raises(DcpstoreError):
        rebuild(str(repo), folder / "new")


@attack
def names_that_lead_out_of_an_export(folder: Path) -> None:
    state = {name: torch.ones(2) for name in NAMES}
    repo = saved(folder, state)
    inside = folder / "exports" / "deep"
    inside.mkdir(parents=True)
    before = {path for path in folder.rglob("*") if inside not in path.parents}
    with dcpstore.open(repo) as opened:
        convert.export_zarr(opened, None, inside / "zarr")
        convert.export_dcp(opened, None, inside / "dcp")
        convert.export_torch(opened, None, inside / "torch.pt")
        convert.export_safetensors(opened, None, inside / "a.safetensors")
        convert.export_safetensors(opened, None, inside / "shards", max_shard_size=16)
        tree = opened.zarr()
        assert set(opened.read()) == set(NAMES)
        assert tree is not None
    assert {path for path in folder.rglob("*") if inside not in path.parents} == before
    found = torch.load(inside / "torch.pt")
    assert set(found) == set(NAMES)


@attack
def pack_keys_that_lead_out(folder: Path) -> None:
    repo = saved(folder)
    (folder / "secret").write_bytes(b"x" * 10_000)
    for key in ("../secret", "/etc/passwd", "packs/../../secret", "packs/\0", "x" * 5000):
        with rows(repo) as catalog:
            catalog.execute("UPDATE pack SET key = ?", (key,))
        with dcpstore.open(repo) as opened:
            with pytest.raises(DcpstoreError):
                opened.read()
            assert opened.verify(deep=True).damaged
    assert (folder / "secret").read_bytes() == b"x" * 10_000


@attack
def giant_claims_in_the_catalog(folder: Path) -> None:
    claims: list[tuple[str, str, str | int]] = [
        ("layout", "shape", "[4611686018427387904]"),
        ("layout", "shape", "[-1]"),
        ("layout", "shape", "[12]"),
        ("layout", "parts", "[[[0],[6],[4611686018427387904]]]"),
        ("layout", "parts", "[[[0],[6],[0]]]"),
        ("layout", "parts", "[[[0],[6],[]]]"),
        ("layout", "parts", "[[[4611686018427387904],[6],[6]]]"),
        ("layout", "parts", "[[[0],[3],[6]]]"),
        ("layout", "parts", "[[[0],[4611686018427387904],[1]]]"),
        ("chunk", "offset", 2**62),
        ("chunk", "length", 2**62),
    ]
    for number, (table, column, value) in enumerate(claims):
        repo = saved(folder / str(number))
        with rows(repo) as catalog:
            catalog.execute(f'UPDATE {table} SET "{column}" = ?', (value,))
        with dcpstore.open(repo) as opened, pytest.raises(DcpstoreError):
            opened.read(None, ["w"])


@attack
def paths_nested_without_end(folder: Path) -> None:
    note = json.dumps({"w": ["a"] * 100_000})
    save_file({"w": torch.ones(2)}, folder / "a.safetensors", {"dcpstore.paths": note})
    with dcpstore.open(folder / "repo") as repo:
        convert.import_any(folder / "a.safetensors", repo)
        convert.export_torch(repo, None, folder / "fine.pt")
    with rows(str(folder / "repo")) as catalog:
        catalog.execute("UPDATE fqn SET path = ?", (json.dumps(["a"] * 100_000),))
    with dcpstore.open(folder / "repo") as repo, pytest.raises(InvalidInputError):
        convert.export_torch(repo, None, folder / "deep.pt")


@attack
def values_nested_without_end_in_the_catalog(folder: Path) -> None:
    repo = saved(folder)
    for depth in (300, 900, 5000):
        with rows(repo) as catalog:
            value = "[" * depth + "]" * depth
            catalog.execute(UPDATE_LR, (value,))
        with dcpstore.open(repo) as opened:
            with pytest.raises(CorruptionError):
                opened.read()
            if depth > 400:
                with pytest.raises(CorruptionError):
                    opened.zarr()


def journal(repo: str) -> list[dict[str, Any]]:
    """Return what the journal of a repository says."""
    return [decode_operation(p.read_bytes()) for p in sorted(Path(repo, "operations").iterdir())]


def rejournaled(repo: str, operations: list[dict[str, Any]]) -> None:
    """Let the journal say something else, with digests that are right."""
    for entries in operations:
        body = json.dumps(entries).encode()
        Path(repo, f"operations/{entries['operation']:012}.json").write_bytes(sign_operation(body))


@attack
def a_journal_that_counts_without_end(folder: Path) -> None:
    repo = saved(folder)
    Path(repo, "operations/999999999999999999.json").write_bytes(b"{}")
    report = rebuild(repo, folder / "new")
    assert report.versions == (1,)
    assert len(report.problems) == 2


@attack
def segments_that_expand_claim_or_contain_too_much(folder: Path) -> None:
    repo = saved(folder)
    lines = [Path(repo, "operations/000000000002.json").read_bytes()] * 32
    bomb = zlib.compress(bytes(200 << 20), 9)
    first = Path(repo, segment_key(Span(1, 32)))
    first.write_bytes(sign_segment(bomb))
    far = 10**15 // 131_072 * 131_072
    Path(repo, segment_key(Span(far + 1, far + 131_072))).write_bytes(b"")
    Path(repo, "operations/000000000001-999999999999.segment").write_bytes(b"")  # of no span
    with dcpstore.open(repo) as opened:
        (damage,) = opened.verify(deep=True).damaged
        assert "expands to more than 100 times" in damage.reason
    report = rebuild(repo, folder / "new")
    assert report.versions == (1,)
    assert len(report.problems) == 3  # two segments, and what lies between them
    first.write_bytes(sign_segment(zlib.compress(b"\n".join(lines))))  # one operation many times
    assert rebuild(repo, folder / "third").versions == (1,)


@attack
def a_journal_whose_parents_go_in_a_circle(folder: Path) -> None:
    repo = saved(folder)
    dcpstore.save({"w": torch.ones(2)}, repo)
    entries = journal(repo)
    facts = [one["version"] for one in entries if one["kind"] == "save"]
    facts[0]["parent"], facts[1]["parent"] = facts[1]["uid"], facts[0]["uid"]
    rejournaled(repo, entries)
    shutil.rmtree(Path(repo, "manifests"))
    Path(repo, "manifests").mkdir()
    report = rebuild(repo, folder / "new")
    assert report.versions == ()
    assert report.lost == (1, 2)


@attack
def a_journal_that_names_what_is_no_pack(folder: Path) -> None:
    for number, key in enumerate(("catalog.db", "../x", "manifests/ab.json")):
        repo = saved(folder / str(number))
        entries = journal(repo)
        described = [one["version"] for one in entries if "version" in one]
        assert described
        for facts in described:
            facts["packs"] = [[key, 1]]
        rejournaled(repo, entries)
        report = rebuild(repo, folder / f"new{number}")
        assert report.problems
        assert report.versions == (1,)  # the tag's operation names it, and its manifest is sound
        with dcpstore.open(folder / f"new{number}", create=False) as opened:
            assert key not in {row.pack for row in opened.sql("SELECT pack FROM storage")}


@attack
def a_journal_of_two_repositories(folder: Path) -> None:
    repo = saved(folder)
    dcpstore.save({"w": torch.ones(2)}, repo)
    entries = journal(repo)
    for one in entries:
        if "version" in one:
            one["version"]["number"] = 1
    rejournaled(repo, entries)
    with pytest.raises(CorruptionError, match="not of one repository"):
        rebuild(repo, folder / "new")
