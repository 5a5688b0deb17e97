# SPDX-License-Identifier: MIT
"""Products by experts' weights, and of the optimizer, on arrays."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from kimi_ops.activations import Activation, of
from kimi_ops.numpy.arrays import as_weights, call, dtype_of, ids, kind
from kimi_ops.numpy.routing import Plan, permute_plan

_METHODS = ("standard", "symmetric", "gram")
_QUINTIC = (3.4445, -4.7750, 2.0315)


def grouped_gemm(
    a: Any, b: Any, offsets: Any, *, bias: Any = None, out: Any = None, out_dtype: Any = None,
    accumulate: bool = False, starts: Any = None,
) -> np.ndarray:  # fmt: skip
    """`kimi_ops.grouped_gemm`: a [R, K] by b [E, K, N], rows up to offsets [E] for each expert,
    from starts [E] on where there are any.

    Examples
    --------
    >>> import numpy as np
    >>> import kimi_ops.numpy as kn
    >>> a, b = np.ones((3, 4), np.float32), np.ones((2, 4, 5), np.float32)
    >>> kn.grouped_gemm(a, b, np.array([1, 3], np.int32)).shape
    (3, 5)
    """
    if out is not None:
        call("grouped_gemm_out", a, b, ids(offsets), bias, out, accumulate, _ids(starts))
        return out
    wanted = kind(dtype_of(a) if out_dtype is None else out_dtype)
    return call("grouped_gemm", a, b, ids(offsets), bias, wanted, _ids(starts))


def grouped_gemm_wgrad(
    a: Any, dc: Any, offsets: Any, *, out: Any = None, accumulate: bool = False,
    out_dtype: Any = None, starts: Any = None,
) -> np.ndarray:  # fmt: skip
    """`kimi_ops.grouped_gemm_wgrad`: [E, K, N], or added to `out`."""
    if out is not None:
        call("grouped_gemm_wgrad_out", a, dc, ids(offsets), out, accumulate, _ids(starts))
        return out
    wanted = kind(dtype_of(a) if out_dtype is None else out_dtype)
    return call("grouped_gemm_wgrad", a, dc, ids(offsets), wanted, _ids(starts))


def _ids(array: Any) -> Any:
    return None if array is None else ids(array)


def fused_experts(
    x: Any, w_gate_up: Any, w_down: Any, weights: Any, indices: Any, *, b_gate_up: Any = None,
    b_down: Any = None, activation: str | Activation = "silu", weights_first: bool = False,
) -> np.ndarray:  # fmt: skip
    """`kimi_ops.fused_experts` on arrays: x [T, H], w_gate_up [E, 2F, H], w_down [E, H, F].

    Examples
    --------
    >>> import numpy as np
    >>> import kimi_ops.numpy as kn
    >>> x, up = np.ones((2, 8), np.float16), np.ones((3, 8, 8), np.float16)
    >>> gate = kn.topk_gate(np.zeros((2, 3), np.float32), 1)
    >>> y = kn.fused_experts(x, up, up[:, :, :4], gate.weights, gate.indices)
    >>> y.dtype, y.shape
    (dtype('float16'), (2, 8))
    """
    plan = permute_plan(indices, w_gate_up.shape[0])
    return fused_experts_planned(
        x, w_gate_up, w_down, weights, plan, b_gate_up=b_gate_up, b_down=b_down,
        activation=activation, weights_first=weights_first,
    )[0]  # fmt: skip


def fused_experts_planned(
    x: Any, w_gate_up: Any, w_down: Any, weights: Any, plan: Plan, *, b_gate_up: Any = None,
    b_down: Any = None, activation: str | Activation = "silu", weights_first: bool = False,
    save: bool = False,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """`fused_experts` of a plan; with `save` also [g; u] [R, 2F] for the backward, else [0, 2F]."""
    return call(
        "fused_experts_planned", x, w_gate_up, w_down, as_weights(weights), plan.row_map,
        plan.source, plan.offsets, None, None, b_gate_up, b_down, *_named(activation),
        weights_first, save,
    )  # fmt: skip


def _named(activation: str | Activation) -> tuple[str, list[float]]:
    form = of(activation)
    if not form.gated:
        raise ValueError(
            f"fused_experts: activation: expected one with a gate, got {form}; arrays have no form "
            "without"
        )
    return form.name, list(form.numbers)


def fused_experts_backward(
    dy: Any, x: Any, w_gate_up: Any, w_down: Any, weights: Any, plan: Plan, *, gate_up: Any = None,
    b_gate_up: Any = None, b_down: Any = None, activation: str | Activation = "silu",
) -> tuple[np.ndarray, ...]:  # fmt: skip
    """The gradients of x, w_gate_up, w_down and weights, then of the biases that are given."""
    biases = b_gate_up, b_down
    gradients = call(
        "fused_experts_backward", dy, x, w_gate_up, w_down, as_weights(weights), plan.row_map,
        plan.source, plan.offsets, gate_up, *biases, *_named(activation),
        [True] * 4 + [bias is not None for bias in biases],
    )  # fmt: skip
    given = [g for g, bias in zip(gradients[4:], biases, strict=True) if bias is not None]
    return *gradients[:4], *given


def newton_schulz(
    g: Any,
    *,
    steps: int = 5,
    coefficients: Sequence[float] = _QUINTIC,
    method: str = "symmetric",
    dtype: Any = None,
    eps: float = 1e-7,
) -> np.ndarray:
    """Matrices of one shape, [M, N] or [E, M, N], with singular values near 1.

    The three coefficients hold for every step; `kimi_ops.newton_schulz` has named schedules and
    chooses the method by itself.

    Examples
    --------
    >>> import numpy as np
    >>> import kimi_ops.numpy as kn
    >>> kn.newton_schulz(np.eye(3, 5, dtype=np.float32)).shape
    (3, 5)
    """
    if method not in _METHODS:
        raise ValueError(
            f"newton_schulz: method: expected one of {', '.join(_METHODS)}, got {method!r}"
        )
    if len(coefficients) != 3:
        raise ValueError(
            f"newton_schulz: coefficients: expected 3 numbers, got {len(coefficients)}"
        )
    matrices = list(g) if g.ndim == 3 else [g]
    wanted = kind(dtype_of(g) if dtype is None else dtype)
    x = call(
        "newton_schulz", matrices, [float(c) for c in coefficients] * steps, [],
        _METHODS.index(method), wanted, eps, False,
    )  # fmt: skip
    return x if g.ndim == 3 else x[0]


def attention_max_logits(q: Any, k: Any, scale: float, *, causal: bool = True) -> np.ndarray:
    """`kimi_ops.attention_max_logits`: [heads] float32 of q, k [B, heads, S, D]."""
    return call("attention_max_logits", q, k, scale, causal)
