"""Evaluate versions after the run, find the best one, and hand its weights on.

    python examples/evaluate_and_export.py --repo ckpts --out out

Trains a small classifier first, if the repository is empty. Then it evaluates each version on held
out data without the optimizer in memory, adds the accuracy to the version, tags the best one, and
writes its weights alone: as a file of safetensors, and as one of `torch.save`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

import dcpstore
from dcpstore.convert import export_safetensors, export_torch


def make_model() -> nn.Module:
    """Return an untrained model."""
    return nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))


def data(seed: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noisy points (size, 2) on two spirals, and which spiral each is on."""
    dice = torch.Generator().manual_seed(seed)
    turn = torch.rand(size, generator=dice) * 5 + 1
    label = torch.randint(2, (size,), generator=dice)
    angle = turn + label * torch.pi
    points = torch.stack([angle.cos(), angle.sin()], dim=1) * turn[:, None] / 3
    return points + torch.randn(size, 2, generator=dice) / 4, label


def train(repo: dcpstore.Repository) -> None:
    """Save a version every 50 steps."""
    torch.manual_seed(0)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for step in range(1, 301):
        points, label = data(step, 256)
        nn.functional.cross_entropy(model(points), label).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            dcpstore.save({"model": model, "optim": optimizer}, repo, step=step)


def main() -> None:
    """Evaluate and export."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repo", required=True, help="a folder or a database URL")
    parser.add_argument("--out", required=True, type=Path, help="a folder for the exported files")
    args = parser.parse_args()

    with dcpstore.open(args.repo) as repo:
        if not repo.log(limit=1):
            train(repo)

        model = make_model()
        points, label = data(seed=0, size=2_000)  # held out
        for version in reversed(repo.log()):
            # The state has the model alone, so nothing of the optimizer is read.
            dcpstore.load({"model": model}, repo, version)
            with torch.no_grad():
                accuracy = (model(points).argmax(dim=1) == label).float().mean().item()
            repo.add_metrics(version, {"accuracy": accuracy})
            print(f"{version} of step {version.step}: accuracy {accuracy:.3f}")
        best = repo.best("accuracy", mode="max")
        repo.tag("best", best, move=True)
        print(f"tagged {best} as 'best'")

        args.out.mkdir(parents=True, exist_ok=True)
        file = args.out / "model.safetensors"
        for export, path in ((export_safetensors, file), (export_torch, args.out / "model.pt")):
            done = export(repo, "best", path, include=["model"], strip_prefix="model.")
            print(f"exported {done.tensors} tensors, {done.nbytes:,} bytes, to {path.name}")

    fresh = make_model()
    fresh.load_state_dict(load_file(file))
    with torch.no_grad():
        accuracy = (fresh(points).argmax(dim=1) == label).float().mean().item()
    print(f"accuracy of the exported file: {accuracy:.3f}")


if __name__ == "__main__":
    main()
