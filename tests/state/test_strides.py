"""Strided splits on releases of torch that lay out unequal pieces in another way."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor

import dcpstore
from dcpstore import InvalidInputError
from dcpstore.compat.torch_private import StridedShard, splits_uneven_strides
from dcpstore.geometry.placements import Split
from dcpstore.state.shards import _check_even_strides
from tests.ranks import RankPool, mesh


@pytest.mark.parametrize(
    ("size", "splits"),
    [
        (2, [Split(0, 2, 0, factor=2)]),
        (10, [Split(0, 2, 1, factor=3), Split(0, 3, 0)]),
        (9, [Split(0, 2, 0), Split(0, 2, 1, factor=2)]),  # 5 elements are left
    ],
)
def test_unequal_pieces_are_refused(size: int, splits: list[Split]) -> None:
    with pytest.raises(
        InvalidInputError, match=r"'w' .* of \d+ elements .* unequal size, .* pad it"
    ):
        _check_even_strides("w", (size,), splits)


def test_equal_pieces_and_plain_splits_are_taken() -> None:
    _check_even_strides("w", (12, 5), [Split(0, 2, 1, factor=3), Split(0, 3, 0), Split(1, 4, 3)])
    _check_even_strides("w", (8,), [Split(0, 2, 1), Split(0, 2, 0, factor=2)])


def save_uneven(rank: int, folder: str) -> str:
    """Save a strided shard of unequal pieces; return what comes of it."""
    placement = StridedShard(0, split_factor=2)
    whole = torch.arange(6.0)
    pieces, _ = placement._split_tensor(whole, 2, with_padding=False)
    split = DTensor.from_local(
        pieces[rank].contiguous(), mesh((2,)), [placement], run_check=False, shape=(6,), stride=(1,)
    )
    try:
        version = dcpstore.save({"w": split}, folder)
    except dcpstore.DcpstoreError as error:
        return type(error).__name__ + str(error)
    with dcpstore.open(folder) as repo:
        return str(torch.equal(repo.read(version.number)["w"], whole))


def test_they_are_saved_right_or_refused(two_ranks: RankPool, tmp_path: object) -> None:
    for said in two_ranks.run(save_uneven, str(tmp_path)):
        assert said == "True" if splits_uneven_strides() else "unequal size" in said
