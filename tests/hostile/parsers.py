"""The parsers that meet what strangers wrote: bytes in, an object or an error of ours out.

A digest shows damage, not malice, so the parsers of signed objects get a body and sign it.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from dcpstore.convert.dcp_folder import read_description
from dcpstore.convert.pickles import odd_inside
from dcpstore.convert.safetensors_header import aliases, paths_of, read_header, values_of
from dcpstore.convert.torch_archive import load_archive, refuse_odd
from dcpstore.core.syntax import check_name, parse_ref
from dcpstore.encoding.codecs import CODECS, decode
from dcpstore.encoding.values import decode_value, encode_value
from dcpstore.errors import DcpstoreError
from dcpstore.formats.journal_entry import decode_operation
from dcpstore.formats.journal_segment import Span, read_segment
from dcpstore.formats.manifest import decode_manifest
from dcpstore.formats.page import decode_page
from dcpstore.formats.plan import decode_plan
from dcpstore.storage.local import LocalFolder
from dcpstore.storage.packs import PackReader

CORPUS = Path(__file__).parent / "corpus"
PACK = bytes(range(256))


@dataclass(frozen=True)
class Parser:
    """A parser; `module` is the file whose lines tell whether an input leads somewhere new.

    `parse` takes the input and a folder of its own; what it asserts must hold of any input.
    """

    name: str
    module: str
    parse: Callable[[bytes, Path], object]

    def try_on(self, data: bytes, folder: Path) -> bool:
        """Tell whether an input is taken; anything but an error of ours ends the test."""
        try:
            self.parse(data, folder)
        except DcpstoreError:
            return False
        return True

    def corpus(self) -> dict[str, bytes]:
        """Return the kept inputs, sound and hostile, by name."""
        files = sorted((CORPUS / self.name).iterdir())
        return {file.name: file.read_bytes() for file in files}


def signed(body: bytes, head: str) -> bytes:
    """Return an object of the data folder with a digest that is right, whatever its body says."""
    return head.format(blake3(body).hexdigest()).encode() + body[1:]


def sign_first(body: bytes) -> bytes:
    """Return a manifest of format 1 of this body."""
    return signed(body, '{{"version": 1, "digest": "{}", ')


def sign_manifest(body: bytes) -> bytes:
    """Return a manifest of this body."""
    return signed(body, '{{"manifest": 2, "digest": "{}", ')


def sign_plan(body: bytes) -> bytes:
    """Return a plan of this body."""
    return signed(body, '{{"plan": 1, "digest": "{}", ')


def sign_page(data: bytes) -> bytes:
    """Return a page of JSON that lists its header and its columns: texts of hex, or integers.

    What is not such JSON is the header as it is.
    """
    raw, stored = data, b""
    try:
        tree = json.loads(data)
        columns = {name: _column(column) for name, column in tree["columns"].items()}
        sizes = {name: len(column) for name, column in columns.items()}
        raw = json.dumps({**tree["header"], "columns": sizes}).encode()
        stored = b"".join(columns.values())
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
        pass
    packed = zlib.compress(raw)
    head = f'"header": {len(packed)}, "raw": {len(raw)}}}\n'.encode()
    return signed(b"{" + head + packed + stored, '{{"page": 1, "digest": "{}", ')


def _column(column: str | list[int]) -> bytes:
    if isinstance(column, str):
        return bytes.fromhex(column)
    numbers = [number.to_bytes(8, "little", signed=True) for number in column]
    return zlib.compress(b"".join(numbers))


PAGE = "pages/0123456789abcdef0123456789abcdef.page"


def sign_operation(body: bytes) -> bytes:
    """Return an operation of this body."""
    return signed(body, '{{"format": 1, "digest": "{}", ')


def sign_segment(packed: bytes) -> bytes:
    """Return a segment of the journal that has these compressed bytes."""
    return signed(b'{"first": 1, "last": 32}\n' + packed, '{{"segment": 1, "digest": "{}", ')


def _segment(data: bytes, folder: Path) -> None:
    for _, operation in read_segment(sign_segment(data), Span(1, 32)):
        assert 1 <= operation["operation"] <= 32


def _ref(data: bytes, folder: Path) -> None:
    ref = parse_ref(data.decode("utf-8", "replace"))
    assert parse_ref(str(ref)) == ref


def _name(data: bytes, folder: Path) -> None:
    name = check_name(data.decode("utf-8", "replace"), kind="tag")
    assert parse_ref(name).name == name
    assert name.isascii()
    assert name.isprintable()


def _value(data: bytes, folder: Path) -> None:
    _again(decode_value(data.decode("utf-8", "replace"), allow_pickle=False))


def _blob(data: bytes, folder: Path) -> None:
    _again(decode_value('{"$blob":"json"}', data, allow_pickle=False))


def _again(value: object) -> None:
    """Check that what came in is a value like any other: shown, and stored again."""
    repr(value)
    kept = encode_value(value, allow_pickle=False)
    decode_value(kept.text, kept.data, allow_pickle=False)


def _range(data: bytes, folder: Path) -> None:
    storage = LocalFolder(folder)
    if not list(storage.list("packs")):
        storage.put("packs/ab/0-0.pack", PACK)
    try:
        key, offset, length = json.loads(data)
        known = isinstance(key, str) and type(offset) is int and type(length) is int
    except (ValueError, TypeError, RecursionError):
        return
    if known:  # the catalog's columns give no other types
        assert PackReader(storage).read(key, offset, length) == PACK[offset : offset + length]
        assert len(PACK[offset : offset + length]) == length


def _chunk(data: bytes, folder: Path) -> None:
    codec, size = CODECS[data[0] % 3] if data else "none", data[1] if len(data) > 1 else 0
    decode(codec, data[2:], bytearray(size))


def _safetensors(data: bytes, folder: Path) -> None:
    path = folder / "hostile.safetensors"
    path.write_bytes(len(data).to_bytes(8, "little") + data)
    header = read_header(path)
    assert sum(tensor.dtype.itemsize for tensor in header.tensors.values() if not tensor.shape) == 0
    aliases(header)
    paths_of(header)
    values_of(path, header)


def _description(data: bytes, folder: Path) -> None:
    (folder / ".metadata").write_bytes(data)
    read_description(folder)


def _archive(data: bytes, folder: Path) -> None:
    found = load_archive(io.BytesIO(data), "it", device="meta", allow_pickle=False)
    odd = odd_inside(found.held)
    refuse_odd("it", {} if odd is None else {"": odd})


PARSERS = {
    parser.name: parser
    for parser in (
        Parser("refs", "refs.py", _ref),
        Parser("names", "refs.py", _name),
        Parser("values", "encoding/values.py", _value),
        Parser("blobs", "encoding/scalars.py", _blob),
        Parser(
            "first-manifests",
            "formats/first_manifest.py",
            lambda data, _: decode_manifest(sign_first(data)),
        ),
        Parser(
            "manifests",
            "formats/manifest.py",
            lambda data, _: decode_manifest(sign_manifest(data)),
        ),
        Parser("pages", "formats/page.py", lambda data, _: decode_page(sign_page(data), PAGE)),
        Parser("plans", "formats/plan.py", lambda data, _: decode_plan(sign_plan(data))),
        Parser("unsigned", "formats/manifest.py", lambda data, _: decode_manifest(data)),
        Parser(
            "operations",
            "formats/journal_entry.py",
            lambda data, _: decode_operation(sign_operation(data)),
        ),
        Parser("segments", "formats/journal_segment.py", _segment),
        Parser("ranges", "storage/interface.py", _range),
        Parser("chunks", "encoding/codecs.py", _chunk),
        Parser("safetensors", "convert/safetensors_header.py", _safetensors),
        Parser("descriptions", "convert/dcp_folder.py", _description),
        Parser("archives", "convert/torch_archive.py", _archive),
    )
}
