"""`status` shows the saves that run, how far their ranks are, and which have fallen silent."""

import json
from datetime import UTC, datetime, timedelta

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.maintenance.condemn import condemn
from dcpstore.catalog.write.saves import abort_save, begin_save, list_running, touch_save
from dcpstore.records import RankProgress
from tests.catalog.conftest import make_draft
from tests.cli.conftest import Run, ask_database

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def test_running_saves_are_listed(run: Run, target: str, catalog: Catalog) -> None:
    assert run("status", repo=target).stdout == "no save is running\n"
    assert run("status", "--json", repo=target).stdout == "[]\n"
    begin_save(catalog, make_draft("quiet", step=7))
    begin_save(catalog, make_draft("busy", branch="side\x1b"[:4]))
    touch_save(
        catalog,
        "busy",
        [
            RankProgress(0, "write", 1 << 20, 3 << 20, NOW),
            RankProgress(3, "digest", 512, 1024, NOW - timedelta(hours=1)),
        ],
    )
    head, quiet, first, second = run("status", repo=target).stdout.splitlines()
    assert head.split() == [
        "SAVE",
        "BRANCH",
        "STEP",
        "BEGAN",
        "LEASE",
        "RANK",
        "PHASE",
        "DONE",
        "OF",
        "SINCE",
    ]
    assert quiet.split()[:3] == ["quiet", "main", "7"]
    assert "alive" in quiet
    assert first.split()[:3] == ["busy", "side", "-"]
    assert "0  write   1.0 MiB  3.0 MiB" in first
    assert second.split()[:6] == ["3", "digest", "512", "B", "1.0", "KiB"]
    saves = json.loads(run("status", "--json", repo=target).stdout)
    assert [save["uid"] for save in saves] == ["quiet", "busy"]
    assert saves[1]["progress"][1] == {
        "rank": 3,
        "phase": "digest",
        "nbytes": 512,
        "total": 1024,
        "since": "2026-01-02T02:04:05.000000+00:00",
    }


def test_a_silent_save_has_lost_its_lease(run: Run, target: str, catalog: Catalog) -> None:
    begin_save(catalog, make_draft("quiet"))
    ask_database(target, "UPDATE version SET touched_at = '2026-01-01' WHERE uid = 'quiet'")
    assert "lapsed" in run("status", repo=target).stdout
    assert "alive" in run("status", "--lease", "100w", repo=target).stdout


def test_progress_is_deleted_with_the_save(target: str, catalog: Catalog) -> None:
    for uid in ("aborted", "crashed"):
        begin_save(catalog, make_draft(uid))
        touch_save(catalog, uid, [RankProgress(0, "write", 1, 2, NOW)])
    abort_save(catalog, "aborted", "given up")
    touch_save(catalog, "aborted", [RankProgress(0, "write", 2, 2, NOW)])
    day = timedelta(days=1)
    condemn(
        catalog,
        now=datetime.now(UTC) + day,
        grace=day,
        lease=day / 2,
        live_share=0.5,
        author="",
    )
    assert list_running(catalog) == []
    assert ask_database(target, "SELECT count(*) FROM progress") == [(0,)]
