"""How far each rank of a save is: told by all, and heard by the coordinator, for the catalog."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from dcpstore.collectives import Collectives
from dcpstore.records import RankProgress

__all__ = ["Reports"]


class Reports:
    """The reports of the ranks of one save."""

    def __init__(self, ranks: Collectives) -> None:
        self._ranks = ranks
        self._phase = ""
        self._since = ""

    def tell(self, phase: str, nbytes: int, total: int) -> None:
        """Report that this rank has done `nbytes` of `total` in a phase."""
        if phase != self._phase:
            self._phase, self._since = phase, datetime.now(UTC).isoformat()
        self._ranks.tell(json.dumps([phase, nbytes, total, self._since]))

    def heard(self) -> list[RankProgress]:
        """Return what each rank reported last."""
        heard = []
        for rank, said in self._ranks.heard().items():
            phase, nbytes, total, since = json.loads(said)
            heard.append(RankProgress(rank, phase, nbytes, total, datetime.fromisoformat(since)))
        return heard
