"""Composed tensors as dicts of mark and parts: of each kind, split over ranks, and filled again."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from dcpstore.encoding.composed_tensors import KINDS, kind_of, parts_of
from dcpstore.errors import CorruptionError, InvalidInputError, MismatchError
from dcpstore.formats.composition import MARK, ComposedEntry, Composition, fold_entries
from dcpstore.state.assemblies import Assemblies
from dcpstore.state.composed import (
    check_none_composed,
    composed_target,
    flatten_parts,
    split_part,
    split_shape,
    take_apart,
    tensor_parts,
)
from dcpstore.state.shards import local_shards
from dcpstore.state.tree import flattened
from tests.state.entries import described, entries_of
from tests.state.fake_ranks import as_rank, cpu_mesh, distributed
from tests.tensors import same

DENSE = torch.tensor([[0.0, 1, 0, 2, 0, 0], [0] * 6, [3, 0, 0, 0, 4, 5], [0, 6, 0, 0, 0, 0]])
BATCH = torch.stack([torch.eye(4, 6), torch.eye(4, 6).flip(0)])  # as many elements in each row


def sparse(layout: torch.layout, dense: torch.Tensor = DENSE) -> torch.Tensor:
    blocks = (2, 3) if layout in (torch.sparse_bsr, torch.sparse_bsc) else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse layouts are in beta
        return dense.to_sparse(layout=layout, blocksize=blocks)


def coo(indices: Any, values: Any, size: tuple[int, ...]) -> torch.Tensor:
    return torch.sparse_coo_tensor(indices, values, size, check_invariants=True)


def jagged(*lengths: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    rows = [torch.arange(2.0 * n, dtype=dtype).reshape(n, 2) + n for n in lengths]
    return torch.nested.nested_tensor(rows, layout=torch.jagged)


def narrowed(*lengths: int) -> torch.Tensor:
    """Return a nested tensor with gaps between its rows, which keeps their lengths."""
    padded = torch.arange(8.0 * len(lengths)).reshape(len(lengths), 4, 2)
    return torch.nested.narrow(padded, 1, 0, torch.tensor(lengths), layout=torch.jagged)


# By name: a tensor, and another one of the same kind and shape with other contents and sizes.
Pair = tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]
LAYOUTS = (
    torch.sparse_coo,
    torch.sparse_csr,
    torch.sparse_csc,
    torch.sparse_bsr,
    torch.sparse_bsc,
)


def pairs() -> dict[str, Pair]:
    found: dict[str, Pair] = {}
    for layout in LAYOUTS:
        name = str(layout).removeprefix("torch.sparse_")
        for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.complex64):
            found[f"{name} {dtype}"] = (
                lambda layout=layout, dtype=dtype: sparse(layout, DENSE.to(dtype)),
                lambda layout=layout, dtype=dtype: sparse(layout, torch.ones(4, 6, dtype=dtype)),
            )
        found[f"{name} without elements"] = (
            lambda layout=layout: sparse(layout, torch.zeros(4, 6)),
            lambda layout=layout: sparse(layout),
        )
        found[f"{name} into one without elements"] = (
            lambda layout=layout: sparse(layout),
            lambda layout=layout: sparse(layout, torch.zeros(4, 6)),
        )
        if layout is not torch.sparse_coo:
            found[f"{name} batched"] = (
                lambda layout=layout: sparse(layout, BATCH),
                lambda layout=layout: sparse(layout, torch.ones(2, 4, 6)),
            )
    none = torch.zeros(0, 0, dtype=torch.int64)
    found["coo without dimensions"] = (
        lambda: coo(torch.zeros(0, 1, dtype=torch.int64), [5.0], ()),
        lambda: coo(none, [], ()),
    )
    found["coo with an index twice"] = (
        lambda: coo([[0, 0], [1, 1]], [1.0, 2.0], (2, 3)),
        lambda: coo([[0], [1]], [7.0], (2, 3)),
    )
    found["hybrid coo"] = (
        lambda: coo([[0, 2]], torch.arange(8.0).reshape(2, 2, 2), (3, 2, 2)),
        lambda: coo([[1]], torch.ones(1, 2, 2), (3, 2, 2)),
    )
    found["jagged"] = (lambda: jagged(3, 1, 2), lambda: jagged(2, 2, 2))
    found["jagged bfloat16"] = (
        lambda: jagged(3, 1, dtype=torch.bfloat16),
        lambda: jagged(2, 4, dtype=torch.bfloat16),
    )
    found["jagged with an empty row"] = (lambda: jagged(0, 2), lambda: jagged(1, 1))
    found["jagged with gaps"] = (lambda: narrowed(1, 3, 4), lambda: narrowed(4, 4, 4))
    found["jagged with gaps into one without"] = (lambda: narrowed(1, 3), lambda: jagged(2, 2))
    return found


PAIRS = pairs()
each_pair = pytest.mark.parametrize(("make", "make_other"), PAIRS.values(), ids=PAIRS)


def alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Tell whether two composed tensors are equal in kind, shape, context and each bit."""
    kind = kind_of(a)
    assert kind is not None
    if kind_of(b) is not kind or a.dtype != b.dtype:
        return False
    (ours, context), (theirs, other) = parts_of(kind, a), parts_of(kind, b)
    return (
        (a.layout is torch.jagged or a.shape == b.shape)
        and context == other
        and list(ours) == list(theirs)
        and all(same(part, theirs[name]) for name, part in ours.items())
    )


