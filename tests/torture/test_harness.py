"""The torture sees what it is there to see: a promise that is broken on purpose, and who hangs."""

import os
import re
import shlex
import signal
import struct
import sys
import time
from pathlib import Path

import pytest

from tests.proxy import Messages
from tests.torture.__main__ import main
from tests.torture.children import start
from tests.torture.kills import Kills
from tests.torture.kinds import Outcome, Tally, Verdict, prepared, run
from tests.torture.listing import MODULES
from tests.torture.loss import Disk
from tests.torture.sabotage import FORGETFUL, HASTY
from tests.torture.steps import Step


@pytest.mark.slow
def test_a_save_that_does_not_sync_is_found_out() -> None:
    with prepared(long=True) as ground:
        kills = Kills(ground, FORGETFUL, "sqlite")
        whole, lost = [point for point in kills.every_point() if point.is_end][:2]
        assert (whole.left, lost.left) == ("all", "synced")
        assert kills.try_point(whole) == Outcome(Verdict.SURVIVED)
        assert kills.try_point(lost).verdict is Verdict.LOST


@pytest.mark.slow
def test_a_version_too_many_is_found_out() -> None:
    with prepared(long=True) as ground:
        kills = Kills(ground, HASTY, "sqlite")
        outcome = kills.try_point(list(kills.every_point())[-1])
        assert outcome.verdict is Verdict.LOST
        assert "v{1, 2, 3, 4, 5} are there" in outcome.detail


@pytest.mark.slow
def test_every_kind_of_step_is_found() -> None:
    with prepared(long=True) as ground:
        kills = Kills(ground, FORGETFUL, "sqlite")
        found = {point.what.split()[0] for point in kills.every_point()}
    wanted = {"connect", "PRAGMA", "BEGIN", "SELECT", "INSERT", "UPDATE", "COMMIT"}
    assert found >= wanted | {"create", "mkdir", "pwrite", "replace", "end"}


def test_who_waits_too_long_is_killed_and_counts_as_hung() -> None:
    began = time.monotonic()
    ended = start(time.sleep, 600).end(deadline=0.5)
    assert ended.hung
    assert time.monotonic() - began < 60


def test_a_child_that_dies_or_raises_is_told_from_one_that_ends() -> None:
    assert start(abs, -3).end().value == 3
    assert start(os._exit, 7).end().code == 7
    assert start(os.abort).end().code == -signal.SIGABRT
    assert "ZeroDivisionError" in start(divmod, 1, 0).end().error


def test_a_kind_that_breaks_counts_as_lost() -> None:
    class Broken:
        name = "broken"

        def points(self) -> list[int]:
            return [1, 2]

        def try_point(self, point: int) -> Outcome:
            if point == 1:
                raise OSError("no such thing")
            return Outcome(Verdict.HUNG)

    heard: list[Tally] = []
    (tally,) = run([Broken()], heard.append)
    assert heard == [tally]
    assert (tally.tried, tally.counts[Verdict.LOST], tally.counts[Verdict.HUNG]) == (2, 1, 1)
    assert "no such thing" in tally.bad[0]


def test_without_a_sync_a_loss_of_power_takes_bytes_and_names(tmp_path: Path) -> None:
    root, before = tmp_path / "root", tmp_path / "before"
    for folder in (root, before):
        folder.mkdir()
        (folder / "old").write_bytes(b"old")
        (folder / "gone").write_bytes(b"gone")
    disk = Disk(root, before)
    assert disk.is_synced

    def take(what: str, name: str, target: str = "", saved: Path | None = None) -> None:
        paths = [str(root / one) if one else "" for one in (name, target)]
        disk.take(Step(0, what, paths[0] or str(root), paths[1], str(saved or ""), True, 0))

    (root / "new").write_bytes(b"synced and more")
    (tmp_path / "saved").write_bytes(b"synced")
    take("create", "new.tmp")
    take("fsync", "new.tmp", saved=tmp_path / "saved")
    take("pwrite", "new.tmp")
    take("replace", "new.tmp", "new")
    assert not disk.is_synced
    take("fsync", "")  # the folder: the name is durable now, the last bytes are not
    (root / "gone").unlink()
    take("unlink", "gone")
    disk.lose_power(lambda: False)
    left = {path.name: path.read_bytes() for path in root.iterdir()}
    assert left == {"old": b"old", "gone": b"gone", "new": b"synced"}


@pytest.mark.parametrize("survives", [True, False])
def test_what_is_synced_outlives_a_loss_of_power(tmp_path: Path, survives: bool) -> None:
    root, before = tmp_path / "root", tmp_path / "before"
    before.mkdir()
    (root / "inside").mkdir(parents=True)
    (root / "inside" / "file").write_bytes(b"whole")
    disk = Disk(root, before)
    inside = root / "inside"
    file = inside / "file"
    steps = [("mkdir", inside), ("create", file), ("fsync", file), ("fsync", inside)]
    for number, (what, path) in enumerate([*steps, ("fsync", root)]):
        disk.take(Step(number, what, str(path), "", str(file), True, number))
    assert disk.is_synced
    disk.lose_power(lambda: survives)
    assert file.read_bytes() == b"whole"


@pytest.mark.parametrize("cut", [1, 3, 7, 100])
def test_requests_are_counted_however_they_lie_in_packets(cut: int) -> None:
    asks_for_encryption = struct.pack("!ii", 8, 80877104)
    greeting = struct.pack("!ihh", 8 + 10, 3, 0) + b"user\0postg"
    messages = [b"Q" + struct.pack("!i", 4 + n) + b"x" * n for n in (0, 1, 5, 70)]
    data = b"".join([asks_for_encryption, greeting, *messages])
    counter = Messages()
    assert sum(counter.count(data[i : i + cut]) for i in range(0, len(data), cut)) == 6


def test_the_readme_shows_the_fault_as_it_is_and_what_it_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parent / "README.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    name = re.search(r"`tests/torture/(faults_\w+)\.py`:", page)
    assert name is not None
    assert name[1] in MODULES
    assert code == (Path(__file__).parent / f"{name[1]}.py").read_text()
    (shown,) = re.findall(r"^```console\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    command, _, printed = shown.partition("\n")
    python, *arguments = shlex.split(command.removeprefix("$ "))
    assert (python, arguments[:2]) == ("python", ["-m", "tests.torture"])
    monkeypatch.setattr(sys, "argv", ["tests.torture", *arguments[2:]])
    assert main() == 0
    assert re.sub(r"in \d+ s", "", capsys.readouterr().out) == re.sub(r"in \d+ s", "", printed)
