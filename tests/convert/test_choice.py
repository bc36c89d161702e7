"""Which entries an export holds, and under which names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dcpstore
from dcpstore import CorruptionError, InvalidInputError, NotFoundError, Repository
from dcpstore.convert import (
    export_dcp,
    export_safetensors,
    export_torch,
    export_zarr,
    import_any,
    import_safetensors,
)
from dcpstore.encoding.dtypes import DTYPES
from tests.convert.states import trained
from tests.tensors import same

EXPORTS = [export_dcp, export_safetensors, export_torch, export_zarr]
CASTS = [name for row in DTYPES for name in row.casts]


class TiedModel(torch.nn.Module):
    """A language model whose head is its embedding, as Hugging Face's often are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(8, 4)
        self.lm_head = torch.nn.Linear(4, 8, bias=False)
        self.lm_head.weight = self.embed.weight


@pytest.fixture
def repo(tmp_path: Path) -> Repository:
    """A repository whose tip is a whole training state."""
    repo = dcpstore.open(tmp_path / "repo")
    dcpstore.save(trained(), repo)
    return repo


def fqns(repo: Repository, exported: Path) -> set[str]:
    """Return the FQNs in an export, by its import."""
    return set(repo.read(import_any(exported, repo).number))


@pytest.mark.parametrize("export", [export_dcp, export_safetensors, export_torch])
def test_the_weights_alone_leave_without_their_prefix(
    export: Callable[..., Any], repo: Repository, tmp_path: Path
) -> None:
    weights = {
        fqn.removeprefix("model."): tensor
        for fqn, tensor in repo.read(None).items()
        if fqn.startswith("model.")
    }
    done = export(repo, "v1", tmp_path / "out", include=["model"], strip_prefix="model.")
    assert (done.tensors, done.values) == (len(weights), 0)
    found = repo.read(import_any(tmp_path / "out", repo).number)
    assert found.keys() == weights.keys()
    assert [fqn for fqn, tensor in weights.items() if not same(found[fqn], tensor)] == []


def test_a_torch_file_of_the_weights_is_what_load_state_dict_takes(
    repo: Repository, tmp_path: Path
) -> None:
    export_torch(
        repo, None, tmp_path / "w.pt", include=["model.twin.*"], strip_prefix="model.twin."
    )
    torch.nn.Linear(3, 3).load_state_dict(torch.load(tmp_path / "w.pt"), strict=True)


def test_an_adapter_has_the_name_that_its_library_looks_for(
    repo: Repository, tmp_path: Path
) -> None:
    target = tmp_path / "adapter_model.safetensors"
    export_safetensors(repo, None, target, include=["model.twin"], strip_prefix="model.")
    assert load_file(target).keys() == {"twin.weight", "twin.bias"}


@pytest.mark.parametrize("export", EXPORTS)
def test_what_is_left_out_and_renamed(
    export: Callable[..., Any], repo: Repository, tmp_path: Path
) -> None:
    names = {"model.twin.weight": "w", "step": "at"}
    done = export(
        repo,
        None,
        tmp_path / "out",
        include=["model.twin.*", "step", "names"],
        exclude=["*.bias", "names"],
        rename=names,
    )
    assert (done.tensors, done.values) == (1, 1)
    if export is export_zarr:
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"w", "zarr.json"}
    else:
        assert fqns(repo, tmp_path / "out") == {"w", "at"}


def test_a_function_renames(repo: Repository, tmp_path: Path) -> None:
    export_safetensors(
        repo, None, tmp_path / "x.safetensors", include=["model.twin"], rename=str.upper
    )
    assert load_file(tmp_path / "x.safetensors").keys() == {"MODEL.TWIN.WEIGHT", "MODEL.TWIN.BIAS"}


def test_a_prefix_that_is_no_whole_part_gives_flat_names(repo: Repository, tmp_path: Path) -> None:
    export_torch(repo, None, tmp_path / "x.pt", include=["mixed"], strip_prefix="mi")
    assert torch.load(tmp_path / "x.pt").keys() == {"xed.0", "xed.1.lr", "xed.1.at.0", "xed.1.at.1"}


def test_below_a_list_names_are_flat(repo: Repository, tmp_path: Path) -> None:
    export_torch(repo, None, tmp_path / "x.pt", include=["mixed"], strip_prefix="mixed.")
    assert torch.load(tmp_path / "x.pt").keys() == {"0", "1.lr", "1.at.0", "1.at.1"}


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"include": ["modle"]}, NotFoundError, "'modle'.*dcpstore ls v1"),
    ({"exclude": ["modle"]}, NotFoundError, "'modle'.*dcpstore ls v1"),
    ({"include": "model"}, InvalidInputError, r"pass a list: \['model'\]"),
    ({"rename": 3}, InvalidInputError, "neither a mapping nor a function"),
    ({"rename": lambda fqn: 3}, InvalidInputError, "must return an FQN"),
    ({"rename": lambda fqn: "x"}, InvalidInputError, "both be exported as 'x'"),
    ({"strip_prefix": None}, InvalidInputError, "pass text"),
    (
        {"include": ["model"], "strip_prefix": "modle."},
        InvalidInputError,
        r"no exported name begins with 'modle\.'; they begin with 'model\.'\.",
    ),
    ({"includes": []}, TypeError, "includes"),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad[2])