@each_pair
def test_a_composed_tensor_becomes_its_mark_and_views_of_its_parts(
    make: Callable[[], torch.Tensor], make_other: Callable[[], torch.Tensor]
) -> None:
    tensor = make()
    kind = kind_of(tensor)
    assert kind is not None
    plain = torch.ones(1)
    state = {"a": [tensor, plain], "same": {"b": plain}}
    apart = take_apart(state)
    found = apart["a"][0]
    assert (found[MARK].kind, found[MARK].dtype) == (
        kind.name,
        str(tensor.dtype).removeprefix("torch."),
    )
    expected, _ = parts_of(kind, tensor)
    assert list(found) == [MARK, *expected]
    for name, part in expected.items():
        assert type(found[name]) is torch.Tensor
        assert found[name].layout is torch.strided
        assert found[name].data_ptr() == part.data_ptr()
    assert apart["same"] is state["same"]
    assert apart["a"][1] is plain
    assert take_apart(apart) == apart
    assert flatten_parts({"t": found, "w": plain}).keys() == {
        "w",
        *(f"t.{name}" for name in found),
    }


def fill(target: Any, source: Any, *, name: str = "t") -> Any:
    """Load `source` into `target` as a load planner does; return what stands in its place then."""
    stored = described({name: source})
    contents = flattened(take_apart({name: source})).items
    assembly = Assemblies({name: target}, stored, lambda fqn: fqn)
    items = flattened(assembly.state).items
    assembly.set_names(items)
    assembly.expect(contents)
    done = []
    for fqn, value in contents.items():
        node, key = assembly.place(fqn)
        if isinstance(value, torch.Tensor):
            assert node[key].shape == value.shape
            node[key].copy_(value)
        else:
            node[key] = value
        done.append(assembly.count_read(fqn))
    assert all(one is None for one in done[:-1])
    assert done[-1] is not None
    fqn, tensor = done[-1]
    assert fqn == name
    return tensor


@each_pair
def test_a_composed_tensor_is_filled_whatever_the_sizes_of_its_parts_were(
    make: Callable[[], torch.Tensor], make_other: Callable[[], torch.Tensor]
) -> None:
    source, target = make(), make_other()
    result = fill(target, source)
    assert alike(result, source)
    if target.layout is not torch.jagged:  # torch cannot resize a nested tensor
        assert result is target


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_parameter_stays_itself_with_its_gradient_flag(layout: torch.layout) -> None:
    target = torch.nn.Parameter(sparse(layout, torch.zeros(4, 6)))
    result = fill(target, sparse(layout))
    assert result is target
    assert target.requires_grad
    assert torch.equal(target.detach().to_dense(), DENSE)


