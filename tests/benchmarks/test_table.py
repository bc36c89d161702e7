"""What the table says follows from the samples."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.table import Row, as_json, render, replace_table, share_of_limit
from benchmarks.timing import Samples, in_turns

MACHINE = {"cpu": "any"}
PROBED = {
    "direct write, fsync": Samples((2e9, 1e9, 3e9)),
    "buffered write, fsync": Samples((1e9,)),
    "BLAKE3, all cores": Samples((4e9,)),
}


def row(theirs: float, ours: float, **more: Any) -> Row:
    return Row("a", "save", "peer", Samples((theirs,)), Samples((ours,)), **more)


@pytest.mark.parametrize(
    ("one", "ratio", "reached"),
    [
        (row(3, 1.5), 2, None),
        (row(3, 1.5, target=2), 2, True),
        (row(3, 1.5, target=2.1), 2, False),
        (row(10, 8, kind="share", target=0.8), 0.8, True),
        (row(10, 8.1, kind="share", target=0.8), 0.81, False),
        (row(10, 100, kind="amount", unit="bytes", target=100), 10, True),
        (row(10, 101, kind="amount", unit="bytes", target=100), 10.1, False),
        (row(0, 1, kind="amount", unit="bytes", target=1), float("inf"), True),
    ],
)
def test_a_target_is_reached_or_falls_short(one: Row, ratio: float, reached: bool | None) -> None:
    assert one.ratio == pytest.approx(ratio)
    assert one.is_reached is reached
    report = render(MACHINE, PROBED, [one], rounds=5, is_tiny=False)
    cells = [cell.strip() for cell in report.splitlines()[-1].strip("|").split("|")]
    assert cells[7] == {None: "", True: "yes", False: "NO"}[reached]
    written = as_json(MACHINE, PROBED, [one], rounds=5, is_tiny=False)
    assert isinstance(written["rows"], list)
    assert written["rows"][0]["reached"] is reached


def test_the_limit_is_the_fastest_way_to_do_what_must_be_done() -> None:
    needed = {"write": 4 * 10**9, "digest": 8 * 10**9}  # 2 s at 2 GB/s, then 2 s at 4 GB/s
    assert share_of_limit(row(1, 8, least_work=needed), PROBED) == pytest.approx(0.5)
    assert share_of_limit(row(1, 8), PROBED) is None


def test_a_spread_is_told_in_the_unit_of_its_median() -> None:
    one = Row("a", "save", "peer", Samples((0.9, 1.5, 2)), Samples((0.02, 0.03, 0.1)))
    report = render(MACHINE, PROBED, [one], rounds=3, is_tiny=False)
    assert "1.5 s (0.9..2)" in report
    assert "30 ms (20..100)" in report


def test_each_round_begins_with_another_contender() -> None:
    order: list[str] = []

    def contender(name: str, value: float) -> dict[str, float]:
        order.append(name)
        return {"took": value}

    measured = in_turns(
        {name: partial(contender, name) for name in "abc"},
        rounds=4,
        say=lambda text: None,
    )
    assert "".join(order) == "abcbcacababc"
    assert measured["b"]["took"].values == (0, 1, 2, 3)
    assert measured["b"]["took"].median == 1.5


def test_a_page_without_the_marks_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing here")
    with pytest.raises(SystemExit, match="lacks the lines"):
        replace_table(page, "report")
    assert page.read_text() == "nothing here"
