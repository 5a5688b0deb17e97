# SPDX-License-Identifier: MIT
"""The routed experts of one mixture-of-experts layer as one op."""

from typing import Any

import torch
from torch import Tensor

from kimi_ops import _check, _native
from kimi_ops._autocast import autocast
from kimi_ops.activations import Activation, ActivationName, of
from kimi_ops.moe.grouped_gemm import grouped_gemm
from kimi_ops.moe.permute import permute, permute_plan, permute_weights, unpermute
from kimi_ops.moe.quantized import QuantizedWeight
from kimi_ops.operators import fused_experts as operators
from kimi_ops.operators.count_once import seen_by_a_graph
from kimi_ops.reference import fused_experts as reference
from kimi_ops.reference.grouped_gemm import expert_of_row
from kimi_ops.routing import PermutePlan

__all__ = ["fused_experts", "join_gate_up_"]

Weight = Tensor | QuantizedWeight


def fused_experts(
    x: Tensor,
    w_gate_up: Weight | tuple[Tensor, Tensor],
    w_down: Weight,
    weights: Tensor,
    indices: Tensor,
    *,
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: ActivationName | Activation = "silu",
    weights_first: bool = False,
    recompute: bool = False,
    plan: PermutePlan | None = None,
) -> Tensor:
    """Send every token through its experts and add their weighted outputs.

    ``y[t] = sum_k weights[t, k] * (w_down[e] @ act(gate, up) + b_down[e])`` with
    ``e = indices[t, k]`` and ``[gate; up] = w_gate_up[e] @ x[t] + b_gate_up[e]``.

    Parameters
    ----------
    x : Tensor [T, H] bfloat16, float16, float32 or float64
    w_gate_up : Tensor [E, 2F, H], the dtype of x
        The F gate rows first, then the F up rows. A `Fp8BlockWeight` or `Int4GroupWeight` of that
        shape is dequantised to the dtype of x (CPU only, read only; not beside float64 tokens). On
        Hopper two `Fp8BlockWeight` meet x and h as `Fp8Rows` (16 divides H, 128 F; no
        gradients, biases or `weights_first`).
        Two tensors [E, F, H], w1 and w3 of other libraries, stand for gate and up: no copy is made
        of them. Made neighbours by `join_gate_up_` they are as fast as one tensor. An activation
        without a gate takes one tensor [E, F, H].
    w_down : Tensor [E, H, F], the dtype of x, or quantised
    weights : Tensor [T, K] float32, bfloat16 or float16 (float64 beside float64 tokens)
    indices : Tensor [T, K] int32 or int64
        Experts of each token; -1 and E are dropped slots and add nothing.
    b_gate_up : Tensor [E, 2F], the dtype of x, optional
    b_down : Tensor [E, H], the dtype of x, optional
    activation : {"silu", "gelu", "gelu_tanh", "relu2", "situ"} or Activation
        `kimi_ops.activations` has the formulas, and forms with numbers: limits, bounds, no gate.
    weights_first : bool
        True multiplies ``act(gate, up)`` by the weights, before it is rounded and projected down;
        b_down is still weighted. The same mathematics in another order of roundings.
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
        Wrong dtype, shape, device or activation; an id outside -1 .. E (see `permute_plan`).

    Notes
    -----
    Differentiable in x, the router weights, biases and matrices that are tensors. The activation
    and the weighted sum are computed in fp32 and rounded once. Under `torch.autocast` x and the
    experts' matrices and biases are cast as those of `torch.mm` are. Cost: 6 T K F H operations.

    Composed of `permute`, `grouped_gemm` and torch's elementwise kernels instead of fused: an
    activation without a gate, two tensors that are no neighbours (or any two under
    `torch.compile`), weights_first beside b_down, gradients beside quantised weights.

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
    form = of(activation)
    if isinstance(x, Tensor) and x.dtype == torch.float64:
        plan = None  # the twin makes its own
    x, w_gate_up, w_down, b_gate_up, b_down = _arguments(
        x, w_gate_up, w_down, b_gate_up, b_down, form
    )
    if isinstance(weights, Tensor) and weights.dtype in _SHORT:
        weights = weights.float()
    if isinstance(indices, Tensor) and indices.dtype == torch.int64:
        indices = indices.clamp(-2, _MOST).int()
    if isinstance(w_gate_up, tuple) or not form.gated or (weights_first and b_down is not None):
        biases = b_gate_up, b_down
        return _otherwise(
            x, w_gate_up, w_down, weights, indices, *biases, form, weights_first, plan
        )
    (gate_up, down), scales = zip(*map(_stored, (w_gate_up, w_down)), strict=True)
    tensors = (x, gate_up, down, weights, indices)
    biases, options = (b_gate_up, b_down), (form.name, form.numbers, weights_first)
    quantised = gate_up is not w_gate_up or down is not w_down
    if plan is None and not torch.compiler.is_dynamo_compiling():
        result = _native.engine.eager.fused_experts(*tensors, *scales, *biases, *options, False)
        if type(result) is not int:
            return result[0]
        wanted = result == _native.GRADIENT
        if x.dtype == torch.float64 and result != _native.WATCHED:
            if wanted:
                _native.engine.fused_experts(*tensors, *scales, *biases, *options, False)  # checks
            return reference.fused_experts(*tensors, form, *biases, weights_first)
        if wanted and not quantised:
            return operators.Layer.apply(*tensors, *biases, *options, not recompute)
    if x.dtype == torch.float64:
        return reference.fused_experts(*tensors, form, *biases, weights_first)
    plan = permute_plan(indices, gate_up.shape[0]) if plan is None else plan
    wanted = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (*tensors[:4], *biases)
    )
    if quantised and wanted:
        return _composed(x, w_gate_up, w_down, weights, plan, *biases, form, weights_first)
    ids = plan.row_map, plan.source, plan.offsets
    save = wanted and not recompute
    return operators.fused_experts(*tensors[:4], *ids, *scales, *biases, *options, save)[0]


def join_gate_up_(w1: Tensor, w3: Tensor) -> None:
    """Make two stacks of matrices neighbours in memory, once: the forms of one tensor [E, 2F, H].

    Both stay what they are (parameters, leaves), with the same values; their memory becomes that of
    the gate and up rows of one tensor, which `fused_experts` reads without a copy. What moves or
    casts them one by one (`Module.to`, `torch.load`) undoes it: call it afterwards.

    Parameters
    ----------
    w1, w3 : Tensor [E, F, H]
        Gate and up.

    Raises
    ------
    TypeError, ValueError
        Two that differ in shape, dtype or device.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops import fused_experts, join_gate_up_
    >>> w1, w3 = (torch.nn.Parameter(torch.ones(2, 3, 4)) for _ in range(2))
    >>> join_gate_up_(w1, w3)
    >>> ids = torch.tensor([[0]], dtype=torch.int32)
    >>> y = fused_experts(torch.ones(1, 4), (w1, w3), torch.ones(2, 4, 3), torch.ones(1, 1), ids)
    >>> y.shape
    torch.Size([1, 4])
    """
    _check_pair("join_gate_up_", w1, w3)
    joined = torch.cat([w1.detach(), w3.detach()], dim=1)
    w1.data, w3.data = joined.chunk(2, dim=1)


_SHORT = (torch.bfloat16, torch.float16)
_FLOATS = (torch.float32, *_SHORT, torch.float64)
_MOST = torch.iinfo(torch.int32).max


def _check_pair(op: str, w1: Tensor, w3: Tensor) -> None:
    for name, w in (("w1", w1), ("w3", w3)):
        _check.tensor(op, name, w)
    _check.shape(op, "w1", w1, ("E", "F", "H"))
    _check.dtype(op, "w3", w3, (w1.dtype,))
    _check.shape(op, "w3", w3, tuple(w1.shape), "pass two stacks of the same shape")
    _check.same_device(op, "w3", w3, "w1", w1)


def _arguments(
    x: Tensor, w_gate_up: Any, w_down: Any, b_gate_up: Any, b_down: Any, form: Activation
) -> tuple[Any, ...]:
    """The same, cast as autocast wants, with two neighbours as one tensor."""
    if not isinstance(w_gate_up, tuple):
        return autocast(x, w_gate_up, w_down, b_gate_up, b_down)
    if len(w_gate_up) != 2 or not form.gated:
        raise ValueError(
            "fused_experts: w_gate_up: expected one tensor or quantised weight, or (w1, w3) beside "
            f"an activation with a gate, got {len(w_gate_up)} beside {form}; pass [E, F, H] stacks"
        )
    _check_pair("fused_experts", *w_gate_up)
    both = _joined(*w_gate_up)
    if both is not None:
        return autocast(x, both, w_down, b_gate_up, b_down)
    x, w1, w3, *others = autocast(x, *w_gate_up, w_down, b_gate_up, b_down)
    return x, (w1, w3), *others


class _Neighbours(torch.autograd.Function):
    """[E, 2F, H] over the memory of gate rows and up rows that lie so."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        experts, width, hidden = gate.shape
        return gate.detach().as_strided((experts, 2 * width, hidden), gate.stride())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = gradient.chunk(2, dim=1)
        return gate, up


