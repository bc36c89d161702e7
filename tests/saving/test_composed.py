"""Torch's tensors that consist of tensors, sparse and jagged ones: saved and loaded."""

from __future__ import annotations

import json
import re
import sqlite3
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner

import dcpstore
from dcpstore import (
    DcpstoreError,
    InvalidInputError,
    MismatchError,
    NotFoundError,
    Repository,
    convert,
)
from dcpstore.cli.app import commands
from dcpstore.encoding.composed_tensors import KINDS, kind_of, parts_of
from tests.loading.composed_ranks import round_trip_columns
from tests.ranks import RankPool
from tests.tensors import same

Make = Callable[[], torch.Tensor]
INDICES = torch.tensor([[0, 1, 1, 3], [2, 0, 0, 1]])  # two of them are equal


def coo(values: torch.Tensor | None = None, *, size: tuple[int, ...] = (4, 3)) -> torch.Tensor:
    held = torch.tensor([1.0, float("nan"), -0.0, 4.0]) if values is None else values
    return torch.sparse_coo_tensor(INDICES, held, size, check_invariants=True)


def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.sparse_coo_tensor(size=size, dtype=dtype, check_invariants=True)


def compressed(layout: torch.layout, dense: torch.Tensor | None = None) -> torch.Tensor:
    blocks = (2, 3) if layout in (torch.sparse_bsr, torch.sparse_bsc) else None
    matrix = coo().coalesce().to_dense().nan_to_num() if dense is None else dense
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse layouts are in beta
        return matrix.to_sparse(layout=layout, blocksize=blocks)


def jagged(*lengths: int, **options: Any) -> torch.Tensor:
    pieces = [torch.arange(2.0 * n).reshape(n, 2) + n for n in lengths]
    return torch.nested.nested_tensor(pieces, layout=torch.jagged, **options)


def narrowed() -> torch.Tensor:
    padded = torch.arange(24.0).reshape(3, 4, 2)
    return torch.nested.narrow(padded, 1, 0, torch.tensor([1, 3, 4]), layout=torch.jagged)


MADE: dict[str, Make] = {
    "coo": coo,
    "coo bfloat16": lambda: coo(torch.arange(4).bfloat16()),
    "coo complex": lambda: coo(torch.arange(4) * 1j),
    "coalesced": lambda: coo().coalesce(),
    "hybrid": lambda: coo(torch.randn(4, 2, 2), size=(4, 3, 2, 2)),
    "coo empty": lambda: empty(4, 3),
    "coo without rows": lambda: empty(0, 3),
    "coo with grad": lambda: coo().requires_grad_(),
    "coo parameter": lambda: torch.nn.Parameter(coo()),
    "csr": lambda: compressed(torch.sparse_csr),
    "csr empty": lambda: compressed(torch.sparse_csr, torch.zeros(4, 3)),
    "csr with grad": lambda: compressed(torch.sparse_csr).requires_grad_(),
    "csr batched": lambda: compressed(torch.sparse_csr, torch.eye(3).repeat(2, 1, 1)),
    "csc": lambda: compressed(torch.sparse_csc),
    "bsr": lambda: compressed(torch.sparse_bsr),
    "bsc": lambda: compressed(torch.sparse_bsc),
    "jagged": lambda: jagged(3, 1, 2),
    "jagged bfloat16": lambda: jagged(3, 1, dtype=torch.bfloat16),
    "jagged with lengths": narrowed,
    "jagged, transposed": lambda: jagged(3, 1).transpose(1, 2),
}