def test_a_nested_parameter_is_replaced_by_a_parameter() -> None:
    target = torch.nn.Parameter(jagged(1, 1), requires_grad=False)
    result = fill(target, jagged(3, 2))
    assert isinstance(result, torch.nn.Parameter)
    assert not result.requires_grad
    assert alike(result.data, jagged(3, 2))


def test_another_kind_is_refused_when_its_mark_is_read() -> None:
    target = sparse(torch.sparse_csr)
    assembly = Assemblies({"t": target}, described({"t": target}), lambda fqn: fqn)
    assembly.set_names(flattened(assembly.state).items)
    mark = f"t.{MARK}"
    assembly.expect([mark])
    node, key = assembly.place(mark)
    node[key] = take_apart({"t": sparse(torch.sparse_csc)})["t"][MARK]
    with pytest.raises(MismatchError, match=r"is a torch\.sparse_csc in the version"):
        assembly.count_read(mark)


def stored_as(value: Any, target: torch.Tensor, *, rename: str = "") -> Assemblies:
    name = rename or "t"
    return Assemblies({"t": target}, described({name: value}), lambda fqn: name)


def test_how_the_stored_tensor_differs() -> None:
    own = sparse(torch.sparse_csr)
    mark = take_apart({"t": sparse(torch.sparse_csr, torch.ones(2, 6))})["t"][MARK]
    same_mark = take_apart({"t": own})["t"][MARK]
    assert stored_as(own, own).difference("t", same_mark) is None
    assert stored_as(own, own).difference("t", None) is None
    assert "has shape (2, 6) in the version, and (4, 6)" in str(
        stored_as(own, own).difference("t", mark)
    )
    dense = stored_as(torch.ones(4, 6), own)
    assert "'t' is a tensor in the version, and a torch.sparse_csr" in str(
        dense.difference("t", None)
    )
    assert "'t' is a value in the version" in str(stored_as(5, own).difference("t", None))
    lacking = Assemblies({"t": own}, {}, lambda fqn: fqn)
    assert "is not in the version" in str(lacking.difference("t", None))
    assert (dense.is_stored("t"), lacking.is_stored("t")) == (True, False)


def test_marks_and_parts_are_renamed_with_their_tensor() -> None:
    assembly = stored_as(sparse(torch.sparse_coo), sparse(torch.sparse_coo), rename="old")
    assembly.set_names(flattened(assembly.state).items)
    assert assembly.stored_name("t.values") == "old.values"
    assert assembly.stored_name(f"t.{MARK}") == f"old.{MARK}"
    assert assembly
    assert not Assemblies({"w": torch.ones(1)}, {}, lambda fqn: fqn)


def test_items_of_other_tensors_are_not_counted() -> None:
    source = sparse(torch.sparse_coo)
    assembly = stored_as(source, sparse(torch.sparse_coo))
    assembly.set_names([*flattened(assembly.state).items, "w"])
    for fqn in ("t.values", "t.indices"):
        node, key = assembly.place(fqn)
        node[key].copy_(take_apart({"t": source})["t"][key])
    assembly.expect(["w", "t.values", "t.indices"])
    assert assembly.count_read("w") is None
    assert assembly.count_read("t.values") is None
    assert assembly.count_read("t.indices") is not None
    assert assembly.count_read("t.indices") is None


@pytest.mark.parametrize("state", [{MARK: 5}, {"a": [{MARK: None, "b": 1}]}], ids=str)
def test_the_key_of_the_mark_is_reserved(state: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=r"\$composed' is reserved .* rename yours"):
        take_apart({"in": state})


