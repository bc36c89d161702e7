"""The examples run as programs; the proofs of the demo: a resumed run equals one never stopped."""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import dcpstore
from dcpstore import Repository
from tests.ranks import ROOT, RankPool

EXAMPLES = str(ROOT / "examples")
SMALL = ["--width=16", "--layers=1", "--heads=2", "--context=8", "--batch=4", "--save-every=1"]


def _example(name: str) -> Any:
    """Import a module of the examples as they import each other."""
    if EXAMPLES not in sys.path:
        sys.path.append(EXAMPLES)
    return importlib.import_module(name)


def _train(rank: int, words: list[str]) -> None:
    """Train as one rank of a pool."""
    example = _example("train_gpt")
    args = example.parse_arguments(words)
    with dcpstore.open(args.repo) as repo:
        example.train(args, repo)


@pytest.fixture(scope="module")
def trained(
    two_ranks: RankPool, four_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Repository]:
    """A repository as the demo makes it, small: one of its runs under torchrun, for they are slow.

    The run stops after 2 of 4 steps.
    """
    target = str(tmp_path_factory.mktemp("examples") / "ckpts")
    small = [*SMALL, "--steps=4"]
    _example("demo").train(2, target, *small, "--stop-after=2", "--tag-best=best")
    one_rank = RankPool(1, tmp_path_factory.mktemp("rank"))
    runs = [
        (one_rank, ["--branch=one-rank", "--resume=best"]),
        (two_ranks, ["--branch=never-stopped"]),
        (two_ranks, ["--branch=two-ranks", "--resume=best"]),
        (four_ranks, ["--branch=four-ranks", "--resume=best"]),
    ]
    for pool, options in runs:
        pool.run(_train, [f"--repo={target}", *small, *options])
    one_rank.close()
    with dcpstore.open(target, create=False) as repo:
        yield repo


@pytest.mark.slow
def test_versions_carry_step_losses_and_labels(trained: Repository) -> None:
    versions = trained.log("main")
    assert [version.step for version in versions] == [2, 1]
    for version in versions:
        assert version.metrics.keys() == {"train_loss", "val_loss"}
        assert version.labels.keys() == {"lr", "seed", "sha256"}
        assert version.ranks == 2


@pytest.mark.slow
def test_best_is_the_version_of_least_validation_loss(trained: Repository) -> None:
    best = min(trained.log("main"), key=lambda version: version.metrics["val_loss"])
    assert trained.show("best") == best
    assert best.tags == ("best",)


@pytest.mark.slow
def test_every_version_reads_as_the_ranks_held_it(trained: Repository) -> None:
    _example("demo").prove_versions(trained)


@pytest.mark.slow
def test_the_same_run_writes_nothing_twice(trained: Repository) -> None:
    demo = _example("demo")
    twins = {version.step: version for version in trained.log("never-stopped")}
    for version in trained.log("main"):
        twin = twins[version.step]
        assert demo.contents(trained, twin) == demo.contents(trained, version)
        assert twin.nbytes_written == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("branch", "ranks"), [("one-rank", 1), ("two-ranks", 2), ("four-ranks", 4)]
)
def test_a_resumed_run_equals_the_one_that_never_stopped(
    trained: Repository, branch: str, ranks: int
) -> None:
    versions = [version for version in trained.log(branch) if version.branch == branch]
    assert versions[0].step == 4
    assert {version.ranks for version in versions} == {ranks}
    assert versions[-1].parent == trained.show("best").number
    _example("demo").prove_resumed(trained, branch, exact=ranks == 2)


def test_the_global_batch_does_not_depend_on_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    example = _example("train_gpt")
    data = example.Data(example.parse_arguments(["--repo=unused", "--context=8", "--batch=8"]))

    def whole(ranks: int, step: int) -> torch.Tensor:
        monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
        shares = []
        for rank in range(ranks):
            monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
            shares.append(data.share(data.training, step)[0])
        return torch.cat(shares)

    assert torch.equal(whole(1, 3), whole(2, 3))
    assert torch.equal(whole(1, 3), whole(4, 3))
    assert not torch.equal(whole(1, 3), whole(1, 4))


@pytest.fixture
def small_repo(tmp_path: Path) -> Iterator[Repository]:
    """A run that never stopped, of two versions, and "best" after its first step."""
    with dcpstore.open(tmp_path / "ckpts") as repo:
        _save(repo, "main", step=1, value=1.0, loss=3.0, tags=["best"])
        _save(repo, "never-stopped", step=2, value=2.0, loss=2.0)
        yield repo