@pytest.mark.parametrize("export", EXPORTS)
def test_invalid_choices_leave_nothing(
    export: Callable[..., Any],
    bad: tuple[dict[str, Any], type[Exception], str],
    repo: Repository,
    tmp_path: Path,
) -> None:
    options, kind, text = bad
    before = set(tmp_path.iterdir())
    with pytest.raises(kind, match=text):
        export(repo, None, tmp_path / "out", **options)
    assert set(tmp_path.iterdir()) == before


def test_without_their_optimizer_equal_moments_are_still_not_tied(tmp_path: Path) -> None:
    state = {
        "optim": {
            "state": {0: {"exp_avg": torch.arange(4.0)}, 1: {"other": torch.arange(4.0)}},
            "param_groups": [{"lr": 0.1, "params": [0, 1]}],
        }
    }
    with dcpstore.open(tmp_path / "repo") as repo:
        dcpstore.save(state, repo)
        done = export_safetensors(
            repo, None, tmp_path / "x.safetensors", include=["optim.state"], strip_prefix="optim."
        )
    assert len(load_file(tmp_path / "x.safetensors")) == done.tensors == 2


def test_a_composed_tensor_leaves_whole_under_its_new_name(tmp_path: Path) -> None:
    sparse = torch.eye(3).to_sparse()
    with dcpstore.open(tmp_path / "repo") as repo:
        dcpstore.save({"model": {"w": sparse, "b": torch.ones(3)}}, repo)
        out = tmp_path / "x.safetensors"
        export_safetensors(repo, None, out, include=["model.w"], strip_prefix="model.")
        (name, found), *rest = repo.read(import_any(out, repo).number).items()
        assert (name, rest) == ("w", [])
        assert torch.equal(found.to_dense(), sparse.to_dense())
        export_torch(repo, "v1", tmp_path / "x.pt", include=["model.w"], rename={"model.w": "v"})
        assert repo.read(import_any(tmp_path / "x.pt", repo).number).keys() == {"v"}


def test_damage_is_named_as_in_the_version(repo: Repository, tmp_path: Path) -> None:
    (pack,) = (tmp_path / "repo").rglob("*.pack")
    pack.write_bytes(bytes(len(pack.read_bytes())))
    with pytest.raises(CorruptionError, match=r"'model\.twin\.\w+'.*pack"):
        export_zarr(repo, None, tmp_path / "out", include=["model.twin"], strip_prefix="model.")


def test_an_imported_model_without_its_tied_head_loads(tmp_path: Path) -> None:
    model, other = TiedModel(), TiedModel()
    save_file({"embed.weight": model.embed.weight.detach()}, tmp_path / "model.safetensors")
    with dcpstore.open(tmp_path / "repo") as repo:
        import_safetensors(tmp_path / "model.safetensors", repo)
        dcpstore.load(other.state_dict(), repo)
        assert same(other.lm_head.weight.detach(), model.embed.weight.detach())
        export_safetensors(repo, None, tmp_path / "again.safetensors")
    assert load_file(tmp_path / "again.safetensors").keys() == {"embed.weight"}


@pytest.mark.parametrize("dtype", CASTS)
@pytest.mark.parametrize("export", EXPORTS)
def test_a_tensor_without_dimensions_is_converted_to_every_dtype(
    export: Callable[..., Any], dtype: str, tmp_path: Path
) -> None:
    state = {"step": torch.tensor(3.0), "count": torch.tensor(7), "flag": torch.tensor(True)}
    with dcpstore.open(tmp_path / "repo") as repo:
        dcpstore.save(state, repo)
        done = export(repo, None, tmp_path / "out", dtype=dtype)
        assert done.tensors == 3
        if export is export_zarr:
            return
        found = repo.read(import_any(tmp_path / "out", repo).number)
        (wanted,) = (row.torch for row in DTYPES if dtype in row.casts)
        assert same(found["step"], state["step"].to(wanted))
        assert same(found["count"], state["count"])
        assert same(found["flag"], state["flag"])


@pytest.mark.parametrize("export", EXPORTS)
def test_every_export_shows_its_options(export: Callable[..., Any]) -> None:
    shown = inspect.signature(export).parameters
    assert shown["include"].default is None
    assert shown["strip_prefix"].default == ""
    assert "options" not in shown