def are_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Tell whether two composed tensors are equal in every part and in shape, layout and dtype."""
    kind = kind_of(a)
    assert kind is not None
    if kind_of(b) is not kind or a.dtype != b.dtype or a.requires_grad != b.requires_grad:
        return False
    (ours, context), (theirs, other) = parts_of(kind, a), parts_of(kind, b)
    is_same = a.layout is torch.jagged or a.shape == b.shape
    return (
        is_same
        and context == other
        and list(ours) == list(theirs)
        and all(same(part, theirs[name]) for name, part in ours.items())
    )


def other(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor to load into, with other and fewer contents."""
    if tensor.layout is torch.jagged:
        is_transposed = tensor._ragged_idx == 2  # type: ignore[attr-defined]
        made = jagged(*([2] * tensor.shape[0]), dtype=tensor.dtype)
        return made.transpose(1, 2) if is_transposed else made
    if tensor.layout is torch.sparse_coo:
        made = empty(*tensor.shape, dtype=tensor.dtype)
    else:
        made = compressed(tensor.layout, torch.zeros(tensor.shape))
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(made)
    return made.requires_grad_(tensor.requires_grad)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_each_kind_is_read_back_exactly(repo: Repository, subtests: pytest.Subtests) -> None:
    made = {name: make() for name, make in MADE.items()}
    state: dict[str, Any] = {"in": {"a list": [*made.values(), 7]}}
    dcpstore.save(state, repo)
    read = repo.read()
    targets: list[Any] = [other(tensor) for tensor in made.values()]
    kept = [*targets]
    report = dcpstore.load(filled := {"in": {"a list": [*targets, 0]}}, repo)
    assert report.missing == report.unexpected == report.differences == ()
    for i, (name, tensor) in enumerate(made.items()):
        with subtests.test(name):
            found = read[f"in.a list.{i}"]
            assert are_equal(found, tensor.detach())
            loaded = filled["in"]["a list"][i]
            assert type(loaded) is type(tensor)
            if tensor.layout is not torch.jagged:
                assert loaded is kept[i]
                assert are_equal(loaded, tensor)
            else:
                assert are_equal(loaded, tensor)
    assert filled["in"]["a list"][-1] == read[f"in.a list.{len(made)}"] == 7


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")
def test_modules_hold_sparse_parameters_and_buffers(tmp_path: Path) -> None:
    def module(tensor: torch.Tensor, rows: torch.Tensor) -> torch.nn.Module:
        made = torch.nn.Module()
        made.w = torch.nn.Parameter(tensor)
        made.register_buffer("b", rows)
        return made

    kept = module(coo(), compressed(torch.sparse_csr))
    dcpstore.save({"m": kept}, tmp_path)
    fresh = module(other(coo()), compressed(torch.sparse_csr, torch.zeros(4, 3)))
    parameter = fresh.w
    dcpstore.load({"m": fresh}, tmp_path)
    assert fresh.w is parameter
    assert are_equal(fresh.w, kept.w)
    assert are_equal(fresh.b, kept.b)


def test_an_asynchronous_save_stores_the_staged_values(tmp_path: Path) -> None:
    state = {"w": coo(), "rows": compressed(torch.sparse_csr)}
    pending = dcpstore.async_save(state, tmp_path)
    with torch.no_grad():
        state["rows"].values().zero_()
        state["w"].copy_(empty(4, 3))
    pending.result()
    with dcpstore.open(tmp_path) as repo:
        read = repo.read()
    assert are_equal(read["w"], coo())
    assert are_equal(read["rows"], compressed(torch.sparse_csr))


def test_globs_and_names_select_whole_tensors(tmp_path: Path) -> None:
    dcpstore.save({"m": {"w": coo(), "x": coo()}, "n": torch.ones(2)}, tmp_path)
    state = {"m": {"v": other(coo()), "x": other(coo())}}
    report = dcpstore.load(state, tmp_path, include=["m.?"], exclude=["m.x"], rename={"m.v": "m.w"})
    assert are_equal(state["m"]["v"], coo())
    assert are_equal(state["m"]["x"], other(coo()))
    assert report.unexpected == ("m.x", "n")
    with dcpstore.open(tmp_path) as repo:
        assert [*repo.read(None, ["m.w", "n"])] == ["m.w", "n"]
        assert repo.read(None, ["m.w.values"])["m.w.values"].shape == (4,)
        assert [entry.fqn for entry in repo.entries(None, ["m.x"])] == [
            "m.x.$composed",
            "m.x.indices",
            "m.x.values",
        ]
        with pytest.raises(NotFoundError, match=r"m\.y"):
            repo.read(None, ["m.w", "m.y"])


