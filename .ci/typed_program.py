"""A user's program, as short as one can be: it must run, and pass mypy's strict checks as it is."""

import torch

import dcpstore

model = torch.nn.Linear(3, 2)
optim = torch.optim.AdamW(model.parameters())
with dcpstore.open("ckpts") as repo:
    version: dcpstore.Version = dcpstore.save(
        {"model": model, "optim": optim, "step": 1}, repo, step=1, metrics={"loss": 0.5}
    )
    report: dcpstore.LoadReport = dcpstore.load({"model": model, "optim": optim}, repo)
    best = repo.best("loss")
    pending = dcpstore.async_save({"model": model}, repo, branch="try")
    newer: dcpstore.Version = pending.result()
    changed = [entry.fqn for entry in repo.diff(version.number, newer.number).changed]
    try:
        repo.show("no-such-ref")
    except dcpstore.NotFoundError as error:
        kind: str = error.kind
    weight: torch.Tensor = repo.read("main", ["model.weight"])["model.weight"]
print(report.version.number, best.metrics["loss"], changed, kind, tuple(weight.shape))