def _joined(gate: Tensor, up: Tensor) -> Tensor | None:
    if seen_by_a_graph() or type(gate) not in (Tensor, torch.nn.Parameter):
        return None  # what has no memory, or not of its own
    distance = gate.shape[1] * gate.stride(1)
    neighbours = (
        gate.stride() == up.stride()
        and gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr()
        and up.storage_offset() - gate.storage_offset() == distance
    )
    return _Neighbours.apply(gate, up) if neighbours else None


def _otherwise(
    x: Tensor, w_gate_up: Any, w_down: Any, weights: Tensor, indices: Tensor,
    b_gate_up: Tensor | None, b_down: Tensor | None, form: Activation, weights_first: bool,
    plan: PermutePlan | None,
) -> Tensor:  # fmt: skip
    """Forms that no kernel has as a whole."""
    biases = b_gate_up, b_down
    _check_otherwise(x, w_gate_up, w_down, weights, indices, *biases, form)
    plan = permute_plan(indices, w_down.shape[0]) if plan is None else plan  # checks the ids
    if x.dtype == torch.float64:
        return reference.fused_experts(
            x, w_gate_up, w_down, weights, indices, form, *biases, weights_first
        )
    return _composed(x, w_gate_up, w_down, weights, plan, *biases, form, weights_first)


