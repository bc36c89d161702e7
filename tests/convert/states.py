"""Foreign checkpoints for the tests of bridges: states with all that a format may have to carry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dcpstore import Repository
from tests.tensors import DTYPES, raw, same

FOREIGN = [dtype for dtype in DTYPES if dtype is not torch.complex32]  # no format has it
NOT_IN_SAFETENSORS = (torch.complex128,)


def every_dtype() -> dict[str, torch.Tensor]:
    """Return tensors of every dtype: some large, one empty, one without dimensions."""
    state = {str(dtype).removeprefix("torch."): raw(dtype, 37, 5) for dtype in FOREIGN}
    return {**state, "empty": torch.empty(0, 3), "scalar": raw(torch.float32)}


def trained() -> dict[str, Any]:
    """Return a nested training state: a model with tied weights, its optimizer, values."""
    model = torch.nn.ModuleDict(
        {
            "embed": torch.nn.Linear(6, 6),
            "head": torch.nn.Linear(6, 6),
            "twin": torch.nn.Linear(3, 3),
        }
    )
    model["head"].weight = model["embed"].weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model["twin"](torch.ones(3)).sum().backward()
    model["head"](model["embed"](torch.ones(6))).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optim": optimizer.state_dict(),
        "step": 1,
        "names": ["a", "b"],
        "mixed": [torch.ones(2), {"lr": 0.5, "at": [torch.zeros(1), 3]}],
    }


def lazy() -> dict[str, torch.Tensor]:
    """Return tensors whose bytes in memory, and so in files, are not yet what they are."""
    pairs = torch.tensor([[1 + 2j, 3 - 4j], [5 + 6j, -7j]])
    return {
        "conj": pairs.conj(),
        "turned": pairs.mH,
        "double": pairs.to(torch.complex128).conj(),
        "neg": pairs.clone().conj().imag,
        "both": torch._neg_view(pairs.conj()),
    }


def equal(a: Any, b: Any) -> bool:
    """Tell whether two nested states are equal, with every bit of their tensors."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and same(a, b)
    if isinstance(a, Mapping):
        return (
            isinstance(b, Mapping)
            and list(a) == list(b)
            and all(equal(a[key], b[key]) for key in a)
        )
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def assert_holds(repo: Repository, ref: str | int, tensors: Mapping[str, torch.Tensor]) -> None:
    """Check that a version holds exactly these tensors, bit by bit."""
    held = repo.read(ref)
    assert {fqn for fqn, item in held.items() if isinstance(item, torch.Tensor)} == set(tensors)
    assert [fqn for fqn, tensor in tensors.items() if not same(held[fqn], tensor)] == []
