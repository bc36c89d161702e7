"""`docs/parallelism.md` lists exactly the cases of the matrix."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from tests.parallel.layouts import Layout
from tests.parallel.test_matrix import CASES, RAW, Case

PAGE = Path(__file__).parent.parent.parent / "docs" / "parallelism.md"

KINDS = {
    "single": "one process",
    "DDP": "`DistributedDataParallel`: every rank holds everything",
    "FSDP1": "`FullyShardedDataParallel` with its sharded state",
    "FSDP1 full": "`FullyShardedDataParallel` with its full state (`full_state_dict=True`)",
    "FSDP2": "`fully_shard` over a mesh of one dimension",
    "HSDP": "`fully_shard` over a mesh of two: replicas of shards",
    "TP": "`parallelize_module`, columns and rows",
    "FSDP2+TP": "`fully_shard` over `parallelize_module`, on a mesh of two dimensions",
    "pipeline": "each rank holds other modules; optimizer state flattened",
    "expert": "each rank holds other experts, and all the dense part; optimizer state flattened",
}

HEAD = """# Every parallelism

A state saved under one parallelism loads under another. This page is written by
`tests/parallel/test_page.py` from the cases that `tests/parallel/test_matrix.py` runs on real gloo
ranks, with models whose sizes the ranks do not divide (some ranks hold nothing of a tensor).

In each case one job trains two steps and saves. Another job, with other parameters and another
learning rate, loads. Then the full parameters, buffers and optimizer state of the second are those
of the first, bit by bit. The losses of the next two steps are the same too, except that another
layout may add up sums in another order (1e-6). The same state goes through torch's
`FileSystemWriter` and `FileSystemReader`, through ours under `torch.distributed.checkpoint`, and
through `dcpstore.save` and `dcpstore.load`: each rank is given the same bits by all three.

States are those of `dcpstore.state_dict.get_state_dict`, which gives parameters the same names in
every parallelism:

```text
model, optim = get_state_dict(model, optimizer)
dcpstore.save({"model": model, "optim": optim}, "ckpts")
...
model_state, optim_state = get_state_dict(model, optimizer)
dcpstore.load(state := {"model": model_state, "optim": optim_state}, "ckpts")
set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
```
"""

NOTES = """
## What to know

- Where ranks hold other modules (pipelines, experts), pass
  `StateDictOptions(flatten_optimizer_state_dict=True)` on both sides. Without it every rank's
  `param_groups` have the same names but different contents, and one rank's would be saved for all.
- Torch's Adafactor takes no step on DTensors (FSDP2, HSDP, TP): it squares a pending norm in place.
  Its cases are those without DTensors.
- Torch's `load` leaves an optimizer that has taken no step yet empty when it is passed as it is;
  ours restores its state.
- A model on the meta device may be loaded as it is (its parameters are then new ones, so make the
  optimizer afterwards), or after `model.to_empty(device=...)`. Torch leaves such a model empty.
"""


def table(cases: Iterable[Case]) -> str:
    """Return the cases, one line a pair, with the optimizers tried."""
    optimizers: dict[tuple[Layout, Layout], list[str]] = {}
    for case in cases:
        optimizers.setdefault((case.saved, case.loaded), []).append(case.optimizer)
    lines = ["| saved under | ranks | loaded under | ranks | optimizer |", "|---|--:|---|--:|---|"]
    for (saved, loaded), names in optimizers.items():
        filled = f"{loaded.kind}, meta device" if loaded.meta else loaded.kind
        lines.append(
            f"| {saved.kind} | {saved.ranks} | {filled} | {loaded.ranks} | {', '.join(names)} |"
        )
    return "\n".join(lines) + "\n"


def test_the_page_lists_the_cases_of_the_matrix() -> None:
    assert KINDS.keys() == {c.saved.kind for c in CASES} | {c.loaded.kind for c in CASES}
    kinds = "\n".join(f"- **{name}**: {text}" for name, text in KINDS.items())
    page = f"{HEAD}\n{kinds}\n\n## The cases\n\n{table(CASES)}\n"
    page += (
        '## As they are\n\nSaved and loaded as `{"model": model, "optim": optimizer}`, into an '
        f"optimizer that has taken no step:\n\n{table(RAW)}{NOTES}"
    )
    if os.environ.get("DCPSTORE_WRITE_DOCS"):
        PAGE.write_text(page)
    assert PAGE.read_text() == page, "run 'make docs' and look at the difference"