def test_a_foreign_load_planner_gets_no_composed_tensor() -> None:
    check_none_composed({"a": [torch.ones(1)], "b": {"c": 5}})
    with pytest.raises(InvalidInputError, match=r"'b\.c' is a torch\.sparse_coo, which only"):
        check_none_composed({"b": {"c": sparse(torch.sparse_coo)}})


def entry_of(tensor: torch.Tensor) -> ComposedEntry:
    (entry,) = fold_entries(entries_of({"t": tensor}))
    assert isinstance(entry, ComposedEntry)
    return entry


@each_pair
def test_a_target_has_the_kind_and_shape_of_the_stored_tensor(
    make: Callable[[], torch.Tensor], make_other: Callable[[], torch.Tensor]
) -> None:
    source = make()
    made = composed_target(entry_of(source), device=torch.device("cpu"))
    assert (kind_of(made), made.dtype) == (kind_of(source), source.dtype)
    assert made.layout is torch.jagged or made.shape == source.shape
    assert alike(fill(made, source), source)


def test_a_target_of_damaged_parts_is_corruption() -> None:
    entry = entry_of(sparse(torch.sparse_csr))
    damaged = ComposedEntry(entry.fqn, entry.path, entry.composition, entry.mark, entry.parts[:1])
    with pytest.raises(CorruptionError, match=r"'t' .*verify"):
        composed_target(damaged, device=torch.device("cpu"))


# How a part follows a whole of 8 x 12: by name, what it holds of the whole.
PARTS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "each element": ("", lambda whole: whole.clone()),
    "rows": ("", lambda whole: whole[:, :1].clone()),
    "blocks": ("", lambda whole: whole[::2, ::3].clone()),
    "flat": ("flat", lambda whole: whole.flatten()),
    "flat blocks": ("flat", lambda whole: whole.flatten()[::4]),
    "turned": ("turned", lambda whole: whole.T.contiguous()),
    "turned blocks": ("turned", lambda whole: whole[::2, ::3].T.contiguous()),
}
SPLITS: dict[str, tuple[tuple[int, ...], list[Placement]]] = {
    "rows": ((2,), [Shard(0)]),
    "columns": ((2,), [Shard(1)]),
    "replicate": ((2,), [Replicate()]),
    "rows and replicate": ((2, 2), [Shard(0), Replicate()]),
}
UNFIT = {("flat", "columns"), ("flat blocks", "columns")}  # a flat part needs whole rows
# A scale for each row is another part where a rank holds some columns: each rank has its own.
CASES = [
    (part, split) for part in PARTS for split in SPLITS if (part, split) != ("rows", "columns")
]


@pytest.mark.parametrize(("part", "split"), CASES)
def test_the_parts_of_all_ranks_are_the_part_of_the_whole(part: str, split: str) -> None:
    cut, take = PARTS[part]
    mesh, placements = SPLITS[split]
    whole = torch.arange(96.0).reshape(8, 12)
    expected = take(whole)
    found = torch.full_like(expected, -1)
    size = torch.Size(mesh).numel()
    for rank in range(size):
        with as_rank(rank, size):
            tensor = distributed(whole, cpu_mesh(*mesh), placements)
            mine = take(tensor._local_tensor)
            if (part, split) in UNFIT:
                with pytest.raises(InvalidInputError, match=r"'m\.w' .*whole blocks"):
                    split_part("m.w", tensor, mine, cut)
                continue
            made = split_part("m.w", tensor, mine, cut)
            assert tuple(made.shape) == tuple(expected.shape)
            assert split_shape("m.w", tensor, tuple(expected.shape), cut) == tuple(mine.shape)
            for shard in local_shards("m.w", made):
                assert shard.data.data_ptr() == mine.data_ptr()
                found[shard.box.slices] = shard.data
    if (part, split) not in UNFIT:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("cut", ["", "flat", "turned", "whole"])
