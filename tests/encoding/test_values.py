"""Values: exact round trips with their types, plain JSON where JSON suffices, no trust in text."""

import datetime as dt
import decimal
import io
import json
import math
import pickle
import struct
import threading
import time
import uuid
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, make_dataclass
from fractions import Fraction
from http import HTTPStatus
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpstore.encoding.values import EncodedValue, decode_value, encode_value
from dcpstore.errors import (
    CorruptionError,
    DcpstoreError,
    InvalidInputError,
    MismatchError,
    UnsafeDataError,
)
from tests.encoding import kinds
from tests.encoding.kinds import Box, Colour, Config, Level, Mode, Perm, Span, Step, canonical


class Unpicklable:
    def __reduce__(self) -> str:
        raise RuntimeError("no")


def round_trip(obj: object, template: object = None) -> object:
    encoded = encode_value(obj, allow_pickle=False)
    assert "\0" not in encoded.text
    encoded.text.encode()
    json.loads(encoded.text)
    return decode_value(encoded.text, encoded.data, allow_pickle=False, template=template)


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=8)
    | st.binary(max_size=8)
    | st.complex_numbers()
    | st.datetimes(timezones=st.none() | st.just(dt.UTC), allow_imaginary=False)
    | st.dates()
    | st.timedeltas()
    | st.decimals(allow_nan=False)
)
hashable = st.recursive(
    leaves,
    lambda inner: st.builds(
        lambda kind, items: kind(items),
        st.sampled_from([tuple, frozenset]),
        st.lists(inner, max_size=2),
    ),
    max_leaves=4,
)
CONTAINERS: list[Callable[[list[tuple[object, object]]], object]] = [
    lambda pairs: [value for _, value in pairs],
    lambda pairs: tuple(value for _, value in pairs),
    lambda pairs: {key for key, _ in pairs},
    dict,
    OrderedDict,
    lambda pairs: {f"${i}": value for i, (_, value) in enumerate(pairs)},
    lambda pairs: {f"key {i}": value for i, (_, value) in enumerate(pairs)},
]
values = st.recursive(
    leaves,
    lambda inner: st.builds(
        lambda kind, pairs: kind(pairs),
        st.sampled_from(CONTAINERS),
        st.lists(st.tuples(hashable, inner), max_size=3),
    ),
    max_leaves=10,
)


@settings(deadline=None)
@given(values)
def test_any_plain_value_comes_back_as_it_was(value: object) -> None:
    assert canonical(round_trip(value)) == canonical(value)


