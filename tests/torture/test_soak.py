"""300 saves and loads in one process: what it holds stays as it was after the first few."""

from itertools import pairwise
from typing import Any

import pytest

from tests.torture.children import start
from tests.torture.kinds import DATABASES, Dialect, prepared
from tests.torture.operations import empty
from tests.torture.sites import Mould
from tests.torture.soak import EVERY, soak

STEPS = 300
MIB = 1 << 20


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dialect", DATABASES)
@pytest.mark.parametrize("asynchronously", [False, True])
def test_a_long_run_holds_no_more_at_its_end(
    dialect: Dialect, asynchronously: bool, postgres_server: Any
) -> None:
    with prepared(long=False, server=postgres_server) as ground:
        site = Mould(ground, dialect, empty).copy()
        ended = start(soak, site, STEPS, asynchronously).end(deadline=800)
        assert (ended.code, ended.error) == (0, "")
    held = ended.value[STEPS // EVERY // 3 :]  # caches have filled by then
    assert len(held) == 20
    first = held[0]
    assert {one.descriptors for one in held} == {first.descriptors}
    assert {one.threads for one in held} == {first.threads}
    assert {one.connections for one in held} == {0}
    # The allocator's arenas come and go by a few MiB; a leak of one state of 1.3 MiB a step is 260.
    assert max(one.memory for one in held) - first.memory < 24 * MIB
    # As many versions are kept each time, and their numbers grow by a digit.
    assert max(one.packs for one in held) - min(one.packs for one in held) < 64 << 10
    # The journal grows, by as many operations for each save.
    growth = {b.journal - a.journal for a, b in pairwise(held)}
    assert max(growth) <= 4 * EVERY