def _check_otherwise(
    x: Tensor, w_gate_up: Any, w_down: Weight, weights: Tensor, indices: Tensor,
    b_gate_up: Tensor | None, b_down: Tensor | None, form: Activation,
) -> None:  # fmt: skip
    op = "fused_experts"
    _check.tensor(op, "x", x)
    _check.dtype(op, "x", x, _FLOATS)
    _check.shape(op, "x", x, ("T", "H"), "flatten the batch")
    _check.choice(op, "activation", form.name, tuple(reference.ACTIVATIONS))
    for name, value in (("weights", weights), ("indices", indices)):
        _check.tensor(op, name, value)
        _check.same_device(op, name, value, "x", x)
    _check.dtype(op, "indices", indices, (torch.int32, torch.int64))
    _check.shape(op, "indices", indices, (x.shape[0], "K"))
    _check.shape(op, "weights", weights, tuple(indices.shape))
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    _check.dtype(op, "weights", weights, (wide,))
    parts = w_gate_up if isinstance(w_gate_up, tuple) else (w_gate_up,)
    for part in parts:
        _check_weight(op, "w_gate_up", part, x)
    _check_weight(op, "w_down", w_down, x)
    if len(w_down.shape) != 3:
        raise ValueError(
            f"{op}: w_down: expected shape [E, H, F], got {list(w_down.shape)}; stack the matrices"
        )
    experts, hidden, width = w_down.shape
    both = 2 * width if form.gated else width
    rows = both // len(parts)
    for part in parts:
        if tuple(part.shape) != (experts, rows, x.shape[1]) or hidden != x.shape[1]:
            raise ValueError(
                f"{op}: w_gate_up: expected shape [{experts}, {rows}, {x.shape[1]}] beside w_down "
                f"{list(w_down.shape)}, got {list(part.shape)}; pass "
                + ("[E, 2F, H] or two [E, F, H]" if form.gated else "[E, F, H]: there is no gate")
            )
    for name, bias, columns in (("b_gate_up", b_gate_up, both), ("b_down", b_down, hidden)):
        if bias is not None:
            _check.tensor(op, name, bias)
            _check.shape(op, name, bias, (experts, columns))
            _check.dtype(op, name, bias, (x.dtype,))
            _check.same_device(op, name, bias, "x", x)


def _check_weight(op: str, name: str, weight: Any, x: Tensor) -> None:
    """Its kind, beside x; a quantised one is checked where it is multiplied, but for float64."""
    if isinstance(weight, QuantizedWeight):
        if x.dtype == torch.float64:
            raise TypeError(
                f"{op}: {name}: expected a Tensor beside float64 tokens, got "
                f"{type(weight).__name__}; pass {name}.dequantize(x.dtype)"
            )
        return
    _check.tensor(op, name, weight)
    _check.dtype(op, name, weight, (x.dtype,))
    _check.same_device(op, name, weight, "x", x)


def _composed(
    x: Tensor, w_gate_up: Any, w_down: Weight, weights: Tensor, plan: PermutePlan,
    b_gate_up: Tensor | None, b_down: Tensor | None, form: Activation, weights_first: bool,
) -> Tensor:  # fmt: skip
    rows = permute(x, plan)
    offsets = plan.offsets
    up = None
    if isinstance(w_gate_up, tuple):
        parts = (None, None) if b_gate_up is None else b_gate_up.chunk(2, dim=1)
        gate, up = (
            grouped_gemm(rows, w.transpose(1, 2), offsets, bias=bias)
            for w, bias in zip(w_gate_up, parts, strict=True)
        )
    else:
        gate = grouped_gemm(rows, _transposed(w_gate_up), offsets, bias=b_gate_up)
        if form.gated:
            gate, up = gate.chunk(2, dim=-1)
    of_rows = permute_weights(weights, plan) if weights_first else None
    rows = reference.activate(gate, up, form, of_rows)
    if of_rows is None:
        return unpermute(
            grouped_gemm(rows, _transposed(w_down), offsets, bias=b_down), plan, weights
        )
    y = grouped_gemm(rows, _transposed(w_down), offsets)
    if b_down is not None:
        y = (y + of_rows[:, None] * b_down[expert_of_row(len(y), offsets)]).to(x.dtype)
    return unpermute(y, plan)


def _stored(weight: Any) -> tuple[Tensor, Tensor | None]:
    """The tensor of a weight as it lies, and the scale of a quantised one."""
    if not isinstance(weight, QuantizedWeight):
        return weight, None
    data, scale = weight.tensors().values()
    return data, scale


def _transposed(weight: Weight) -> Weight:
    """The b of `grouped_gemm`; a quantised weight stands for its transpose already."""
    return weight if isinstance(weight, QuantizedWeight) else weight.transpose(1, 2)
