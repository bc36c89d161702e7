"""Files of torch.save are imported, and exports are read by torch.load, bit by bit."""

from __future__ import annotations

import io
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from dcpstore import (
    AlreadyExistsError,
    CorruptionError,
    InvalidInputError,
    NotFoundError,
    Repository,
    UnsafeDataError,
)
from dcpstore.convert import export_torch, import_torch
from tests.convert.states import assert_holds, equal, every_dtype, lazy, same, trained

pytestmark = pytest.mark.slow_on_postgres

EXPORTS = pytest.mark.parametrize("mapped", [False, True])


@EXPORTS
def test_every_dtype_passes_both_ways(repo: Repository, tmp_path: Path, mapped: bool) -> None:
    state = every_dtype()
    torch.save(state, tmp_path / "in.pt")
    version = import_torch(tmp_path / "in.pt", repo)
    assert_holds(repo, version.number, state)
    export_torch(repo, version.number, tmp_path / "out.pt")
    back = torch.load(tmp_path / "out.pt", weights_only=True, mmap=mapped)
    assert back.keys() == state.keys()
    assert all(same(back[name], state[name]) for name in state)


def test_a_nested_state_comes_back_as_it_was(repo: Repository, tmp_path: Path) -> None:
    state = trained()
    torch.save(state, tmp_path / "in.pt")
    import_torch(tmp_path / "in.pt", repo, branch="b", tags=["t"], step=7, message="hello")
    shown = repo.show("t")
    assert (shown.branch, shown.step, shown.message) == ("b", 7, "hello")
    done = export_torch(repo, "t", tmp_path / "out.pt")
    back = torch.load(tmp_path / "out.pt", weights_only=True)
    assert sorted_keys(back) == sorted_keys(state)
    assert equal(ordered(back), ordered(state))
    assert (done.files, done.format, done.version.number) == (1, "torch", shown.number)


def test_an_optimizer_goes_on_from_an_export(repo: Repository, tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.5)
    weight.sum().backward()
    optimizer.step()
    torch.save({"optim": optimizer.state_dict()}, tmp_path / "in.pt")
    import_torch(tmp_path / "in.pt", repo)
    export_torch(repo, None, tmp_path / "out.pt")
    other = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    other.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True)["optim"])
    assert equal(ordered(other.state_dict()), ordered(optimizer.state_dict()))


def test_views_of_every_kind_come_in(repo: Repository, tmp_path: Path) -> None:
    base = torch.arange(3 * 400 * 500, dtype=torch.float32).reshape(3, 400, 500)
    state = {
        "transposed": base.transpose(0, 2),
        "sliced": base[1, ::3, 5:400:7],
        "expanded": torch.ones(1, 5).expand(4, 5),
        "parameter": torch.nn.Parameter(base[0]),
    }
    torch.save(state, tmp_path / "in.pt")
    import_torch(tmp_path / "in.pt", repo)
    assert_holds(repo, "main", {name: t.detach() for name, t in state.items()})


def test_lazily_conjugated_and_negated_tensors_come_in(repo: Repository, tmp_path: Path) -> None:
    torch.save(lazy(), tmp_path / "in.pt")
    import_torch(tmp_path / "in.pt", repo)
    assert_holds(repo, "main", lazy())


def test_tied_tensors_stay_tied_and_equal_ones_apart(repo: Repository, tmp_path: Path) -> None:
    state = trained()
    # what no tie may join: moments that are equal by chance, and buffers of every layer
    for moments in state["optim"]["state"].values():
        moments["max_exp_avg_sq"] = moments["exp_avg_sq"].clone()
    state["model"] |= {f"layer.{i}.freq": torch.arange(4.0) for i in range(2)}
    state["model"] |= {"zeros": torch.zeros(4), "bias": torch.zeros(4)}
    torch.save(state, tmp_path / "in.pt")
    import_torch(tmp_path / "in.pt", repo)
    export_torch(repo, None, tmp_path / "out.pt")
    back = torch.load(tmp_path / "out.pt", weights_only=True)
    owners: dict[int, list[str]] = {}
    for name, tensor in back["model"].items():
        owners.setdefault(tensor.data_ptr(), []).append(name)
    assert [names for names in owners.values() if len(names) > 1] == [
        ["embed.weight", "head.weight"]
    ]
    moments = [t.data_ptr() for s in back["optim"]["state"].values() for t in s.values()]
    assert len(set(moments)) == len(moments)


def test_an_export_is_an_archive_that_other_tools_check(repo: Repository, tmp_path: Path) -> None:
    state = every_dtype()
    torch.save(state, tmp_path / "in.pt")
    import_torch(tmp_path / "in.pt", repo)
    export_torch(repo, None, tmp_path / "out.pt")
    with zipfile.ZipFile(tmp_path / "out.pt") as archive:
        assert archive.testzip() is None
        with (tmp_path / "out.pt").open("rb") as file:
            for record in archive.infolist():
                file.seek(record.header_offset + 26)
                name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
                assert (record.header_offset + 30 + name + extra) % 64 == 0


