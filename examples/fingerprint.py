"""One digest of a whole training state, made without dcpstore: the witness of the demo.

Two states have the same fingerprint exactly when every tensor has the same bits, dtype and shape
and every value the same text, however many ranks hold them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

__all__ = ["fingerprint"]


def fingerprint(state: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a state; every rank calls it, for it gathers the shards."""
    hasher = hashlib.sha256()
    for name, value in sorted(_items(state)):
        if isinstance(value, torch.Tensor):
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            hasher.update(f"{name} {whole.dtype} {tuple(whole.shape)}\n".encode())
            hasher.update(whole.detach().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            hasher.update(f"{name} {value!r}\n".encode())
    return hasher.hexdigest()


def _items(value: object, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the tensors and values of a nested state under the names that DCP gives them."""
    if isinstance(value, Stateful) and not isinstance(value, torch.Tensor):
        value = value.state_dict()
    if isinstance(value, Mapping):
        nested = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(x, dict | list | torch.Tensor) for x in value):
        nested = [(str(i), item) for i, item in enumerate(value)]
    else:
        yield name, value
        return
    for key, item in nested:
        yield from _items(item, f"{name}.{key}" if name else key)
