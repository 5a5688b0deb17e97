# SPDX-License-Identifier: MIT
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kimi_ops.operators.registry import Operator

METHODS = {"standard": 0, "symmetric": 1, "gram": 2}  # kimi_newton_schulz_method


def _product(a: Tensor, b: Tensor, *_: Any) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]))


def _images(g: Sequence[Tensor], *_: Any) -> list[Tensor]:
    """Dense, in the orientation of g."""
    images = []
    for matrix in g:
        rows, cols = matrix.shape
        across = matrix.stride(1) != 1 and cols > 1 and (matrix.stride(0) == 1 or rows == 1)
        images.append(
            matrix.new_empty((cols, rows)).mT if across else matrix.new_empty((rows, cols))
        )
    return images


matrix_product = Operator(
    "matrix_product(Tensor a, Tensor b, Tensor? c, float alpha, float beta, bool symmetric) "
    "-> Tensor",
    _product,
)
newton_schulz = Operator(
    "newton_schulz(Tensor[] g, float[] coefficients, int[] restarts, int method, ScalarType dtype, "
    "float eps) -> Tensor[]",
    _images,
    differentiable=False,
)
