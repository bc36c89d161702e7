"""Values: exact round trips with their types, plain JSON where JSON suffices, no trust in text."""

import datetime as dt
import decimal
import enum
import json
import math
import pickle
import time
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpstore.encoding.values import EncodedValue, decode_value, encode_value
from dcpstore.errors import CorruptionError, DcpstoreError, InvalidInputError, UnsafeDataError


class Colour(enum.Enum):
    RED = 1


class Unpicklable:
    def __reduce__(self) -> str:
        raise RuntimeError("no")


def round_trip(obj: object) -> object:
    encoded = encode_value(obj, allow_pickle=False)
    assert "\0" not in encoded.text
    encoded.text.encode()
    json.loads(encoded.text)
    return decode_value(encoded.text, encoded.data, allow_pickle=False)


def canonical(obj: object) -> object:
    """Return what compares equal for equal values of equal types: nan too, and not -0.0 to 0.0."""
    match obj:
        case list() | tuple():
            seen: object = [canonical(item) for item in obj]
        case dict():
            seen = [(canonical(key), canonical(value)) for key, value in obj.items()]
        case set() | frozenset():
            seen = sorted(repr(canonical(item)) for item in obj)
        case np.ndarray() | np.generic():
            seen = (obj.dtype, obj.shape, obj.tobytes())
        case dt.datetime():
            seen = (obj.isoformat(), obj.fold, obj.tzinfo)
        case float() | complex() | decimal.Decimal():
            seen = repr(obj)
        case _:
            seen = obj
    return type(obj), seen


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


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Colour.RED, "Colour"),
        (defaultdict(int), "defaultdict"),
        (namedtuple("Point", "x")(1), "Point"),
        (print, "builtin_function_or_method"),
        (torch.ones(1), "torch.Tensor"),
        (np.longdouble(1), "longdouble|float128"),
        (np.array([object()]), "object"),
        (np.zeros(1, "i4,f4"), "dtype"),
        (np.str_("x"), "dtype <U1"),
        ({"deep": [(Colour.RED,)]}, "Colour"),
    ],
)
def test_what_is_not_plain_needs_leave(value: object, name: str) -> None:
    with pytest.raises(UnsafeDataError, match=rf"{name}.*allow_pickle=True"):
        encode_value(value, allow_pickle=False)


@pytest.mark.parametrize(
    "value",
    [
        (torch.ones(2), torch.zeros(3)),
        (1, [{"w": torch.ones(2)}]),
        [(1, torch.ones(2))],
        {torch.ones(2)},
        frozenset([torch.ones(2)]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_tensor_inside_a_value_is_told_where_to_go(value: object) -> None:
    said = r"a torch\.Tensor lies inside a value, as in a tuple or set, .* in lists and dicts only"
    with pytest.raises(UnsafeDataError, match=said) as caught:
        encode_value(value, allow_pickle=False)
    assert "convert it to tensors" not in str(caught.value)
    assert encode_value(value, allow_pickle=True).text == '{"$blob":"pickle"}'


def test_a_pickle_is_written_and_read_with_leave_only() -> None:
    encoded = encode_value({"c": Colour.RED}, allow_pickle=True)
    assert (encoded.kind, encoded.text) == ("blob", '{"$blob":"pickle"}')
    assert decode_value(encoded.text, encoded.data, allow_pickle=True) == {"c": Colour.RED}
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
                    *(f"${t}" for t in ("tuple", "dict", "set", "int", "numpy", "ndarray", "size")),
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
    try:
        value = decode_value(json.dumps(node), allow_pickle=False)
    except CorruptionError:
        return
    assert value is None or pickle.dumps(value)


def test_no_pickle_hides_in_the_text() -> None:
    evil = pickle.dumps(time.time)
    with pytest.raises(CorruptionError):
        decode_value(json.dumps({"$pickle": evil.hex()}), evil, allow_pickle=False)
