# SPDX-License-Identifier: MIT
"""NumPy's way to the kernels."""

import math
from typing import Any

import numpy as np

from kimi_ops.arrays.balance import Balance
from kimi_ops.arrays.experts import Experts
from kimi_ops.arrays.gate import Gates
from kimi_ops.arrays.optimizer import Optimizer
from kimi_ops.numpy.arrays import kind
from kimi_ops.numpy.calls import adopted, call, space_of


class NumPy(Gates, Balance, Experts, Optimizer):
    """The native functions as they are: outputs are changed in place, nothing is differentiable."""

    def run(self, op: str, *arguments: Any) -> Any:
        result = call(op, *arguments)
        if op in ("update_expert_bias_", "quantile_histogram_", "squares_"):
            return arguments[0]
        if op.endswith("_out"):
            return arguments[4 if op == "grouped_gemm_out" else 3]
        if op == "muon_momentum_":  # one array holds all
            shapes = [x.shape for x in arguments[0]]
            edges = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
            parts = self.space(result).split(result, edges)
            return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        return result

    def array(self, x: Any) -> Any:
        return adopted(x)

    def space(self, x: Any) -> Any:
        return space_of(x) or np

    def dtype(self, dtype: Any) -> Any:
        return kind(dtype)

    def constant(self, x: Any) -> Any:
        return x

    def order(self, x: Any) -> Any:
        return self.space(x).argsort(x, kind="stable")

    def sigmoid(self, x: Any) -> Any:
        xp = self.space(x)
        power = xp.exp(-xp.abs(x))
        return xp.where(x >= 0, 1, power) / (1 + power)

    def softplus(self, x: Any) -> Any:
        return self.space(x).logaddexp(x, 0)

    def erf(self, x: Any) -> Any:
        return np.vectorize(math.erf, otypes=[x.dtype])(x)

    def matrices(self, stack: Any) -> Any:
        return list(stack)

    def placed(self, result: Any, out: Any) -> Any:
        out[...] = result
        return out

    def flat(self, out: Any) -> Any:
        if not out.flags.c_contiguous:
            raise ValueError(
                f"grouped_gemm: out: expected a contiguous {list(out.shape)}, got one of strides "
                f"{out.strides}; allocate it with that shape"
            )
        return super().flat(out)


OPS = NumPy()