def _save(
    repo: Repository,
    branch: str,
    *,
    step: int,
    value: float,
    loss: float,
    tags: list[str] | None = None,
    parent: str | None = None,
    sha256: str | None = None,
) -> dcpstore.Version:
    state = {"w": torch.full((3,), value)}
    return dcpstore.save(
        state,
        repo,
        branch=branch,
        parent=parent,
        step=step,
        tags=tags or [],
        metrics={"val_loss": loss},
        labels={"sha256": sha256 or _example("fingerprint").fingerprint(state)},
    )


def test_a_version_that_reads_otherwise_fails_the_demo(small_repo: Repository) -> None:
    _example("demo").prove_versions(small_repo)
    _save(small_repo, "main", step=2, value=2.0, loss=2.0, sha256="00" * 32)
    with pytest.raises(SystemExit, match="v3 was saved as 0000"):
        _example("demo").prove_versions(small_repo)


def test_loading_another_state_than_was_saved_ends_the_example(small_repo: Repository) -> None:
    _save(small_repo, "main", step=2, value=2.0, loss=2.0, sha256="00" * 32)
    with pytest.raises(SystemExit, match="v3 was saved as 0000"):
        _example("train_gpt").resume({"w": torch.zeros(3)}, small_repo, "main")


@pytest.mark.parametrize(
    ("value", "loss", "exact", "failure"),
    [
        (2.0, 2.0, True, None),
        (9.0, 2.0, True, "v3 and v2 do not hold the same"),
        (2.0, 2.0 + 1e-7, True, "val_loss is 2.0000001 on again"),
        (9.0, 2.0 + 1e-7, False, None),
        (9.0, 2.001, False, "val_loss is 2.001 on again"),
    ],
)
def test_a_resumed_run_that_differs_fails_the_demo(
    small_repo: Repository, value: float, loss: float, exact: bool, failure: str | None
) -> None:
    _save(small_repo, "again", step=2, value=value, loss=loss, parent="best")
    prove = _example("demo").prove_resumed
    if failure is None:
        prove(small_repo, "again", exact=exact)
    else:
        with pytest.raises(SystemExit, match=failure):
            prove(small_repo, "again", exact=exact)


def test_a_resumed_run_from_elsewhere_fails_the_demo(small_repo: Repository) -> None:
    _save(small_repo, "again", step=2, value=2.0, loss=2.0, parent="never-stopped")
    with pytest.raises(SystemExit, match="begins at v2, not at v1"):
        _example("demo").prove_resumed(small_repo, "again", exact=True)


def test_a_command_that_fails_or_hangs_ends_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = _example("demo")
    with pytest.raises(SystemExit, match="exit code 3"):
        demo.run([sys.executable, "-c", "raise SystemExit(3)"], shown="python")
    monkeypatch.setattr(demo, "PATIENCE", 0.2)
    with pytest.raises(SystemExit, match=r"did not end in 0\.2 s"):
        demo.run([sys.executable, "-c", "import time; time.sleep(60)"], shown="python")


