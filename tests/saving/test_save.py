"""What a save stores, what it reuses, and what its version says; on both databases."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import dcpstore
import dcpstore.saving.commit as committing
from dcpstore import ChunkDefaults, Repository
from dcpstore.catalog.maintenance.export import load_content
from dcpstore.catalog.read.entries import load_plan
from dcpstore.formats.manifest import Manifest, decode_manifest, manifest_key
from dcpstore.formats.page import decode_page
from dcpstore.formats.plan import decode_plan
from dcpstore.maintenance.page_reader import PageReader
from tests.ranks import RankPool, first_ranks, mesh
from tests.soundness import Place, assert_sound
from tests.tensors import DTYPES, raw, same


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_every_dtype_is_read_back_bit_by_bit(repo: Repository, subtests: pytest.Subtests) -> None:
    for dtype in DTYPES:
        with subtests.test(dtype=dtype):
            state = {
                "matrix": raw(dtype, 5, 7),
                "zero-dimensional": raw(dtype, 3)[1],
                "empty": raw(dtype, 0, 3),
                "transposed": raw(dtype, 4, 6).T,
                "strided": raw(dtype, 10, 3)[::2],
            }
            version = dcpstore.save(state, repo)
            read = repo.read(version.number)
            filled = {fqn: torch.empty_like(tensor) for fqn, tensor in state.items()}
            report = dcpstore.load(filled, repo, version.number)
            assert report.missing == report.unexpected == ()
            for fqn, tensor in state.items():
                assert same(read[fqn], tensor), fqn
                assert same(filled[fqn], tensor), fqn


def test_tied_and_aliased_tensors_are_stored_once(repo: Repository) -> None:
    weight = torch.randn(50, 8)
    version = dcpstore.save({"embed": weight, "head": weight, "view": weight.view(400)}, repo)
    assert version.nbytes == 3 * weight.nbytes
    entries = {e.fqn: e for e in repo.entries()}
    assert entries["embed"].tensor == entries["head"].tensor
    assert version.nbytes_written == weight.nbytes  # the flat view has the same bytes too
    assert version.nbytes_reused == 2 * weight.nbytes


def test_unchanged_state_writes_no_chunk_bytes(repo: Repository) -> None:
    state = {f"layer{i}": torch.randn(30, 30) for i in range(5)}
    first = dcpstore.save(state, repo)
    second = dcpstore.save(state, repo)
    assert (first.nbytes_written, first.nbytes_reused) == (first.nbytes, 0)
    assert (second.nbytes_written, second.nbytes_reused) == (0, second.nbytes)
    assert {key.split("/")[1] for key in repo.storage.list("packs")} == {first.uid}
    state["layer3"] += 1
    third = dcpstore.save(state, repo)
    assert third.nbytes_written == state["layer3"].nbytes


def test_a_changed_row_writes_one_chunk(database_url: str, tmp_path: Path) -> None:
    with Place(database_url, str(tmp_path / "data"), chunk_nbytes=1024).open() as repo:
        weight = torch.randn(64, 64)
        dcpstore.save({"weight": weight}, repo)
        weight[40] = 0
        version = dcpstore.save({"weight": weight}, repo)
        assert version.nbytes_written == 1024


def test_the_version_has_what_the_caller_gave(repo: Repository) -> None:
    version = dcpstore.save(
        {"w": torch.zeros(3), "lr": 0.001},
        repo,
        step=1000,
        tags=["best", "night"],
        message="after warm-up",
        metrics={"val_loss": 2.31},
        labels={"lr": "3e-4"},
        author="ada",
    )
    assert (version.number, version.branch, version.parent, version.step) == (1, "main", None, 1000)
    assert version.tags == ("best", "night")
    assert (version.metrics, version.labels) == ({"val_loss": 2.31}, {"lr": "3e-4"})
    assert (version.author, version.message, version.ranks) == ("ada", "after warm-up", 1)
    assert set(version.seconds) == {"plan", "digest", "compare", "write", "manifest"}
    for ref in ("best", "night", "v1", 1, "main", None, "main@step=1000"):
        assert repo.show(ref) == version
    child = dcpstore.save({"w": torch.zeros(3)}, repo)
    assert (child.number, child.parent) == (2, 1)
    assert repo.show("main~1") == version
    assert repo.log() == [child, version]
    assert repo.log("best") == [version]


def test_branches_begin_at_the_given_parent(repo: Repository) -> None:
    for _ in range(3):
        dcpstore.save({"w": torch.zeros(3)}, repo)
    side = dcpstore.save({"w": torch.ones(3)}, repo, branch="side", parent="main~1")
    other = dcpstore.save({"w": torch.ones(3)}, repo, branch="other")
    assert (side.parent, other.parent) == (2, None)
    assert dcpstore.save({"w": torch.ones(3)}, repo, branch="side").parent == side.number


def test_values_are_plain_sql(repo: Repository) -> None:
    state = {"lr": 0.001, "betas": (0.9, 0.999), "name": "adam", "nested": {"on": True, "n": None}}
    dcpstore.save(state, repo)
    rows = repo.sql("SELECT fqn, value FROM entries WHERE kind = 'value' ORDER BY fqn")
    assert dict(rows)["lr"] == "0.001"
    assert dict(rows)["nested.on"] == "true"
    empty: dict[str, Any] = {"lr": 0, "betas": 0, "name": 0, "nested": {"on": 0, "n": 0}}
    dcpstore.load(empty, repo)
    assert empty == state


def test_large_values_are_blobs(repo: Repository) -> None:
    state: dict[str, Any] = {"history": list(range(50_000)), "rng": np.arange(9)}
    dcpstore.save(state, repo)
    assert {e.fqn: e.kind for e in repo.entries()} == {"history": "blob", "rng": "value"}
    empty: dict[str, Any] = {"history": None, "rng": None}
    dcpstore.load(empty, repo)
    assert empty["history"] == state["history"]
    assert repo.read(None, ["history"]) == {"history": state["history"]}


def test_the_manifest_equals_the_catalog(repo: Repository) -> None:
    state = {"w": torch.randn(40, 3), "step": 7}
    dcpstore.save(state, repo)
    version = dcpstore.save({**state, "b": torch.randn(3)}, repo, step=5, tags=["t"])
    manifest = decode_manifest(repo.storage.get(manifest_key(version.uid)))
    assert isinstance(manifest, Manifest)
    assert (manifest.draft.uid, manifest.draft.step) == (version.uid, 5)
    assert manifest.stats.created_at == version.created_at
    held = PageReader(repo.storage).tree(manifest.root, manifest.page)
    _, content = load_content(repo.catalog, version.number)
    assert [entry for one in held.tree.sets for entry in one.entries] == content.entries
    chunks = {t.digest: list(t.chunks) for t in held.tensors}
    assert chunks == {t.digest: list(t.chunks) for t in content.tensors}
    assert sum(map(len, chunks.values())) == 2  # the chunk of the first version is listed too
    plan = decode_plan(repo.storage.get(manifest.plan))
    assert plan == load_plan(repo.catalog, version.number)


def objects(repo: Repository) -> set[str]:
    """Return the keys of what describes versions, without packs and journal."""
    folders = ("manifests", "pages", "plans")
    return {key for folder in folders for key in repo.storage.list(folder)}


def test_a_save_writes_two_objects_at_most_and_only_what_is_new(repo: Repository) -> None:
    state = {f"layer{i:03}": torch.tensor([float(i)]) for i in range(300)}
    first = dcpstore.save(state, repo)
    uid = first.uid
    assert objects(repo) == {f"manifests/{uid}.json", f"pages/{uid}.page", f"plans/{uid}.json"}
    before = objects(repo)
    same = dcpstore.save(state, repo)
    assert objects(repo) - before == {manifest_key(same.uid)}
    assert repo.storage.size(manifest_key(same.uid)) < 2000
    before = objects(repo)
    state["layer150"] += 1
    changed = dcpstore.save(state, repo)
    page = f"pages/{changed.uid}.page"
    assert objects(repo) - before == {manifest_key(changed.uid), page}
    assert repo.storage.size(page) < repo.storage.size(f"pages/{uid}.page") / 2
    assert_sound(repo)


def test_one_changed_chunk_of_a_large_tensor_writes_one_run(tmp_path: Path) -> None:
    large = torch.arange(200 * 8192).reshape(200, 8192)  # of 50 chunks, and so of 4 runs
    with dcpstore.open(tmp_path / "other", chunk=ChunkDefaults(nbytes=1 << 18)) as other:
        dcpstore.save({"large": large}, other)
        large[100, 0] = -1
        version = dcpstore.save({"large": large}, other)
        page = decode_page(
            other.storage.get(f"pages/{version.uid}.page"), f"pages/{version.uid}.page"
        )
        (tensor,) = page.tensors.values()
        assert len(tensor.runs) > 2
        assert len(page.runs) == 1
        assert_sound(other)


def test_versions_that_others_commit_at_the_same_time_share_one_page(
    repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"same": torch.randn(100), "step": 1}
    commit = committing.commit_save

    def commit_second(*args: Any) -> Any:
        monkeypatch.setattr(committing, "commit_save", commit)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: dcpstore.save(state, repo, branch="rival")).result()
        return commit(*args)

    monkeypatch.setattr(committing, "commit_save", commit_second)
    version = dcpstore.save(state, repo)
    rival = repo.show("rival")
    manifest = decode_manifest(repo.storage.get(manifest_key(version.uid)))
    assert isinstance(manifest, Manifest)
    assert manifest.page == f"pages/{rival.uid}.page"
    report = repo.gc()
    assert set(report.cleared) == {f"pages/{version.uid}.page", f"plans/{version.uid}.json"}
    assert_sound(repo)


def save_with_metrics(rank: int, place: Place) -> dict[str, float]:
    with place.open() as repo:
        metrics = {"loss": torch.tensor(float("nan")), "best": 1, "worst": float("inf")}
        return dict(dcpstore.save({}, repo, metrics=metrics, labels={"lr": 3e-4}).metrics)


def test_a_diverged_loss_does_not_stop_a_save(place: Place, two_ranks: RankPool) -> None:
    for metrics in two_ranks.run(save_with_metrics, place):
        assert math.isnan(metrics.pop("loss"))
        assert metrics == {"best": 1.0, "worst": math.inf}
    with place.open() as repo:
        assert repo.show().labels == {"lr": "0.0003"}


def save_on_two(rank: int, place: Place, shape: tuple[int, ...], scale: float) -> tuple[int, int]:
    with place.open() as repo:
        weight = torch.arange(640.0).reshape(64, 10)
        state = {
            "sharded": distribute_tensor(weight, mesh(shape), [Shard(0)]),
            "bias": distribute_tensor(torch.full((10,), scale), mesh(shape), [Replicate()]),
            "plain": torch.ones(100),
        }
        version = dcpstore.save(state, repo)
        return version.nbytes_written, version.ranks


def test_nothing_is_written_again_when_the_world_size_changes(
    place: Place, two_ranks: RankPool, four_ranks: RankPool
) -> None:
    everything = (640 + 10 + 100) * 4
    assert two_ranks.run(save_on_two, place, (2,), 1.0) == [(everything, 2)] * 2
    assert four_ranks.run(save_on_two, place, (4,), 1.0) == [(0, 4)] * 4
    assert four_ranks.run(save_on_two, place, (4,), 2.0) == [(40, 4)] * 4
    with place.open() as repo:
        alone = {"sharded": torch.zeros(64, 10), "bias": torch.zeros(10), "plain": torch.zeros(100)}
        dcpstore.load(alone, repo)
        assert torch.equal(alone["sharded"], torch.arange(640.0).reshape(64, 10))
        assert torch.equal(alone["bias"], torch.full((10,), 2.0))
        assert dcpstore.save(alone, repo).nbytes_written == 0


def save_replicas(rank: int, place: Place) -> None:
    with place.open() as repo:
        dcpstore.save({f"w{i}": torch.full((1000,), float(i)) for i in range(8)}, repo)


def test_replicas_are_written_once_and_spread_over_the_ranks(
    place: Place, four_ranks: RankPool
) -> None:
    four_ranks.run(save_replicas, place)
    with place.open() as repo:
        sizes = [row.nbytes for row in repo.sql("SELECT pack, nbytes FROM storage")]
        assert sizes == [8000] * 4


def save_in_part(rank: int, place: Place) -> str:
    """Ranks 0 and 1 of four save; the others make no call."""
    group = first_ranks(2)
    if rank > 1:
        return "no call"
    with place.open() as repo:
        return str(dcpstore.save({f"of{rank}": torch.ones(2)}, repo, process_group=group))


def test_a_sub_group_saves_and_ranks_may_hold_different_names(
    place: Place, four_ranks: RankPool
) -> None:
    assert four_ranks.run(save_in_part, place) == ["v1", "v1", "no call", "no call"]
    with place.open() as repo:
        assert [e.fqn for e in repo.entries()] == ["of0", "of1"]


def step_optimizer(rank: int, place: Place, ranks: int) -> None:
    """Save a stepped FSDP2-like optimizer, or load it into an optimizer that has taken no step."""
    torch.manual_seed(0)
    weight = torch.randn(8, 4)
    parameter = torch.nn.Parameter(distribute_tensor(weight, mesh((ranks,)), [Shard(0)]))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    with place.open() as repo:
        if not repo.log():
            torch.distributed.barrier()
            parameter.grad = distribute_tensor(weight * 2, mesh((ranks,)), [Shard(0)])
            optimizer.step()
            dcpstore.save({"optim": optimizer}, repo)
            return
        dcpstore.load({"optim": optimizer}, repo)
        kept = repo.read()
        state = optimizer.state[parameter]
        assert isinstance(state["exp_avg"], DTensor)
        assert state["exp_avg"].placements == (Shard(0),)
        assert torch.equal(state["exp_avg"].full_tensor(), kept["optim.state.0.exp_avg"])
        assert torch.equal(state["step"], kept["optim.state.0.step"])
        assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_new_optimizer_gets_state_sharded_like_its_parameters(
    place: Place, two_ranks: RankPool, four_ranks: RankPool
) -> None:
    place.open().close()
    two_ranks.run(step_optimizer, place, 2)
    four_ranks.run(step_optimizer, place, 4)
