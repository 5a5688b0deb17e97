# SPDX-License-Identifier: MIT
"""NumPy's way to the kernels."""

import math
from itertools import accumulate
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
            ends = list(accumulate(map(math.prod, shapes)))
            return [
                result[end - math.prod(shape) : end].reshape(shape)
                for end, shape in zip(ends, shapes, strict=True)
            ]
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
        if space_of(x) is None:
            return np.vectorize(math.erf, otypes=[x.dtype])(x)
        xp = self.space(x)  # none of the array API: Abramowitz and Stegun 7.1.26, to 1.5e-7
        t = 1 / (1 + 0.3275911 * xp.abs(x))
        series = 0.0
        for factor in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
            series = t * (series + factor)
        return xp.sign(x) * (1 - series * xp.exp(-x * x))

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
