"""`show` tells all about one version."""

import json
import re

from dcpstore.catalog.catalog import Catalog
from tests.cli.conftest import Run
from tests.cli.history import save_version


def test_tells_all(run: Run, target: str) -> None:
    output = run("show", "best", repo=target).stdout
    pairs = dict(
        re.split(r" {2,}", line, maxsplit=1) for line in output.splitlines() if line[0] != " "
    )
    assert pairs.pop("when")[:7] == "2026-03"
    assert len(pairs.pop("uid")) == 32
    assert pairs == {
        "version": "v2",
        "parent": "v1",
        "branch": "main",
        "step": "1000",
        "tags": "best",
        "author": "ada",
        "ranks": "2",
        "bytes": "4.0 MiB in all, 2.0 MiB of them reused; 2.0 MiB written",
        "seconds": "plan 0.02, write 0.41",
        "metrics": "train_loss 1.72",
        "labels": "lr 3e-4",
        "message": "-",
    }
    assert "\n         val_loss 1.87\n" in output


def test_no_digit_of_a_metric_is_lost(run: Run, catalog: Catalog, target: str) -> None:
    metrics = {"tokens": 123456789, "loss": 1.23456789, "big": 1e22, "none": 0, "odd": float("nan")}
    save_version(catalog, 4, metrics=metrics)
    shown = run("show", repo=target).stdout
    for line in ("tokens 123456789", "loss 1.23456789", "big 1e+22", "none 0", "odd nan"):
        assert f"  {line}\n" in shown


def test_every_field_is_in_the_json(run: Run, target: str) -> None:
    shown = json.loads(run("show", "v2", "--json", repo=target).stdout)
    assert shown == json.loads(run("log", "v2", "-n1", "--json", repo=target).stdout)[0]
    assert json.loads(run("show", "--json", repo=target).stdout)["number"] == 3


def test_control_characters_are_visible_everywhere(run: Run, catalog: Catalog, target: str) -> None:
    save_version(
        catalog,
        4,
        message="one\n\x1b[2Jtwo",
        labels={"a\x1b": "b\x07\nc"},
        metrics={"\x1bloss": 1.0},
    )
    output = run("show", repo=target).stdout
    assert all(line.isprintable() for line in output.splitlines())
    assert r"a\x1b b\x07\nc" in output
    assert r"\x1bloss 1" in output
    assert "message  one\n         \\x1b[2Jtwo\n" in output
