"""A database server whose connections break: at each request, and at each commit.

A proxy before the real server breaks the connection, before the server hears of the request or
after it has carried it out. The operation goes on all the same, or says in our words that it could
not; then all must hold that holds of a kill.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch

from tests.proxy import Proxy, proxied
from tests.torture.children import carry_out, start
from tests.torture.faults_disk import told, verdict_of
from tests.torture.kinds import Ground, Outcome
from tests.torture.operations import OPERATIONS, Operation
from tests.torture.sites import Mould, Site

__all__ = ["Connections", "kinds"]

SHORT = {"save": 3, "expire": 1}


@dataclass(frozen=True, slots=True)
class Loss:
    """Which request or commit, counted from 1, ends its connection, and what of it is lost."""

    number: int
    counts: Literal["commits", "requests"]
    what: Literal["answer", "request"]

    def __str__(self) -> str:
        return f"the {self.what} lost, at {self.counts[:-1]} {self.number}"


class Connections:
    """The breaks of the connections of one operation."""

    at_once = 2

    def __init__(self, ground: Ground, operation: Operation) -> None:
        self._ground, self._operation = ground, operation
        self.name = f"connections: {operation.name}"

    @cached_property
    def _mould(self) -> Mould:
        return Mould(self._ground, "postgres", self._operation.prepare)

    def points(self) -> Sequence[Loss]:
        """Run the operation once, and return its requests and commits."""
        site = self._mould.copy()
        commits, requests = carry_out(_count, self._operation, site)
        self._mould.discard(site)
        # Neighbours among the requests are alike: inside one transaction, mostly.
        points = [Loss(i + 1, "requests", "request") for i in range(0, requests, 10)]
        points += [Loss(i + 1, "commits", "request") for i in range(commits)]
        points += [Loss(i + 1, "commits", "answer") for i in range(commits)]
        return self._ground.pick(points, SHORT.get(self._operation.name, 1))

    def try_point(self, point: Loss) -> Outcome:
        """Break the connection there, and look."""
        site = self._mould.copy()
        ended = start(_work, self._operation, site, point).end()
        return verdict_of(ended, self._operation, site, self._mould)


def kinds(ground: Ground) -> Iterator[Connections]:
    """Yield the broken connections of every operation of one rank."""
    for operation in OPERATIONS:
        if operation.ranks == 1 and (ground.long or operation.name in SHORT):
            yield Connections(ground, operation)


def _count(operation: Operation, site: Site) -> tuple[int, int]:
    with proxied(site.target) as proxy:
        operation.act(_behind(site, proxy), 0)
        return proxy.commits, proxy.requests


def _work(operation: Operation, site: Site, point: Loss) -> str | None:
    torch.set_num_threads(1)
    with proxied(site.target) as proxy:
        proxy.lose, proxy.counts, proxy.what = point.number, point.counts, point.what
        return told(operation, _behind(site, proxy))


def _behind(site: Site, proxy: Proxy) -> Site:
    return replace(site, target=proxy.url)