@pytest.mark.parametrize(
    "value",
    [
        2**63 - 1,
        2**63,
        -(2**63) - 1,
        10**6000,
        "nul \0",
        "lone \ud800",
        {"$tuple": [1]},
        {"$blob": "json"},
        {"\0": 1},
        {1: 2, None: 3, (1, 2): 4},
        bytearray(b"\0\xff"),
        torch.float8_e4m3fn,
        torch.qint8,
        torch.device("cuda:3"),
        torch.device("cpu"),
        torch.Size([2, 3]),
        torch.Size([]),
        dt.datetime(2026, 10, 25, 2, 30, fold=1),
        dt.datetime(2026, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=5, minutes=30))),
        decimal.Decimal("sNaN"),
        np.float32(0.1),
        np.float64("nan"),
        np.uint64(2**64 - 1),
        np.bool_(True),
        np.complex64(1 - 2j),
        np.datetime64("2026-01-01T00:00:00", "ms"),
        np.timedelta64(3, "D"),
        np.arange(6, dtype=">i2").reshape(2, 3).T,
        np.zeros((0, 3), np.float16),
        np.array(7, "M8[ns]"),
        np.random.MT19937(3).state["state"],
        np.random.default_rng(3).bit_generator.state,
        np.str_("a\0"),
        np.str_(""),
        np.bytes_(b"\xff\0"),
        np.array(["a", "café"]),
        np.array([b"a", b"bc"]),
        np.array(["a"], dtype=">U3"),
        np.datetime64("NaT"),
        np.float32(math.nan),
        np.uint32([0xFFC00001]).view(np.float32)[0],
        np.uint64([0xFFF8000000000001]).view(np.float64)[0],
        np.dtype("M8[ns]"),
        np.dtype(">f8"),
        np.dtype("U7"),
        -0.0,
        struct.unpack("<d", bytes.fromhex("010000000000f8ff"))[0],
        complex(-0.0, struct.unpack("<d", bytes.fromhex("010000000000f8ff"))[0]),
        Path("a/b"),
        Path(),
        PurePosixPath("/a\0\udcff"),
        PureWindowsPath("C:/a b"),
        PureWindowsPath("//host/share/x"),
        uuid.UUID(int=7, is_safe=uuid.SafeUUID.safe),
        dt.time(1, 2, 3, 4, fold=1),
        dt.time(1, tzinfo=dt.timezone(dt.timedelta(seconds=-1), "odd \ud800")),
        dt.datetime(2026, 1, 1, tzinfo=dt.timezone(dt.timedelta(microseconds=7))),
        dt.UTC,
        dt.timezone(dt.timedelta(hours=1), ""),
        Fraction(-(2**70), 3),
        range(2**70, -5, -3),
        slice(None),
        slice("a", (1, 2), 2.5),
        (slice(1), ..., None),
        deque(),
        deque([1, (2,), deque(maxlen=0)]),
        Namespace(**{"$odd": [Path("x")], "a b": None}),
        SimpleNamespace(inner=SimpleNamespace(a={1: 2})),
        (Counter({(1, 2): 3, "a": -1}), defaultdict(None, a=1), defaultdict(dict, {1: {}})),
        torch.channels_last_3d,
        torch.sparse_csr,
        io.BytesIO(),
        (torch.ones(2, 3, dtype=torch.bfloat16).T, torch.tensor(1.5), torch.zeros(0, 3)),
        {"t": (torch.nn.Parameter(torch.ones(2)), torch.ones(2, requires_grad=True))},
        (torch.nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False),),
        (torch.tensor([1 + 2j]).conj(), torch.tensor([1], dtype=torch.uint16)),
        deque([torch.ones(1, dtype=torch.float8_e4m3fn)]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_special_values_come_back_as_they_were(value: object) -> None:
    assert canonical(round_trip(value)) == canonical(value)
    assert canonical(round_trip((value, [value]))) == canonical((value, [value]))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.001, "0.001"),
        (1000, "1000"),
        (True, "true"),
        (None, "null"),
        ("café", '"café"'),
        ({"lr": 3e-4, "betas": (0.9, 0.95)}, '{"lr":0.0003,"betas":{"$tuple":[0.9,0.95]}}'),
        ({2: [1]}, '{"$dict":[[2,[1]]]}'),
        ({3, 1, 2}, '{"$set":[1,2,3]}'),
        (math.inf, '{"$float":"inf"}'),
    ],
)
def test_the_text_is_what_sql_would_look_for(value: object, text: str) -> None:
    assert encode_value(value, allow_pickle=False) == EncodedValue("value", text)


def test_long_json_becomes_a_blob() -> None:
    value = {"tokens": list(range(20_000))}
    encoded = encode_value(value, allow_pickle=False)
    assert (encoded.kind, encoded.text) == ("blob", '{"$blob":"json"}')
    assert decode_value(encoded.text, encoded.data, allow_pickle=False) == value
    with pytest.raises(CorruptionError, match="missing"):
        decode_value(encoded.text, None, allow_pickle=False)


def offered_for(value: object) -> str:
    """Return what a refusal offers: pickle, where it works."""
    try:
        pickle.dumps(value, protocol=4)
    except (pickle.PicklingError, AttributeError, TypeError, ValueError):
        return "leave it out of the state"
    return "save with allow_pickle=True"


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (print, "builtin_function_or_method"),
        (torch.ones(1), "torch.Tensor"),
        (np.longdouble(1), "longdouble|float128"),
        (np.array([object()]), "object"),
        (np.zeros(1, "i4,f4"), "dtype"),
        (np.void(b"x"), "dtype"),
        (np.dtype("O"), "dtype"),
        (np.dtype(np.longdouble), "dtype"),
        (np.ma.array([1]), "MaskedArray"),
        ({"deep": [(object(),)]}, "object"),
        (time.gmtime(0), "struct_time"),
        (torch.ones(2).max(0), "max"),
        (type("Own", (dict,), {})(), "Own"),
        (make_dataclass("Sub", ["x"], bases=(dict,))(1), "Sub"),
        (make_dataclass("Unset", ["x"], init=False)(), "Unset whose field 'x'"),
        (({Colour.RED: 1, 1: 2},), "dict whose keys"),
        (frozenset([Box((1,))]), "frozenset whose keys"),
        (frozenset([Level.LOW, Perm.READ]), "frozenset whose keys"),
    ],
)
def test_what_is_not_plain_needs_leave(value: object, name: str) -> None:
    with pytest.raises(UnsafeDataError, match=rf"{name}.*{offered_for(value)}"):
        encode_value(value, allow_pickle=False)