def _run(name: str, *words: str, ranks: int = 0) -> str:
    """Return what an example prints, run as its docstring says; under torchrun with `ranks`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [sys.executable, *(launcher if ranks else []), f"{EXAMPLES}/{name}.py", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _losses(target: Path) -> dict[int, float]:
    with dcpstore.open(target, create=False) as repo:
        return {version.step or 0: version.metrics["loss"] for version in repo.log()}


def test_a_plain_loop_goes_on_exactly_where_it_stopped(tmp_path: Path) -> None:
    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    assert "nothing to resume from" in _run("plain_loop", f"--repo={stopped}", "--steps=20")
    assert "resumed from v1, step 20" in _run("plain_loop", f"--repo={stopped}", "--steps=40")
    _run("plain_loop", f"--repo={straight}", "--steps=40")
    contents = _example("demo").contents
    with dcpstore.open(stopped, create=False) as one, dcpstore.open(straight, create=False) as two:
        assert contents(one, one.show("main@step=40")) == contents(two, two.show("main@step=40"))
    assert _losses(stopped) == _losses(straight)


@pytest.mark.slow
def test_ddp_resumes_on_more_ranks(tmp_path: Path) -> None:
    target = tmp_path / "ckpts"
    _run("ddp", f"--repo={target}", "--steps=10", ranks=2)
    said = _run("ddp", f"--repo={target}", "--steps=20", ranks=3)
    assert "resumed from step 10 of 2 ranks, on 3" in said
    assert "['data.rank-2']" in said
    with dcpstore.open(target, create=False) as repo:
        assert [version.ranks for version in repo.log()] == [3, 2]
        own = {f"data.rank-{rank}" for rank in range(3)}
        assert own <= {entry.fqn for entry in repo.entries("main")}
    losses = _losses(target)
    assert losses[20] < losses[10]


@pytest.mark.slow
def test_fsdp2_resumes_on_another_world_size(tmp_path: Path) -> None:
    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    _run("fsdp2_resume", f"--repo={stopped}", "--steps=10", ranks=2)
    said = _run("fsdp2_resume", f"--repo={stopped}", "--steps=20", ranks=3)
    assert "resumed from step 10 of 2 ranks, on 3" in said
    _run("fsdp2_resume", f"--repo={straight}", "--steps=20", ranks=2)
    with dcpstore.open(stopped, create=False) as repo:
        assert [version.ranks for version in repo.log()] == [3, 3, 2, 2]
    assert _losses(stopped) == pytest.approx(_losses(straight), abs=1e-3)


def test_the_best_version_is_found_and_its_weights_are_exported(tmp_path: Path) -> None:
    target, out = tmp_path / "ckpts", tmp_path / "out"
    said = _run("evaluate_and_export", f"--repo={target}", f"--out={out}")
    with dcpstore.open(target, create=False) as repo:
        best = repo.show("best")
        accuracies = [version.metrics["accuracy"] for version in repo.log()]
        assert best.metrics["accuracy"] == max(accuracies) > min(accuracies)
        weights = repo.read("best", "model", nested=True)["model"]
    assert f"tagged {best} as 'best'" in said
    assert f"accuracy of the exported file: {max(accuracies):.3f}" in said
    for exported in (load_file(out / "model.safetensors"), torch.load(out / "model.pt")):
        assert exported.keys() == weights.keys()
        assert all(torch.equal(exported[name], weights[name]) for name in weights)


def test_an_adapter_costs_its_own_bytes(tmp_path: Path) -> None:
    target, adapter = tmp_path / "ckpts", tmp_path / "adapter_model.safetensors"
    said = _run("lora", f"--repo={target}", f"--adapter={adapter}")
    with dcpstore.open(target, create=False) as repo:
        base, *adapters = reversed(repo.log())
        assert [version.parent for version in adapters] == [base.number] * 2
        for version in adapters:
            assert version.nbytes == base.nbytes
            assert version.nbytes_written == 2 * 4 * 256 * 4  # bytes of both small matrices
        changed = {entry.fqn for entry in repo.diff("base", "cos").changed}
    assert changed == load_file(adapter).keys() == {"model.2.lora_down", "model.2.lora_up"}
    assert "cos(1.5) is 0.0" in said


def test_the_history_becomes_data_frames(tmp_path: Path) -> None:
    target = tmp_path / "ckpts"
    said = _run("history_in_pandas", f"--repo={target}")
    with dcpstore.open(target, create=False) as repo:
        best = repo.best("loss")
    assert f"Best: {best} on {best.branch}, loss {best.metrics['loss']:.4f}" in said
    assert all(f"lr-{rate}" in said for rate in ("0.01", "0.1", "0.7"))


def _commands_drawn(picture: Path) -> list[str]:
    texts = ElementTree.fromstring(picture.read_text()).iter("{http://www.w3.org/2000/svg}text")
    lines: dict[float, str] = {}
    for text in texts:
        height = float(text.attrib["y"])
        lines[height] = lines.get(height, "") + (text.text or "").replace("\xa0", " ")
    return [line for line in lines.values() if line.startswith("$ ")]


@pytest.mark.slow
def test_the_picture_of_the_readme_shows_a_session_that_runs(tmp_path: Path) -> None:
    images = ROOT / "docs" / "images"
    drawn = tmp_path / "terminal.svg"
    subprocess.run([sys.executable, str(images / "terminal.py"), str(drawn)], check=True)
    commands = _commands_drawn(drawn)
    assert len(commands) == 6
    assert commands == _commands_drawn(images / "terminal.svg")
