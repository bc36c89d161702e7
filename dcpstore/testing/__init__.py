"""Public tools for tests of programs that use dcpstore; they need pytest and Hypothesis.

`assert_sound` checks a whole repository, `StorageContract` tests a kind of storage, and the
strategies draw shapes, boxes, tensors and states. Install them by `pip install '.[testing]'` from
a checkout. Invariant: no other module of dcpstore imports this one.
"""

import pytest

# before they are imported, so that their assertions show the values when they fail
pytest.register_assert_rewrite("dcpstore.testing.soundness", "dcpstore.testing.storage_contract")

from dcpstore.storage.interface import Sink, Source, Storage  # noqa: E402
from dcpstore.testing.soundness import assert_sound  # noqa: E402
from dcpstore.testing.storage_contract import StorageContract  # noqa: E402
from dcpstore.testing.strategies import boxes, shapes, states, tensors, tilings  # noqa: E402

__all__ = [
    "Sink",
    "Source",
    "Storage",
    "StorageContract",
    "assert_sound",
    "boxes",
    "shapes",
    "states",
    "tensors",
    "tilings",
]
