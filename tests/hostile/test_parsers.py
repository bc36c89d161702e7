"""Parsers on what strangers wrote: an object or an error of ours, never anything else.

The corpus holds sound inputs and every input that once broke a parser.
"""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.hostile.guided import NUMBERS, TEXTS, search
from tests.hostile.parsers import CORPUS, PARSERS, Parser

CASES = [
    pytest.param(parser, data, id=f"{parser.name}-{name}")
    for parser in PARSERS.values()
    for name, data in parser.corpus().items()
]
ROOM = 64 << 10  # KiB that a small input may make a parser take; the claims in it are of exabytes
every_parser = pytest.mark.parametrize("parser", PARSERS.values(), ids=PARSERS)


def test_every_corpus_is_a_parsers() -> None:
    assert {folder.name for folder in CORPUS.iterdir()} == set(PARSERS)


@pytest.mark.parametrize(("parser", "data"), CASES)
def test_the_corpus_is_taken_or_refused(parser: Parser, data: bytes, tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    parser.try_on(data, tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < ROOM


@every_parser
def test_some_of_its_corpus_is_sound(parser: Parser, tmp_path: Path) -> None:
    taken = [name for name, data in parser.corpus().items() if parser.try_on(data, tmp_path)]
    assert [name for name in taken if name.startswith("sound")] != []
    sound = {name for name in parser.corpus() if name.startswith("sound")}
    assert sound <= set(taken)
    assert not [name for name in taken if name.startswith("bad")]


@every_parser
def test_a_search_by_coverage_finds_nothing_that_breaks_it(parser: Parser, tmp_path: Path) -> None:
    found = search(parser, tmp_path, runs=250, seed=6)
    assert [(data[:200], repr(error)[:200]) for data, error in found.broken] == []


def test_the_search_finds_what_a_wrong_parser_lets_through(tmp_path: Path) -> None:
    def wrong(data: bytes, folder: Path) -> None:
        tree = json.loads(data) if data.startswith(b"{") else {}
        if isinstance(tree, dict) and tree.get("uid") is None:
            raise KeyError("uid")

    names = PARSERS["operations"]
    found = search(Parser(names.name, names.module, wrong), tmp_path, runs=50, seed=6)
    assert any(isinstance(error, KeyError) for _, error in found.broken)


trees = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(TEXTS)
    | st.sampled_from(NUMBERS),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(("$tuple", "$ndarray", "$numpy", "$dict", "$size", "$datetime", "a"))
            | st.text(max_size=4),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)


@every_parser
@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.binary(max_size=300) | trees.map(lambda tree: json.dumps(tree).encode()))
def test_anything_is_taken_or_refused(parser: Parser, data: bytes, tmp_path: Path) -> None:
    parser.try_on(data, tmp_path)
