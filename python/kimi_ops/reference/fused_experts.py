# SPDX-License-Identifier: MIT
"""The routed experts of one layer: permute, gate/up, activation, down, unpermute."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_ops.activations import Activation, of
from kimi_ops.reference.grouped_gemm import expert_of_row, grouped_gemm
from kimi_ops.reference.permute import permute, permute_plan, unpermute

Factors = tuple[Tensor, Tensor]  # h is their product; without a gate it is the first one


def silu(gate: Tensor, up: Tensor) -> Factors:
    return F.silu(gate), up


def gelu(gate: Tensor, up: Tensor) -> Factors:
    return F.gelu(gate), up


def gelu_tanh(gate: Tensor, up: Tensor) -> Factors:
    return F.gelu(gate, approximate="tanh"), up


def relu2(gate: Tensor, up: Tensor) -> Factors:
    return F.relu(gate).square(), up


def situ(gate: Tensor, up: Tensor, gate_bound: float, up_bound: float) -> Factors:
    """Both factors stay bounded."""
    bounded = gate_bound * torch.tanh(gate / gate_bound) * torch.sigmoid(gate)
    return bounded, up if up_bound == float("inf") else up_bound * torch.tanh(up / up_bound)


def swiglu(
    gate: Tensor, up: Tensor, alpha: float, shift: float, gate_limit: float, silu_limit: float,
    up_limit: float,
) -> Factors:  # fmt: skip
    gate = gate.clamp(max=gate_limit)
    value = (gate * torch.sigmoid(alpha * gate)).clamp(max=silu_limit)
    return value, up.clamp(min=-up_limit, max=up_limit) + shift


ACTIVATIONS: dict[str, Callable[..., Factors]] = {
    "silu": silu,
    "gelu": gelu,
    "situ": situ,
    "gelu_tanh": gelu_tanh,
    "relu2": relu2,
    "swiglu": swiglu,
}


def activate(
    gate: Tensor, up: Tensor | None, activation: str | Activation, weights: Tensor | None = None
) -> Tensor:
    """h [R, F] from gate and up, or from gate alone, times weights [R] where there are any: one
    rounding, after all products in fp32 (fp64 for fp64)."""
    form = of(activation)
    wide = torch.float64 if gate.dtype == torch.float64 else torch.float32
    g, u = gate.to(wide), gate.to(wide) if up is None else up.to(wide)
    value = ACTIVATIONS[form.name](g, u, *form.numbers)[0] if up is None else gated(g, u, form)
    if weights is not None:
        value = value * weights[:, None].to(wide)
    return value.to(gate.dtype)


def gated(gate: Tensor, up: Tensor, activation: str | Activation) -> Tensor:
    """h in the dtype of gate and up, by torch's own functions."""
    form = of(activation)
    first, second = ACTIVATIONS[form.name](gate, up, *form.numbers)
    return first * second


def fused_experts(
    x: Tensor,
    w_gate_up: Tensor | tuple[Tensor, Tensor],
    w_down: Tensor,
    weights: Tensor,
    indices: Tensor,
    activation: str | Activation = "silu",
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    weights_first: bool = False,
) -> Tensor:
    """y [T, H] = sum_k weights[t, k] * expert[indices[t, k]](x[t])."""
    form = of(activation)
    both = w_gate_up if isinstance(w_gate_up, Tensor) else torch.cat(w_gate_up, dim=1)
    plan = permute_plan(indices, both.shape[0])
    rows = permute(x, plan)
    sums = grouped_gemm(rows, both.transpose(1, 2), plan.offsets, b_gate_up)
    gate, up = sums.chunk(2, dim=-1) if form.gated else (sums, None)
    of_rows = weights.flatten()[plan.source.clamp(min=0).long()] if weights_first else None
    hidden = activate(gate, up, form, of_rows)
    if of_rows is None:
        y = grouped_gemm(hidden, w_down.transpose(1, 2), plan.offsets, b_down)
        return unpermute(y, plan, weights)
    y = grouped_gemm(hidden, w_down.transpose(1, 2), plan.offsets)
    if b_down is not None:
        experts = expert_of_row(y.shape[0], plan.offsets)
        y = (y + of_rows[:, None] * b_down[experts]).to(y.dtype)
    return unpermute(y, plan)