def test_a_tensor_that_the_version_lacks_is_left_unchanged(tmp_path: Path) -> None:
    dcpstore.save({"n": torch.ones(2)}, tmp_path)
    state = {"n": torch.zeros(2), "w": coo()}
    asked: list[tuple[str, torch.Tensor]] = []
    report = dcpstore.load(state, tmp_path, init_missing=lambda *call: asked.append(call))
    assert report.missing == ("w",)
    assert [(fqn, tensor is state["w"]) for fqn, tensor in asked] == [("w", True)]
    assert are_equal(state["w"], coo())


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")
def test_all_differences_are_named_before_anything_is_loaded(tmp_path: Path) -> None:
    dcpstore.save(
        {"a": torch.ones(2), "c": coo(), "d": coo(), "p": torch.ones(3), "w": coo()}, tmp_path
    )
    state = {
        "a": torch.zeros(2),
        "c": compressed(torch.sparse_csr),
        "d": coo().double(),
        "lacks": coo(),
        "p": coo(),
        "w": torch.zeros(4, 3),
    }
    expected = [
        "'c' is a torch.sparse_coo in the version, and a torch.sparse_csr in the state",
        "'d.values' has dtype torch.float32 in the version, and torch.float64 in the state",
        "'lacks', a torch.sparse_coo in the state, is not in the version",
        "'p' is a tensor in the version, and a torch.sparse_coo in the state",
        "'w' is a torch.sparse_coo in the version, and a tensor in the state",
    ]
    with pytest.raises(MismatchError) as caught:
        dcpstore.load(state, tmp_path)
    for text, difference in zip(expected, sorted(caught.value.differences), strict=True):
        assert difference.startswith(text)
    assert torch.equal(state["a"], torch.zeros(2))
    with pytest.raises(MismatchError, match=r"'c' has shape \(4, 3\) in the version, and \(9, 3\)"):
        dcpstore.load({"c": empty(9, 3)}, tmp_path)
    dcpstore.load(cast := {"d": coo().double()}, tmp_path, on_dtype="cast")
    assert are_equal(cast["d"], coo().double())


def test_new_stateful_objects_get_them(tmp_path: Path) -> None:
    class Grown:
        def __init__(self, **held: Any) -> None:
            self.held = held

        def state_dict(self) -> dict[str, Any]:
            return dict(self.held)

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.held = state

    made = {name: make() for name, make in MADE.items() if "grad" not in name}
    del made["coo parameter"]
    dcpstore.save({"t": Grown(**made)}, tmp_path)
    fresh = Grown()
    assert dcpstore.load({"t": fresh}, tmp_path, dry_run=True).differences == ()
    dcpstore.load({"t": fresh}, tmp_path)
    assert fresh.held.keys() == made.keys()
    assert all(are_equal(fresh.held[name], tensor) for name, tensor in made.items())


def test_per_rank_values_and_tied_tensors(tmp_path: Path) -> None:
    tied = coo()
    dcpstore.save({"own": dcpstore.PerRank({"w": coo()}), "a": tied, "b": tied}, tmp_path)
    both = empty(4, 3)
    state = {"own": dcpstore.PerRank({"w": empty(4, 3)}), "a": both, "b": both}
    dcpstore.load(state, tmp_path)
    assert are_equal(state["own"].value["w"], coo())
    assert state["a"] is state["b"] is both
    assert are_equal(both, coo())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torchs_storages_take_them_with_our_planners(tmp_path: Path) -> None:
    state = {"w": coo(), "rows": compressed(torch.sparse_csr), "n": 1}
    places = {
        "torch": (dcp.FileSystemWriter(tmp_path / "torch"), dcp.FileSystemReader),
        "ours": (dcpstore.FileSystemWriter(tmp_path / "ours"), dcpstore.FileSystemReader),
    }
    for name, (writer, reader) in places.items():
        dcp.save(state, storage_writer=writer, planner=dcpstore.DefaultSavePlanner(), no_dist=True)
        filled = {"w": empty(4, 3), "rows": compressed(torch.sparse_csr, torch.eye(4, 3)), "n": 0}
        planner = dcpstore.DefaultLoadPlanner()
        dcp.load(filled, storage_reader=reader(tmp_path / name), planner=planner, no_dist=True)
        assert filled["n"] == 1
        assert are_equal(filled["w"], coo())
        assert are_equal(filled["rows"], state["rows"])
    flat = dcpstore.DefaultSavePlanner(flatten_state_dict=False)
    dcpstore.save(state, tmp_path / "flat", planner=flat)
    filled = {"w": empty(4, 3), "rows": other(state["rows"]), "n": 0}
    planner = dcpstore.DefaultLoadPlanner(flatten_state_dict=False)
    dcpstore.load(filled, tmp_path / "flat", planner=planner)
    assert are_equal(filled["w"], coo())
    assert are_equal(filled["rows"], state["rows"])


def test_torchs_save_planner_stores_them(tmp_path: Path) -> None:
    dcpstore.save({"w": coo()}, tmp_path, planner=DefaultSavePlanner())
    with dcpstore.open(tmp_path) as repo:
        assert are_equal(repo.read()["w"], coo())
    with pytest.raises(InvalidInputError, match=r"'w' is a torch.sparse_coo.*planner"):
        dcpstore.load({"w": empty(4, 3)}, tmp_path, planner=DefaultLoadPlanner())


