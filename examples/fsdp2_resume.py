"""Sharded training (FSDP2) that resumes on any number of ranks.

    torchrun --standalone --nproc-per-node 2 examples/fsdp2_resume.py --repo ckpts --steps 10
    torchrun --standalone --nproc-per-node 3 examples/fsdp2_resume.py --repo ckpts --steps 20

Each rank holds a part of every parameter and saves that part alone. A load reads the chunks that
the new parts need; nothing is gathered on one rank. The batches depend on the step alone, so the
losses are those of a run that never stopped, but for the order in which floats are added.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import dcpstore

SAVE_EVERY = 5  # steps
GLOBAL_BATCH = 48  # rows, over all ranks


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this rank's part of the batch of a step: inputs (rows, 16), and labels (rows,)."""
    inputs = torch.randn(GLOBAL_BATCH, 16, generator=torch.Generator().manual_seed(step))
    labels = inputs[:, :4].argmax(dim=1)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    return inputs.tensor_split(ranks)[rank], labels.tensor_split(ranks)[rank]


def main() -> None:
    """Train up to `--steps`, as one of the ranks that torchrun starts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repo", required=True, help="a folder or a database URL")
    parser.add_argument("--steps", type=int, default=10, help="train up to this step")
    args = parser.parse_args()

    dist.init_process_group("gloo")  # "nccl" on GPUs, with a mesh of "cuda"
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 100), nn.GELU(), nn.Linear(100, 100), nn.Linear(100, 4))
    mesh = init_device_mesh("cpu", (ranks,))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = {"model": model, "optim": optimizer, "step": 0}

    with dcpstore.open(args.repo) as repo:
        if repo.log(limit=1):
            report = dcpstore.load(state, repo)
            if rank == 0:
                print(
                    f"resumed from step {state['step']} of {report.version.ranks} ranks, on "
                    f"{ranks}: {report.nbytes_read:,} bytes read in {report.chunks} chunks"
                )

        for step in range(state["step"] + 1, args.steps + 1):
            inputs, labels = batch(step)
            loss = nn.functional.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % SAVE_EVERY == 0:
                mean = loss.detach() / ranks
                dist.all_reduce(mean)
                state["step"] = step
                version = dcpstore.save(state, repo, step=step, metrics={"loss": mean})
                if rank == 0:
                    print(f"step {step}: loss {mean.item():.5f}, saved {version} on {ranks} ranks")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
