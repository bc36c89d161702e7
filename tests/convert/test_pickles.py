"""Pickles of plain values: built out of a closed list, bit for bit, and nothing else is."""

from __future__ import annotations

import collections
import datetime
import decimal
import io
import os
import pathlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import _weights_only_unpickler

from dcpstore import Repository, UnsafeDataError
from dcpstore.convert import import_dcp, import_torch
from dcpstore.convert.pickles import Odd, PlainUnpickler, odd_inside
from dcpstore.errors import CorruptionError

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.slow_on_postgres,
]

PLAIN: dict[str, Any] = {
    "bool_": np.bool_(True),
    "float64": np.float64(0.1),
    "float32": np.float32(-0.0),
    "int64": np.int64(-(2**63)),
    "uint8": np.uint8(255),
    "half": np.float16("nan"),
    "complex128": np.complex128(1 - 2j),
    "datetime64": np.datetime64("2026-01-01T00:00:00", "ns"),
    "timedelta64": np.timedelta64(3, "25us"),
    "array": np.arange(6, dtype=np.int16).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "no dimension": np.array(1.5),
    "empty": np.zeros((0, 3), np.float32),
    "dates": np.array(["2026-01-01", "NaT"], "M8[D]"),
    "flags": np.array([True, False]),
    "set": {1, 2},
    "frozenset": frozenset({"a"}),
    "complex": 1 + 2j,
    "bytes": b"\x00\xff",
    "bytearray": bytearray(b"\x00\xff"),
    "datetime": datetime.datetime(
        2026, 1, 1, 12, tzinfo=datetime.timezone(datetime.timedelta(0, 3600))
    ),
    "date": datetime.date(2026, 1, 1),
    "timedelta": datetime.timedelta(1, 2, 3),
    "decimal": decimal.Decimal("1.10"),
    "size": torch.Size([2, 3]),
    "device": torch.device("cuda", 1),
    "dtype": torch.bfloat16,
    "tuple": (1, (np.float32(2), None)),
}


def alike(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray | np.generic):
        same_form = one.dtype == other.dtype and one.shape == other.shape
        return same_form and one.dtype.str == other.dtype.str and one.tobytes() == other.tobytes()
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other)


def unpickled(data: bytes) -> Any:
    return PlainUnpickler(io.BytesIO(data)).load()


@pytest.mark.parametrize("protocol", range(2, 5))
def test_plain_values_are_built_bit_for_bit(protocol: int) -> None:
    found = unpickled(pickle.dumps(PLAIN, protocol=protocol))
    assert [name for name, value in PLAIN.items() if not alike(found[name], value)] == []
    assert odd_inside(found) is None
    held = {
        "a": PLAIN["array"],
        "b": [PLAIN["array"]],
        "d": np.dtype(">i4"),
        "e": np.dtype("M8[s]"),
    }
    found = unpickled(pickle.dumps(held, protocol=protocol))
    assert found["a"] is found["b"][0]
    assert (found["d"], found["e"]) == (np.dtype(">i4"), np.dtype("M8[s]"))
    swapped = np.arange(3, dtype=">f4")  # which numpy itself makes native, in pickles
    assert alike(unpickled(pickle.dumps(swapped, protocol=2)), swapped.astype("<f4"))
    assert np.dtype("i4") == np.dtype(np.int32)  # none of numpy's own was changed
    for numpy in (b"numpy.core", b"numpy._core"):  # as older numpy wrote it, and newer
        text = pickle.dumps(PLAIN["int64"], protocol=2).replace(b"numpy._core", numpy)
        assert alike(unpickled(text), PLAIN["int64"])


def test_containers_are_built() -> None:
    made = collections.defaultdict(list, {"a": [1]})
    own = collections.defaultdict(os.getpid, {"a": 1})
    held = [made, own, collections.Counter("aab"), collections.OrderedDict(a=1)]
    held.append(collections.deque([1, 2], 3))
    assert unpickled(pickle.dumps(held, protocol=2)) == [
        {"a": [1]},
        {"a": 1},
        collections.Counter("aab"),
        collections.OrderedDict(a=1),
        collections.deque([1, 2], 3),
    ]
    assert unpickled(pickle.dumps(held, protocol=2))[4].maxlen == 3


class Evil:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)


