"""`docs/values.md` and `docs/dtypes.md` are what values and the table of dtypes say."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import pytest

from dcpstore.encoding.codecs import choose_codec
from dcpstore.encoding.dtypes import DTYPES, Dtype
from dcpstore.encoding.values import decode_value, encode_value
from dcpstore.errors import UnsafeDataError
from tests.encoding.kinds import KEPT, REFUSED, Kind, Refused

DOCS = Path(__file__).parent.parent.parent / "docs"

HEAD = """# Values

What a state holds besides tensors. This page is written by `tests/encoding/test_page.py`, which
saves and loads each example.

A **value** is what torch's flattening of a state comes to that is not a tensor: mappings are
walked, lists are walked where they hold tensors or mappings, tuples and dataclasses where they hold
tensors, and anything else is one value, with all that lies in it. It is stored as typed JSON,
without pickle, and comes back exactly, or the save is refused with its FQN before anything is
written.

**Objects of your own classes** (enum members, dataclasses, named tuples, subclasses of `str`,
`int`, `float` and `bytes`) are stored as their plain value or their fields, with the name of the
class as a label. A load makes them again in the class of which the *template* holds an object: the
template is the value that the state has in that place before the load. The class is found by the
label, or, for dataclasses and named tuples, by the fields where the template has one such class.
`__init__` and `__post_init__` do not run. A template that has such objects of other classes or
fields is a `MismatchError`. Where the template has none (it is `None`, say), and in `repo.read` and
the exports, the plain value comes back: the enum's value, a dict of a dataclass's fields, a tuple,
a plain `str`. No class is ever imported by a name that a checkpoint holds.
"""

NOTES = """
## What to know

- A tensor inside a set, a deque, a namespace or another value is stored with that value: it is not
  deduplicated by chunks, not resharded, not filled in place, and comes back on the CPU, or on the
  device on which the template has its tensors. Large tensors belong into dicts, lists and tuples.
- An array comes back in the order of C, and so does a tensor inside a value. Two names for one
  object inside a value come back as two objects.
- Mappings outside of other values are walked, whatever their class: a load fills the state's own.
- `io.BytesIO` is stored by its contents, whatever its position, and comes back at its beginning.
- A path of another platform comes back as its pure class (`WindowsPath` as `PureWindowsPath`).
- Torch's own `DefaultLoadPlanner`, which `torch.distributed.checkpoint.load` uses unless it is
  given ours, makes `None` of dataclasses and other objects of the state before a reader is asked,
  so that no template is left: they come back plainly.
- Torch cannot pickle a `torch.memory_format`: planners that read values from bytes and the exports
  to `torch.save` files and DCP folders refuse it by name.
- `allow_pickle=True` stores what is refused as a pickle.
"""

DTYPES_HEAD = """# Dtypes

What each torch dtype is stored as. This page is written by `tests/encoding/test_page.py` from the
table in `dcpstore/encoding/dtypes.py`.

Every bit of an element is kept. Where Zarr has no such data type, the unsigned integer of the same
width stands in, and the attribute `torch_dtype` of the array names torch's. A save refuses
quantized dtypes (`qint8` and the like), integers of fewer than 8 bits, and `bits8` and the like,
which torch only names: convert those tensors first.

- **auto**: the codec that `codec="auto"` chooses for tensors of this dtype.
- **safetensors**: the format's tag; an export refuses tensors of a dtype that it does not hold.
- **names for `dtype=`**: what imports and exports take to convert floating tensors to it.

| torch | bytes | Zarr | auto | safetensors | names for `dtype=` |
|---|---|---|---|---|---|
"""


def _code(text: str) -> str:
    shown = re.sub(r"<function (\w+) at 0x\w+>", r"\1", text)
    return "`" + shown.replace("tests.encoding.kinds.", "").replace("|", "\\|") + "`"


def _shown(value: object) -> str:
    return f"io.BytesIO({value.getvalue()!r})" if isinstance(value, io.BytesIO) else repr(value)


def _row(kind: Kind) -> str:
    encoded = encode_value(kind.value, allow_pickle=False)
    plain = decode_value(encoded.text, encoded.data, allow_pickle=False)
    made = decode_value(encoded.text, allow_pickle=False, template=kind.template)
    assert type(made) is type(kind.value)
    again = "the same" if kind.template is None else _code(_shown(made))
    assert (_shown(plain) == _shown(made)) is (kind.template is None)
    return f"| {kind.name} | {_code(encoded.text)} | {_code(_shown(plain))} | {again} |"


def _refusal(kind: Refused) -> str:
    with pytest.raises(UnsafeDataError) as caught:
        encode_value(kind.make(), allow_pickle=False)
    message = str(caught.value).replace("\\", "").replace("|", "\\|")
    message = re.sub(r"tests\.encoding\.kinds\.|array\(.*\)", "", message)
    return f"| {kind.name} | {message} |"


def test_the_page_is_what_values_do() -> None:
    rows = "\n".join(map(_row, KEPT))
    refused = "\n".join(map(_refusal, REFUSED))
    page = (
        f"{HEAD}\n## Kept\n\n| kind | stored | comes back by itself | with a template |\n"
        f"|---|---|---|---|\n{rows}\n\n## Refused\n\n| kind | what the save says |\n|---|---|\n"
        f"{refused}\n{NOTES}"
    )
    _check_page("values.md", page)


def _dtype_row(row: Dtype) -> str:
    cells = (
        f"`{row.name}`",
        str(row.torch.itemsize),
        f"`{row.stored}`",
        choose_codec("auto", row.name),
        f"`{row.safetensors}`" if row.safetensors else "not held",
        ", ".join(f"`{name}`" for name in row.casts),
    )
    return f"| {' | '.join(cells)} |"


def test_the_page_is_the_table_of_dtypes() -> None:
    _check_page("dtypes.md", DTYPES_HEAD + "".join(f"{_dtype_row(row)}\n" for row in DTYPES))


def _check_page(name: str, text: str) -> None:
    page = DOCS / name
    if os.environ.get("DCPSTORE_WRITE_DOCS"):
        page.write_text(text)
    assert page.read_text() == text, "run 'make docs' and look at the difference"