def test_a_part_of_one_element_is_the_same_on_all_ranks(cut: str) -> None:
    with as_rank(0, 2):
        tensor = distributed(torch.ones(4, 4), cpu_mesh(), [Shard(0)])
        for part in (torch.tensor(2.0), torch.ones(1, 1)):
            assert split_part("w", tensor, part, cut) is part
            assert split_shape("w", tensor, tuple(part.shape), cut) == tuple(part.shape)


def test_a_part_that_all_ranks_share_is_not_split() -> None:
    with as_rank(0, 2):
        tensor = distributed(torch.ones(4, 4), cpu_mesh(), [Shard(0)])
        codes = torch.arange(16.0)
        assert split_part("w", tensor, codes, "whole") is codes
        assert split_shape("w", tensor, (16,), "whole") == (16,)


def test_a_flat_part_over_a_mesh_dimension_of_one_rank() -> None:
    with as_rank(0, 1):
        tensor = distributed(torch.ones(4, 4), cpu_mesh(), [Shard(1)])
        made = split_part("w", tensor, torch.arange(16.0), "flat")
        (shard,) = local_shards("w", made)
        assert (shard.box.sizes, shard.data.tolist()) == ((16,), [*range(16)])


def test_a_rank_without_elements_cannot_hold_a_part() -> None:
    with as_rank(3, 4):
        tensor = distributed(torch.ones(3, 4), cpu_mesh(), [Shard(0)])
        with pytest.raises(InvalidInputError, match=r"'w' .* holds 0 pieces"):
            split_part("w", tensor, torch.ones(0, 4), "")


@pytest.mark.parametrize(
    ("part", "cut"), [((3, 4), ""), ((8,), ""), ((8, 4), "turned"), ((5,), "flat"), ((0, 4), "")]
)
def test_a_shard_that_ends_inside_a_block_has_no_shape(part: tuple[int, ...], cut: str) -> None:
    with as_rank(0, 2):
        tensor = distributed(torch.ones(8, 4), cpu_mesh(), [Shard(0)])
        with pytest.raises(InvalidInputError, match=r"'w' of shape \(8, 4\) .* whole blocks"):
            split_shape("w", tensor, part, cut)


@pytest.fixture(scope="module")
def torchao_makers() -> dict[str, Callable[[torch.dtype], torch.Tensor]]:
    pytest.importorskip("torchao")
    from tests.loading.torchao_tensors import MAKERS  # noqa: PLC0415 (takes seconds to load)

    return MAKERS


TORCHAO = sorted(name for name in KINDS if name.startswith("torchao"))


@pytest.mark.parametrize("name", TORCHAO)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tensor_of_torchao_is_filled_in_place(
    torchao_makers: dict[str, Callable[[torch.dtype], torch.Tensor]], name: str, dtype: torch.dtype
) -> None:
    source, target = torchao_makers[name](dtype), torchao_makers[name](dtype)
    parts = tensor_parts(("t",), source)
    assert parts is not None
    assert isinstance(parts[MARK], Composition)
    assert parts[MARK].kind == name
    assert not alike(source, target)
    assert fill(target, source) is target
    assert alike(target, source)


@pytest.mark.parametrize("name", ["torchao OptimState8bit", "torchao OptimStateFp8"])
def test_a_torchao_state_over_ranks_gets_a_target_split_like_it(
    torchao_makers: dict[str, Callable[[torch.dtype], torch.Tensor]], name: str
) -> None:
    entry = entry_of(torchao_makers[name](torch.float32))
    assert entry.composition.shape == (64, 128)
    with as_rank(1, 2):
        like = distributed(torch.zeros(64, 128), cpu_mesh(), [Shard(0)])
        made = composed_target(entry, device=torch.device("cpu"), like=like)
        assert isinstance(made, DTensor)
        assert made.placements == like.placements
        assert tuple(made._local_tensor.shape) == (32, 128)
        other = distributed(torch.zeros(8, 128), cpu_mesh(), [Shard(0)])
        alone = composed_target(entry, device=torch.device("cpu"), like=other)
        assert not isinstance(alone, DTensor)
