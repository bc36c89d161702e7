"""Bad input: an error that names it, and an unchanged repository."""

from __future__ import annotations

import functools
import os
import random
import string
import threading
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.masked import masked_tensor
from torch.testing._internal.two_tensor import TwoTensor

import dcpstore
from dcpstore import (
    AlreadyExistsError,
    ConflictError,
    DcpstoreError,
    InvalidInputError,
    MismatchError,
    NotFoundError,
    Repository,
    UnsafeDataError,
)
from tests.saving.conftest import Opaque, W, assert_unchanged
from tests.soundness import Place, assert_sound


def freed() -> torch.Tensor:
    tensor = torch.arange(1000.0)[10:20]
    tensor.untyped_storage().resize_(0)
    return tensor


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(3)


def named_only(name: str) -> torch.Tensor:
    """Return a tensor of a dtype for which torch has views and no other operations."""
    dtype: torch.dtype = getattr(torch, name)
    return torch.ones(4, dtype=torch.uint8).view(dtype)


# Tensors that have no bytes to store, and a part of the error message for each.
NOT_PLAIN: dict[str, tuple[str, Callable[[], torch.Tensor]]] = {
    "freed": ("was freed or resized", freed),
    "meta": ("on the meta device", lambda: torch.ones(3, device="meta")),
    "nested": ("a nested tensor", lambda: torch.nested.nested_tensor([torch.ones(2)])),
    "lazy": ("neither shape nor bytes", lambda: torch.nn.LazyLinear(3).weight),
    "wrapped": ("TwoTensor", lambda: TwoTensor(torch.ones(2), torch.ones(2))),
    "fake": ("FakeTensor", fake),
    "masked": ("MaskedTensor", lambda: masked_tensor(torch.ones(2), torch.ones(2).bool())),
    "dimensions": ("70 dimensions", lambda: torch.ones(1).reshape((1,) * 70)),
    "quantized": (
        "qint8 cannot be stored",
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    ),
    **{
        name: (f"{name} cannot be stored", functools.partial(named_only, name))
        for name in ("int2", "int4", "uint1", "uint4", "uint7", "bits8", "bits16")
    },
}


def recursive() -> dict[str, Any]:
    state: dict[str, Any] = {}
    state["again"] = state
    return state


def deep() -> dict[str, Any]:
    state: dict[str, Any] = {}
    for _ in range(5000):
        state = {"in": state}
    return state


def _stale_tip(repo: Repository) -> None:
    dcpstore.save(W, repo, expect_tip="best", branch="new")


TOO_LARGE: Any = {"loss": 10**400}
LONG: Any = {"m" * 2001: 1}
SET_OF_TENSORS: dict[str, Any] = {"deep": {"t": {torch.ones(2, device="meta")}}}

BAD: list[tuple[type[Exception], str, Callable[[Repository], Any]]] = [
    (AlreadyExistsError, "best", lambda r: dcpstore.save(W, r, tags=["best"])),
    (AlreadyExistsError, "best", lambda r: r.tag("best", "v1")),
    (AlreadyExistsError, "best", lambda r: r.branch("best", at="v1")),
    (AlreadyExistsError, "best", lambda r: dcpstore.save(W, r, branch="best")),
    (InvalidInputError, "a b", lambda r: dcpstore.save(W, r, tags=["a b"])),
    (InvalidInputError, "v3", lambda r: dcpstore.save(W, r, branch="v3")),
    (InvalidInputError, "one text", lambda r: dcpstore.save(W, r, tags="best2")),
    (NotFoundError, "side", lambda r: dcpstore.save(W, r, branch="x", parent="side")),
    (ConflictError, "expect_tip", _stale_tip),
    (InvalidInputError, "tags=None is not a list", lambda r: dcpstore.save(W, r, tags=None)),
    (InvalidInputError, "metrics=.*not a mapping", lambda r: dcpstore.save(W, r, metrics=[1])),
    (InvalidInputError, "labels=.*not a mapping", lambda r: dcpstore.save(W, r, labels=["a"])),
    (InvalidInputError, "too large for a float", lambda r: dcpstore.save(W, r, metrics=TOO_LARGE)),
    (InvalidInputError, "nested too deep", lambda r: dcpstore.save({"e": recursive()}, r)),
    (InvalidInputError, "nested too deep", lambda r: dcpstore.save(deep(), r)),
    (InvalidInputError, "FQN 'xx.* 2001 bytes", lambda r: dcpstore.save({"x" * 2001: 1}, r)),
    (InvalidInputError, "FQN .* 3000 bytes", lambda r: dcpstore.save({"日" * 1000: W["w"]}, r)),
    (InvalidInputError, "metric name 'm.* 2001", lambda r: dcpstore.save(W, r, metrics=LONG)),
    (InvalidInputError, "label name 'm.* 2001", lambda r: dcpstore.save(W, r, labels=LONG)),
    (UnsafeDataError, "Opaque", lambda r: dcpstore.save({"o": Opaque()}, r)),
    (UnsafeDataError, "'deep.o'", lambda r: dcpstore.save({"deep": {"o": Opaque()}}, r)),
    (
        UnsafeDataError,
        r"'deep\.t': .* tuples and dicts only",
        lambda r: dcpstore.save(SET_OF_TENSORS, r),
    ),
    (InvalidInputError, "same FQN", lambda r: dcpstore.save({"a": {"b": 1}, "a.b": 2}, r)),
    (InvalidInputError, "keys must be text", lambda r: dcpstore.save({1: torch.ones(3)}, r)),
    (NotFoundError, "'best'", lambda r: dcpstore.load(dict(W), r, "bets")),
    (NotFoundError, "v9", lambda r: dcpstore.load(dict(W), r, 9)),
    (InvalidInputError, "is not a ref", lambda r: dcpstore.load(dict(W), r, "a b")),
    (NotFoundError, "'w'", lambda r: r.read("best", ["ww"])),
    (InvalidInputError, "shape", lambda r: r.read("best", {"w": (slice(0, 1), 0)})),
    (NotFoundError, "'w'", lambda r: r.read("best", "ww")),
    (MismatchError, "'v' is not", lambda r: dcpstore.load({"v": torch.ones(3)}, r)),
    (MismatchError, "shape", lambda r: dcpstore.load({"w": torch.ones(4)}, r)),
    (MismatchError, "dtype", lambda r: dcpstore.load({"w": torch.ones(3).int()}, r)),
    (MismatchError, "is a value", lambda r: dcpstore.load({"lr": torch.ones(3)}, r)),
    (MismatchError, "is a tensor", lambda r: dcpstore.load({"w": 3}, r)),
    (InvalidInputError, "INSERT", lambda r: r.sql("INSERT INTO ref VALUES (1)")),
]


