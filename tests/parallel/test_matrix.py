"""Every parallelism, saved under one and loaded under another: a covering set of pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import dcpstore
from tests.parallel import runs
from tests.parallel.layouts import OPTIMIZERS, Layout
from tests.parallel.runs import Half, Outcome
from tests.ranks import RankPool
from tests.soundness import assert_sound

SINGLE = Layout("single")
DDP2, DDP4 = Layout("DDP", 2), Layout("DDP", 4)
FSDP1_2, FSDP1_4 = Layout("FSDP1", 2), Layout("FSDP1", 4)
FULL2, FULL4 = Layout("FSDP1 full", 2), Layout("FSDP1 full", 4)
FSDP2_2, FSDP2_4 = Layout("FSDP2", 2), Layout("FSDP2", 4)
HSDP = Layout("HSDP", 4)
TP2, TP4 = Layout("TP", 2), Layout("TP", 4)
FSDP2_TP = Layout("FSDP2+TP", 4)
PIPE2, PIPE4 = Layout("pipeline", 2), Layout("pipeline", 4)
EXPERT2, EXPERT4 = Layout("expert", 2), Layout("expert", 4)
META, META_FSDP2, META_TP = (
    Layout("single", 1, meta=True),
    Layout("FSDP2", 4, meta=True),
    Layout("TP", 2, meta=True),
)


@dataclass(frozen=True)
class Case:
    saved: Layout
    loaded: Layout
    optimizer: str

    def __str__(self) -> str:
        return f"{self.saved}-{self.loaded}-{self.optimizer}".replace(" ", "_")

    def half(self, layout: Layout) -> Half:
        kinds = {self.saved.kind, self.loaded.kind}
        moe = "expert" in kinds
        return Half(layout, self.optimizer, moe=moe, flat=moe or "pipeline" in kinds)


STEPPERS = [name for name in OPTIMIZERS if name != "Adafactor"]
CASES = [
    *(Case(FSDP2_4, TP2, name) for name in STEPPERS),
    *(Case(DDP2, FSDP2_4, name) for name in STEPPERS),
    Case(SINGLE, DDP4, "AdamW"),
    Case(SINGLE, FSDP2_2, "SGD momentum"),
    Case(SINGLE, META, "AdamW"),
    Case(DDP4, SINGLE, "AdamW fused"),
    Case(DDP4, FSDP1_2, "AdamW"),
    Case(FSDP1_4, SINGLE, "AdamW foreach"),
    Case(FSDP1_4, FSDP1_2, "AdamW"),
    Case(FSDP1_2, FSDP2_4, "SGD momentum"),
    Case(FSDP1_4, TP2, "AdamW fused"),
    Case(FULL4, FSDP1_2, "AdamW"),
    Case(FULL2, TP4, "SGD momentum"),
    Case(FSDP2_4, FULL2, "AdamW foreach"),
    Case(HSDP, FULL4, "AdamW"),
    Case(FSDP2_4, FSDP2_2, "AdamW fused"),
    Case(FSDP2_2, HSDP, "AdamW"),
    Case(HSDP, FSDP2_2, "AdamW foreach"),
    Case(HSDP, TP2, "SGD momentum"),
    Case(TP4, HSDP, "AdamW fused"),
    Case(TP2, TP4, "AdamW"),
    Case(TP4, SINGLE, "AdamW foreach"),
    Case(TP2, FSDP1_4, "SGD momentum"),
    Case(TP2, FSDP2_TP, "AdamW"),
    Case(FSDP2_TP, TP2, "AdamW fused"),
    Case(FSDP2_TP, FSDP2_4, "AdamW"),
    Case(FSDP2_TP, SINGLE, "SGD momentum"),
    Case(FSDP2_4, FSDP2_TP, "AdamW foreach"),
    Case(PIPE4, PIPE2, "AdamW"),
    Case(PIPE2, FSDP2_4, "AdamW foreach"),
    Case(PIPE4, SINGLE, "SGD momentum"),
    Case(FSDP2_TP, PIPE2, "AdamW"),
    Case(FSDP1_2, PIPE4, "AdamW fused"),
    Case(EXPERT4, EXPERT2, "AdamW"),
    Case(EXPERT2, EXPERT4, "SGD momentum"),
    Case(EXPERT4, SINGLE, "AdamW foreach"),
    Case(FSDP2_4, EXPERT2, "AdamW fused"),
    Case(EXPERT2, FSDP2_4, "AdamW"),
    Case(FSDP2_4, META_TP, "AdamW"),
    Case(TP2, META_FSDP2, "AdamW foreach"),
    Case(DDP2, META, "SGD momentum"),
    Case(SINGLE, DDP4, "Adafactor"),
    Case(DDP4, SINGLE, "Adafactor"),
    Case(DDP2, PIPE4, "Adafactor"),
    Case(EXPERT4, EXPERT2, "Adafactor"),
]

# Saved and loaded as {"model": model, "optim": optimizer}, without the state-dict functions.
RAW = [
    Case(SINGLE, FSDP2_4, "AdamW"),
    Case(SINGLE, TP2, "SGD momentum"),
    Case(FSDP2_4, TP2, "AdamW fused"),
    Case(FSDP2_4, SINGLE, "AdamW foreach"),
    Case(TP2, FSDP2_2, "AdamW"),
    Case(TP4, SINGLE, "SGD momentum"),
    Case(DDP2, DDP4, "AdamW"),
]


def with_slow_marks(cases: Sequence[Case]) -> list[Any]:
    """Return the cases; a few cover each side and optimizer, and the others are marked slow.

    The few are chosen greedily: each time the case that covers most for the first time.
    """

    def shown(case: Case) -> set[tuple[str, str]]:
        sides = {("saved", case.saved.kind), ("loaded", case.loaded.kind)}
        return (sides | {("with", case.optimizer)}) - seen

    seen: set[tuple[str, str]] = set()
    quick = set()
    while shown(best := max(cases, key=lambda case: len(shown(case)))):
        seen |= shown(best)
        quick.add(best)
    return [
        pytest.param(case, id=str(case), marks=[] if case in quick else pytest.mark.slow)
        for case in cases
    ]


Run = Callable[..., Outcome]


@pytest.fixture(scope="module")
def run(two_ranks: RankPool, four_ranks: RankPool) -> Run:
    """Run one half of a case on as many ranks as its layout has."""

    def run(call: Callable[..., Outcome], half: Half, *args: object) -> Outcome:
        if half.layout.ranks == 1:
            return call(0, half, *args)
        pool = {2: two_ranks, 4: four_ranks}[half.layout.ranks]
        outcomes: list[Outcome] = pool.run(call, half, *args)
        assert all(one.whole == outcomes[0].whole for one in outcomes)
        return outcomes[0]

    return run


@pytest.fixture(scope="module")
def saved(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Half], object]:
    """Train and save a half, once for all cases that load it; return where, and what it was."""
    kept: dict[Half, tuple[Path, Outcome]] = {}

    def saved(half: Half) -> tuple[Path, Outcome]:
        if half not in kept:
            folder = tmp_path_factory.mktemp("saved")
            kept[half] = folder, run(runs.save, half, folder)
        return kept[half]

    return saved


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_saved_under_one_and_loaded_under_another(
    case: Case, run: Run, saved: Callable[[Half], tuple[Path, Outcome]]
) -> None:
    folder, before = saved(case.half(case.saved))
    after = run(runs.load, case.half(case.loaded), folder)
    assert_same(before, after)
    with dcpstore.open(folder / "save") as repo:
        assert_sound(repo)


@pytest.mark.parametrize("case", with_slow_marks(RAW))
def test_models_and_optimizers_as_they_are(case: Case, run: Run, tmp_path: Path) -> None:
    before = run(runs.save_raw, case.half(case.saved), tmp_path)
    assert_same(before, run(runs.load_raw, case.half(case.loaded), tmp_path, "save"))


def test_torch_leaves_a_new_optimizer_empty(run: Run, tmp_path: Path) -> None:
    """Torch loads what the new optimizer has state for, and that is nothing."""
    half = Half(SINGLE, "AdamW", moe=False, flat=False)
    before = run(runs.save_raw, half, tmp_path)
    after = run(runs.load_raw, half, tmp_path, "torch")
    lost = [fqn for fqn in before.whole if before.whole[fqn] != after.whole[fqn]]
    assert "optim.state.up.weight.exp_avg" in lost
    assert all(fqn.startswith("optim.state") for fqn in lost)
    assert_same(before, run(runs.load_raw, half, tmp_path, "save"))


def assert_same(before: Outcome, after: Outcome) -> None:
    """Check that the whole state is bit-equal, and the next losses equal but for rounding.

    Another layout adds the same numbers in another order (a product over split columns, a sum over
    ranks), so a loss may differ by some units in the last place of a float32 of about 1.
    """
    assert len(before.whole) > 20
    assert after.whole == before.whole
    assert after.losses == pytest.approx(before.losses, rel=1e-6)


def test_the_cases_cover_each_parallelism() -> None:
    for side in (Counter(c.saved.kind for c in CASES), Counter(c.loaded.kind for c in CASES)):
        assert min(side.values()) >= 2
        assert len(side) == 10
    for name in STEPPERS:
        pairs = {(c.saved.kind, c.loaded.kind) for c in CASES if c.optimizer == name}
        assert {("FSDP2", "TP"), ("DDP", "FSDP2")} <= pairs
