"""What ranks do together: steps in which each rank's error reaches all, and nobody waits forever.

`group` has the ranks that take part and how bytes travel between them, `barrier` the check that all
ranks have arrived first, `steps` the exchanges that a save or a load consists of.
"""

from dcpstore.collectives.barrier import name_ranks
from dcpstore.collectives.group import (
    Alone,
    Collectives,
    RankGroup,
    alone_in,
    alone_in_thread,
    find_collectives,
    gloo_twin,
    has_process_group,
)
from dcpstore.collectives.steps import in_step, in_turn

__all__ = [
    "Alone",
    "Collectives",
    "RankGroup",
    "alone_in",
    "alone_in_thread",
    "find_collectives",
    "gloo_twin",
    "has_process_group",
    "in_step",
    "in_turn",
    "name_ranks",
]
