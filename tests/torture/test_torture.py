"""The short form of the torture: some points of some kinds; `make torture` tries very many."""

from typing import Any

import pytest

from tests.torture.kinds import prepared, run
from tests.torture.listing import MODULES, listed


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_lost_and_nobody_hangs(module: str, postgres_server: Any) -> None:
    with prepared(long=False, server=postgres_server) as ground:
        bad = [line for tally in run(listed(ground, module=module)) for line in tally.bad]
    assert bad == [], "\n".join(bad)
