"""Train a small GPT on many ranks, and keep every checkpoint as a version of a repository.

    torchrun --standalone --nproc-per-node 2 examples/train_gpt.py --repo ckpts --steps 60
    torchrun --standalone --nproc-per-node 4 examples/train_gpt.py --repo ckpts --steps 90 \
        --resume main

What a batch holds follows from the step and the size of the global batch alone, never from the
number of ranks. A run that was stopped and resumed therefore sees the batches that it would have
seen: on as many ranks its losses are the same to the last bit, on other numbers of ranks they
differ only by the order in which floats are added.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.distributed as dist
from fingerprint import fingerprint
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

import dcpstore

VOCABULARY = 256  # the text is read byte by byte
WARM_UP = 10  # steps


class Block(nn.Module):
    """One transformer block: attention to what came before, then a small network."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the activations (batch, time, width) after this block."""
        batch, time, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, time, width))
        return x + self.mlp(self.norm2(x))


class Gpt(nn.Module):
    """A GPT over bytes."""

    def __init__(self, *, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.place = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits (batch, time, vocabulary) of the next byte."""
        x = self.embed(tokens) + self.place(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Data:
    """The help texts of Python; the last tenth is held out."""

    def __init__(self, args: argparse.Namespace) -> None:
        text = "\n".join(topics[name] for name in sorted(topics)).encode()
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        cut = len(tokens) * 9 // 10
        self.training, self.held_out = tokens[:cut], tokens[cut:]
        self.context, self.batch, self.seed = args.context, args.batch, args.seed

    def share(self, tokens: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this rank's share of the global batch of a step: bytes, and the bytes to come."""
        dice = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        starts = torch.randint(len(tokens) - self.context, (self.batch,), generator=dice)
        mine = starts.tensor_split(dist.get_world_size())[dist.get_rank()]
        windows = torch.stack([tokens[start : start + self.context + 1] for start in mine])
        return windows[:, :-1], windows[:, 1:]


def loss_of(model: nn.Module, share: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the mean loss over this rank's share of a batch."""
    tokens, following = share
    return functional.cross_entropy(model(tokens).flatten(0, 1), following.flatten())


def mean_over_ranks(loss: torch.Tensor) -> float:
    """Return the loss over the global batch, the same number on every rank."""
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def train(args: argparse.Namespace, repo: dcpstore.Repository) -> None:
    """Train from the beginning or from a version, saving as it goes."""
    torch.manual_seed(args.seed)  # every rank begins with the same weights
    model = Gpt(width=args.width, layers=args.layers, heads=args.heads, context=args.context)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / args.steps)) / 2,
    )
    data = Data(args)

    # All that a run is made of: the position in the data is the step.
    state: dict[str, Any] = {"model": model, "optim": optimizer, "schedule": schedule, "step": 0}
    last = resume(state, repo, args.resume) if args.resume else None
    saved: list[dcpstore.Version] = []

    for step in range(state["step"] + 1, (args.stop_after or args.steps) + 1):
        loss = loss_of(model, data.share(data.training, step))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        state["step"] = step
        if step % args.save_every and step != args.steps:
            continue

        train_loss = mean_over_ranks(loss)
        with torch.no_grad():
            val_loss = mean_over_ranks(loss_of(model, data.share(data.held_out, 0)))
        last = dcpstore.save(
            state,
            repo,
            branch=args.branch,
            parent=None if last is None else last.number,  # nobody else may move the branch
            step=step,
            message=f"val loss {val_loss:.4f}",
            metrics={"train_loss": train_loss, "val_loss": val_loss},
            labels={"lr": f"{args.lr:g}", "seed": str(args.seed), "sha256": fingerprint(state)},
        )
        saved.append(last)
        say(
            f"step {step:4}  train {train_loss:.4f}  val {val_loss:.4f}  saved {last}: "
            f"{last.nbytes:,} bytes, {last.nbytes_written:,} written"
        )

    if args.tag_best and saved and dist.get_rank() == 0:
        best = min(saved, key=lambda version: version.metrics["val_loss"])
        repo.tag(args.tag_best, best.number)  # a tag is for good, so it waits for the end
        say(f"tagged {best} {args.tag_best!r}: val loss {best.metrics['val_loss']:.4f}")


def resume(state: dict[str, Any], repo: dcpstore.Repository, ref: str) -> dcpstore.Version:
    """Fill the state from a version, and prove that it is the state that was saved."""
    report = dcpstore.load(state, repo, ref)
    version, found = report.version, fingerprint(state)
    if found != version.labels["sha256"]:
        raise SystemExit(f"{version} was saved as {version.labels['sha256']}, loaded as {found}")
    say(
        f"loaded {version} of step {version.step}, saved by {version.ranks} ranks, on "
        f"{dist.get_world_size()}: {report.chunks} chunks, every bit as saved (sha256 {found[:12]})"
    )
    return version


def say(text: str) -> None:
    """Print on one rank."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line, or of `words`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repo", required=True, help="a folder or a database URL")
    parser.add_argument("--branch", default="main", help="the branch that the versions extend")
    parser.add_argument("--resume", metavar="REF", help="begin at this version")
    parser.add_argument("--steps", type=int, default=60, help="of the whole run and its schedule")
    parser.add_argument("--stop-after", type=int, metavar="STEP", help="end the run early")
    parser.add_argument("--save-every", type=int, default=10, metavar="STEPS")
    parser.add_argument("--tag-best", metavar="TAG", help="name the version with the best val loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=16, help="windows of text, over all ranks")
    parser.add_argument("--context", type=int, default=64, help="bytes that the model looks back")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=4)
    return parser.parse_args(words)


def main() -> None:
    """Train as one of the ranks that torchrun started."""
    args = parse_arguments()
    torch.set_num_threads(1)  # how threads share a sum would change its last bits
    dist.init_process_group("gloo")
    try:
        if args.batch % dist.get_world_size():
            raise SystemExit(f"--batch {args.batch} does not divide by {dist.get_world_size()}")
        with dcpstore.open(args.repo) as repo:
            train(args, repo)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
