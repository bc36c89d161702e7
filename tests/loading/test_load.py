"""What a load finds, refuses and reports; on both databases."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dcpstore
from dcpstore import ChunkDefaults, CorruptionError, InvalidInputError, Repository
from tests.ranks import RankPool
from tests.soundness import Place


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


@pytest.mark.parametrize("codec", ["none", "blosc", "zstd"])
def test_a_flipped_bit_anywhere_is_found_and_named(tmp_path: Path, codec: str) -> None:
    repo = dcpstore.open(tmp_path / "r", chunk=ChunkDefaults(nbytes=512, codec=codec))
    state = {"w": torch.arange(512.0).reshape(64, 8), "n": torch.arange(9)}
    dcpstore.save(state, repo)
    (pack,) = (Path(repo.storage.url) / "packs").rglob("*.pack")
    bits = os.path.getsize(pack) * 8

    @settings(deadline=None, max_examples=60)
    @given(st.integers(0, bits - 1))
    def check(bit: int) -> None:
        flip(pack, bit)
        try:
            filled = {fqn: torch.zeros_like(tensor) for fqn, tensor in state.items()}
            text = ""
            try:
                dcpstore.load(filled, repo)
            except CorruptionError as error:
                text = str(error)
            if text:
                assert re.match(r"v1: '[wn]': chunk \d+ of part 0 in pack .* offset \d+", text)
            else:  # some bits of a compressed chunk mean nothing to its decoder
                assert codec != "none"
                assert all(torch.equal(filled[fqn], state[fqn]) for fqn in state)
        finally:
            flip(pack, bit)

    check()
    assert torch.equal(repo.read()["w"], state["w"])
    repo.close()


@pytest.mark.parametrize("wrong", ["missing", "short", "empty"])
def test_a_pack_that_is_not_whole_is_named(repo: Repository, wrong: str) -> None:
    dcpstore.save({"w": torch.ones(100)}, repo)
    (pack,) = (Path(repo.storage.url) / "packs").rglob("*.pack")
    whole = pack.read_bytes()
    if wrong == "missing":
        pack.unlink()
    else:
        pack.write_bytes(whole[:50] if wrong == "short" else b"")
    with pytest.raises(CorruptionError, match=pack.name):
        dcpstore.load({"w": torch.zeros(100)}, repo)
    pack.write_bytes(whole)


def test_without_verification_damaged_bytes_are_loaded(repo: Repository) -> None:
    dcpstore.save({"w": torch.ones(4)}, repo)
    (pack,) = (Path(repo.storage.url) / "packs").rglob("*.pack")
    flip(pack, 3)
    filled = {"w": torch.zeros(4)}
    dcpstore.load(filled, repo, verify=False)
    assert not torch.equal(filled["w"], torch.ones(4))
    flip(pack, 3)


def test_a_load_reports_what_it_did(repo: Repository) -> None:
    version = dcpstore.save({"a": torch.ones(10), "b": torch.ones(5), "c": 1}, repo)
    report = dcpstore.load({"a": torch.zeros(10)}, repo)
    assert report.version == version
    assert (report.missing, report.unexpected) == ((), ("b", "c"))
    assert (report.chunks, report.nbytes_read) == (1, 40)
    assert set(report.seconds) == {"plan", "read"}


def test_targets_of_every_kind_are_filled_in_place(repo: Repository) -> None:
    source = torch.randn(6, 4)
    dcpstore.save({"w": source}, repo)
    for target in (
        torch.zeros(6, 4),
        torch.zeros(4, 6).T,
        torch.zeros(12, 4)[::2],
        torch.nn.Parameter(torch.zeros(6, 4)),
    ):
        state: dict[str, Any] = {"w": target}
        dcpstore.load(state, repo)
        assert state["w"] is target
        assert torch.equal(target, source)


def test_int_keys_and_lists_are_the_callers_own(repo: Repository) -> None:
    saved = {"s": {0: {"step": 5, "t": torch.ones(2)}}, "l": [{"lr": 0.1}, torch.ones(3)]}
    dcpstore.save(saved, repo)
    state = {"s": {0: {"step": 0, "t": torch.zeros(2)}}, "l": [{"lr": 0.0}, torch.zeros(3)]}
    dcpstore.load(state, repo)
    assert state["s"].keys() == {0}
    assert state["s"][0]["step"] == 5
    assert state["l"][0] == {"lr": 0.1}
    assert torch.equal(state["l"][1], torch.ones(3))


def test_an_empty_dict_in_a_list_is_not_an_item(repo: Repository) -> None:
    dcpstore.save({"l": [{}, torch.ones(1)]}, repo)
    state = {"l": [{}, torch.zeros(1)]}
    dcpstore.load(state, repo)
    assert state["l"][0] == {}
    assert float(state["l"][1]) == 1


def test_two_items_with_one_name_are_refused(repo: Repository) -> None:
    dcpstore.save({"a": {"1": 7}}, repo)
    state = {"a": {1: 0, "1": 0}}
    with pytest.raises(InvalidInputError, match="same FQN"):
        dcpstore.load(state, repo)
    assert state == {"a": {1: 0, "1": 0}}


def test_a_state_to_load_into_that_contains_itself_is_refused(repo: Repository) -> None:
    dcpstore.save({"a": 1}, repo)
    state: dict[str, Any] = {}
    state["a"] = state
    with pytest.raises(InvalidInputError, match="contains itself"):
        dcpstore.load(state, repo)


def test_keys_that_are_not_text_stay_the_callers_own(repo: Repository) -> None:
    keys: list[Any] = [None, True, 1.5, (1, 2), b"x"]
    dcpstore.save({"d": {key: i for i, key in enumerate(keys)}, "t": {None: torch.ones(2)}}, repo)
    with torch.device("meta"):
        unfilled = torch.zeros(2)
    state: dict[str, Any] = {"d": dict.fromkeys(keys), "t": {None: unfilled}}
    report = dcpstore.load(state, repo)
    assert (report.missing, report.unexpected) == ((), ())
    assert state["d"] == {key: i for i, key in enumerate(keys)}
    assert torch.equal(state["t"][None], torch.ones(2))
    dcpstore.save({"d": {None: {"deep": {None: 3}}}}, repo)
    nested: dict[str, Any] = {"d": {None: {"deep": {None: 0}}}}
    dcpstore.load(nested, repo)
    assert nested == {"d": {None: {"deep": {None: 3}}}}


def test_slices_read_only_the_chunks_they_intersect(tmp_path: Path) -> None:
    repo = dcpstore.open(tmp_path / "r", chunk=ChunkDefaults(nbytes=256))
    w = torch.randn(32, 8)
    dcpstore.save({"w": w}, repo)
    for index in (0, -1, slice(3, 9), (slice(None), 2), (..., slice(1, 8, 3)), (4, 5), slice(0, 0)):
        assert torch.equal(repo.read("main", {"w": index})["w"], w[index])
    (pack,) = (Path(repo.storage.url) / "packs").rglob("*.pack")
    flip(pack, 8)  # in the first chunk, rows 0 to 7
    assert torch.equal(repo.read("main", {"w": slice(8, 20)})["w"], w[8:20])
    with pytest.raises(CorruptionError):
        repo.read("main", {"w": slice(7, 9)})
    repo.close()


def one_rank_is_short(rank: int, place: Place) -> str:
    with place.open() as repo:
        state = {"w": torch.zeros(3)} if rank == 0 else {"w": torch.zeros(3), "x": torch.ones(1)}
        try:
            dcpstore.load(state, repo)
        except dcpstore.MismatchError as error:
            assert torch.equal(state["w"], torch.zeros(3))  # nothing was touched
            return str(error)
    return "loaded"


def test_no_rank_changes_a_tensor_unless_all_ranks_fit(place: Place, two_ranks: RankPool) -> None:
    with place.open() as repo:
        dcpstore.save({"w": torch.ones(3)}, repo)
    first, second = two_ranks.run(one_rank_is_short, place)
    assert first == second
    assert "'x' is not in the version" in first
