# SPDX-License-Identifier: MIT
"""What ops on tensors and ops on arrays ask alike, without torch."""

import math
from typing import Any

from kimi_ops import _arguments as check

FORMS = (2, 3), (3, 3), (3, 2), (2, 2)


def check_form(
    form: tuple[int, int], plain: bool, a: Any, b: Any, offsets: Any, starts: Any, counts: Any,
    bias: Any,
) -> None:  # fmt: skip
    """Which options go with which form of `grouped_gemm`: `form` are the numbers of dimensions of a
    and b, which are `plain` where neither is a stored form."""
    op, whole = "grouped_gemm", form == (3, 3)
    if form not in FORMS:
        raise ValueError(
            f"{op}: a, b: expected shapes [R, K] and [E, K, N], or another form of its table, got "
            f"{list(a.shape)} and {list(b.shape)}; reshape them"
        )
    if whole != (offsets is None):
        raise ValueError(
            f"{op}: offsets: expected "
            + ("none beside a matrix for each expert" if whole else "the end of each group")
            + f", got {'none' if offsets is None else list(offsets.shape)}; "
            + ("pass counts" if whole else "pass the cumulative sum of the group sizes")
        )
    for name, value, allowed in (
        ("starts", starts, form == (2, 3) and plain), ("counts", counts, whole),
        ("bias", bias, form[1] == 3),
    ):  # fmt: skip
        if value is not None and not allowed:
            raise ValueError(
                f"{op}: {name}: expected none beside "
                + (f"{form[0]}-D a and {form[1]}-D b" if plain else "stored operands")
                + ", got one; leave it away"
            )


def check_accumulate(out: Any, plain: bool) -> None:
    """What is added to is there, and no operand is a stored form."""
    if out is None or not plain:
        raise ValueError(
            "grouped_gemm: accumulate: expected out, a and b that are tensors beside it, got "
            + ("no out" if out is None else "stored ones")
            + "; add the result to out yourself"
        )


def fastest_method(rows: int, columns: int, dtype: str, on_gpu: bool) -> str:
    """The method of Newton-Schulz that ``auto`` means where native kernels serve a matrix.

    Never the Gram form in bf16, which is too coarse for it. The products do half the work for a
    symmetric result, so that the Gram form costs less from n = m on; its small products pay from
    1.2 m on a GPU and 1.5 m on a CPU.
    """
    m, n = sorted((rows, columns))
    wide = 5 * n >= 6 * m if on_gpu else 2 * n >= 3 * m
    return "gram" if dtype in ("float32", "float16") and wide else "symmetric"


def expert_capacity(num_tokens: int, k: int, num_experts: int, factor: float) -> int:
    """The pairs that an expert takes: ``ceil(T * k / E * factor)``.

    Raises
    ------
    TypeError, ValueError
        A size below 1 (0 for tokens), or no finite factor above 0.

    Examples
    --------
    >>> import kimi_ops
    >>> kimi_ops.expert_capacity(4096, 8, 384, 1.25)
    107
    """
    op = "expert_capacity"
    check.between(op, "num_tokens", num_tokens, 0, 2**31 - 1)
    check.between(op, "k", k, 1, 2**31 - 1)
    check.between(op, "num_experts", num_experts, 1, 2**31 - 1)
    if not check.number(op, "factor", factor) > 0:
        raise ValueError(f"{op}: factor: expected a number above 0, got {factor}")
    return math.ceil(num_tokens * k / num_experts * factor)
