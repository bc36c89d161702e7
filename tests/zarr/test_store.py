"""The store of a version: zarr reads it exactly, lazily, and never takes damage for data."""

import asyncio
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype

from dcpstore.encoding.dtypes import as_bytes
from dcpstore.errors import CorruptionError
from dcpstore.geometry.grids import Grid
from dcpstore.records import ChunkRange, StoredChunk
from dcpstore.storage.packs import PackReader
from dcpstore.zarr.store import VersionStore

GRID = Grid((0, 0), (5, 7), (2, 4))
SAVED = {
    "model.w": (torch.arange(35.0).reshape(5, 7).bfloat16(), (GRID,)),
    "model.b": (torch.arange(35).reshape(5, 7), (GRID,)),
    "split": (torch.arange(10.0), (Grid((0,), (3,), (3,)), Grid((3,), (7,), (4,)))),
    "scalar": (torch.tensor(2.5), (Grid((), (), ()),)),
    "c": (torch.tensor([True]), (Grid((0,), (1,), (1,)),)),
}


class Catalog:
    """Answers ranges of ordinals, and remembers what it was asked."""

    def __init__(self, chunks: Iterable[StoredChunk]) -> None:
        self.chunks = list(chunks)
        self.asked: list[ChunkRange] = []

    def find(self, ranges: Sequence[ChunkRange]) -> Iterable[StoredChunk]:
        self.asked += ranges
        return [
            chunk
            for tensor, part, first, last in ranges
            for chunk in self.chunks
            if chunk[:2] == (tensor, part) and first <= chunk.ordinal <= last
        ]


def open_store(written, catalog: Catalog | None = None, *, verify: bool = True) -> VersionStore:
    return VersionStore(
        "v12",
        written.entries,
        attributes={"step": 7},
        find=(catalog or Catalog(written.chunks)).find,
        read=PackReader(written.storage).read,
        verify=verify,
    )


@pytest.fixture(params=["none", "blosc", "zstd"])
def written(write, request: pytest.FixtureRequest):
    return write(SAVED, codec=request.param, values={"lr": "0.001"})


@pytest.mark.parametrize("verify", [True, False])
def test_zarr_reads_every_tensor(written, verify: bool) -> None:
    store = open_store(written, verify=verify)
    group = zarr.open_group(store, mode="r")
    assert dict(group.attrs) == {"step": 7, "values": {"lr": 0.001}}
    assert sorted(group.keys()) == ["c", "model.b", "model.w", "scalar", "split"]
    assert sorted(group["split"].keys()) == ["0", "1"]
    for fqn in ("model.w", "model.b", "scalar", "c"):
        array = group[fqn]
        assert array[...].tobytes() == as_bytes(SAVED[fqn][0]).tobytes()
    assert group["model.w"].attrs["torch_dtype"] == "bfloat16"
    assert (group["model.b"][1:4, 3] == np.arange(35).reshape(5, 7)[1:4, 3]).all()
    assert np.concatenate([group["split/0"], group["split/1"]]).tolist() == list(range(10))


def test_places_are_asked_for_once_an_array_and_only_of_arrays_read(written) -> None:
    catalog = Catalog(written.chunks)
    group = zarr.open_group(open_store(written, catalog), mode="r")
    assert catalog.asked == []
    group["model.b"][0]
    group["model.b"][...]
    assert catalog.asked == [ChunkRange(1, 0, 0, 5)]


def test_a_flipped_bit_is_named_and_not_handed_out(written) -> None:
    (pack,) = Path(written.storage.url).rglob("*.pack")
    raw = bytearray(pack.read_bytes())
    chunk = written.chunks[7]
    raw[chunk.offset + chunk.length - 1] ^= 1
    pack.write_bytes(raw)
    group = zarr.open_group(open_store(written), mode="r")
    assert group["model.w"][...].tobytes() == as_bytes(SAVED["model.w"][0]).tobytes()
    named = (
        r"chunk 1 of part 0 of 'model.b' in v12 "
        rf"\(pack 'packs/ab12/0-0.pack', offset {chunk.offset}\) is damaged"
    )
    with pytest.raises(CorruptionError, match=named):
        group["model.b"][...]


def test_a_chunk_that_is_not_found_is_no_zeros(written) -> None:
    lost = [chunk for chunk in written.chunks if chunk[:3] != (1, 0, 2)]
    group = zarr.open_group(open_store(written, Catalog(lost)), mode="r")
    with pytest.raises(CorruptionError, match=r"chunk 2 of part 0 of 'model.b' in v12 is not in"):
        group["model.b"][...]


def test_a_version_cannot_be_written(written) -> None:
    store = open_store(written)
    with pytest.raises(ValueError, match="read-only"):
        zarr.open_group(store, mode="a").create_array("x", shape=(1,), dtype="u1")
    array = zarr.open_array(store, path="model.b", mode="r")
    with pytest.raises(ValueError, match=r"read-only|never changes"):
        array[0] = 1
    with pytest.raises(ValueError, match="never changes"):
        asyncio.run(store.delete("zarr.json"))


def test_keys_exist_exactly_as_listed(written) -> None:
    store = open_store(written)

    async def collect() -> tuple[list[str], list[bool], list[bool], dict[str, list[str]]]:
        keys = [key async for key in store.list()]
        there = [await store.exists(key) for key in keys]
        odd = ["x", "model.b/c", "model.b/c/0", "model.b/c/0/2", "model.b/c/00/0", "model.b/c/-1/0"]
        absent = [await store.exists(key) for key in [*odd, "model.b", "c/c/1", "split/c/0"]]
        listed = {
            prefix: sorted([name async for name in store.list_dir(prefix)])
            for prefix in ("", "c", "split", "split/1/c", "model.b/c/", "nothing")
        }
        return keys, there, absent, listed

    keys, there, absent, listed = asyncio.run(collect())
    assert all(there)
    assert not any(absent)
    assert len(keys) == len(set(keys)) == 8 + len(written.chunks)
    assert listed == {
        "": ["c", "model.b", "model.w", "scalar", "split", "zarr.json"],
        "c": ["c", "zarr.json"],
        "split": ["0", "1", "zarr.json"],
        "split/1/c": ["0", "1"],
        "model.b/c/": ["0", "1", "2"],
        "nothing": [],
    }


def test_byte_ranges_are_cut_out(written) -> None:
    store = open_store(written)
    prototype = default_buffer_prototype()

    async def ranges() -> list[bytes]:
        keys = [
            ("zarr.json", RangeByteRequest(1, 5)),
            ("zarr.json", OffsetByteRequest(3)),
            ("zarr.json", SuffixByteRequest(2)),
            ("model.b/c/0/0", None),
            ("model.b/c/0/0", SuffixByteRequest(10_000)),
        ]
        return [v.to_bytes() for v in await store.get_partial_values(prototype, keys) if v]

    document = asyncio.run(store.get("zarr.json")).to_bytes()
    whole = asyncio.run(store.get("model.b/c/0/0")).to_bytes()
    assert asyncio.run(ranges()) == [document[1:5], document[3:], document[-2:], whole, whole]
    assert asyncio.run(store.get("model.b/c/9/9")) is None


def test_stores_of_one_version_are_equal(written) -> None:
    store = open_store(written)
    again = VersionStore(
        "v12", written.entries, attributes={"step": 7}, find=store._find, read=store._read
    )
    assert store == again
    assert store != open_store(written)  # it reads through another reader
    assert str(store) == "dcpstore:v12"