@pytest.mark.parametrize("protocol", range(2, 5))
def test_an_odd_value_is_named_where_it_lies(tmp_path: Path, protocol: int) -> None:
    held = {
        "path": pathlib.PurePosixPath("/a"),
        "evil": Evil(tmp_path / "made"),
        "inside": [(1, {Evil(tmp_path / "made")})],
        "objects": np.array([Evil(tmp_path / "made"), None], object),
        "records": np.zeros(2, [("a", "i4")]),
        "text": np.array(["a"]),
        "class": np.float32,
        "good": 1,
    }
    found = unpickled(pickle.dumps(held, protocol=protocol))
    odd = {name: odd_inside(value) for name, value in found.items()}
    assert odd.pop("good") is None
    assert all(isinstance(one, Odd) for one in odd.values()), odd
    assert odd["evil"] == odd["inside"] == Odd("posix.mkdir")
    assert not (tmp_path / "made").exists()


ARRAY = pickle.dumps(np.arange(4, dtype=np.int32), protocol=2)
SCALAR = pickle.dumps(np.int32(7), protocol=2)
HOSTILE = {
    "a large shape": ARRAY.replace(b"K\x04\x85", b"J\xff\xff\xff\x7f\x85"),
    "a shape without bytes": ARRAY.replace(b"K\x04\x85", b"K\x05\x85"),
    "a scalar of other bytes": SCALAR.replace(b"i4", b"i8"),
    "a dtype of another size": SCALAR.replace(b"NNNJ\xff\xff\xff\xff", b"NNNJ\xff\xff\xff\x7f"),
    "a dtype of records": SCALAR.replace(b"NNNJ", b"N}NJ"),
    "a tensor by its size": b"ctorch\nFloatTensor\n(J\xff\xff\xff\x7ftR.",
    "a storage by its size": b"ctorch.storage\nUntypedStorage\n(J\xff\xff\xff\x7ftR.",
    "an array by its size": b"cnumpy\nndarray\n(J\xff\xff\xff\x7ftR.",
    "bytes by their size": b"cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR.",
    "bytes by an opcode": b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.",
    "bytes by a codec": b"c_codecs\nencode\n(Vabc\nVrot13\ntR.",
    "a function's own state": b"c_codecs\nencode\n}Va\nK\x01sb.",
    "a class's own state": b"ccollections\nOrderedDict\n}Va\nK\x01sb.",
    "an item of an array": ARRAY[:-1] + b"K\x00K\x01s.",
    "a call of a value": b"ctorch\nfloat32\n(tR.",
    "a call without arguments": b"ccollections\nOrderedDict\nK\x01R.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_allocate_and_change_nothing(
    repo: Repository, tmp_path: Path, name: str
) -> None:
    assert HOSTILE[name] not in (ARRAY, SCALAR)
    with torch.serialization.skip_data():
        torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    source = torch._C.PyTorchFileReader(str(tmp_path / "a.pt"))
    writer = torch._C.PyTorchFileWriter(str(tmp_path / "b.pt"))
    writer.write_record("data.pkl", HOSTILE[name], len(HOSTILE[name]))
    for record in source.get_all_records():
        if record.startswith("data/"):
            writer.write_record(record, source.get_record(record), 8)
    writer.write_end_of_file()
    with pytest.raises((UnsafeDataError, CorruptionError)):
        import_torch(tmp_path / "b.pt", repo)
    assert repo.log() == []


def test_files_and_folders_with_such_values_come_in(repo: Repository, tmp_path: Path) -> None:
    state = {"w": torch.ones(2), "v": PLAIN}
    torch.save(state, tmp_path / "a.pt")
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    for version in (import_torch(tmp_path / "a.pt", repo), import_dcp(tmp_path / "dcp", repo)):
        read = repo.read(version.number)
        assert torch.equal(read["w"], torch.ones(2))
        wrong = [name for name, value in PLAIN.items() if not alike(read[f"v.{name}"], value)]
        assert wrong == []


def test_one_odd_value_among_tensors_is_left_out_or_named(repo: Repository, tmp_path: Path) -> None:
    torch.save(
        {"m": {"w": torch.ones(2)}, "evil": Evil(tmp_path / "made"), "lr": 1}, tmp_path / "a.pt"
    )
    with pytest.raises(UnsafeDataError, match=r"'evil' \(posix.mkdir\); leave the values out"):
        import_torch(tmp_path / "a.pt", repo)
    version = import_torch(tmp_path / "a.pt", repo, tensors_only=True)
    assert [entry.fqn for entry in repo.entries(version.number)] == ["m.w"]
    assert not (tmp_path / "made").exists()


def test_the_private_names_of_torch_are_there() -> None:
    assert "torch._utils._rebuild_tensor_v2" in _weights_only_unpickler._get_allowed_globals()
    assert isinstance(_weights_only_unpickler._get_user_allowed_globals(), dict)
