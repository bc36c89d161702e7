"""`ls` lists the entries of a version, all or by glob."""

import json

import pytest

from tests.cli.conftest import Run
from tests.cli.history import NBYTES

ALL = ["model.embed.weight", "model.head.weight", "optim.lr", "step"]


def names(output: str) -> list[str]:
    return [line.split()[0] for line in output.splitlines()[1:]]


CHOSEN: list[tuple[tuple[str, ...], list[str]]] = [
    ((), ALL),
    (("best",), ALL),
    (("v1", "*"), ALL),
    (("*.weight",), ALL[:2]),
    (("model.?mbed.*",), ALL[:1]),
    (("v1", "step", "model.h[a-e]ad*"), [ALL[1], ALL[3]]),
    (("main~1", "optim.lr"), [ALL[2]]),
]


def test_globs_choose(run: Run, target: str, subtests: pytest.Subtests) -> None:
    for args, expected in CHOSEN:
        with subtests.test(args=args):
            assert names(run("ls", *args, repo=target).stdout) == expected
            printed = json.loads(run("ls", "--json", *args, repo=target).stdout)
            assert [e["fqn"] for e in printed] == expected


def test_a_glob_that_matches_nothing_names_what_is_near(run: Run, target: str) -> None:
    result = run("ls", "best", "model.head.wieght", "step", repo=target)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "'model.head.weight'" in result.stderr
    assert "'dcpstore ls v2'" in result.stderr


def test_columns(run: Run, target: str) -> None:
    tensor, value = run("ls", "best", "model.head*", "step", repo=target).stdout.splitlines()[1:]
    assert tensor.split() == ["model.head.weight", "tensor", "float32", "512x1024", "2.0", "MiB"]
    assert value.split() == ["step", "value", "1000"]
    long, _ = run("ls", "best", "model.head*", "step", "--long", repo=target).stdout.splitlines()[
        1:
    ]
    digest = long.split()[-1]
    assert (long.split()[4:6], len(digest)) == (["2", "none"], 64)


def test_json_is_the_record_with_its_value_as_json(run: Run, target: str) -> None:
    _, head, lr, _ = json.loads(run("ls", "best", "--json", repo=target).stdout)
    tensor = head.pop("tensor")
    assert head == {
        "fqn": "model.head.weight",
        "path": ["model", "head.weight"],
        "kind": "tensor",
        "value": None,
    }
    assert (tensor["dtype"], tensor["shape"], tensor["nbytes"]) == ("float32", [512, 1024], NBYTES)
    assert tensor["parts"] == [
        {"offsets": [0, 0], "shape": [512, 1024], "chunk_shape": [256, 1024]}
    ]
    assert (lr["kind"], lr["tensor"], lr["value"]) == ("value", None, 0.0003)