def test_floats_are_converted_and_nothing_else(repo: Repository, tmp_path: Path) -> None:
    state = {"w": torch.randn(9, 3), "h": torch.randn(4).half(), "n": torch.arange(4), "x": 1.5}
    torch.save(state, tmp_path / "in.pt")
    version = import_torch(tmp_path / "in.pt", repo, dtype="bf16")
    assert_holds(
        repo,
        version.number,
        {"w": state["w"].bfloat16(), "h": state["h"].bfloat16(), "n": state["n"]},
    )
    export_torch(repo, version.number, tmp_path / "out.pt", dtype=torch.float64, tensors_only=True)
    back = torch.load(tmp_path / "out.pt", weights_only=True)
    assert back.keys() == {"w", "h", "n"}
    assert same(back["w"], state["w"].bfloat16().double())
    assert same(back["n"], state["n"])


def test_unknown_dtypes_are_refused(repo: Repository, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "in.pt")
    with pytest.raises(InvalidInputError, match=r"'int7'.*bf16"):
        import_torch(tmp_path / "in.pt", repo, dtype="int7")
    assert repo.log() == []


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated", "ignore:.*quantize")
def test_quantized_tensors_are_refused(repo: Repository, tmp_path: Path) -> None:
    quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    torch.save({"w": quantized}, tmp_path / "in.pt")
    with pytest.raises(InvalidInputError, match="holds quantized tensors"):
        import_torch(tmp_path / "in.pt", repo)
    assert repo.log() == []


class Custom:
    """A class that weights_only does not let in."""

    def __init__(self) -> None:
        self.kept = torch.arange(5)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Custom) and torch.equal(other.kept, self.kept)

    __hash__ = None  # type: ignore[assignment]


def test_a_pickle_needs_leave_both_ways(repo: Repository, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3), "args": Custom()}, tmp_path / "in.pt")
    with pytest.raises(UnsafeDataError, match=r"in.pt.*Custom.*--allow-pickle"):
        import_torch(tmp_path / "in.pt", repo)
    assert repo.log() == []
    import_torch(tmp_path / "in.pt", repo, allow_pickle=True)
    with pytest.raises(UnsafeDataError, match="'args'"):
        export_torch(repo, None, tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()
    export_torch(repo, None, tmp_path / "out.pt", allow_pickle=True)
    back = torch.load(tmp_path / "out.pt", weights_only=False)
    assert back["args"] == Custom()  # with the data of the tensor inside it


def saved(state: Any, **options: Any) -> bytes:
    data = io.BytesIO()
    torch.save(state, data, **options)
    return data.getvalue()


WHOLE = saved({"w": torch.arange(1000.0)})
BAD = {
    "text": (b"hello, I am no archive at all", InvalidInputError),
    "empty": (b"", InvalidInputError),
    "half": (WHOLE[: len(WHOLE) // 2], CorruptionError),
    "tail": (WHOLE[:-30], CorruptionError),
    "legacy": (
        saved({"w": torch.ones(2)}, _use_new_zipfile_serialization=False),
        InvalidInputError,
    ),
    "list": (saved([torch.ones(2)]), InvalidInputError),
    "sparse": (saved({"w": torch.eye(3).to_sparse()}), InvalidInputError),
    "meta": (saved({"w": torch.ones(2, device="meta")}), InvalidInputError),
    "set of tensors": (saved({"w": {torch.eye(3).to_sparse()}}), UnsafeDataError),
    "same names": (saved({"a.b": torch.ones(2), "a": {"b": torch.ones(2)}}), InvalidInputError),
}


def test_a_bad_file_is_refused(repo: Repository, tmp_path: Path, subtests: pytest.Subtests) -> None:
    for name, (data, error) in BAD.items():
        with subtests.test(name=name):
            (tmp_path / "in.pt").write_bytes(data)
            with pytest.raises(error):
                import_torch(tmp_path / "in.pt", repo)
            assert repo.log() == []


def test_storages_past_the_file_are_refused(repo: Repository, tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(WHOLE)) as old:
        records = {record.filename: old.read(record) for record in old.infolist()}
    (data,) = (name for name in records if name.endswith("data/0"))
    with zipfile.ZipFile(tmp_path / "in.pt", "w") as new:
        for name, content in records.items():
            new.writestr(name, content[:8] if name == data else content)
    with pytest.raises(CorruptionError, match="truncated or damaged"):
        import_torch(tmp_path / "in.pt", repo)
    assert repo.log() == []


def test_what_is_not_there_and_what_is(repo: Repository, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no file"):
        import_torch(tmp_path / "nix.pt", repo)
    torch.save({"w": torch.ones(1)}, tmp_path / "in.pt")
    import_torch(tmp_path / "in.pt", repo)
    before = (tmp_path / "in.pt").read_bytes()
    with pytest.raises(AlreadyExistsError, match=r"in\.pt"):
        export_torch(repo, None, tmp_path / "in.pt")
    assert (tmp_path / "in.pt").read_bytes() == before
    with pytest.raises(NotFoundError, match="make it first"):
        export_torch(repo, None, tmp_path / "no" / "out.pt")
    with pytest.raises(NotFoundError, match="nix"):
        export_torch(repo, "nix", tmp_path / "out.pt")
    assert {path.name for path in tmp_path.glob("*.pt*")} == {"in.pt"}


def ordered(state: Any) -> Any:
    """Return a state with its dicts plain and sorted, for a version is sorted by FQN."""
    if isinstance(state, dict | OrderedDict):
        return {key: ordered(state[key]) for key in sorted(state, key=str)}
    return [ordered(item) for item in state] if isinstance(state, list) else state


def sorted_keys(state: dict[Any, Any]) -> list[str]:
    return sorted(map(repr, state))
