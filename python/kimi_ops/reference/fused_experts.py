# SPDX-License-Identifier: MIT
"""The routed experts of one layer: permute, gate/up, activation, down, unpermute."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_ops.reference.grouped_gemm import grouped_gemm
from kimi_ops.reference.permute import permute, permute_plan, unpermute

SITU_GATE_BOUND = 4.0
SITU_UP_BOUND = 25.0


def silu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def gelu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate) * up


def situ(gate: Tensor, up: Tensor) -> Tensor:
    """b1 tanh(gate / b1) sigmoid(gate) * b2 tanh(up / b2): both factors stay bounded."""
    bounded = SITU_GATE_BOUND * torch.tanh(gate / SITU_GATE_BOUND) * torch.sigmoid(gate)
    return bounded * (SITU_UP_BOUND * torch.tanh(up / SITU_UP_BOUND))


ACTIVATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "situ": situ,
}


def gated_activation(gate_up: Tensor, activation: str) -> Tensor:
    """[R, F] from [R, 2F]: one rounding, after the product in fp32 (fp64 for fp64)."""
    gate, up = gate_up.chunk(2, dim=-1)
    wide = torch.float64 if gate_up.dtype == torch.float64 else torch.float32
    return ACTIVATIONS[activation](gate.to(wide), up.to(wide)).to(gate_up.dtype)


def fused_experts(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    weights: Tensor,
    indices: Tensor,
    activation: str = "silu",
) -> Tensor:
    """y [T, H] = sum_k weights[t, k] * expert[indices[t, k]](x[t])."""
    plan = permute_plan(indices, w_gate_up.shape[0])
    rows = permute(x, plan)
    hidden = grouped_gemm(rows, w_gate_up.transpose(1, 2), plan.offsets)
    hidden = gated_activation(hidden, activation)
    y = grouped_gemm(hidden, w_down.transpose(1, 2), plan.offsets)
    return unpermute(y, plan, weights)