def test_bad_input_leaves_the_repository_as_it_was(
    kept: Repository, subtests: pytest.Subtests
) -> None:
    for error, match, call in BAD:
        with subtests.test(error=error.__name__, match=match):
            with pytest.raises(error, match=match):
                call(kept)
            assert_unchanged(kept)


@pytest.mark.filterwarnings(
    "ignore:The PyTorch API of", "ignore:Lazy modules", "ignore:.*quantize_per_tensor"
)
@pytest.mark.parametrize("save", [dcpstore.save, dcpstore.async_save])
def test_a_tensor_without_plain_bytes_is_named(
    kept: Repository, save: Callable[..., object], subtests: pytest.Subtests
) -> None:
    for what, (message, make) in NOT_PLAIN.items():
        with subtests.test(what=what):
            with pytest.raises(InvalidInputError, match=rf"'deep\.0\.w': .*{message}"):
                save({"deep": [{"w": make()}], "b": torch.ones(1)}, kept)
            assert_unchanged(kept)


def test_names_of_the_longest_length_are_read_back(repo: Repository) -> None:
    rng = random.Random(0)  # a name that no database can compress
    name = "".join(rng.choices(string.ascii_letters, k=2000))
    state = {name: torch.ones(2), f"{name[:-2]}.v": 1}
    version = dcpstore.save(state, repo, metrics={name: 1.0}, labels={name: "a"})
    assert (version.metrics, version.labels) == ({name: 1.0}, {name: "a"})
    assert repo.read()[name].tolist() == [1, 1]


def test_a_mapping_that_cannot_be_changed_is_saved(repo: Repository) -> None:
    state = {"c": MappingProxyType({"lr": 0.1, "w": torch.ones(2)})}
    for save in (dcpstore.save, lambda *given: dcpstore.async_save(*given).result()):
        save(MappingProxyType(state), repo)
        assert repo.read()["c.lr"] == 0.1


def test_every_difference_is_named_at_once(kept: Repository) -> None:
    state = {"W": torch.ones(3), "w": torch.ones(2), "lr": torch.ones(1)}
    before = {fqn: tensor.clone() for fqn, tensor in state.items()}
    with pytest.raises(MismatchError) as caught:
        dcpstore.load(state, kept)
    assert len(caught.value.differences) == 3
    for fqn, tensor in before.items():
        assert torch.equal(state[fqn], tensor)


def test_a_repository_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        dcpstore.load({"w": torch.ones(3)}, tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InvalidInputError, match="is a file"):
        dcpstore.open(tmp_path / "file")


def test_a_data_folder_that_was_moved(place: Place) -> None:
    place.open().close()
    os.rename(place.data, place.data + "-moved")
    with pytest.raises(NotFoundError, match="data folder"):
        dcpstore.open(place.url)
    assert not os.path.exists(place.data)


def test_a_data_folder_that_cannot_be_written(place: Place) -> None:
    repo = place.open()
    packs = Path(place.data) / "packs"
    packs.write_text("a file where the packs should be")
    with pytest.raises(DcpstoreError, match="packs"):
        dcpstore.save({"w": torch.ones(3)}, repo)
    assert repo.log() == []
    packs.unlink()
    assert dcpstore.save({"w": torch.ones(3)}, repo).number == 1
    assert_sound(repo)
    repo.close()


def test_a_pickle_is_written_and_read_only_with_allow_pickle(repo: Repository) -> None:
    state: dict[str, Any] = {"dtype": torch.float32, "float": threading.TIMEOUT_MAX, "o": print}
    with pytest.raises(UnsafeDataError, match="allow_pickle"):
        dcpstore.save(state, repo)
    dcpstore.save(state, repo, allow_pickle=True)
    empty = dict.fromkeys(state)
    with pytest.raises(UnsafeDataError, match="'o'"):
        dcpstore.load(empty, repo)
    dcpstore.load(empty, repo, allow_pickle=True)
    assert empty == state


def test_a_value_that_cannot_be_stored_is_named(
    kept: Repository, subtests: pytest.Subtests
) -> None:
    deep: tuple[object, ...] = ()
    for _ in range(101):
        deep = (deep,)
    for message, value in (("does not pickle", lambda: 1), ("nested deeper than 100", deep)):
        state = {"deep": {"o": value}, "w": torch.ones(3)}
        for save in (
            dcpstore.save,
            lambda *given, **how: dcpstore.async_save(*given, **how).result(),
        ):
            with subtests.test(message=message):
                with pytest.raises(InvalidInputError, match=rf"^'deep\.o': .*{message}"):
                    save(state, kept, allow_pickle=True)
                assert_unchanged(kept)
