"""Safetensors in and out, against the safetensors library; and files that lie about themselves."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model

import dcpstore
from dcpstore import (
    AlreadyExistsError,
    CorruptionError,
    DcpstoreError,
    InvalidInputError,
    NotFoundError,
    Repository,
    UnsafeDataError,
)
from dcpstore.convert import export_safetensors, import_safetensors, import_torch
from dcpstore.convert.safetensors_files import parse_size
from dcpstore.convert.safetensors_header import TAGS, read_header
from tests.convert.states import (
    FOREIGN,
    NOT_IN_SAFETENSORS,
    assert_holds,
    every_dtype,
    raw,
    same,
    trained,
)

pytestmark = pytest.mark.slow_on_postgres

INDEX = "model.safetensors.index.json"
# The library's own writer in torch lacks it; its Rust side has it, and reads it.
NOT_WRITTEN_BY_LIBRARY = (*NOT_IN_SAFETENSORS, torch.float8_e8m0fnu)


def carried(without: tuple[torch.dtype, ...]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in every_dtype().items() if tensor.dtype not in without}


def test_every_dtype_comes_in(repo: Repository, tmp_path: Path) -> None:
    state = carried(NOT_WRITTEN_BY_LIBRARY)
    save_file(state, tmp_path / "in.safetensors")
    version = import_safetensors(tmp_path / "in.safetensors", repo)
    assert_holds(repo, version.number, state)


def test_every_dtype_goes_out(repo: Repository, tmp_path: Path) -> None:
    state = carried(NOT_WRITTEN_BY_LIBRARY)
    dcpstore.save(state, repo)
    done = export_safetensors(repo, None, tmp_path / "out.safetensors")
    back = load_file(tmp_path / "out.safetensors")
    assert back.keys() == state.keys()
    assert all(same(back[name], state[name]) for name in state)
    assert done.nbytes == sum(tensor.nbytes for tensor in state.values())


def test_scales_pass_both_ways(repo: Repository, tmp_path: Path) -> None:
    state = {"scale": raw(torch.float8_e8m0fnu, 7)}
    dcpstore.save(state, repo)
    export_safetensors(repo, None, tmp_path / "out.safetensors")
    version = import_safetensors(tmp_path / "out.safetensors", repo)
    assert_holds(repo, version.number, state)


def test_tensors_lie_where_they_can_be_mapped(repo: Repository, tmp_path: Path) -> None:
    dcpstore.save(carried(NOT_IN_SAFETENSORS), repo)
    export_safetensors(repo, None, tmp_path / "out.safetensors")
    for tensor in read_header(tmp_path / "out.safetensors").tensors.values():
        assert tensor.offset % tensor.dtype.itemsize == 0


def test_a_nested_state_with_values_passes_both_ways(repo: Repository, tmp_path: Path) -> None:
    torch.save(trained(), tmp_path / "in.pt")
    first = import_torch(tmp_path / "in.pt", repo)
    done = export_safetensors(repo, None, tmp_path / "out")
    second = import_safetensors(tmp_path / "out", repo)
    assert repo.entries(first.number) == repo.entries(second.number)
    assert second.nbytes_written == 0
    assert (done.files, done.values) == (1, len([e for e in repo.entries() if e.kind == "value"]))


def test_shards_have_hugging_faces_names_and_index(repo: Repository, tmp_path: Path) -> None:
    state = {f"layer.{i}.weight": torch.randn(100) for i in range(10)}
    state["large"] = torch.randn(1000)
    dcpstore.save({"model": state, "step": 3}, repo)
    done = export_safetensors(repo, None, tmp_path / "out", max_shard_size="1KB")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    assert (
        names == [f"model-{i:05}-of-{len(names):05}.safetensors" for i in range(1, 7)][: len(names)]
    )
    assert done.files == len(names) + 1 == len(list((tmp_path / "out").iterdir()))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    for fqn, name in index["weight_map"].items():
        with safe_open(tmp_path / "out" / name, "pt") as file:
            assert same(file.get_tensor(fqn), state[fqn.removeprefix("model.")])
    for name in names:
        held = read_header(tmp_path / "out" / name).tensors.values()
        nbytes = sum(t.shape[0] * 4 for t in held)
        assert nbytes <= 1000 or len(held) == 1
    for source in (tmp_path / "out", tmp_path / "out" / INDEX):
        version = import_safetensors(source, repo)
        assert repo.entries(version.number) == repo.entries(1)


def test_several_files_are_one_version(repo: Repository, tmp_path: Path) -> None:
    parts = [{"a": torch.randn(3)}, {"b": torch.randn(4)}]
    for i, part in enumerate(parts):
        save_file(part, tmp_path / f"{i}.safetensors")
    version = import_safetensors(sorted(tmp_path.glob("*.safetensors")), repo)
    assert_holds(repo, version.number, parts[0] | parts[1])
    save_file({"a": torch.ones(3)}, tmp_path / "2.safetensors")
    with pytest.raises(InvalidInputError, match=r"0\.safetensors.*2\.safetensors.* both hold 'a'"):
        import_safetensors(sorted(tmp_path.glob("*.safetensors")), repo)
    assert len(repo.log()) == 1


def test_files_given_twice_are_refused_with_what_to_give(repo: Repository, tmp_path: Path) -> None:
    dcpstore.save({"m": {"e": torch.randn(100), "w": torch.randn(100)}}, repo)
    folder = tmp_path / "shards"
    export_safetensors(repo, None, folder, max_shard_size="400B")
    everything = sorted(folder.iterdir())  # what a shell makes of shards/*
    first = everything[0]
    for chosen in (everything, [folder, first], [folder, folder / INDEX], [first, first]):
        with pytest.raises(InvalidInputError, match=r"is given twice.*give the index alone"):
            import_safetensors(chosen, repo)
    assert len(repo.log()) == 1


def model_with_a_tie() -> torch.nn.ModuleDict:
    model = torch.nn.ModuleDict(
        {"embed": torch.nn.Linear(5, 5, bias=False), "head": torch.nn.Linear(5, 5, bias=False)}
    )
    model["head"].weight = model["embed"].weight
    return model


def test_a_tied_tensor_is_written_once_and_tied_again(repo: Repository, tmp_path: Path) -> None:
    model = model_with_a_tie()
    dcpstore.save(dict(model.state_dict()), repo)
    done = export_safetensors(repo, None, tmp_path / "out.safetensors")
    assert (done.tensors, done.nbytes) == (2, 100)
    other = model_with_a_tie()
    load_model(other, tmp_path / "out.safetensors")
    assert same(other["head"].weight.detach(), model["embed"].weight.detach())


def test_a_tie_of_the_library_comes_in(repo: Repository, tmp_path: Path) -> None:
    model = model_with_a_tie()
    save_model(model, str(tmp_path / "in.safetensors"))
    version = import_safetensors(tmp_path / "in.safetensors", repo)
    assert_holds(repo, version.number, dict(model.state_dict()))


def test_what_the_format_cannot_carry_is_named(repo: Repository, tmp_path: Path) -> None:
    dcpstore.save({"a": {"z": torch.ones(2, dtype=torch.complex128)}}, repo)
    with pytest.raises(InvalidInputError, match=r"complex128.*'a\.z'.*torch, dcp or zarr"):
        export_safetensors(repo, None, tmp_path / "out")
    dcpstore.save(
        {"w": torch.ones(2), "odd": Odd(), "long": ["x" * 1000] * 100}, repo, allow_pickle=True
    )
    with pytest.raises(InvalidInputError, match=r"'odd'.*--tensors-only"):
        export_safetensors(repo, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = export_safetensors(repo, None, tmp_path / "out", tensors_only=True)
    assert (done.tensors, done.values) == (1, 0)


def test_a_long_value_is_carried(repo: Repository, tmp_path: Path) -> None:
    dcpstore.save({"w": torch.ones(2), "long": ("x" * 1000,) * 100}, repo)
    export_safetensors(repo, None, tmp_path / "out")
    version = import_safetensors(tmp_path / "out", repo)
    assert repo.read(version.number)["long"] == ("x" * 1000,) * 100


class Odd:
    """No plain value."""


def test_dtype_on_both_ways(repo: Repository, tmp_path: Path) -> None:
    state = {"w": torch.randn(5), "n": torch.arange(3)}
    save_file(state, tmp_path / "in.safetensors")
    version = import_safetensors(tmp_path / "in.safetensors", repo, dtype="fp16")
    assert_holds(repo, version.number, {"w": state["w"].half(), "n": state["n"]})
    export_safetensors(repo, None, tmp_path / "out.safetensors", dtype="bfloat16")
    assert same(load_file(tmp_path / "out.safetensors")["w"], state["w"].half().bfloat16())


def test_an_existing_target_is_left_alone(repo: Repository, tmp_path: Path) -> None:
    dcpstore.save({"w": torch.ones(2)}, repo)
    (tmp_path / "out").mkdir()
    (tmp_path / "out.safetensors").write_text("mine")
    for target in ("out", "out.safetensors"):
        with pytest.raises(AlreadyExistsError, match="replaces nothing"):
            export_safetensors(repo, None, tmp_path / target)
    assert (tmp_path / "out.safetensors").read_text() == "mine"
    assert list((tmp_path / "out").iterdir()) == []


def test_sizes() -> None:
    assert [parse_size(s) for s in (7, "7", "5GB", "1.5 MiB", "2k")] == [
        7,
        7,
        5 * 10**9,
        1572864,
        2000,
    ]
    for bad in ("", "GB", "-1", "5XB", "0", "1e9"):
        with pytest.raises(InvalidInputError, match="size"):
            parse_size(bad)


def header(**entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def f32(begin: int, end: int, *shape: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}


ONE = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
TWICE = b"{" + ONE + b"," + ONE + b"}"
NOTED_TWICE = b'{"__metadata__":{"n":"1","n":"2"}}'
GOOD = header(a=f32(0, 8, 2), b=f32(8, 12, 1)) + bytes(12)
LIARS: dict[str, bytes] = {
    "empty": b"",
    "short length": b"\x01\x00",
    "truncated data": GOOD[:-1],
    "truncated header": GOOD[:20],
    "trailing bytes": GOOD + b"\x00",
    "giant header": struct.pack("<Q", 1 << 62) + b"{}",
    "larger than the format allows": struct.pack("<Q", 100_000_001) + bytes(100),
    "no JSON": struct.pack("<Q", 4) + b"oops",
    "no object": struct.pack("<Q", 4) + b"[12]",
    "deep": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "same names": struct.pack("<Q", len(TWICE)) + TWICE + bytes(4),
    "same notes": struct.pack("<Q", len(NOTED_TWICE)) + NOTED_TWICE,
    "overlap": header(a=f32(0, 8, 2), b=f32(4, 8, 1)) + bytes(8),
    "gap": header(a=f32(0, 4, 1), b=f32(8, 12, 1)) + bytes(12),
    "past the end": header(a=f32(0, 4000, 1000)) + bytes(8),
    "backwards": header(a=f32(8, 0, 2)) + bytes(8),
    "negative": header(a=f32(-8, 0, 2)) + bytes(8),
    "negative shape": header(a=f32(0, 8, -1, -2)) + bytes(8),
    "other size": header(a=f32(0, 8, 3)) + bytes(8),
    "huge shape": header(a=f32(0, 8, 1 << 62, 1 << 62)) + bytes(8),
    "huge shape of nothing": header(a=f32(0, 0, 0, 1 << 62, 1 << 62)),
    "65 dimensions": header(a=f32(0, 4, *[1] * 65)) + bytes(4),
    "half bytes": header(a={"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}) + bytes(2),
    "float offsets": header(a={"dtype": "F32", "shape": [2], "data_offsets": [0, 8.0]}) + bytes(8),
    "bool shape": header(a={"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}) + bytes(4),
    "no offsets": header(a={"dtype": "F32", "shape": [2]}) + bytes(8),
    "no dtype": header(a={"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}) + bytes(8),
    "unknown dtype": header(a={"dtype": "F13", "shape": [2], "data_offsets": [0, 8]}) + bytes(8),
    "notes of numbers": header(a=f32(0, 8, 2), __metadata__={"n": 1}) + bytes(8),
    "broken values": header(a=f32(0, 8, 2), __metadata__={"dcpstore.values": "[1"}) + bytes(8),
    "hostile values": header(
        a=f32(0, 8, 2), __metadata__={"dcpstore.values": '{"v":{"$blob":"pickle"}}'}
    )
    + bytes(8),
    "pieces": header(
        a=f32(0, 8, 2), __metadata__={"DCP_SHARDING_INFO": '{"a":{"saved_offsets":[4]}}'}
    )
    + bytes(8),
}


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[Repository]:
    """A new repository in a folder, for what depends on no database."""
    with dcpstore.open(tmp_path / "repo") as repository:
        yield repository


@pytest.mark.parametrize("name", LIARS)
def test_a_file_that_lies_is_refused(embedded: Repository, tmp_path: Path, name: str) -> None:
    (tmp_path / "in.safetensors").write_bytes(LIARS[name])
    with pytest.raises((CorruptionError, InvalidInputError)):
        import_safetensors(tmp_path / "in.safetensors", embedded)
    assert embedded.log() == []


@settings(
    deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_changed_header_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    changed = bytearray(GOOD)
    for place in data.draw(st.lists(st.integers(0, len(GOOD) - 13), min_size=1, max_size=4)):
        changed[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "in.safetensors"
    path.write_bytes(changed)
    try:
        found = read_header(path)
    except DcpstoreError:
        return
    assert sum(4 for t in found.tensors.values() for _ in range(t.shape[0])) <= 12


def write_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    folder.mkdir()
    save_file({"a": torch.ones(2)}, folder / "model-1.safetensors")
    save_file({"b": torch.ones(3)}, folder / "model-2.safetensors")
    index: dict[str, Any] = {
        "metadata": {"total_size": 20},
        "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"},
    }
    change(index)
    (folder / INDEX).write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda i: i.pop("weight_map"), CorruptionError),
        (lambda i: i.update(weight_map=["a"]), CorruptionError),
        (lambda i: i["weight_map"].update(a=3), CorruptionError),
        (lambda i: i["weight_map"].update(c="model-1.safetensors"), CorruptionError),
        (lambda i: i["weight_map"].update(a="model-2.safetensors"), CorruptionError),
        (lambda i: i["weight_map"].update(a="model-3.safetensors"), CorruptionError),
        (lambda i: i["weight_map"].update(a="../secret.safetensors"), UnsafeDataError),
        (lambda i: i["weight_map"].update(a="/etc/passwd"), UnsafeDataError),
    ],
)
def test_an_index_that_lies_is_refused(
    embedded: Repository, tmp_path: Path, change: Callable[[Any], object], error: type[Exception]
) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "secret.safetensors")
    folder = write_index(tmp_path / "in", change)
    with pytest.raises(error):
        import_safetensors(folder, embedded)
    assert embedded.log() == []


def test_nothing_there(embedded: Repository, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    for path in ("none", "nix.safetensors"):
        with pytest.raises(NotFoundError, match=path):
            import_safetensors(tmp_path / path, embedded)


def test_no_dtype_is_forgotten() -> None:
    assert set(FOREIGN) - set(NOT_IN_SAFETENSORS) == set(TAGS)
