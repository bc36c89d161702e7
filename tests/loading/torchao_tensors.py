"""What makes tensors of torchao, of random content; torchao takes seconds to load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torchao import quantization as ao
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.optim.subclass_4bit import OptimState4bit
from torchao.optim.subclass_8bit import OptimState8bit
from torchao.optim.subclass_fp8 import OptimStateFp8
from torchao.quantization.quantize_.workflows.float8 import float8_tensor
from torchao.quantization.quantize_.workflows.int4 import (
    int4_plain_int32_tensor,
    int4_tensor,
    int4_tile_packed_to_4d_tensor,
)

Make = Callable[[torch.dtype], torch.Tensor]


def quantized(config: Any, dtype: torch.dtype) -> torch.Tensor:
    model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False).to(dtype))
    ao.quantize_(model, config)
    return model[0].weight


def packed(cls: type, dtype: torch.dtype, *sizes: int) -> torch.Tensor:
    """Return an int4 tensor, which only a GPU's kernels make of others."""
    data = torch.randint(0, 100, sizes).to(torch.int32 if len(sizes) > 2 else torch.uint8)
    blocks = [torch.randn(2, 32).to(dtype) for _ in range(1 if len(sizes) > 2 else 2)]
    return cls(data, *blocks, [1, 32], torch.Size([32, 64]))


def float8_training(dtype: torch.dtype) -> torch.Tensor:
    config = Float8LinearConfig(enable_fsdp_float8_all_gather=True, emulate=True)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False).to(dtype))
    return convert_to_float8_training(model, config=config)[0].weight


def state(cls: Any, dtype: torch.dtype) -> torch.Tensor:
    made = cls.zeros((64, 128), dtype=dtype)
    return made.copy_(torch.randn(64, 128))


def float8(dtype: torch.dtype) -> torch.Tensor:
    kwargs = float8_tensor.QuantizeTensorToFloat8Kwargs(granularity=ao.PerTensor())
    made: torch.Tensor = float8_tensor.Float8Tensor.from_hp(
        torch.randn(32, 64).to(dtype), act_quant_kwargs=kwargs
    )
    return made


_KINDS: dict[str, Make] = {
    "Int8Tensor": lambda d: quantized(ao.Int8DynamicActivationInt8WeightConfig(), d),
    "Int4Tensor": lambda d: packed(int4_tensor.Int4Tensor, d, 32, 32),
    "Int4PlainInt32Tensor": lambda d: packed(
        int4_plain_int32_tensor.Int4PlainInt32Tensor, d, 32, 8
    ),
    "Int4TilePackedTo4dTensor": lambda d: packed(
        int4_tile_packed_to_4d_tensor.Int4TilePackedTo4dTensor, d, 4, 4, 32, 4
    ),
    "IntxUnpackedToInt8Tensor": lambda d: quantized(ao.Int8DynamicActivationIntxWeightConfig(), d),
    "Float8Tensor": float8,
    "WeightWithDynamicFloat8CastTensor": float8_training,
    "OptimState8bit": lambda d: state(OptimState8bit, d),
    "OptimState4bit": lambda d: state(OptimState4bit, d),
    "OptimStateFp8": lambda d: state(OptimStateFp8, d),
}
MAKERS = {f"torchao {name}": make for name, make in _KINDS.items()}
