#!/usr/bin/env python3
"""Writes the kerchunk reference of a version, with which plain Zarr and fsspec read it.

    python references.py 12 > v12.json

It lies in the data folder of each repository, and needs neither dcpstore nor the catalog: Python's
standard library alone. A version is given by its number, or by the uid in the name of its manifest.
Nothing that is read is checked against a digest; `dcpstore verify --deep` does that.
"""

from __future__ import annotations

import argparse
import array
import itertools
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

__all__ = ["main", "references"]

# JSON of many kinds, hence `Any`.
Json = dict[str, Any]
Place = list[Any]  # pack, offset, length

_RUN = 16  # chunks in a run of a tensor that has more
_DIGEST = 32  # bytes
# What has another meaning in Zarr nodes, URLs, globs or templates; and lone surrogates.
_UNSAFE = re.compile(r'[\x00-\x20\x7f-\x9f"#%&*/:<>?\[\\\]{|}\ud800-\udfff]')


class _Page:
    """A page: its header, and its columns as lists, of digests or of integers."""

    def __init__(self, data: bytes) -> None:
        line, _, rest = data.partition(b"\n")
        size = json.loads(line)["header"]
        self.header: Json = json.loads(zlib.decompress(rest[:size]))
        begin = size
        self._columns: dict[str, bytes] = {}
        for name, length in self.header["columns"].items():
            self._columns[name] = rest[begin : begin + length]
            begin += length
        digests = self._pieces("nodes")
        count = len(self.header["sets"])
        self.sets = dict(zip(digests, self.header["sets"], strict=False))
        children = zip(self._pieces("children"), self._numbers("child_pages"), strict=True)
        self.groups = {
            digest: [
                (child, self.header["pages"][page])
                for child, page in itertools.islice(children, len(firsts))
            ]
            for digest, (_, firsts) in zip(digests[count:], self.header["groups"], strict=True)
        }
        self._place_chunks()

    def _place_chunks(self) -> None:
        lengths = self._numbers("lengths")
        places: list[Place] = []
        end = 0
        steps = zip(self._numbers("packs"), self._numbers("steps"), lengths, strict=True)
        for pack, step, length in steps:
            places.append([self.header["packs"][pack], end + step, length])
            end += step + length
        chunks = iter(places)
        named = zip(self._pieces("named"), self._numbers("named_pages"), strict=True)
        # Of each tensor: its layout, and its chunks, or the runs that hold them with their pages.
        self.tensors: list[tuple[Json, list[Place], list[tuple[bytes, str]]]] = []
        for number in self._numbers("layouts"):
            layout = self.header["layouts"][number]
            count = sum(_size(part) for part in layout["parts"])
            if count > _RUN:
                runs = itertools.islice(named, -(-count // _RUN))
                self.tensors.append((layout, [], [(r, self.header["pages"][p]) for r, p in runs]))
            else:
                self.tensors.append((layout, list(itertools.islice(chunks, count)), []))
        self.runs = {
            run: list(itertools.islice(chunks, count))
            for run, (_, _, count) in zip(self._pieces("runs"), self.header["runs"], strict=True)
        }

    def _pieces(self, name: str) -> list[bytes]:
        data = self._columns[name]
        return [data[i : i + _DIGEST] for i in range(0, len(data), _DIGEST)]

    def _numbers(self, name: str) -> list[int]:
        numbers = array.array("q", zlib.decompress(self._columns[name]))
        if sys.byteorder == "big":
            numbers.byteswap()
        return numbers.tolist()


class _Folder:
    """Reads what lies in a data folder, each page once."""

    def __init__(self, read: Callable[[str], bytes]) -> None:
        self.read = read
        self._pages: dict[str, _Page] = {}

    def page(self, key: str) -> _Page:
        if key not in self._pages:
            self._pages[key] = _Page(self.read(key))
        return self._pages[key]

    def entries(self, root: str, page: str) -> Iterator[tuple[Json, list[Place]]]:
        """Yield the entries below a root, each with its layout and chunks if it has a tensor."""
        for group, group_page in self.page(page).groups[bytes.fromhex(root)]:
            for child, child_page in self.page(group_page).groups[group]:
                held = self.page(child_page)
                for fqn, _, kind, number, value in held.sets[child]:
                    entry: Json = {"fqn": fqn, "kind": kind, "value": value, "layout": None}
                    chunks: list[Place] = []
                    if number is not None:
                        entry["layout"], chunks, runs = held.tensors[number]
                        for run, run_page in runs:
                            chunks = chunks + self.page(run_page).runs[run]
                    yield entry, chunks


def references(read: Callable[[str], bytes], uid: str, data: str) -> Json:
    """Return the kerchunk reference of a version, as JSON.

    Format: https://fsspec.github.io/kerchunk/spec.html

    Args:
        read: returns the bytes of an object in the data folder by its key.
        uid: of the version.
        data: where "packs/" lies for those who will read it: a path or a URL that fsspec opens.
    """
    folder = _Folder(read)
    manifest: Json = json.loads(folder.read(f"manifests/{uid}.json"))
    if "refs" in manifest:  # of format 1, which is a reference itself
        return {"version": 1, "templates": {"data": data}, "refs": manifest["refs"]}
    nodes: Json = {}
    values: Json = {}
    chunks: Json = {}
    for entry, places in folder.entries(manifest["root"], manifest["page"]):
        if entry["layout"] is None:
            values[entry["fqn"]] = json.loads(entry["value"])
            continue
        rest = iter(places)
        for name, node, part in _nodes(entry):
            nodes[name] = node
            for key in () if part is None else _keys(name, part):
                pack, offset, length = next(rest)
                chunks[key] = ["{{data}}/" + pack, offset, length]
    # The nodes stand in the root too: zarr 3.1 finds no arrays of a split tensor otherwise.
    root = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {"uid": uid, "step": manifest["step"], "values": values},
        "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": nodes},
    }
    documents = {"zarr.json": root, **{f"{name}/zarr.json": nodes[name] for name in nodes}}
    refs = {key: _compact(document) for key, document in documents.items()}
    return {"version": 1, "templates": {"data": data}, "refs": {**refs, **chunks}}


