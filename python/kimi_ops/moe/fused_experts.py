# SPDX-License-Identifier: MIT
"""The routed experts of one mixture-of-experts layer as one op."""

import torch
from torch import Tensor

from kimi_ops import _native
from kimi_ops._autocast import autocast
from kimi_ops.moe.grouped_gemm import grouped_gemm
from kimi_ops.moe.permute import permute, permute_plan, unpermute
from kimi_ops.moe.quantized import QuantizedWeight
from kimi_ops.operators import fused_experts as operators
from kimi_ops.reference import fused_experts as reference
from kimi_ops.routing import PermutePlan

__all__ = ["fused_experts"]


def fused_experts(
    x: Tensor,
    w_gate_up: Tensor | QuantizedWeight,
    w_down: Tensor | QuantizedWeight,
    weights: Tensor,
    indices: Tensor,
    *,
    activation: str = "silu",
    recompute: bool = False,
    plan: PermutePlan | None = None,
) -> Tensor:
    """Send every token through its experts and add their weighted outputs.

    ``y[t] = sum_k weights[t, k] * w_down[e] @ (act(gate) * up)`` with ``e = indices[t, k]`` and
    ``[gate; up] = w_gate_up[e] @ x[t]``.

    Parameters
    ----------
    x : Tensor [T, H] bfloat16, float16, float32 or float64
    w_gate_up : Tensor [E, 2F, H], the dtype of x
        The F gate rows first, then the F up rows. A `Fp8BlockWeight` or `Int4GroupWeight` of that
        shape is dequantised to the dtype of x (CPU only, read only; not beside float64 tokens). On
        Hopper two `Fp8BlockWeight` meet x and h as `Fp8Rows` (no gradients; 16 divides H, 128 F).
    w_down : Tensor [E, H, F], the dtype of x, or quantised
    weights : Tensor [T, K] float32 (float64 beside float64 tokens)
    indices : Tensor [T, K] int32
        Experts of each token; -1 is a dropped slot and adds nothing.
    activation : {"silu", "gelu", "situ"}
        silu(g) * u; gelu(g) * u with the exact (erf) GELU; or SiTU,
        ``4 tanh(g / 4) sigmoid(g) * 25 tanh(u / 25)``, Kimi K3's bounded gate.
    recompute : bool
        False keeps ``[gate; up]`` [T * K, 2F] in the dtype of x for the backward. True keeps only
        the inputs and computes it again: a sixth product in the backward for 4 T K F bytes less.
    plan : PermutePlan, optional
        ``permute_plan(indices, E)``, where it is there already: from `gate_plan`. The CPU refuses
        one that leads out of memory; no device is asked whether it is that of the ids.

    Returns
    -------
    Tensor [T, H], the dtype of x

    Raises
    ------
    TypeError, ValueError
        Wrong dtype, shape, device or activation; an id outside -1 .. E - 1 (see `permute_plan`).

    Notes
    -----
    Differentiable in x, the router weights and matrices that are tensors. The activation and the
    weighted sum are computed in fp32 and rounded once. Under `torch.autocast` x and the experts'
    matrices are cast as those of `torch.mm` are. Cost: 6 T K F H operations.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops import fused_experts, topk_gate
    >>> x = torch.randn(5, 8)
    >>> gate = topk_gate(torch.randn(5, 4), 2)
    >>> w_gate_up, w_down = torch.randn(4, 12, 8), torch.randn(4, 8, 6)
    >>> fused_experts(x, w_gate_up, w_down, gate.weights, gate.indices).shape
    torch.Size([5, 8])
    """
    x, w_gate_up, w_down = autocast(x, w_gate_up, w_down)
    (gate_up, down), scales = zip(*map(_stored, (w_gate_up, w_down)), strict=True)
    tensors = (x, gate_up, down, weights, indices)
    quantised = gate_up is not w_gate_up or down is not w_down
    if plan is None and not torch.compiler.is_dynamo_compiling():
        result = _native.engine.eager.fused_experts(*tensors, *scales, activation, False)
        if type(result) is not int:
            return result[0]
        wanted = result == _native.GRADIENT
        if x.dtype == torch.float64 and result != _native.WATCHED:
            if wanted:
                _native.engine.fused_experts(*tensors, *scales, activation, False)  # checks
            return reference.fused_experts(*tensors, activation)
        if wanted and not quantised:
            return operators.Layer.apply(*tensors, activation, not recompute)
    if x.dtype == torch.float64:
        return reference.fused_experts(*tensors, activation)
    plan = permute_plan(indices, gate_up.shape[0]) if plan is None else plan
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors[:4])
    if quantised and wanted:
        rows = permute(x, plan)
        rows = grouped_gemm(rows, _transposed(w_gate_up), plan.offsets)
        rows = reference.gated_activation(rows, activation)
        rows = grouped_gemm(rows, _transposed(w_down), plan.offsets)
        return unpermute(rows, plan, weights)
    ids = plan.row_map, plan.source, plan.offsets
    save = wanted and not recompute
    return operators.fused_experts(*tensors[:4], *ids, *scales, activation, save)[0]


def _stored(weight: Tensor | QuantizedWeight) -> tuple[Tensor, Tensor | None]:
    """The tensor of a weight as it lies, and the scale of a quantised one."""
    if isinstance(weight, Tensor):
        return weight, None
    data, scale = weight.tensors().values()
    return data, scale


def _transposed(weight: Tensor | QuantizedWeight) -> Tensor | QuantizedWeight:
    """The b of `grouped_gemm`; a quantised weight stands for its transpose already."""
    return weight if isinstance(weight, QuantizedWeight) else weight.transpose(1, 2)
