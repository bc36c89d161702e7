"""The benchmark of long histories runs, at a tiny size, on both databases."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.ranks import ROOT


@pytest.fixture
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("history", ROOT / "benchmarks" / "history.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sqlite", "postgres"])
def test_it_times_every_question(
    benchmark: ModuleType, name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if name == "sqlite":
        url = str(tmp_path)
    else:
        url = request.getfixturevalue("postgres_server").get_uri()
    with benchmark.catalogs(url) as (few, many):
        timings = benchmark.measure(few, many, versions=(22, 44), entries=12, repeat=2)
    assert {t.name for t in timings} >= {"log", "show", "diff", "ref: tag", "ref: uid", "save"}
    assert all(t.few > 0 and t.many > 0 for t in timings)
    text = benchmark.report(name, timings, (22, 44))
    assert len(text.splitlines()) == 1 + len(timings)
