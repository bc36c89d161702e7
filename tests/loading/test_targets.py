"""Tensors to load into, of every kind: filled right, or refused before any is touched."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import Shard, distribute_tensor

import dcpstore
from dcpstore import InvalidInputError, MismatchError, UnsafeDataError
from tests.ranks import RankPool, mesh
from tests.torch_release import since_2_9


def test_conjugated_and_negated_views_are_filled(tmp_path: Path) -> None:
    z = torch.tensor([1 + 2j, 3 - 1j])
    dcpstore.save({"z": z, "x": torch.tensor([1.0, 2.0])}, tmp_path)
    conj = torch.zeros(2, dtype=torch.complex64).conj()
    neg = torch.zeros(2, dtype=torch.complex64).conj().imag
    assert conj.is_conj()
    assert neg.is_neg()
    dcpstore.load({"z": conj, "x": neg}, tmp_path)
    assert torch.equal(conj, z)
    assert torch.equal(neg, torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("kind", ["expanded", "strided", "sparse"])
def test_a_tensor_whose_elements_share_memory_is_refused(tmp_path: Path, kind: str) -> None:
    dcpstore.save({"a": torch.ones(2), "w": torch.arange(9.0).reshape(3, 3)}, tmp_path)
    targets = {
        "expanded": torch.zeros(1, 3).expand(3, 3),
        "strided": torch.zeros(5).as_strided((3, 3), (1, 1)),
        "sparse": torch.zeros(3, 3).to_sparse(),
    }
    state = {"a": torch.zeros(2), "w": targets[kind]}
    with pytest.raises(MismatchError, match=r"'w' (shares memory|is a tensor in the version)"):
        dcpstore.load(state, tmp_path)
    assert torch.equal(state["a"], torch.zeros(2))


def test_an_inference_tensor_is_filled_with_another_dtype(tmp_path: Path) -> None:
    dcpstore.save({"w": torch.ones(3)}, tmp_path)
    with torch.inference_mode():
        target = torch.zeros(3, dtype=torch.float64)
    dcpstore.load({"w": target}, tmp_path, on_dtype="cast")
    assert torch.equal(target, torch.ones(3, dtype=torch.float64))


def test_a_cast_that_torch_cannot_do_changes_nothing(tmp_path: Path) -> None:
    dcpstore.save({"a": torch.ones(3), "b": torch.ones(4)}, tmp_path)
    packed = torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    state = {"a": torch.zeros(3), "b": packed}
    with pytest.raises(MismatchError, match=r"'b' .* cannot be converted"):
        dcpstore.load(state, tmp_path, on_dtype="cast")
    assert torch.equal(state["a"], torch.zeros(3))


def test_a_pickle_that_is_not_allowed_changes_nothing(tmp_path: Path) -> None:
    dcpstore.save({"w": torch.ones(3), "o": {"kind": object}}, tmp_path, allow_pickle=True)
    state: dict[str, Any] = {"w": torch.zeros(3), "o": {"kind": None}}
    with pytest.raises(UnsafeDataError, match=r"v1: 'o.kind': a value is a pickle"):
        dcpstore.load(state, tmp_path)
    assert torch.equal(state["w"], torch.zeros(3))
    (difference,) = dcpstore.load(state, tmp_path, dry_run=True).differences
    assert "'o.kind': a value is a pickle" in difference
    dcpstore.load(state, tmp_path, allow_pickle=True)
    assert state["o"]["kind"] is object


def save_apart(rank: int, folder: Path) -> None:
    whole = distribute_tensor(torch.arange(1.0, 9.0), mesh((2,)), [Shard(0)])
    writer = dcpstore.RepositoryWriter(folder)
    dcp.save({"w": whole}, storage_writer=writer, use_collectives=False)


def load_apart(rank: int, folder: Path) -> None:
    mine = distribute_tensor(torch.zeros(8), mesh((2,)), [Shard(0)])
    dcpstore.load({"w": mine}, folder, f"main/rank-{rank}", no_dist=True)
    assert mine.to_local().tolist() == [4.0 * rank + i for i in range(1, 5)]


@since_2_9
def test_a_part_of_a_tensor_is_not_loaded_as_the_whole(tmp_path: Path, two_ranks: RankPool) -> None:
    two_ranks.run(save_apart, tmp_path)
    two_ranks.run(load_apart, tmp_path)
    whole = torch.zeros(8)
    with pytest.raises(MismatchError, match="only a part of 'w': 4 elements of this rank's box"):
        dcpstore.load({"w": whole}, tmp_path, "main/rank-0")
    assert torch.equal(whole, torch.zeros(8))


def test_tensors_on_the_meta_device_get_memory_only_in_a_load_that_fits(tmp_path: Path) -> None:
    dcpstore.save({"m": {"w": torch.ones(3)}, "l": [torch.ones(2)]}, tmp_path)
    lists = [torch.empty(2, device="meta")]
    inner = {"w": torch.empty(3, device="meta"), "b": torch.zeros(2)}
    state = {"m": inner, "l": lists}
    with pytest.raises(MismatchError):
        dcpstore.load(state, tmp_path)
    dcpstore.load(state, tmp_path, dry_run=True)
    assert inner["w"].is_meta
    assert lists[0].is_meta
    report = dcpstore.load(state, tmp_path, exclude=["l.*"], init_missing=lambda _, t: t.fill_(7))
    assert report.missing == ("m.b",)
    assert torch.equal(inner["w"], torch.ones(3))
    assert torch.equal(inner["b"], torch.full((2,), 7.0))
    assert lists[0].is_meta  # and no garbage
    dcpstore.load(state, tmp_path, include=["l.*"])
    assert torch.equal(lists[0], torch.ones(2))


def test_what_is_missing_on_the_meta_device_is_initialised_in_memory(tmp_path: Path) -> None:
    dcpstore.save({"w": torch.ones(3)}, tmp_path)
    state = {"w": torch.empty(3, device="meta"), "new": torch.empty(2, device="meta")}
    dcpstore.load(state, tmp_path, init_missing=lambda _, tensor: tensor.fill_(7))
    assert torch.equal(state["new"], torch.full((2,), 7.0))
    state["new"] = torch.empty(2, device="meta")
    dcpstore.load(state, tmp_path, strict=False)
    assert state["new"].is_meta


def test_one_tensor_with_two_names_stays_one(tmp_path: Path) -> None:
    dcpstore.save({"a": torch.ones(3), "b": torch.ones(3)}, tmp_path)
    one = torch.empty(3, device="meta")
    state = {"a": one, "b": one}
    dcpstore.load(state, tmp_path)
    assert state["a"] is state["b"]


def test_an_immutable_state_is_refused(tmp_path: Path) -> None:
    dcpstore.save({"w": torch.ones(2), "c": {"lr": 0.1, "t": torch.ones(2)}}, tmp_path)
    frozen: Any = types.MappingProxyType({"lr": 0.0, "t": torch.zeros(2)})
    state = {"w": torch.zeros(2), "c": frozen}
    with pytest.raises(InvalidInputError, match=r"'c.lr' is inside a mappingproxy"):
        dcpstore.load(state, tmp_path)
    assert torch.equal(state["w"], torch.zeros(2))
    dcpstore.load(state, tmp_path, exclude=["c.lr"])
    assert torch.equal(frozen["t"], torch.ones(2))
    with pytest.raises(InvalidInputError, match="the state is a mappingproxy"):
        dcpstore.load(types.MappingProxyType(state), tmp_path)  # type: ignore[arg-type]


def test_values_of_a_state_that_is_not_flattened_are_set(tmp_path: Path) -> None:
    dcpstore.save({"step": 5, "w": torch.ones(2)}, tmp_path)
    state = {"step": 0, "w": torch.zeros(2)}
    planner = dcpstore.DefaultLoadPlanner(flatten_state_dict=False)
    dcpstore.load(state, tmp_path, planner=planner)
    assert state == {"step": 5, "w": state["w"]}
    assert torch.equal(state["w"], torch.ones(2))
