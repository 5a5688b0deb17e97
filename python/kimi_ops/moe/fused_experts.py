# SPDX-License-Identifier: MIT
"""The routed experts of one mixture-of-experts layer as one op."""

import torch
from torch import Tensor

from kimi_ops import _check
from kimi_ops.moe.grouped_gemm import grouped_gemm
from kimi_ops.moe.permute import check_ids, permute, permute_plan, unpermute
from kimi_ops.moe.quantized import QuantizedWeight
from kimi_ops.operators import fused_experts as _ops
from kimi_ops.operators.tensors import autocast
from kimi_ops.reference import fused_experts as reference

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
) -> Tensor:
    """Send every token through its experts and add their weighted outputs.

    ``y[t] = sum_k weights[t, k] * w_down[e] @ (act(gate) * up)`` with ``e = indices[t, k]`` and
    ``[gate; up] = w_gate_up[e] @ x[t]``.

    Parameters
    ----------
    x : Tensor [T, H] bfloat16, float16, float32 or float64
    w_gate_up : Tensor [E, 2F, H], the dtype of x
        The F gate rows first, then the F up rows. A `Fp8BlockWeight` or `Int4GroupWeight` of that
        shape is dequantised to the dtype of x (CPU only, read only; not beside float64 tokens).
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
    op = "fused_experts"
    if activation not in reference.ACTIVATIONS:
        raise ValueError(
            f"{op}: activation: expected one of {sorted(reference.ACTIVATIONS)}, got "
            f"{activation!r}; choose one of these"
        )
    for name, value in (("x", x), ("weights", weights), ("indices", indices)):
        _check.tensor(op, name, value)
    x = autocast(x)
    w_gate_up = w_gate_up if isinstance(w_gate_up, QuantizedWeight) else autocast(w_gate_up)
    w_down = w_down if isinstance(w_down, QuantizedWeight) else autocast(w_down)
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise TypeError(
            f"{op}: x: expected bfloat16, float16, float32 or float64, got {x.dtype}; convert it"
        )
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    arguments = {"w_gate_up": w_gate_up, "w_down": w_down, "weights": weights, "indices": indices}
    dtypes = {"w_gate_up": x.dtype, "w_down": x.dtype, "weights": wide, "indices": torch.int32}
    for name, tensor in arguments.items():
        if isinstance(tensor, QuantizedWeight):
            if x.dtype == torch.float64 or x.device.type != "cpu":
                raise TypeError(
                    f"{op}: {name}: expected a Tensor beside {x.dtype} tokens on {x.device}, got "
                    f"{type(tensor).__name__}; pass {name}.dequantize(x.dtype)"
                )
        elif tensor.dtype != dtypes[name]:
            raise TypeError(
                f"{op}: {name}: expected {dtypes[name]} beside {x.dtype} tokens, got "
                f"{tensor.dtype}; convert it"
            )
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name}: expected device {x.device}, got {tensor.device}")
    if x.dim() != 2:
        raise ValueError(f"{op}: x: expected shape [T, H], got {list(x.shape)}; flatten the batch")
    tokens, hidden = x.shape
    if len(w_gate_up.shape) != 3 or w_gate_up.shape[2] != hidden or w_gate_up.shape[1] % 2:
        raise ValueError(
            f"{op}: w_gate_up: expected shape [E, 2F, H={hidden}], got {list(w_gate_up.shape)}; "
            "stack gate rows over up rows"
        )
    experts, both, _ = w_gate_up.shape
    if list(w_down.shape) != [experts, hidden, both // 2]:
        raise ValueError(
            f"{op}: w_down: expected shape {[experts, hidden, both // 2]}, got "
            f"{list(w_down.shape)}; pass [E, H, F]"
        )
    if indices.dim() != 2 or indices.shape[0] != tokens or indices.shape[1] < 1:
        raise ValueError(
            f"{op}: indices: expected shape [T={tokens}, K >= 1], got {list(indices.shape)}"
        )
    if weights.shape != indices.shape:
        raise ValueError(
            f"{op}: weights: expected shape {list(indices.shape)}, got {list(weights.shape)}"
        )
    if not torch.compiler.is_compiling():  # there permute_plan refuses what is out of range
        check_ids(op, indices, experts)
    if x.dtype == torch.float64:
        assert isinstance(w_gate_up, Tensor) and isinstance(w_down, Tensor)
        return reference.fused_experts(x, w_gate_up, w_down, weights, indices, activation)
    plan = permute_plan(indices, experts)
    quantised = isinstance(w_gate_up, QuantizedWeight) or isinstance(w_down, QuantizedWeight)
    wanted = torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in (x, w_gate_up, w_down, weights)
    )
    if not (quantised and wanted):
        matrices, scales = zip(*map(_stored, (w_gate_up, w_down)), strict=True)
        y, _ = _ops.forward(
            x, *matrices, weights, plan.row_map, plan.source, plan.offsets, *scales, activation,
            wanted and not recompute,
        )  # fmt: skip
        return y
    rows = permute(x, plan)
    rows = grouped_gemm(rows, _transposed(w_gate_up), plan.offsets)
    rows = reference.gated_activation(rows, activation)
    rows = grouped_gemm(rows, _transposed(w_down), plan.offsets)
    return unpermute(rows, plan, weights)


def _stored(weight: Tensor | QuantizedWeight) -> tuple[Tensor, Tensor | None]:
    """The tensor of a weight as it lies, and the scale of a quantised one."""
    if isinstance(weight, Tensor):
        return weight, None
    data, scale = weight.tensors().values()
    return data, scale


def _transposed(weight: Tensor | QuantizedWeight) -> Tensor | QuantizedWeight:
    """The b of `grouped_gemm`; a quantised weight stands for its transpose already."""
    return weight if isinstance(weight, QuantizedWeight) else weight.transpose(1, 2)
