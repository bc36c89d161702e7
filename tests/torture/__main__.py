"""`python -m tests.torture [--long] [--only NAME]`: prints the table; exit code 1 if any is bad."""

from __future__ import annotations

import argparse
import sys
import time

from tests.torture.kinds import Tally, Verdict, prepared, run
from tests.torture.listing import listed


def row(tally: Tally) -> str:
    """Return a line of the table."""
    counts = " ".join(f"{tally.counts[verdict]:>9}" for verdict in Verdict)
    return f"{tally.name:<44} {tally.tried:>7} {counts}"


def tell(tally: Tally) -> None:
    """Print a kind's line of the table, and what was bad."""
    print(row(tally), *tally.bad, sep="\n", flush=True)


def main() -> int:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture")
    parser.add_argument("--long", action="store_true", help="try very many points")
    parser.add_argument("--only", default="", metavar="NAME", help="kinds whose name holds NAME")
    said = parser.parse_args()
    began = time.monotonic()
    print(f"{'kind of fault':<44} {'tried':>7} " + " ".join(f"{v:>9}" for v in Verdict))
    with prepared(long=said.long) as ground:
        tallies = run(listed(ground, only=said.only), tell)
    total = Tally("all")
    for tally in tallies:
        total.tried += tally.tried
        total.bad += tally.bad
        for verdict in Verdict:
            total.counts[verdict] += tally.counts[verdict]
    print(row(total), f"in {time.monotonic() - began:.0f} s")
    return 1 if total.bad else 0


if __name__ == "__main__":
    sys.exit(main())
