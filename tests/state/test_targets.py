"""Which tensors can be filled element by element."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from dcpstore.state.targets import target_fault

SOUND = [
    torch.zeros(4, 3),
    torch.zeros(4, 3).T,
    torch.zeros(8, 6)[::2, 1::3],
    torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
    torch.zeros(5).as_strided((1, 5, 1), (0, 1, 3)),
    torch.zeros(0, 3).expand(2, 0, 3),
    torch.zeros(()),
    torch.zeros(9).as_strided((2, 3), (3, 2)),  # its rows are interleaved, without overlap
]


def test_every_layout_without_overlap_is_accepted() -> None:
    assert [target_fault(tensor) for tensor in SOUND] == [None] * len(SOUND)


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), min_size=1, max_size=4),
)
def test_whether_elements_share_memory_is_determined_exactly(dims: list[tuple[int, int]]) -> None:
    shape, strides = zip(*dims, strict=True)
    count = 1 + sum(stride * max(size - 1, 0) for size, stride in dims)
    places = torch.arange(count).as_strided(shape, strides).flatten()
    tensor = torch.zeros(count).as_strided(shape, strides)
    assert (target_fault(tensor) is None) == (len(places.unique()) == len(places))
