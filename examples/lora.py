"""Two LoRA adapters on one base model, which is stored once.

    python examples/lora.py --repo ckpts --adapter adapter_model.safetensors

The base is trained and saved on the branch `base`. Each adapter is trained on a branch that begins
there, and saves the whole model: every version loads by itself, yet only the adapter is written.
Then one adapter alone is exported, as a small file of safetensors.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import nn

import dcpstore
from dcpstore.convert import export_safetensors

WIDTH, RANK = 256, 4


class LoraLinear(nn.Linear):
    """A linear layer plus a product of two small matrices, which begins as zero."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.lora_down = nn.Parameter(torch.randn(RANK, inputs) / math.sqrt(inputs))
        self.lora_up = nn.Parameter(torch.zeros(outputs, RANK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output (..., outputs) for x (..., inputs)."""
        return super().forward(x) + x @ self.lora_down.T @ self.lora_up.T


def make_model() -> nn.Module:
    """Return an untrained model from a number to a number."""
    return nn.Sequential(
        nn.Linear(1, WIDTH), nn.Tanh(), LoraLinear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1)
    )


def train(model: nn.Module, task: str, *, adapter: bool) -> float:
    """Train the adapter alone, or all the rest; return the last loss."""
    function = {"base": torch.sin, "cos": torch.cos, "sign": torch.sign}[task]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(("lora" in name) is adapter)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    for _ in range(150):
        x = torch.rand(128, 1) * 4 - 2
        loss = nn.functional.mse_loss(model(x), function(x))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def main() -> None:
    """Train the base and its adapters, and show what each version cost."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repo", required=True, help="a folder or a database URL, new or empty")
    parser.add_argument("--adapter", required=True, help="a new file for one of the adapters")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = make_model()
    with dcpstore.open(args.repo) as repo:
        loss = train(model, "base", adapter=False)
        dcpstore.save({"model": model}, repo, branch="base", metrics={"loss": loss})
        for task in ("cos", "sign"):
            dcpstore.load({"model": model}, repo, "base")
            loss = train(model, task, adapter=True)
            dcpstore.save(
                {"model": model}, repo, branch=task, parent="base", metrics={"loss": loss}
            )

        for version in reversed(repo.log()):
            print(
                f"{version} on {version.branch}: loss {version.metrics['loss']:.4f}, "
                f"holds {version.nbytes:,} bytes, wrote {version.nbytes_written:,}"
            )
        diff = repo.diff("base", "cos")
        print(f"base to cos: changed {[entry.fqn for entry in diff.changed]}")

        # The adapter alone: as a file, and into a model that has the base.
        done = export_safetensors(repo, "cos", args.adapter, include=["*lora*"])
        print(f"the adapter as a file: {done.tensors} tensors, {done.nbytes:,} bytes")
        dcpstore.load({"model": model}, repo, "cos", include=["*lora*"])
        x = torch.tensor([[1.5]])
        print(f"cos(1.5) is {model(x).item():.2f}, says the base with the adapter of 'cos'")


if __name__ == "__main__":
    main()
