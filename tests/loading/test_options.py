"""Loads that people need: parts, other names and dtypes, grown models, each rank's own."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dcpstore
from dcpstore import InvalidInputError, MismatchError, NotFoundError, PerRank, Repository
from tests.ranks import RankPool, first_ranks
from tests.soundness import Place


@pytest.fixture
def kept(repo: Repository) -> Repository:
    state = {
        "model": {"embed": torch.ones(4, 2), "head": torch.full((2,), 2.0)},
        "optim": {"lr": 0.1, "m": torch.full((3,), 3.0)},
    }
    dcpstore.save(state, repo)
    return repo


def zeros() -> dict[str, Any]:
    return {
        "model": {"embed": torch.zeros(4, 2), "head": torch.zeros(2)},
        "optim": {"lr": 0.0, "m": torch.zeros(3)},
    }


def test_include_and_exclude_select_by_glob(kept: Repository) -> None:
    state = zeros()
    report = dcpstore.load(state, kept, include=["model.*", "optim.lr"], exclude=["*.head"])
    assert torch.equal(state["model"]["embed"], torch.ones(4, 2))
    assert torch.equal(state["model"]["head"], torch.zeros(2))
    assert state["optim"]["lr"] == 0.1
    assert torch.equal(state["optim"]["m"], torch.zeros(3))
    assert report.unexpected == ("model.head", "optim.m")
    assert report.missing == ()


def test_a_name_stands_for_all_below_it(kept: Repository) -> None:
    state = zeros()
    report = dcpstore.load(state, kept, include=["model", "optim.m"], exclude=["model.head"])
    assert torch.equal(state["model"]["embed"], torch.ones(4, 2))
    assert torch.equal(state["optim"]["m"], torch.full((3,), 3.0))
    assert report.unexpected == ("model.head", "optim.lr")
    with pytest.raises(NotFoundError, match="'mod'"):  # a part of a name is not a name
        dcpstore.load(state, kept, include=["mod"])


MISSPELT: list[tuple[dict[str, Any], str]] = [
    ({"include": ["modle.*"]}, r"include= has 'modle\.\*'.* Did you mean 'model\.head'"),
    ({"include": ["model.*", "optm"]}, "include= has 'optm'"),
    ({"exclude": ["modle.*"]}, r"exclude= has 'modle\.\*'.* Did you mean 'model\.head'"),
    ({"exclude": ["modle.*"], "strict": False}, "exclude= has"),
    ({"exclude": ["modle.*"], "init_missing": lambda fqn, tensor: None}, "exclude= has"),
    (
        {"rename": {"model.9": "x"}},
        r"rename= maps 'model\.9' to 'x'.* no such entry\. Did you mean 'model\.",
    ),
    ({"rename": {"model.9": ["x"]}}, r"to \['x'\]: the state has no such FQN"),
    ({"rename": {9: "x"}}, "rename= maps 9 to 'x'"),
]


@pytest.mark.parametrize(("options", "message"), MISSPELT)
def test_a_name_that_names_nothing_is_refused(
    kept: Repository, options: dict[str, Any], message: str
) -> None:
    state = zeros()
    with pytest.raises(NotFoundError, match=message):
        dcpstore.load(state, kept, **options)
    assert torch.equal(state["model"]["embed"], torch.zeros(4, 2))
    (difference,) = dcpstore.load(state, kept, **options, dry_run=True).differences
    with pytest.raises(NotFoundError, match=re.escape(difference)):
        dcpstore.load(state, kept, **options)


def test_all_names_that_name_nothing_are_in_one_error(kept: Repository) -> None:
    with pytest.raises(NotFoundError) as caught:
        dcpstore.load(zeros(), kept, include=["a", "model"], exclude=["b"], rename={"c": "d"})
    assert [line.split(" ")[:3] for line in str(caught.value).splitlines()] == [
        ["include=", "has", "'a',"],
        ["exclude=", "has", "'b',"],
        ["rename=", "maps", "'c'"],
    ]


def test_names_of_new_layers_and_of_parts_left_out_are_taken(kept: Repository) -> None:
    state = {"model": {"head": torch.zeros(2), "extra": torch.full((3,), 9.0)}}
    dcpstore.load(state, kept, exclude=["*.extra", "optim"])
    assert torch.equal(state["model"]["extra"], torch.full((3,), 9.0))
    report = dcpstore.load(state, kept, include=["*.extra"], strict=False)
    assert report.missing == ("model.extra",)
    # of a larger model's names this state has some, and the version all that they map to
    rename = {"model.head": "model.head", "model.embedding": "model.embed"}
    dcpstore.load(state, kept, exclude=["*.extra"], rename=rename)
    assert torch.equal(state["model"]["head"], torch.full((2,), 2.0))


def stages(rank: int, place: Place, options: dict[str, Any]) -> tuple[str, float]:
    """Load two stages of a pipeline, of which each rank holds one; rank 1 has a new layer, too."""
    target = {"net": {f"stage{rank}": torch.zeros(2)}}
    if rank == 1:
        target["net"]["new"] = torch.zeros(2)
    with place.open() as repo:
        try:
            dcpstore.load({"net": target["net"]}, repo, strict=False, **options)
        except dcpstore.DcpstoreError as error:
            return f"{type(error).__name__}: {error}", 0.0
    return "", float(target["net"][f"stage{rank}"][0])


def test_a_rank_may_hold_nothing_of_what_is_named(place: Place, two_ranks: RankPool) -> None:
    with place.open() as repo:
        dcpstore.save({"old": {"stage0": torch.ones(2), "stage1": torch.ones(2)}}, repo)
    rename = {"net.stage0": "old.stage0", "net.stage1": "old.stage1"}
    accepted: list[dict[str, Any]] = [
        {"rename": rename},
        {"rename": rename, "include": ["net.stage0", "net.stage1"]},  # only in the states
        {"rename": rename, "exclude": ["net.new"]},  # only in that of rank 1
        {"rename": {**rename, "net.new": "old.new"}},
    ]
    for options in accepted:
        assert two_ranks.run(stages, place, options) == [("", 1.0)] * 2
    refused: list[tuple[dict[str, Any], str]] = [
        ({"rename": rename, "exclude": ["net.nwe"]}, "NotFoundError: exclude= has 'net.nwe'"),
        ({"rename": {**rename, "net.nwe": "old.new"}}, "NotFoundError: rename= maps 'net.nwe'"),
    ]
    for options, message in refused:
        first, second = two_ranks.run(stages, place, options)
        assert first == second
        assert first[0].startswith(message)


def stages_alone(rank: int, place: Place) -> float:
    """Save and load one stage a rank, each rank by itself, with the names of both stages."""
    with place.open() as repo:
        state = {"net": {f"stage{rank}": torch.ones(2)}}
        dcpstore.save(state, repo, branch="alone", use_collectives=False)
        target = {"net": {f"stage{rank}": torch.zeros(2)}}
        dist.barrier()
        dcpstore.load(target, repo, "alone", include=["net.stage0", "net.stage1"])
    return float(target["net"][f"stage{rank}"][0])


def test_ranks_that_load_their_own_versions_may_share_the_options(
    place: Place, two_ranks: RankPool
) -> None:
    place.open().close()
    assert two_ranks.run(stages_alone, place) == [1.0, 1.0]


@pytest.mark.parametrize(
    "rename",
    [
        {"net.w": "model.embed", "net.b": "model.head"},
        lambda fqn: {"net.w": "model.embed", "net.b": "model.head"}[fqn],
    ],
    ids=["mapping", "function"],
)
def test_rename_finds_other_names(kept: Repository, rename: Any) -> None:
    state = {"net": {"w": torch.zeros(4, 2), "b": torch.zeros(2)}}
    dcpstore.load(state, kept, rename=rename)
    assert torch.equal(state["net"]["w"], torch.ones(4, 2))
    assert torch.equal(state["net"]["b"], torch.full((2,), 2.0))


def test_without_strict_missing_items_stay_unchanged_and_are_reported(kept: Repository) -> None:
    state = {"model": {"embed": torch.zeros(4, 2), "hed": torch.full((1,), 9.0)}, "new": 5}
    report = dcpstore.load(state, kept, strict=False)
    assert report.missing == ("model.hed", "new")
    assert torch.equal(state["model"]["hed"], torch.full((1,), 9.0))
    assert state["new"] == 5
    with pytest.raises(MismatchError, match=r"'model.hed' is not in the version \(near"):
        dcpstore.load(state, kept)


def test_a_dtype_is_converted_only_on_request(kept: Repository) -> None:
    state = {"model": {"head": torch.zeros(2, dtype=torch.bfloat16)}}
    with pytest.raises(MismatchError, match="dtype"):
        dcpstore.load(state, kept)
    report = dcpstore.load(state, kept, on_dtype="cast")
    assert report.cast == ("model.head",)
    assert torch.equal(state["model"]["head"], torch.full((2,), 2.0, dtype=torch.bfloat16))


def test_new_parameters_are_initialised(kept: Repository) -> None:
    state = {"model": {"head": torch.zeros(2), "extra": torch.zeros(3)}}
    seen = []

    def start(fqn: str, tensor: torch.Tensor) -> None:
        seen.append(fqn)
        tensor.fill_(7)

    report = dcpstore.load(state, kept, init_missing=start)
    assert seen == list(report.missing) == ["model.extra"]
    assert torch.equal(state["model"]["extra"], torch.full((3,), 7.0))
    assert torch.equal(state["model"]["head"], torch.full((2,), 2.0))


def test_a_dry_run_reports_everything_and_changes_nothing(kept: Repository) -> None:
    state = zeros()
    report = dcpstore.load(state, kept, dry_run=True)
    assert (report.differences, report.missing, report.unexpected) == ((), (), ())
    assert (report.chunks, report.nbytes_read) == (3, 32 + 8 + 12)
    assert torch.equal(state["model"]["embed"], torch.zeros(4, 2))
    state["model"] = {"embed": torch.zeros(5), "haed": torch.zeros(2), "head": torch.zeros(2).int()}
    report = dcpstore.load(state, kept, dry_run=True)
    assert len(report.differences) == 3
    assert any(
        "'model.haed' is not in the version (near: 'model.head'" in d for d in report.differences
    )


MEANINGLESS: list[dict[str, Any]] = [
    {"include": "model.*"},
    {"on_dtype": "round"},
    {"rename": lambda fqn: 3},
    {"strict": False, "planner": dcpstore.DefaultLoadPlanner()},
]
# Each with a part of its message.
WRONG_TYPES: list[tuple[dict[str, Any], str]] = [
    ({"rename": 5}, "rename=5 is neither .*; pass a dict"),
    ({"rename": "model.*"}, r"rename='model\.\*' is neither"),
    ({"rename": [("a", "b")]}, "rename=.* is neither"),
    ({"include": 5}, r"include=5 is not a list; pass one of globs: \['model\.\*'\]"),
    ({"include": [5]}, "include holds 5, which is not text; pass globs"),
    ({"include": [None]}, "include holds None"),
    ({"include": iter(["model.*"])}, "include=<.* is not a list"),
    ({"exclude": 5}, "exclude=5 is not a list"),
    ({"exclude": True}, "exclude=True is not a list"),
    ({"exclude": [b"model.*"]}, "exclude holds b'model"),
    ({"strict": 0}, "strict=0; pass True or False"),
    ({"strict": None}, "strict=None; pass True or False"),
    ({"on_dtype": 5}, "on_dtype=5; write 'error' or 'cast'"),
    ({"on_dtype": None}, "on_dtype=None; write"),
    ({"on_dtype": torch.ones(2)}, "on_dtype=tensor.*; write"),
    ({"on_dtype": ["cast"]}, "on_dtype=.*; write"),
]


def test_invalid_options_are_refused(kept: Repository, subtests: pytest.Subtests) -> None:
    for options in MEANINGLESS:
        with subtests.test(options=[*options]), pytest.raises(InvalidInputError):
            dcpstore.load(zeros(), kept, **options)


def test_options_of_another_type_are_refused(kept: Repository, subtests: pytest.Subtests) -> None:
    for options, message in WRONG_TYPES:
        with subtests.test(message=message):
            with pytest.raises(InvalidInputError, match=message):
                dcpstore.LoadOptions(**options)
            state = zeros()
            with pytest.raises(InvalidInputError, match=message):
                dcpstore.load(state, kept, **options)
            assert torch.equal(state["model"]["embed"], torch.zeros(4, 2))


@pytest.mark.parametrize("globs", [["model.*"], ("model.*",), {"model.*"}, {"model.*": 1}])
def test_globs_may_be_in_any_collection(globs: Any) -> None:
    options = dcpstore.LoadOptions(include=globs, exclude=globs)
    assert not options.asks_for("model.w")
    assert dcpstore.LoadOptions(include=globs).asks_for("model.w")


def stepped(names: list[str], frozen: str | None = None) -> tuple[torch.nn.Module, Any]:
    torch.manual_seed(1)
    model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.ones(3)) for name in names})
    if frozen:
        model[frozen].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    sum((p * p).sum() for p in model.values() if p.requires_grad).backward()
    optimizer.step()
    return model, optimizer


def test_state_of_a_parameter_that_took_no_step_yet_is_restored(repo: Repository) -> None:
    model, optimizer = stepped(["a", "b"])
    dcpstore.save({"model": model, "optim": optimizer}, repo)
    frozen, other = stepped(["a", "b"], frozen="b")
    assert dcpstore.load({"model": frozen, "optim": other}, repo, dry_run=True).differences == ()
    assert len(other.state_dict()["state"]) == 1
    report = dcpstore.load({"model": frozen, "optim": other}, repo)
    assert (report.missing, report.unexpected) == ((), ())
    assert torch.equal(other.state[frozen["b"]]["exp_avg"], optimizer.state[model["b"]]["exp_avg"])


def test_state_that_a_setting_of_the_version_needs_is_restored(repo: Repository) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    jobs = [torch.optim.Adam([weight], amsgrad=amsgrad) for amsgrad in (True, False)]
    for optimizer in jobs:
        (weight**2).sum().backward()
        optimizer.step()
    dcpstore.save({"optim": jobs[0]}, repo)
    assert dcpstore.load({"optim": jobs[1]}, repo).unexpected == ()
    jobs[1].step()


def test_optimizer_state_is_restored_if_the_version_has_it(repo: Repository) -> None:
    model, optimizer = stepped(["a", "b"], frozen="b")
    dcpstore.save({"model": model, "optim": optimizer}, repo)
    thawed, fresh = stepped(["a", "b"])
    fresh.param_groups[0]["lr"] = 0.1
    own = fresh.state[thawed["b"]]["exp_avg"].clone()
    report = dcpstore.load({"model": thawed, "optim": fresh}, repo)
    assert report.missing == tuple(f"optim.state.1.{k}" for k in ("exp_avg", "exp_avg_sq", "step"))
    assert torch.equal(fresh.state[thawed["a"]]["exp_avg"], optimizer.state[model["a"]]["exp_avg"])
    assert torch.equal(fresh.state[thawed["b"]]["exp_avg"], own)
    assert fresh.param_groups[0]["lr"] == 0.5
    assert fresh.param_groups[0]["betas"] == (0.9, 0.999)


def keep_own(rank: int, place: Place, ranks: int, call: str) -> Any:
    group = first_ranks(ranks)
    if rank >= ranks:
        return None
    own = PerRank({"seed": rank if call == "save" else -1, "t": torch.full((2,), float(rank))})
    state: dict[str, Any] = {"w": torch.zeros(2), "rng": own, "deep": [{"n": PerRank(rank * 10)}]}
    with place.open() as repo:
        if call == "save":
            dcpstore.save(state, repo, process_group=group)
            return None
        own.value["t"].fill_(-1)
        report = dcpstore.load(state, repo, process_group=group)
    assert state["rng"] is own
    return own.value["seed"], own.value["t"].tolist(), report.missing, report.unexpected


def test_each_rank_gets_its_own_value_back(place: Place, four_ranks: RankPool) -> None:
    place.open().close()
    four_ranks.run(keep_own, place, 2, "save")
    same = four_ranks.run(keep_own, place, 2, "load")
    assert [answer[:2] for answer in same[:2]] == [(0, [0.0, 0.0]), (1, [1.0, 1.0])]
    fewer = four_ranks.run(keep_own, place, 1, "load")
    gone = ("deep.0.n.rank-1", "rng.rank-1.seed", "rng.rank-1.t")
    assert fewer[0] == (0, [0.0, 0.0], (), gone)
    more = four_ranks.run(keep_own, place, 4, "load")
    assert [answer[0] for answer in more] == [0, 1, -1, -1]
    assert more[3][2] == tuple(
        sorted(f"{name.replace('rank-1', f'rank-{r}')}" for name in gone for r in (2, 3))
    )


def disagree(rank: int, place: Place) -> str:
    with place.open() as repo:
        try:
            dcpstore.load({"w": torch.zeros(1)}, repo, dry_run=rank == 1)
        except InvalidInputError as error:
            return str(error)
    return "loaded"


def test_ranks_must_agree_on_a_dry_run(place: Place, two_ranks: RankPool) -> None:
    with place.open() as repo:
        dcpstore.save({"w": torch.ones(1)}, repo)
    first, second = two_ranks.run(disagree, place)
    assert first == second
    assert "dry_run" in first


def test_options_can_be_passed_to_the_callers_own_planner(kept: Repository) -> None:
    class Mine(dcpstore.DefaultLoadPlanner):
        """Counts what it commits."""

        committed = 0

        def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
            self.committed += 1

    planner = Mine(options=dcpstore.LoadOptions(include=["model.*"]))
    dcpstore.load(zeros(), kept, planner=planner)
    assert planner.committed == 2
