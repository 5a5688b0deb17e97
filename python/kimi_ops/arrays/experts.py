# SPDX-License-Identifier: MIT
"""The routed experts of one layer."""

import math
from typing import Any

from kimi_ops import _arguments as check
from kimi_ops.activations import Activation, ActivationName, of
from kimi_ops.arrays.door import Plan, name_of
from kimi_ops.arrays.formats import Quantized, parts
from kimi_ops.arrays.permute import Permute
from kimi_ops.arrays.products import Products

FUSED = ("silu", "gelu", "situ", "gelu_tanh", "relu2", "swiglu")


class Experts(Products, Permute):
    def fused_experts(
        self,
        x: Any,
        w_gate_up: Any,
        w_down: Any,
        weights: Any,
        indices: Any,
        *,
        b_gate_up: Any = None,
        b_down: Any = None,
        activation: ActivationName | Activation = "silu",
        weights_first: bool = False,
        recompute: bool = False,
        plan: Plan | None = None,
    ) -> Any:
        """`kimi_ops.fused_experts`: [T, H] of x [T, H], w_gate_up [E, 2F, H] (or w1, w3 of
        [E, F, H], or [E, F, H] beside an activation without a gate) and w_down [E, H, F], which may
        be quantised, weights and indices [T, K] of the pairs.

        What is composed of other ops there is so here. `recompute` is for autograd: it keeps no
        [g; u] for the backward.

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
        form, op = of(activation), "fused_experts"
        check.choice(op, "activation", form.name, FUSED)
        pair = isinstance(w_gate_up, tuple) and not isinstance(w_gate_up, Quantized)
        if pair and (len(w_gate_up) != 2 or not form.gated):
            raise ValueError(
                f"{op}: w_gate_up: expected one array or quantised weight, or (w1, w3) beside an "
                f"activation with a gate, got {len(w_gate_up)} beside {form}; pass [E, F, H] stacks"
            )
        weights = self.as_weights(weights)
        if plan is None:
            plan = self.permute_plan(indices, w_down.shape[0])
        biases = b_gate_up, b_down
        if pair or not form.gated or (weights_first and b_down is not None):
            return self.composed(
                x, w_gate_up, w_down, weights, plan, *biases, form, bool(weights_first)
            )
        (up, up_scale), (down, down_scale) = parts(w_gate_up), parts(w_down)
        return self.run(
            "fused_experts_planned", x, up, down, weights, plan.row_map, plan.source, plan.offsets,
            up_scale, down_scale, *biases, form.name, form.numbers, bool(weights_first),
            self.autograd and not recompute,
        )[0]  # fmt: skip

    def composed(
        self, x: Any, w_gate_up: Any, w_down: Any, weights: Any, plan: Plan, b_gate_up: Any,
        b_down: Any, form: Activation, weights_first: bool,
    ) -> Any:  # fmt: skip
        """Of permute, products, an activation and unpermute."""
        rows, ends = self.permute(x, plan), plan.offsets
        up = None
        if isinstance(w_gate_up, tuple) and not isinstance(w_gate_up, Quantized):
            both = (None, None) if b_gate_up is None else self._halves(b_gate_up)
            gate, up = (
                self.grouped_gemm(rows, _transposed(w), ends, bias=bias)
                for w, bias in zip(w_gate_up, both, strict=True)
            )
        else:
            gate = self.grouped_gemm(rows, _transposed(w_gate_up), ends, bias=b_gate_up)
            if form.gated:
                gate, up = self._halves(gate)
        of_rows = self.permute_weights(weights, plan) if weights_first else None
        h = self.activate(gate, up, form, of_rows)
        if of_rows is None:
            y = self.grouped_gemm(h, _transposed(w_down), ends, bias=b_down)
            return self.unpermute(y, plan, weights)
        y = self.grouped_gemm(h, _transposed(w_down), ends)
        if b_down is not None:
            y, ends, b_down = self.array(y), self.array(ends), self.array(b_down)
            xp = self.space(y)
            row = xp.arange(y.shape[0], dtype="int32")
            expert = xp.clip((ends[None] <= row[:, None]).sum(1), None, ends.shape[0] - 1)
            y = (y + of_rows[:, None] * b_down[expert]).astype(name_of(x.dtype))
        return self.unpermute(y, plan)

    def _halves(self, x: Any) -> tuple[Any, Any]:
        x = self.array(x)
        middle = x.shape[1] // 2
        return x[:, :middle], x[:, middle:]

    def activate(self, gate: Any, up: Any, form: Activation, weights: Any = None) -> Any:
        """h [R, F] from gate and up, or from gate alone, times weights [R] where there are any: one
        rounding, after all products in float32."""
        gate = self.array(gate)
        xp, g, numbers = self.space(gate), gate.astype("float32"), form.numbers
        u = g if up is None else self.array(up).astype("float32")
        if form.name == "silu":
            h = g * self.sigmoid(g)
        elif form.name == "gelu":
            h = 0.5 * g * (1 + self.erf(g * math.sqrt(0.5)))
        elif form.name == "gelu_tanh":
            h = g * self.sigmoid(2 * math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))
        elif form.name == "relu2":
            h = xp.maximum(g, 0) ** 2
        elif form.name == "situ":
            bound, up_bound = numbers
            h = bound * xp.tanh(g / bound) * self.sigmoid(g)
            u = u if up_bound == math.inf else up_bound * xp.tanh(u / up_bound)
        else:  # swiglu
            alpha, shift, gate_limit, silu_limit, up_limit = numbers
            g = xp.minimum(g, gate_limit)
            h = xp.minimum(g * self.sigmoid(alpha * g), silu_limit)
            u = xp.clip(u, -up_limit, up_limit) + shift
        if up is not None:
            h = h * u
        if weights is not None:
            h = h * self.array(weights)[:, None]
        return h.astype(gate.dtype)


def _transposed(weight: Any) -> Any:
    """The b of `grouped_gemm`; a quantised weight stands for its transpose already."""
    return weight if isinstance(weight, Quantized) else weight.swapaxes(1, 2)
