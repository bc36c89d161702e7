"""The bf16 state, with the statistics of weights that were really trained.

How it is made: `examples/train_gpt.py` trains its small GPT (one process, some hundred steps of
AdamW in fp32, on the help texts of Python), once, and the bench folder keeps the repository. Each
tensor of GPT-2 small, and each of its moments, is then filled by bootstrap: drawn with replacement,
by a fixed seed, from the values of the trained tensor of the same role, and rounded to bf16.
So signs, exponents and mantissas are spread as training spreads them, tensor by tensor, while no
two chunks are alike and no run of values repeats: neither dedupe nor a codec's dictionary finds
anything that a real state would not have. What is lost is any order among neighbours, which could
only have helped a codec. A finite sample makes the entropy of small tensors look a little smaller
than it is, by under one part in a hundred.

GPT-2's embedding is also its output layer, so gradients reach every row of it. The example has two
tensors for these, and many bytes never occur in its text, which leaves exact zeros in the moments
of its embedding; GPT-2's embedding is therefore drawn from the example's output layer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import dcpstore
from benchmarks.scale import Scale
from benchmarks.states import MOMENTS, State, gpt_shapes

__all__ = ["trained_gpt"]

_EXAMPLE = Path(__file__).parent.parent / "examples" / "train_gpt.py"
_LAYERS = 3
_PATIENCE = 900  # seconds for the training

# A parameter of GPT-2's block, and the one of the example's block that has the same role, in the
# order in which the example's optimizer counts them.
_ROLES = {
    "ln_1.weight": "norm1.weight",
    "ln_1.bias": "norm1.bias",
    "ln_2.weight": "norm2.weight",
    "ln_2.bias": "norm2.bias",
    "attn.c_attn.weight": "qkv.weight",
    "attn.c_attn.bias": "qkv.bias",
    "attn.c_proj.weight": "out.weight",
    "attn.c_proj.bias": "out.bias",
    "mlp.c_fc.weight": "mlp.0.weight",
    "mlp.c_fc.bias": "mlp.0.bias",
    "mlp.c_proj.weight": "mlp.2.weight",
    "mlp.c_proj.bias": "mlp.2.bias",
}
_BEFORE_BLOCKS, _NORM = 2, 2  # parameters of the embeddings, and of the last norm


def trained_gpt(scale: Scale, folder: Path, say: Callable[[str], None]) -> State:
    """Return the bf16 state; the first call in a folder trains."""
    place = folder / f"trained-{scale.training_steps}"
    done = place / "done"
    if not done.exists():
        say(f"training {_EXAMPLE.name} for {scale.training_steps} steps")
        shutil.rmtree(place, ignore_errors=True)
        _train(place, scale.training_steps)
        done.touch()
    with dcpstore.open(place / "repository", create=False) as repo:
        trained = repo.read("main")
    dice = torch.Generator().manual_seed(3)
    state = {}
    for name, shape in gpt_shapes(scale).items():
        role, place_in_optimizer = _role(name, scale)
        weight = trained[f"model.{role}"]
        state[f"model.{name}"] = _drawn(weight, shape, dice)
        for moment in MOMENTS:
            source = trained[f"optim.state.{place_in_optimizer}.{moment}"]
            assert source.shape == weight.shape, f"{role} is not where the optimizer counts it"
            state[f"optim.{name}.{moment}"] = _drawn(source, shape, dice)
    return state


def _train(place: Path, steps: int) -> None:
    """Run the example as the only rank, on a port of the system's choice."""
    command = [sys.executable, str(_EXAMPLE), "--repo", str(place / "repository")]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    done = subprocess.run(
        [*command, "--steps", str(steps), "--save-every", str(steps)],
        env={**os.environ, **alone},
        capture_output=True,
        text=True,
        timeout=_PATIENCE,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{_EXAMPLE.name} failed:\n{done.stderr}")


def _role(name: str, scale: Scale) -> tuple[str, int]:
    """Return the example's parameter for one of GPT-2's, and its place in the optimizer."""
    if name == "wte.weight":
        return "head.weight", _BEFORE_BLOCKS + _LAYERS * len(_ROLES) + _NORM
    if name == "wpe.weight":
        return "place.weight", 1
    _, layer, role = name.split(".", 2)
    block = int(layer) * _LAYERS // scale.layers
    place = _BEFORE_BLOCKS + block * len(_ROLES) + list(_ROLES).index(role)
    return f"blocks.{block}.{_ROLES[role]}", place


def _drawn(source: torch.Tensor, shape: tuple[int, ...], dice: torch.Generator) -> torch.Tensor:
    drawn = torch.randint(source.numel(), shape, generator=dice, dtype=torch.int32)
    return source.flatten().bfloat16()[drawn]
