"""Values of every kind, on each path in and out: the result equals what was saved."""

from __future__ import annotations

import io
import json
import pickle
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner

import dcpstore
from dcpstore import InvalidInputError, MismatchError, Repository, UnsafeDataError
from dcpstore.cli.app import commands
from dcpstore.convert import (
    export_dcp,
    export_safetensors,
    export_torch,
    export_zarr,
    import_safetensors,
)
from tests.encoding.kinds import KEPT, REFUSED, Box, Config, Level, Mode, Span, canonical
from tests.ranks import RankPool
from tests.soundness import assert_sound


def everything() -> dict[str, Any]:
    """Return a state with a value of each kind, flat and in containers."""
    state = {f"k{i}": kind.value for i, kind in enumerate(KEPT)}
    return {"v": state, "w": torch.ones(2), "l": [torch.zeros(1), Level.HIGH, {"p": Path("x")}]}


def places() -> dict[str, Any]:
    """Return a state to load that into, with other values of the same classes."""
    state = {f"k{i}": kind.template for i, kind in enumerate(KEPT)}
    return {"v": state, "w": torch.zeros(2), "l": [torch.ones(1), Level.LOW, {"p": None}]}


def plain() -> dict[str, Any]:
    """Return what each kind is read as without a template, by FQN."""
    by_name = {"IntEnum": 2, "dataclass": None, "named tuple": (1, 2), "subclass": 7}
    found = {}
    for i, kind in enumerate(KEPT):
        name = next((name for name in by_name if name in kind.name), None)
        found[f"v.k{i}"] = kind.value if name is None else by_name[name]
        if "any other factory" in kind.name:
            found[f"v.k{i}"] = ({"a": 1},)
        if name == "dataclass":
            found[f"v.k{i}"] = {"lr": 0.1, "mode": "train", "betas": (0.9, 0.95), "steps": 1}
    return found


def check(filled: dict[str, Any]) -> None:
    """Check that a state holds what `everything` returns."""
    saved = everything()
    for name in filled["v"]:
        value = saved["v"][name]
        assert canonical(filled["v"][name]) == canonical(value), name
    assert filled["l"][1] is Level.HIGH
    assert filled["l"][2] == {"p": Path("x")}
    assert torch.equal(filled["w"], torch.ones(2))


def test_every_kind_is_restored_with_its_class_and_as_plain_values(repo: Repository) -> None:
    dcpstore.save(everything(), repo, step=1)
    dcpstore.load(filled := places(), repo)
    check(filled)
    found = repo.read()
    for fqn, value in plain().items():
        assert canonical(found[fqn]) == canonical(value), fqn
    assert found["l.1"] == 2
    empty = {"v": dict.fromkeys(everything()["v"]), "w": torch.zeros(2)}
    dcpstore.load(empty, repo, exclude=["l.*"])
    for fqn, value in plain().items():
        assert canonical(empty["v"][fqn.removeprefix("v.")]) == canonical(value), fqn
    again = dcpstore.save(everything(), repo, step=2)
    assert not repo.diff(1, again.number)
    changed = everything()
    changed["v"]["k0"], changed["l"][1] = Mode.TRAIN, Level.LOW
    dcpstore.save(changed, repo, step=3)
    assert [entry.fqn for entry in repo.diff(2, 3).changed] == ["l.1", "v.k0"]
    assert_sound(repo)


def test_every_kind_is_staged(repo: Repository) -> None:
    state = everything()
    state["v"]["late"] = (io.BytesIO(b"abc"), deque([1]), Config(0.1), deque([torch.ones(1)]))
    pending = dcpstore.async_save(state, repo)
    state["v"]["late"][0].write(b"later")
    state["v"]["late"][1].append(2)
    state["v"]["late"][2].lr = 7.0
    state["v"]["late"][3][0].zero_()
    pending.result()
    into = places()
    into["v"]["late"] = Config(0.0)
    dcpstore.load(into, repo)
    file, items, config, tensors = into["v"].pop("late")
    check(into)
    assert (file.getvalue(), items, config.lr) == (b"abc", deque([1]), 0.1)
    assert tensors[0] == 1


