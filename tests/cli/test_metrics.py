"""`best` finds a version by a metric; `metric` and `label` add what was learned later."""

import json

import pytest

from dcpstore.catalog.catalog import Catalog
from tests.cli.conftest import Run
from tests.cli.history import save_version


def test_the_best_version(run: Run, catalog: Catalog, target: str) -> None:
    save_version(catalog, 4, branch="side", step=2000, metrics={"val_loss": 0.5})
    assert run("best", "val_loss", repo=target).stdout == (
        "v4 (branch side, step 2000): val_loss 0.5\n"
    )
    on_main = run("best", "val_loss", "--branch", "main", repo=target).stdout
    assert on_main == "v2 (branch main, step 1000): val_loss 1.87\n"
    largest = run("best", "val_loss", "--max", "--json", repo=target).stdout
    assert json.loads(largest)["number"] == 1
    unknown = run("best", "val_los", repo=target)
    assert (unknown.exit_code, "Did you mean 'val_loss'" in unknown.stderr) == (1, True)


def test_metrics_and_labels_are_added_and_undone(run: Run, target: str) -> None:
    added = run("metric", "best", "acc=0.5", "inf=inf", repo=target)
    assert added.stdout == "v2 has the metrics acc=0.5, inf=inf, train_loss=1.72, val_loss=1.87\n"
    labelled = json.loads(run("label", "v2", "url=a=b", "--json", repo=target).stdout)
    assert labelled["labels"] == {"lr": "3e-4", "url": "a=b"}
    for _ in range(2):
        assert run("undo", repo=target).stdout == "removed what was added to v2\n"
    version = json.loads(run("show", "v2", "--json", repo=target).stdout)
    assert version["metrics"] == {"train_loss": 1.72, "val_loss": 1.87}
    assert version["labels"] == {"lr": "3e-4"}


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("metric", "best", "acc"), 2, "'acc' is not NAME=NUMBER"),
        (("metric", "best", "acc=high"), 2, "'high' is not a number, for the metric 'acc'"),
        (("metric", "best", "a=1", "a=2"), 2, "two different texts"),
        (("metric", "best", "val_loss=7"), 11, "val_loss"),
        (("metric", "best"), 2, "Missing argument"),
        (("label", "best", "lr"), 2, "'lr' is not NAME=TEXT"),
        (("label", "best", "lr=1"), 11, "lr"),
        (("label", "bset", "a=1"), 1, "'best'"),
    ],
)
def test_what_cannot_be_added(
    run: Run, target: str, args: tuple[str, ...], code: int, message: str
) -> None:
    before = run("ops", "--json", repo=target).stdout
    result = run(*args, repo=target)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert run("ops", "--json", repo=target).stdout == before
