"""Data parallel training (DDP) that resumes on another number of ranks.

    torchrun --standalone --nproc-per-node 2 examples/ddp.py --repo ckpts --steps 20
    torchrun --standalone --nproc-per-node 3 examples/ddp.py --repo ckpts --steps 40

Every rank holds the whole model, so the state has the plain module, not its DDP wrapper: a version
then loads with DDP and without. What each rank has of its own, here its place in the data, goes
into `PerRank`. The losses are averaged over the ranks, so that all of them save the same metric.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dcpstore

SAVE_EVERY = 10  # steps


def batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this rank's part of a batch: inputs (32, 8), and their sums (32, 1)."""
    inputs = torch.randn(32, 8, generator=generator)
    return inputs, inputs.sum(dim=1, keepdim=True)


def main() -> None:
    """Train up to `--steps`, as one of the ranks that torchrun starts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repo", required=True, help="a folder or a database URL")
    parser.add_argument("--steps", type=int, default=20, help="train up to this step")
    args = parser.parse_args()

    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # every rank begins with the same weights
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1_000 + rank)  # every rank draws other data
    data_state = dcpstore.PerRank(generator.get_state())
    state = {"model": model, "optim": optimizer, "data": data_state, "step": 0}

    with dcpstore.open(args.repo) as repo:
        if repo.log(limit=1):
            report = dcpstore.load(state, repo)
            generator.set_state(data_state.value)
            if rank == 0:
                saved_by = report.version.ranks
                print(f"resumed from step {state['step']} of {saved_by} ranks, on {ranks}")
                print(f"ranks without data state of their own: {list(report.missing)}")

        for step in range(state["step"] + 1, args.steps + 1):
            inputs, sums = batch(generator)
            loss = nn.functional.mse_loss(wrapped(inputs), sums)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % SAVE_EVERY == 0:
                mean = loss.detach() / ranks
                dist.all_reduce(mean)
                state["step"], data_state.value = step, generator.get_state()
                version = dcpstore.save(state, repo, step=step, metrics={"loss": mean})
                if rank == 0:
                    print(f"step {step}: loss {mean.item():.4f}, saved {version} on {ranks} ranks")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
