"""The history of a repository as data frames: which run was best, and what became of it.

    pip install pandas
    python examples/history_in_pandas.py --repo ckpts

Trains three short runs with different learning rates, each on a branch, if the repository is empty.
A row of `repo.sql` becomes a dict by `dict(row)`, so a list of rows becomes a data frame.
"""

from __future__ import annotations

import argparse

import pandas as pd
import torch
from torch import nn

import dcpstore


def frame(repo: dcpstore.Repository, query: str, **params: object) -> pd.DataFrame:
    """Return the rows of a query as a data frame."""
    return pd.DataFrame([dict(row) for row in repo.sql(query, **params)])


def train(repo: dcpstore.Repository, rate: float) -> None:
    """Save a version every 10 steps, on a branch that is named after the learning rate."""
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    target = torch.arange(8.0)
    for step in range(1, 41):
        x = torch.randn(64, 8)
        loss = nn.functional.mse_loss(model(x).squeeze(1), x @ target + torch.randn(64))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            dcpstore.save(
                {"model": model, "optim": optimizer},
                repo,
                branch=f"lr-{rate:g}",
                step=step,
                metrics={"loss": loss.item()},
                labels={"lr": rate},
            )


def main() -> None:
    """Print what the history says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repo", required=True, help="a folder or a database URL")
    args = parser.parse_args()

    with dcpstore.open(args.repo) as repo:
        if not repo.log(limit=1):
            for rate in (0.01, 0.1, 0.7):
                train(repo, rate)

        history = frame(
            repo,
            """SELECT version, branch, step, value AS loss
               FROM history JOIN metrics USING (version) WHERE name = :metric ORDER BY version""",
            metric="loss",
        )
        print("The loss of each run, by step:")
        print(history.pivot(index="step", columns="branch", values="loss").round(3).to_string())
        best = history.loc[history["loss"].idxmin()]
        print(f"\nBest: v{best['version']} on {best['branch']}, loss {best['loss']:.4f}")

        rates = frame(repo, "SELECT version, CAST(value AS REAL) AS lr FROM labels WHERE name='lr'")
        by_rate = history.merge(rates, on="version").groupby("lr")["loss"].min()
        print("\nThe least loss by learning rate:")
        print(by_rate.round(3).to_string())


if __name__ == "__main__":
    main()
