"""Documents: node names that Zarr can hold and that never collide, keys in chunk order."""

import itertools
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.core.metadata.v3 import ArrayV3Metadata

from dcpstore.encoding import dtypes
from dcpstore.encoding.codecs import CODECS
from dcpstore.geometry.grids import Grid
from dcpstore.records import EntryRecord, TensorRecord
from dcpstore.zarr.documents import (
    array_name,
    array_names,
    chunk_keys,
    zarr_documents,
)

texts = st.text(st.sampled_from(".%_/z2EaA\\\0\ud800é{[") | st.characters(exclude_categories=()))


def entry(fqn: str, parts: tuple[Grid, ...], dtype: str = "float32", codec: str = "none"):
    record = TensorRecord(5, "aa", dtype, (4, 6), codec, 96, parts)
    return EntryRecord(fqn, (fqn,), "tensor", record)


WHOLE = (Grid((0, 0), (4, 6), (3, 2)),)
PARTS = (Grid((0, 0), (3, 6), (3, 2)), Grid((3, 0), (1, 6), (1, 6)))


@settings(deadline=None, max_examples=300)
@given(texts, texts)
def test_names_are_legal_and_two_fqns_never_share_one(one: str, other: str) -> None:
    name = array_name(one)
    assert name
    assert set(name) != {"."}
    assert not name.startswith("__")
    assert name != "zarr.json"
    assert not re.search(r"[/\\\0]", name)
    name.encode()
    assert (name == array_name(other)) == (one == other)


@pytest.mark.parametrize(
    ("fqn", "name"),
    [
        ("model.layers.0.weight", "model.layers.0.weight"),
        ("größe-1", "größe-1"),
        ("a/b", "a%2Fb"),
        ("100%", "100%25"),
        ("", "%"),
        ("..", "%2E%2E"),
        ("__init__", "%5F%5Finit%5F%5F"),
        ("zarr.json", "zarr%2Ejson"),
        (".zgroup", "%2Ezgroup"),
        ("\ud800", "%ED%A0%80"),
    ],
)
def test_names_stay_readable(fqn: str, name: str) -> None:
    assert array_name(fqn) == name


def test_chunk_keys_follow_the_ordinals() -> None:
    (grid,) = WHOLE
    assert list(chunk_keys("w", grid)) == [
        "w/c/" + "/".join(map(str, grid.index(i))) for i in range(6)
    ]
    assert list(chunk_keys("s", Grid((), (), ()))) == ["s/c"]
    assert list(chunk_keys("e", Grid((0,), (0,), (1,)))) == []


@pytest.mark.parametrize(("dtype", "codec"), list(itertools.product(dtypes._DTYPES, CODECS)))
def test_zarr_reads_the_array_documents_as_meant(dtype: str, codec: str) -> None:
    documents = zarr_documents([entry("w", WHOLE, dtype, codec)], {})
    document = json.loads(documents["w/zarr.json"])
    read = ArrayV3Metadata.from_dict(dict(document))
    assert read.shape == (4, 6)
    assert read.dtype.to_native_dtype() == dtypes.numpy_dtype(dtype)
    assert read.fill_value == 0
    # What zarr itself would write for the array is what we wrote.
    assert json.loads(json.dumps(read.to_dict())) | {"storage_transformers": []} == document


def test_split_tensors_are_groups_and_values_attributes_of_the_root() -> None:
    value = EntryRecord("lr", ("lr",), "value", None, '{"$float":"nan"}')
    blob = EntryRecord("b", ("b",), "blob", entry("b", WHOLE).tensor, '{"$blob":"pickle"}')
    documents = zarr_documents([entry("a/b", PARTS), value, blob], {"step": 3})
    assert list(documents) == [
        "zarr.json",
        "a%2Fb/zarr.json",
        "a%2Fb/0/zarr.json",
        "a%2Fb/1/zarr.json",
        "b/zarr.json",
    ]
    root = json.loads(documents["zarr.json"])
    assert root["attributes"] == {"step": 3, "values": {"lr": {"$float": "nan"}}}
    assert {f"{k}/zarr.json": v for k, v in root["consolidated_metadata"]["metadata"].items()} == {
        key: json.loads(text) for key, text in documents.items() if key != "zarr.json"
    }
    group = json.loads(documents["a%2Fb/zarr.json"])
    assert group["attributes"] == {"fqn": "a/b", "torch_dtype": "float32", "shape": [4, 6]}
    second = json.loads(documents["a%2Fb/1/zarr.json"])
    assert second["attributes"] == {"offsets": [3, 0], "shape": [1, 6]}
    assert json.loads(documents["b/zarr.json"])["attributes"]["blob"] == {"$blob": "pickle"}
    assert array_names(value) == []
