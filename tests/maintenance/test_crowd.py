"""Two processes save to one branch, a third expires and collects, a fourth loads: for a minute."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections import Counter
from typing import Any

import pytest
import torch

import dcpstore
from dcpstore import ConflictError, InvalidInputError, NotFoundError, Repository
from tests.soundness import Place, assert_sound

SECONDS = 60
GRACE = "10s"  # far longer than a load of so little takes


def state(number: int) -> dict[str, Any]:
    """Return a state: one part is new, one returns to old values, one never changes."""
    return {
        "new": torch.full((20_000,), float(number)),
        "again": torch.full((3000,), float(number % 5)),
        "kept": torch.arange(500),
        "number": number,
    }


def check(read: dict[str, Any]) -> None:
    expected = state(read["number"])
    assert read.keys() == expected.keys()
    for fqn in ("new", "again", "kept"):
        assert torch.equal(read[fqn], expected[fqn]), fqn


def save(repo: Repository, rank: int, count: Counter[str]) -> None:
    try:
        dcpstore.save(state(1000 * count["saved"] + rank), repo)
        count["saved"] += 1
    except ConflictError:  # what it meant to reuse was collected meanwhile; it says so
        count["refused"] += 1


def collect(repo: Repository, rank: int, count: Counter[str]) -> None:
    time.sleep(0.5)
    if repo.log(limit=1):
        count["expired"] += len(repo.expire(keep_last=6).expired)
    try:
        report = repo.gc(grace=GRACE)
    except InvalidInputError:  # a save took longer than the grace time
        count["waited"] += 1
        return
    count["deleted"] += len(report.deleted)
    count["repacked"] += len(report.repacked)


def load(repo: Repository, rank: int, count: Counter[str]) -> None:
    versions = repo.log(limit=8)
    if not versions:
        return
    try:
        check(repo.read(random.choice(versions).number))
        count["loaded"] += 1
    except NotFoundError as error:
        if "expired" not in str(error):
            raise
        count["expired first"] += 1


def work(job: Any, place: Place, rank: int, results: Any) -> None:
    """Do a job again and again until the time is over; tell what came of it."""
    torch.set_num_threads(1)
    count: Counter[str] = Counter()
    try:
        with place.open() as repo:
            end = time.monotonic() + SECONDS
            while time.monotonic() < end:
                job(repo, rank, count)
    except BaseException as error:
        results.put((job.__name__, f"{type(error).__name__}: {error}", count))
        raise
    results.put((job.__name__, "", count))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_committed_version_stays_loadable_in_a_crowd(place: Place) -> None:
    place.open().close()
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    jobs = [save, save, collect, load]
    workers = [
        context.Process(target=work, args=(job, place, rank, results))
        for rank, job in enumerate(jobs)
    ]
    for worker in workers:
        worker.start()
    outcomes = [results.get(timeout=SECONDS + 300) for _ in workers]
    for worker in workers:
        worker.join()
    assert [error for _, error, _ in outcomes if error] == []
    count: Counter[str] = Counter()
    for _, _, one in outcomes:
        count.update(one)
    assert min(count["saved"], count["expired"], count["deleted"], count["loaded"]) > 5, count
    with place.open() as repo:
        versions = repo.log()
        assert len(versions) + count["expired"] == count["saved"]
        assert [v.parent for v in versions] == [v.number - 1 or None for v in versions]
        for version in versions:
            check(repo.read(version.number))
        assert repo.verify(deep=True).damaged == ()
        repo.gc(grace="0s")
        assert_sound(repo)