def test_a_lazy_tensor_inside_an_object_is_refused_by_staging(repo: Repository) -> None:
    pairs = torch.tensor([1 + 2j])
    dcpstore.async_save({"t": (pairs.conj(),)}, repo).result()
    assert torch.equal(repo.read()["t.0"], pairs.conj().resolve_conj())
    for holder in (deque([pairs.conj()]), {pairs.conj().imag}):
        with pytest.raises(InvalidInputError, match=r"'t\.o': .*resolve_conj"):
            dcpstore.async_save({"t": {"o": holder}}, repo).result()
        dcpstore.save({"t": {"o": holder}}, repo)
        (found,) = repo.read()["t.o"]
        assert torch.equal(found, next(iter(holder)).resolve_conj().resolve_neg())


class Watching(dcpstore.DefaultLoadPlanner):
    """Reads torch's bytes of each value, as planners of torch do."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        self.sizes = [*getattr(self, "sizes", ()), len(value.getvalue())]
        super().load_bytes(read_item, value)


class Logging(dcpstore.DefaultSavePlanner):
    """A save planner that returns torch's bytes of each value."""

    def resolve_data(self, write_item: Any) -> Any:
        return super().resolve_data(write_item)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("saver", [dcp.DefaultSavePlanner, dcpstore.DefaultSavePlanner, Logging])
