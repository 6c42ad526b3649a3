"""4-bit linear layers whose weights ZeRO-3 can let go of between the forward and the backward pass."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit


# PEFT's DoRA knows it by this name (0.21.2, tuners/lora/dora.py, update_layer).
class Linear4bit(bitsandbytes.nn.Linear4bit):  # type: ignore[misc]
    """bitsandbytes' layer, whose backward pass looks at the parameter.

    Its own keeps the bytes that the parameter had in the forward pass (0.50.2, autograd/_functions.py, MatMul4Bit). To
    free a gathered weight ZeRO-3 gives the parameter other bytes (deepspeed 0.19.8, zero/partition_parameters.py,
    free_param), so that a worker would hold the whole base model at the end of each forward pass.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The same product."""
        product: torch.Tensor = _Product.apply(x, self.weight, self)  # type: ignore[no-untyped-call]
        return product


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.nn.Parameter, layer: Linear4bit) -> torch.Tensor:
        # autograd keeps a leaf as itself, and not its bytes.
        ctx.save_for_backward(weight)
        ctx.layer = layer
        product: torch.Tensor = bitsandbytes.nn.Linear4bit.forward(layer, x)
        return product

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,), (weight,), dtype = gradients, ctx.saved_tensors, ctx.layer.compute_dtype
        whole = dequantize_4bit(weight, ctx.layer.weight.quant_state).to(dtype)
        return (gradient.to(dtype) @ whole).to(gradient.dtype), None, None
