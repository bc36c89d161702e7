"""What ranks do together: steps in which each rank's error reaches all, and nobody waits forever.

`group` says who takes part and how bytes travel, `barrier` that all have arrived before they do,
`steps` what a save or a load is made of.
"""

from dcpstore.collectives.group import (
    Alone,
    Collectives,
    RankGroup,
    alone_in,
    alone_in_thread,
    find_collectives,
    gloo_twin,
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
    "in_step",
    "in_turn",
]
