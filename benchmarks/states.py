"""The states that workloads save: GPT-2 small with Adam in fp32, and very many small tensors.

A state is flat, FQN to tensor, for that is what every peer takes. Values are random, so that no two
chunks are alike and no codec shrinks them by luck; the bf16 state comes from `trained`.
"""

from __future__ import annotations

import torch

from benchmarks.scale import Scale

__all__ = ["MOMENTS", "State", "gpt_shapes", "layer_of", "nbytes_of", "random_gpt", "random_small"]

State = dict[str, torch.Tensor]

MOMENTS = ("exp_avg", "exp_avg_sq")


def gpt_shapes(scale: Scale) -> dict[str, tuple[int, ...]]:
    """Return the shapes of GPT-2's parameters by name; 146 of them at full scale.

    The two of the last norm, 6 KB, are left out: with Adam's moments these are the 438 tensors that
    the targets speak of.
    """
    width = scale.width
    block = {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "attn.c_attn.weight": (width, 3 * width),
        "attn.c_attn.bias": (3 * width,),
        "attn.c_proj.weight": (width, width),
        "attn.c_proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "mlp.c_fc.weight": (width, 4 * width),
        "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (4 * width, width),
        "mlp.c_proj.bias": (width,),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (scale.vocabulary, width),
        "wpe.weight": (scale.context, width),
    }
    for layer in range(scale.layers):
        shapes |= {f"h.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


def random_gpt(scale: Scale) -> State:
    """Return fp32 parameters and both moments of Adam, of about the size that training gives."""
    dice = torch.Generator().manual_seed(1)
    state = {}
    for name, shape in gpt_shapes(scale).items():
        state[f"model.{name}"] = torch.empty(shape).normal_(0, 0.02, generator=dice)
        for moment in MOMENTS:
            state[f"optim.{name}.{moment}"] = torch.empty(shape).normal_(0, 1e-3, generator=dice)
        state[f"optim.{name}.exp_avg_sq"].square_()
    return state


def random_small(scale: Scale) -> State:
    """Return very many small tensors."""
    dice = torch.Generator().manual_seed(2)
    return {
        f"small.{i:05}": torch.randn(scale.small_elements, generator=dice)
        for i in range(scale.small_tensors)
    }


def layer_of(state: State, layer: int) -> State:
    """Return the parameters and moments of one transformer block of a state."""
    return {fqn: tensor for fqn, tensor in state.items() if f".h.{layer}." in fqn}


def nbytes_of(state: State) -> int:
    """Return the bytes of all tensors."""
    return sum(tensor.nbytes for tensor in state.values())
