"""Linear layers on the CPU, up to three times as fast for the few rows of a decoding step.

For x of n rows, `torch.nn.Linear` asks the matrix library for x W^T with n rows. Where n is small, the libraries are far from
what the processor can do; (W x^T)^T is the same sum of the same float32 products with the long side first, at 1.2 to 3.6 times
the speed for 2 to 4 rows, and for the output layer, whose W is by far the largest, at 1.1 to 4.7 times for 2 to 32
(`benchmarks/bench_linear.py`). Above that it is no faster, and torch's own form runs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["CpuLinear", "speed_up_linears"]

MOST_ROWS, MOST_ROWS_WIDE = 4, 32
WIDE = 1 << 15  # outputs


class CpuLinear(nn.Linear):
    """`nn.Linear` with the product turned round: few rows of float32 on the CPU, weights frozen, not compiled."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        rows = input.numel() // max(1, input.shape[-1])
        if (
            not 2 <= rows <= (MOST_ROWS if self.out_features < WIDE else MOST_ROWS_WIDE)
            or input.device.type != "cpu"
            or input.dtype != torch.float32
            or self.weight.dtype != torch.float32
            or (torch.is_grad_enabled() and self.weight.requires_grad)
            or torch.compiler.is_compiling()
        ):
            return super().forward(input)
        turned = input.reshape(rows, -1).t()
        bias = self.bias
        made = self.weight @ turned if bias is None else torch.addmm(bias[:, None], self.weight, turned)
        return made.t().contiguous().view(*input.shape[:-1], self.out_features)


def speed_up_linears(model: nn.Module) -> int:
    """Make the float32 `nn.Linear` layers of `model` that lie on the CPU `CpuLinear`, in place; how many they were.

    Parameters, names and state_dict stay. Subclasses of `nn.Linear` (adapters, quantised layers) are left alone.
    """
    count = 0
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32:
            module.__class__ = CpuLinear
            count += 1
    return count