def test_they_are_exported_and_imported(tmp_path: Path) -> None:
    state = {"m": {"w": coo(), "rows": compressed(torch.sparse_csr)}, "x": torch.ones(2)}
    with dcpstore.open(tmp_path / "r") as repo:
        dcpstore.save(state, repo)
        for name in ("torch", "dcp", "safetensors"):
            getattr(convert, f"export_{name}")(repo, "v1", tmp_path / f"out.{name}", dtype="bf16")
            getattr(convert, f"import_{name}")(tmp_path / f"out.{name}", repo, branch=name)
            read = repo.read(name)
            assert are_equal(read["m.w"], coo())
            assert are_equal(read["m.rows"], state["m"]["rows"])
            assert read["x"].dtype == torch.bfloat16


def test_parts_that_do_not_fit_are_reported_as_damage(tmp_path: Path) -> None:
    with dcpstore.open(tmp_path) as repo:
        dcpstore.save({"w": coo()}, repo)
        change = sqlite3.connect(tmp_path / "catalog.db")
        for old, new, message in (
            ("[4,3]", "[2,3]", "cannot be made of its parts"),
            ("[4,3]", "[2,-3]", "does not decode"),
            ("torch.sparse_coo", "torch.sparse_csr", "cannot be made of its parts"),
            ("torch.sparse_coo", "os.system", "does not know"),
            ('"coalesced":false', '"class":"os","fields":{}', "does not decode"),
        ):
            query = "UPDATE entry SET value = replace(value, ?, ?)"
            change.execute(query, (old, new))
            change.commit()
            with pytest.raises(DcpstoreError, match=message):
                repo.read()
            change.execute(query, (new, old))
            change.commit()
        change.close()
        assert are_equal(repo.read()["w"], coo())


def test_the_command_line_shows_one_entry_with_its_parts(tmp_path: Path) -> None:
    with dcpstore.open(tmp_path) as repo:
        dcpstore.save({"m": {"w": coo()}, "x": torch.ones(2)}, repo)
        changed = coo(torch.zeros(4))
        dcpstore.save({"m": {"w": changed}, "x": torch.ones(2)}, repo)
        dcpstore.save({"m": {"w": torch.ones(4, 3)}, "x": torch.ones(2)}, repo)
        diff = repo.diff("v1", "v2", stats=True)
        ((entry,), plain) = diff.changed, repo.diff("v2", "v3").retyped
        assert [(part.fqn, part.change) for part in entry.parts] == [
            ("indices", "unchanged"),
            ("values", "changed"),
        ]
        assert entry.fqn == "m.w"
        assert entry.parts[1].stats is not None
        assert (entry.nbytes, entry.nbytes_shared) == (80, 64)
        assert [(one.fqn, one.change) for one in plain] == [("m.w", "retyped")]

    def run(*args: str) -> str:
        return CliRunner().invoke(commands, [*args, "--repo", str(tmp_path)]).output

    assert [line.split() for line in run("ls", "v1", "m.*").splitlines()[1:]] == [
        ["m.w", "torch.sparse_coo", "float32", "4x3", "80", "B"],
        ["indices", "tensor", "int64", "2x4", "64", "B"],
        ["values", "tensor", "float32", "4", "16", "B"],
    ]
    (one,) = json.loads(run("ls", "v1", "m.*", "--json"))
    assert (one["fqn"], one["kind"], [*one["parts"]]) == (
        "m.w",
        "torch.sparse_coo",
        ["indices", "values"],
    )
    shown = run("diff", "v1", "v2")
    assert "  values" in shown
    assert "indices" not in shown
    assert "1 changed, 1 unchanged" in shown
    shape = json.loads(run("diff", "v1", "v2", "--json"))["entries"][0]
    assert [part["change"] for part in shape["parts"]] == ["unchanged", "changed"]


def test_column_shards_of_torchs_wrapper(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(round_trip_columns, str(tmp_path))


def test_a_key_of_the_mark_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidInputError, match=r"'a\.\$composed': the key '\$composed' is reserved"
    ):
        dcpstore.save({"a": {"$composed": 1}}, tmp_path)
    with pytest.raises(InvalidInputError, match="have the same FQN"):
        dcpstore.save({"w": coo(), "w.values": torch.ones(2)}, tmp_path)


def test_the_page_lists_every_kind() -> None:
    page = (Path(__file__).parents[2] / "docs" / "composed.md").read_text()
    listed = re.findall(r"`(torch[^`]*)`", page)
    assert KINDS.keys() <= set(listed)
