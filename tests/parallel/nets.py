"""The models that the matrix trains: tiny, with sizes that the number of ranks does not divide."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

TOKENS = 11
WIDTH = 6
HIDDEN = 10
CLASSES = 5
EXPERTS = 4

PARTS: dict[str, Callable[[], nn.Module]] = {
    "embed": lambda: nn.Embedding(TOKENS, WIDTH),
    "up": lambda: nn.Linear(WIDTH, HIDDEN),
    "down": lambda: nn.Linear(HIDDEN, WIDTH),
    "head": lambda: nn.Linear(WIDTH, CLASSES),
}


class Net(nn.Module):
    """A chain of parts, or the parts of one pipeline stage."""

    def __init__(self, seed: int, parts: Iterable[str] = PARTS) -> None:
        super().__init__()
        for i, (name, make) in enumerate(PARTS.items()):
            if name in parts:
                torch.manual_seed(seed * 100 + i)
                self.add_module(name, make())
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1)
        for name, part in self.named_children():
            x = part(x)
            if name == "up":
                x = torch.relu(x)
        return x


class Experts(nn.Module):
    """A dense part that every rank holds, and the experts of one rank.

    The outputs of experts are not mixed; the loss is the sum over all experts of all ranks.
    """

    def __init__(self, seed: int, own: Iterable[int] = range(EXPERTS)) -> None:
        super().__init__()
        torch.manual_seed(seed * 100)
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.experts = nn.ModuleDict()
        for i in own:
            torch.manual_seed(seed * 100 + 1 + i)
            self.experts[str(i)] = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        return torch.stack([expert(x) for expert in self.experts.values()])


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens and targets of a step: the same on every rank."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, TOKENS, (8,), generator=generator)
    return tokens, torch.randn(8, CLASSES, generator=generator)