def _nodes(entry: Json) -> Iterator[tuple[str, Json, Place | None]]:
    """Yield the nodes of an entry with a tensor: name, document, and the part if it is an array."""
    layout, name = entry["layout"], _name(entry["fqn"])
    attributes = {"fqn": entry["fqn"], "torch_dtype": layout["dtype"]}
    if entry["kind"] == "blob" and entry["value"]:
        attributes["blob"] = json.loads(entry["value"])
    arrays = [json.loads(document) for document in layout["documents"]]
    parts = layout["parts"]
    if len(parts) == 1 and parts[0][1] == layout["shape"]:
        yield name, {**arrays[0], "attributes": attributes}, parts[0]
        return
    attributes["shape"] = layout["shape"]
    yield name, {"zarr_format": 3, "node_type": "group", "attributes": attributes}, None
    for i, (array_, part) in enumerate(zip(arrays, parts, strict=True)):
        placed = {"offsets": part[0], "shape": part[1]}
        yield f"{name}/{i}", {**array_, "attributes": placed}, part


def _counts(part: Place) -> list[int]:
    """Return the number of cells of a part in each dimension."""
    return [-(-n // c) for n, c in zip(part[1], part[2], strict=True)]


def _size(part: Place) -> int:
    size = 1
    for count in _counts(part):
        size *= count
    return size


def _keys(name: str, part: Place) -> Iterator[str]:
    """Yield the Zarr keys of the chunks of an array, in order."""
    for index in itertools.product(*map(range, _counts(part))):
        yield "/".join([name, "c", *map(str, index)])


def _name(fqn: str) -> str:
    """Return the name of an FQN's node."""
    name = _UNSAFE.sub(lambda match: _escaped(match[0]), fqn)
    if not name:
        return "%"
    if name.startswith("__") or name == "zarr.json" or set(name) == {"."} or name.startswith(".z"):
        return "".join(f"%{ord(c):02X}" if c in "_." else c for c in name)
    return name


def _escaped(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode("utf-8", "surrogatepass"))


def _compact(document: Mapping[str, Any]) -> str:
    return json.dumps(document, separators=(",", ":"))


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("version", help="number of a version (12 or v12), or its uid")
    here = os.path.dirname(os.path.abspath(__file__))
    parser.add_argument("--folder", default=here, help="the data folder, if not the script's")
    parser.add_argument("--data", help="the URL under which readers find that folder")
    chosen = parser.parse_args()
    folder = os.path.abspath(chosen.folder)

    def read(key: str) -> bytes:
        with open(os.path.join(folder, *key.split("/")), "rb") as file:
            return file.read()

    uid = _uid(folder, read, chosen.version)
    json.dump(references(read, uid, folder if chosen.data is None else chosen.data), sys.stdout)


def _uid(folder: str, read: Callable[[str], bytes], version: str) -> str:
    """Return the uid of a version that is given by its number or its uid."""
    if os.path.exists(os.path.join(folder, "manifests", f"{version}.json")):
        return version
    number = version.removeprefix("v")
    for name in sorted(os.listdir(os.path.join(folder, "operations"))):
        for operation in _operations(name, read(f"operations/{name}")):
            made = operation.get("version")
            if made is not None and str(made["number"]) == number:
                return str(made["uid"])
    raise SystemExit(f"{folder!r} names no version {version!r}; give a number or a uid.")


def _operations(name: str, data: bytes) -> list[Json]:
    """Return the operations in an object of the journal: a single one, or a segment of many."""
    if name.endswith(".json"):
        return [json.loads(data)]
    if name.endswith(".segment"):  # a line, and compressed after it the operations, one a line
        packed = data.partition(b"\n")[2]
        return [json.loads(line) for line in zlib.decompress(packed).splitlines()]
    return []  # a file that another process is writing


if __name__ == "__main__":
    main()
