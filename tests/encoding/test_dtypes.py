"""Every dtype of torch goes to bytes and back bit by bit, whatever the view."""

import re

import numpy as np
import pytest
import torch
from safetensors.torch import _TYPES  # the library's own table

from dcpstore.encoding import dtypes
from dcpstore.errors import InvalidInputError

EVERY = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)
WITHOUT_PLAIN_BYTES = re.compile(r"torch\.(q.*|bits.*|u?int[1-7])")
STORED = [dtype for dtype in EVERY if not WITHOUT_PLAIN_BYTES.fullmatch(str(dtype))]

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def pattern(dtype: torch.dtype) -> torch.Tensor:
    """Return 4 x 6 elements in which nearly every byte differs."""
    raw = torch.arange(24 * dtype.itemsize, dtype=torch.int64)
    if dtype is torch.bool:
        return (raw % 3 == 0).reshape(4, 6)
    return (raw * 37 % 251).to(torch.uint8).view(dtype).reshape(4, 6)


def bits(tensor: torch.Tensor) -> bytes:
    """Return the bytes element by element, without help from the code under test."""
    return b"".join(
        bytes(tensor[i].reshape(1).view(torch.uint8).tolist()) for i in np.ndindex(*tensor.shape)
    )


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_views_of_every_dtype_keep_their_bits(dtype: torch.dtype) -> None:
    name = dtypes.dtype_name(dtype)
    assert dtypes.torch_dtype(name) is dtype
    whole = pattern(dtype)
    for view in (
        whole,
        whole.t(),
        whole[::2, 1::2],
        whole[1],
        whole[0, 0],
        whole[:0],
        whole[:, :0],
    ):
        array = dtypes.as_bytes(view)
        assert array.shape == tuple(view.shape)
        assert array.dtype == dtypes.numpy_dtype(name)
        assert array.dtype.itemsize == dtype.itemsize
        assert array.tobytes() == bits(view)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2], ids=str)
def test_a_view_writes_through(dtype: torch.dtype) -> None:
    tensor = torch.ones(4, dtype=dtype)
    dtypes.as_bytes(tensor)[1] = 0
    assert tensor.float().tolist() == [1, 0, 1, 1]


def test_lazy_conjugates_and_negatives_are_resolved() -> None:
    tensor = torch.tensor([1 + 2j, 3 - 4j])
    assert dtypes.as_bytes(tensor.conj()).tolist() == [1 - 2j, 3 + 4j]
    assert dtypes.as_bytes(tensor.conj().imag).tolist() == [-2, 4]


def test_parameters_need_no_detaching() -> None:
    assert dtypes.as_bytes(torch.nn.Parameter(torch.ones(2))).tolist() == [1, 1]


def test_the_table_has_each_dtype_of_torch_once_or_refuses_it() -> None:
    assert sorted((row.torch for row in dtypes.DTYPES), key=str) == STORED
    for dtype in {*EVERY} - {*STORED}:
        with pytest.raises(InvalidInputError, match=f"{dtype} cannot be stored; convert"):
            dtypes.dtype_name(dtype)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_rows_agree_with_numpy_and_safetensors() -> None:
    for row in dtypes.DTYPES:
        assert np.dtype(row.stored).itemsize == row.torch.itemsize
        assert row.stored == row.name or row.stored == f"uint{8 * row.torch.itemsize}"
        assert row.storage is None or row.storage.dtype is row.torch
    tags = {row.safetensors: row.torch for row in dtypes.DTYPES if row.safetensors}
    assert {tag: tags[tag] for tag in _TYPES} == _TYPES


def test_what_has_no_plain_bytes_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="qint8 cannot be stored"):
        dtypes.dtype_name(torch.qint8)
    with pytest.raises(InvalidInputError, match="to_dense"):
        dtypes.as_bytes(torch.eye(2).to_sparse())
    with pytest.raises(InvalidInputError, match=r"'float3'.*update dcpstore"):
        dtypes.numpy_dtype("float3")
