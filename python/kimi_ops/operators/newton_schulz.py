# SPDX-License-Identifier: MIT
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kimi_ops.operators.registry import Operator

METHODS = {"standard": 0, "symmetric": 1, "gram": 2}  # kimi_newton_schulz_method


def _product(a: Tensor, b: Tensor, *_: Any) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]))


def _images(g: Sequence[Tensor], *_: Any) -> Tensor:
    """[len(g), m, n], each dense in the orientation of g."""
    rows, cols = g[0].shape
    across = g[0].stride(1) != 1 and cols > 1 and (g[0].stride(0) == 1 or rows == 1)
    if across and all(matrix.stride() == g[0].stride() for matrix in g):
        return g[0].new_empty((len(g), cols, rows)).mT
    return g[0].new_empty((len(g), rows, cols))


matrix_product = Operator(
    "matrix_product(Tensor a, Tensor b, Tensor? c, float alpha, float beta, bool symmetric) "
    "-> Tensor",
    _product,
)
newton_schulz = Operator(
    "newton_schulz(Tensor[] g, float[] coefficients, int[] restarts, int method, ScalarType dtype, "
    "float eps, bool aol) -> Tensor",
    _images,
    differentiable=False,
)