@pytest.mark.parametrize("kind", kinds.REFUSED, ids=lambda kind: kind.name)
def test_what_is_refused_is_refused_wherever_it_lies(kind: kinds.Refused) -> None:
    value = kind.make()
    with pytest.raises(UnsafeDataError, match=offered_for(value)):
        encode_value({"a": [(1, {"b": value})]}, allow_pickle=False)


@pytest.mark.parametrize(
    "value",
    [
        (torch.ones(2), torch.ones(2, device="meta")),
        (1, [{"w": torch.eye(2).to_sparse()}]),
        Config(lr=torch.ones(2, device="meta")),  # type: ignore[arg-type]
        {torch.ones(2).to_mkldnn()},
        deque([torch.nn.UninitializedParameter()]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_tensor_without_bytes_inside_a_value_is_refused(value: object) -> None:
    message = (
        r"a torch\..* is inside a value, such as a set or deque, .* in lists, tuples and dicts only"
    )
    with pytest.raises(UnsafeDataError, match=message) as caught:
        encode_value(value, allow_pickle=False)
    assert "convert it to tensors" not in str(caught.value)


@pytest.mark.parametrize("kind", kinds.KEPT, ids=lambda kind: kind.name)
def test_every_kind_comes_back(kind: kinds.Kind) -> None:
    for value in (kind.value, [(kind.value,)], Namespace(a=(kind.value,))):
        made = round_trip(value, template=[kind.template])
        assert canonical(made) == canonical(value)


point = namedtuple("point", "x y")


@dataclass
class Deep:
    inner: Any
    more: Any = None


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Colour.BLUE, (2, "b")),
        (Mode.TRAIN, "train"),
        (Perm.READ | Perm.WRITE, 3),
        (HTTPStatus.NOT_FOUND, 404),
        (Config(0.1), {"lr": 0.1, "mode": "train", "betas": (0.9, 0.95), "steps": 1}),
        (Box((1, 2)), {"sizes": (1, 2)}),
        (Span(1, 2), (1, 2)),
        (point(Span(1, 2), [Level.HIGH]), ((1, 2), [2])),
        (torch.__version__, str(torch.__version__)),
        (Step(2**70), 2**70),
        (Deep(Deep(Colour.RED), {Level.LOW: (Span(0, 1),)}), None),
        ([Level.LOW, {1: Level.HIGH}, {Colour.RED, Colour.BLUE}], None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_objects_of_own_classes_come_back_by_a_template_or_plainly(
    value: object, plain: object
) -> None:
    if plain is not None:
        found = round_trip((value,))
        assert canonical(found) == canonical((plain,))
    assert canonical(round_trip((value,), template=value)) == canonical((value,))
    template = {"deep": [Deep(value)]}
    assert canonical(round_trip((value,), template=template)) == canonical((value,))


def test_a_dataclass_is_made_by_its_fields_alone() -> None:
    config = Config(0.1)
    config.steps = 7
    made = round_trip(config, template=Config(0.5))
    assert isinstance(made, Config)
    assert (made.lr, made.steps) == (0.1, 7)


def test_a_class_that_moved_is_found_by_its_name_or_fields() -> None:
    text = '{"$dataclass":["__main__.Config",{"lr":0.1,"mode":1,"betas":2,"steps":3}]}'
    assert type(decode_value(text, allow_pickle=False, template=Config(0.5))) is Config
    text = '{"$namedtuple":["old.Interval",{"start":1,"stop":2}]}'
    assert decode_value(text, allow_pickle=False, template=[Span(0, 0)]) == Span(1, 2)
    text = '{"$enum":["old.Level",2]}'
    assert decode_value(text, allow_pickle=False, template=Level.LOW) is Level.HIGH


@pytest.mark.parametrize(
    ("text", "template", "message"),
    [
        ('{"$enum":["a.Level",9]}', Level.LOW, "Level of value 9"),
        ('{"$enum":["a.Other",1]}', Level.LOW, "a.Other of value 1"),
        ('{"$enum":["a.Level",[1]]}', Level.LOW, r"Level of value \[1\]"),
        ('{"$dataclass":["a.Box",{"other":1}]}', Box((1,)), r"a.Box\(other\).*Box\(sizes\)"),
        ('{"$dataclass":["a.Odd",{"other":1}]}', Box((1,)), "Odd"),
        ('{"$namedtuple":["a.Span",{"stop":1,"start":2}]}', Span(1, 2), "Span"),
        ('{"$subclass":["a.Step","text"]}', Step(1), "Step"),
        ('{"$subclass":["a.Other",1]}', Step(1), "Other"),
    ],
)
def test_objects_of_another_class_than_the_template_are_a_mismatch(
    text: str, template: object, message: str
) -> None:
    with pytest.raises(MismatchError, match=message) as caught:
        decode_value(text, allow_pickle=False, template=template)
    assert len(caught.value.differences) == 1
    decode_value(text, allow_pickle=False)  # by itself it is plain
    decode_value(text, allow_pickle=False, template=[1, "a", {}])


def test_tensors_inside_a_value_go_to_the_device_of_the_template() -> None:
    found = round_trip((torch.ones(2),), template=(torch.ones(2, device="meta"),))
    assert isinstance(found, tuple)
    assert found[0].device.type == "cpu"  # a template without memory says nothing


def test_two_files_of_one_content_are_the_same() -> None:
    one, other = io.BytesIO(b"abc"), io.BytesIO(b"abc")
    other.seek(2)
    texts = {encode_value(file, allow_pickle=False).text for file in (one, other)}
    assert texts == {'{"$bytesio":"YWJj"}'}
    assert other.tell() == 2


def test_a_pickle_is_written_and_read_with_leave_only() -> None:
    encoded = encode_value({"c": print}, allow_pickle=True)
    assert (encoded.kind, encoded.text) == ("blob", '{"$blob":"pickle"}')
    assert decode_value(encoded.text, encoded.data, allow_pickle=True) == {"c": print}
    with pytest.raises(UnsafeDataError, match="allow_pickle=True"):
        decode_value(encoded.text, encoded.data, allow_pickle=False)
    with pytest.raises(CorruptionError):
        decode_value(encoded.text, encoded.data[:-5], allow_pickle=True)
    with pytest.raises(CorruptionError):
        decode_value(encoded.text, None, allow_pickle=True)
    with pytest.raises(DcpstoreError, match="importable"):
        decode_value(encoded.text, b"cnowhere\nThing\n.", allow_pickle=True)
    with pytest.raises(InvalidInputError, match="does not pickle"):
        encode_value(Unpicklable(), allow_pickle=True)


def test_a_plain_value_is_never_pickled() -> None:
    assert encode_value((1, "a"), allow_pickle=True).kind == "value"


def test_loops_and_depth_are_refused() -> None:
    loop: list[object] = [1]
    loop.append({"again": loop})
    for leave in (False, True):
        with pytest.raises(InvalidInputError, match="contains itself"):
            encode_value(loop, allow_pickle=leave)
    shared = [1]
    assert round_trip([shared, shared]) == [[1], [1]]
    nested: object = 1
    for _ in range(100):
        nested = (nested,)
    assert round_trip(nested) == nested
    with pytest.raises(InvalidInputError, match="nested deeper than 100"):
        encode_value([nested], allow_pickle=False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "NaN",
        "[1,Infinity]",
        '{"$unknown":1}',
        '{"$tuple":5}',
        '{"$tuple":"ab"}',
        '{"$tuple":[],"x":1}',
        '{"$dict":[[1]]}',
        '{"$dict":[[[],1]]}',
        '{"$set":[[1]]}',
        '{"$size":["a"]}',
        '{"$int":5}',
        '{"$int":"zz"}',
        '{"$str":"/w=="}',
        '{"$bytes":"?"}',
        '{"$bytes":7}',
        '{"$complex":["1"]}',
        '{"$datetime":["x",0]}',
        '{"$date":1}',
        '{"$timedelta":[1e400]}',
        '{"$timedelta":[1,2,3,4,5,6,7,8]}',
        '{"$decimal":"x"}',
        '{"$dtype":"torch.load"}',
        '{"$dtype":[]}',
        '{"$device":"rm -rf"}',
        '{"$device":{}}',
        '{"$numpy":["O",1]}',
        '{"$numpy":["|i1",1000]}',
        '{"$numpy":["<f8",[1]]}',
        '{"$ndarray":["|O",[1],""]}',
        '{"$ndarray":["<f8,(",[1],""]}',
        '{"$ndarray":["<f8",[1000000000000],""]}',
        '{"$ndarray":["<f8",1]}',
        '{"$ndarray":["<U0",[1],""]}',
        '{"$ndarray":["<U1",[1],"/////w=="]}',
        '{"$ndarray":["<U99999999999999999999",[1],""]}',
        '{"$numpy":["<U1","ab"]}',
        '{"$numpy":["<U1",1]}',
        '{"$numpy":["<f4",{"$bytes":""}]}',
        '{"$numpy_dtype":"O"}',
        '{"$numpy_dtype":["<f4"]}',
        '{"$nan":"00"}',
        '{"$nan":"000000000000f03f"}',
        '{"$path":["os.system","x"]}',
        '{"$path":["PosixPath",["x"]]}',
        '{"$path":"x"}',
        '{"$uuid":["x",null]}',
        '{"$uuid":[7,null]}',
        '{"$uuid":["00000000000000000000000000000005",9]}',
        '{"$time":["01:00",0,"UTC"]}',
        '{"$timezone":[9,0,0]}',
        '{"$fraction":[1,0]}',
        '{"$fraction":[1.5,2]}',
        '{"$fraction":["1","2"]}',
        '{"$range":[0,1,0]}',
        '{"$range":[0,1e9,1]}',
        '{"$range":[0,1]}',
        '{"$slice":[1]}',
        '{"$slice":7}',
        '{"$deque":[1,[1,2]]}',
        '{"$deque":[-1,[]]}',
        '{"$deque":[true,[]]}',
        '{"$deque":[null,{"a":1}]}',
        '{"$deque":[null,"ab"]}',
        '{"$counter":[1]}',
        '{"$defaultdict":["eval",{}]}',
        '{"$defaultdict":["list",[]]}',
        '{"$defaultdict":[[],{}]}',
        '{"$namespace":[1]}',
        '{"$namespace":{"$dict":[[1,2]]}}',
        '{"$simple_namespace":"x"}',
        '{"$memory_format":"torch.load"}',
        '{"$layout":1}',
        '{"$bytesio":7}',
        '{"$ellipsis":1}',
        '{"$enum":1}',
        '{"$enum":[1,1]}',
        '{"$dataclass":["a",1]}',
        '{"$dataclass":["a",{"$dict":[[1,2]]}]}',
        '{"$namedtuple":["a",[1]]}',
        '{"$subclass":["a",null]}',
        '{"$subclass":["a",true]}',
        '{"$tensor":["float32",[1000000000000],"",[]]}',
        '{"$tensor":["float32",[-1],"",[]]}',
        '{"$tensor":["float32",[1],"AAAAAA==",["trained"]]}',
        '{"$tensor":["int8",[1],"AA==",["parameter","requires_grad"]]}',
        '{"$tensor":["qint8",[1],"AA==",[]]}',
        '{"$tensor":["float32",[0,4611686018427387904,4611686018427387904],"",[]]}',
        "[" * 200 + "]" * 200,
        "[" * 200_000,
        '{"$tuple":[' * 100_000,
        "9" * 5000,
        '{"$blob":"zip"}',
    ],
    ids=lambda text: text[:30],
)
def test_text_that_we_did_not_write_is_corruption(text: str) -> None:
    with pytest.raises(CorruptionError, match="verify"):
        decode_value(text, None, allow_pickle=False)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "a",
                    *(
                        f"${t}"
                        for t in (
                            *("tuple", "dict", "set", "int", "numpy", "ndarray", "size", "tensor"),
                            *("deque", "range", "namespace", "enum", "dataclass", "namedtuple"),
                            *("subclass", "path", "defaultdict", "fraction", "timezone", "time"),
                        )
                    ),
                ]
            ),
            inner,
            max_size=2,
        )
    ),
)


@settings(deadline=None)
@given(json_values)
def test_hostile_json_decodes_or_is_corruption(node: object) -> None:
    for template in (None, [Level.LOW, Box((1,)), Span(1, 2), Step(1)]):
        try:
            value = decode_value(json.dumps(node), allow_pickle=False, template=template)
        except (CorruptionError, MismatchError):
            continue
        assert value is None or pickle.dumps(value)


def test_no_pickle_hides_in_the_text() -> None:
    evil = pickle.dumps(time.time)
    with pytest.raises(CorruptionError):
        decode_value(json.dumps({"$pickle": evil.hex()}), evil, allow_pickle=False)


@pytest.mark.parametrize("value", [lambda: 1, threading.Lock(), {"a": [lambda: 1]}])
def test_pickle_is_not_offered_where_it_would_fail(value: object) -> None:
    with pytest.raises(UnsafeDataError, match=r"cannot be pickled; .* leave it out") as caught:
        encode_value(value, allow_pickle=False)
    assert "allow_pickle" not in str(caught.value)