@pytest.mark.parametrize("loader", [dcp.DefaultLoadPlanner, dcpstore.DefaultLoadPlanner, Watching])
def test_every_kind_goes_through_torchs_own_calls(tmp_path: Path, saver: Any, loader: Any) -> None:
    state, filled, planner = everything(), places(), loader()
    odd = next(name for name, value in state["v"].items() if value is torch.channels_last)
    if saver is Logging or loader is not dcpstore.DefaultLoadPlanner:
        del state["v"][odd], filled["v"][odd]  # which torch.save cannot pickle
    dcp.save(state, storage_writer=dcpstore.FileSystemWriter(tmp_path / "c"), planner=saver())
    dcp.load(filled, storage_reader=dcpstore.FileSystemReader(tmp_path / "c"), planner=planner)
    if loader is dcp.DefaultLoadPlanner:  # which makes None of objects that it does not know
        for name in ("dataclass", "named tuple"):
            at = next(f"k{i}" for i, kind in enumerate(KEPT) if name in kind.name)
            assert canonical(filled["v"].pop(at)) == canonical(plain()[f"v.{at}"])
    check(filled)
    assert not isinstance(planner, Watching) or min(planner.sizes) > 0


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_what_torch_cannot_serialize_is_refused_by_its_fqn(tmp_path: Path) -> None:
    state = {"format": torch.channels_last}
    with pytest.raises(InvalidInputError, match=r"'format': the planner cannot make bytes"):
        dcpstore.save(state, tmp_path, planner=Logging())
    dcpstore.save(state, tmp_path)
    for planner in (dcp.DefaultLoadPlanner(), Watching()):
        with pytest.raises(InvalidInputError, match=r"'format': .*dcpstore\.DefaultLoadPlanner"):
            dcpstore.load(dict(state), tmp_path, planner=planner)
    for export in (export_torch, export_dcp):
        with pytest.raises(InvalidInputError, match=r"'format': a value does not pickle"):
            export(tmp_path, None, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_every_kind_is_shown_and_exported(tmp_path: Path) -> None:
    state = everything()
    odd = next(name for name, value in state["v"].items() if value is torch.channels_last)
    del state["v"][odd]  # which torch.save cannot pickle
    dcpstore.save(state, tmp_path / "r")
    shown = CliRunner().invoke(commands, ["ls", "--repo", str(tmp_path / "r"), "--json"])
    assert shown.exit_code == 0, shown.output
    listed = {entry["fqn"]: entry["value"] for entry in json.loads(shown.output)}
    assert listed["l.1"]["$enum"][1] == 2
    assert CliRunner().invoke(commands, ["ls", "--repo", str(tmp_path / "r")]).exit_code == 0
    export_zarr(tmp_path / "r", None, tmp_path / "zarr")
    export_torch(tmp_path / "r", None, tmp_path / "all.pt")
    loaded = torch.load(tmp_path / "all.pt", weights_only=False)
    export_safetensors(tmp_path / "r", None, tmp_path / "all.safetensors")
    import_safetensors(tmp_path / "all.safetensors", tmp_path / "again")
    export_dcp(tmp_path / "r", None, tmp_path / "dcp")
    into = {"v": dict.fromkeys(state["v"])}
    dcp.load(into, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with dcpstore.open(tmp_path / "again") as again:
        found = again.read()
    for name in state["v"]:
        fqn, value = f"v.{name}", plain()[f"v.{name}"]
        if type(value) is dict:  # an import walks it like any mapping
            assert value == {key: found[f"{fqn}.{key}"] for key in value}
        else:
            assert canonical(found[fqn]) == canonical(value), fqn
        assert canonical(loaded["v"][name]) == canonical(value), fqn
        assert canonical(into["v"][name]) == canonical(value), fqn


@dataclass
class Other:
    """No field of it is one of Config's."""

    size: int


def test_all_that_does_not_fit_is_named_before_a_tensor_is_changed(repo: Repository) -> None:
    state = {"a": Config(0.1), "b": [Level.HIGH], "w": torch.ones(2), "x": {"s": Span(1, 2)}}
    dcpstore.save(state, repo)
    into = {"a": Other(1), "b": [Mode.TRAIN], "w": torch.zeros(2), "x": {"s": Span(0, 0)}}
    for dry_run in (True, False):
        if dry_run:
            differences = dcpstore.load(into, repo, dry_run=True).differences
        else:
            with pytest.raises(MismatchError, match="None to be given its plain value") as caught:
                dcpstore.load(into, repo)
            differences = caught.value.differences
        assert [line.split()[0] for line in differences] == ["'a'", "'b'"]
        assert "kinds.Config(lr, mode, betas, steps)" in differences[0]
        assert "Other(size)" in differences[0]
    assert into["x"]["s"] == Span(0, 0)
    assert not into["w"].any()
    into |= {"a": None, "b": None}
    dcpstore.load(into, repo)
    assert into["a"]["lr"] == 0.1
    assert into["b"] == [2]
    assert into["x"]["s"] == Span(1, 2)


def test_a_long_value_fits_or_is_named(repo: Repository) -> None:
    dcpstore.save({"many": [Box((i,)) for i in range(10_000)]}, repo)
    into: dict[str, Any] = {"many": [Box(())]}
    dcpstore.load(into, repo)
    assert into["many"][-1] == Box((9_999,))
    with pytest.raises(MismatchError, match=r"'many' is a .*Box\(sizes\)"):
        dcpstore.load({"many": [Other(1)]}, repo)


def test_what_is_refused_is_named_and_nothing_is_written(repo: Repository) -> None:
    for kind in REFUSED:
        try:
            pickle.dumps(kind.make())
            cure = "allow_pickle"
        except Exception:  # as each class likes
            cure = "cannot be pickled"
        with pytest.raises(UnsafeDataError, match=rf"'deep\.odd': .*{cure}"):
            dcpstore.save({"w": torch.ones(2), "deep": {"odd": kind.make()}}, repo)
    assert repo.log() == []
    assert not list(repo.storage.list("packs"))


def _both(rank: int, folder: str) -> list[str]:
    state = everything()
    state["own"] = dcpstore.PerRank((Level(rank + 1), io.BytesIO(b"%d" % rank), np.float32(rank)))
    dcpstore.save(state, folder)
    filled = places()
    filled["own"] = dcpstore.PerRank(Level.LOW)
    dcpstore.load(filled, folder)
    check(filled)
    level, file, number = filled["own"].value
    assert level is Level(rank + 1)
    assert file.getvalue() == b"%d" % rank
    assert number == rank
    try:
        dcpstore.load(
            {"v": {}, "l": [torch.ones(1), Mode.TRAIN if rank else Level.LOW, {"p": 1}]}, folder
        )
    except MismatchError as error:
        return [*error.differences]
    return []


def test_two_ranks(two_ranks: RankPool, tmp_path: Path) -> None:
    one, other = two_ranks.run(_both, str(tmp_path / "r"))
    assert one == other
    assert [line.split()[0] for line in one] == ["'l.1'"]
