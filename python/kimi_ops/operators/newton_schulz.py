# SPDX-License-Identifier: MIT
"""The operators behind `kimi_ops.newton_schulz` on CPU tensors: native calls and fake tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kimi_ops import _check, _native
from kimi_ops.operators.registry import define, register

METHODS = {"standard": 0, "symmetric": 1, "gram": 2}  # kimi_newton_schulz_method


def _workspace(like: Tensor, op: str, *arguments: int) -> Tensor:
    """64-byte aligned, as torch's CPU allocator gives it; for the threads that torch uses now."""
    _native.share_threads()
    size = _native.workspace_bytes(op, like, *arguments)
    return torch.empty((size,), dtype=torch.uint8)


# ---- one product


def _product_implementation(
    a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float, symmetric: bool
) -> Tensor:
    _check_product(a, b, c, symmetric)
    d = _product_output(a, b, c, alpha, beta, symmetric)
    if c is not None and c.stride(1) != 1:
        c = c.contiguous()
    sizes = (*d.shape, a.shape[1])
    dtype = _native.DTYPES[a.dtype]
    workspace = _workspace(a, "matrix_product", *sizes, dtype)
    _native.call(
        "matrix_product", a, a.data_ptr(), b.data_ptr(), _native.address(c), d.data_ptr(),
        workspace.data_ptr(), *sizes, *a.stride(), *b.stride(),
        0 if c is None else c.stride(0), d.stride(0), alpha, beta, 0.0, symmetric, dtype,
    )  # fmt: skip
    return d


def _check_product(a: Tensor, b: Tensor, c: Tensor | None, symmetric: bool) -> None:
    op = "matrix_product"
    _check.dtype(op, "a", a, tuple(_native.DTYPES))
    _check.shape(op, "a", a, ("M", "K"))
    _check.shape(op, "b", b, (a.shape[1], "N"))
    _check.dtype(op, "b", b, (a.dtype,))
    if symmetric:
        _check.shape(op, "b", b, (a.shape[1], a.shape[0]), "a symmetric result is square")
    if c is not None:
        _check.dtype(op, "c", c, (a.dtype,))
        _check.shape(op, "c", c, (a.shape[0], b.shape[1]))


def _product_output(
    a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float, symmetric: bool
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]))


matrix_product = register(
    "matrix_product(Tensor a, Tensor b, Tensor? c, float alpha, float beta, bool symmetric) "
    "-> Tensor",
    _product_implementation,
    _product_output,
)

# ---- the chain of a schedule on matrices of one shape


def _chain_implementation(
    g: Sequence[Tensor],
    coefficients: Sequence[float],
    restarts: Sequence[int],
    method: int,
    dtype: torch.dtype,
    eps: float,
) -> list[Tensor]:
    _check_chain(g, coefficients, dtype)
    g = [matrix if 1 in _strides(matrix) else matrix.contiguous() for matrix in g]
    if any(_strides(matrix) != _strides(g[0]) for matrix in g):
        g = [matrix.contiguous() for matrix in g]
    x = _chain_outputs(g, coefficients, restarts, method, dtype, eps)
    rows, cols = g[0].shape
    strides, codes = _strides(g[0]), (_native.DTYPES[g[0].dtype], _native.DTYPES[dtype])
    workspace = _workspace(g[0], "newton_schulz", len(g), rows, cols, *strides, codes[1], method)
    # Addresses and numbers travel in tensors of the host, which must live until the call returns.
    sources = torch.tensor([matrix.data_ptr() for matrix in g])
    targets = torch.tensor([matrix.data_ptr() for matrix in x])
    numbers = torch.tensor(coefficients, dtype=torch.float32)
    steps = torch.tensor(restarts, dtype=torch.int32)
    _native.call(
        "newton_schulz", g[0], sources.data_ptr(), targets.data_ptr(), numbers.data_ptr(),
        steps.data_ptr(), workspace.data_ptr(), len(g), rows, cols, *strides, *_strides(x[0]),
        len(coefficients) // 3, len(restarts), eps, codes[0], codes[1], codes[0], method,
    )  # fmt: skip
    return x


def _strides(x: Tensor) -> tuple[int, int]:
    """Of a side of one element torch may say anything."""
    rows, cols = x.shape
    return (x.stride(0) if rows > 1 else cols, x.stride(1) if cols > 1 else 1)


def _check_chain(g: Sequence[Tensor], coefficients: Sequence[float], dtype: torch.dtype) -> None:
    op = "newton_schulz"
    if len(coefficients) % 3:
        raise ValueError(f"{op}: coefficients: expected 3 a step, got {len(coefficients)} numbers")
    if dtype not in _native.DTYPES:
        raise TypeError(f"{op}: dtype: expected fp32, bf16 or fp16, got {dtype}; choose one")
    for index, matrix in enumerate(g):
        name = f"g[{index}]"
        _check.dtype(op, name, matrix, tuple(_native.DTYPES))
        _check.shape(op, name, matrix, ("m", "n"))
        _check.shape(op, name, matrix, tuple(g[0].shape), "call once for each shape")
        _check.dtype(op, name, matrix, (g[0].dtype,), "call once for each dtype")


def _chain_outputs(
    g: Sequence[Tensor],
    coefficients: Sequence[float],
    restarts: Sequence[int],
    method: int,
    dtype: torch.dtype,
    eps: float,
) -> list[Tensor]:
    """Dense, in the orientation of g."""
    images = []
    for matrix in g:
        rows, cols = matrix.shape
        across = matrix.stride(1) != 1 and cols > 1 and (matrix.stride(0) == 1 or rows == 1)
        images.append(
            matrix.new_empty((cols, rows)).mT if across else matrix.new_empty((rows, cols))
        )
    return images


newton_schulz = define(
    "newton_schulz(Tensor[] g, float[] coefficients, int[] restarts, int method, ScalarType dtype, "
    "float eps) -> Tensor[]",
    _chain_implementation,
    _chain_outputs,
)
