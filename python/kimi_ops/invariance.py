# SPDX-License-Identifier: MIT
"""Batch invariance: a token's result does not depend on what else is computed with it."""

from __future__ import annotations

from kimi_ops import _native

__all__ = ["is_batch_invariant", "set_batch_invariant"]


class set_batch_invariant:  # noqa: N801  (as torch.set_grad_enabled)
    """From now on, or in a `with` block, a row of a product has the same bits in any batch.

    A function, or a context manager as ``torch.set_grad_enabled`` is one; no decorator. It holds
    for the whole process, all threads. Without it CPU products of very few rows an expert add in an
    order of their own, which reads the weights once and is up to several times as fast; all else
    holds with and without it: docs/determinism.md has the table. The environment variable
    ``KIMI_OPS_BATCH_INVARIANT=1`` says the same from the start.

    Parameters
    ----------
    enabled : bool

    Raises
    ------
    TypeError
        Something else than a bool.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops import grouped_gemm, set_batch_invariant
    >>> x, w = torch.randn(64, 256), torch.randn(1, 32, 256).transpose(1, 2)
    >>> with set_batch_invariant(True):
    ...     alone = grouped_gemm(x[:1], w, torch.tensor([1], dtype=torch.int32))
    ...     among = grouped_gemm(x, w, torch.tensor([64], dtype=torch.int32))
    >>> torch.equal(alone[0], among[0])
    True
    """

    def __init__(self, enabled: bool) -> None:
        if not isinstance(enabled, bool):
            raise TypeError(
                "set_batch_invariant: enabled: expected a bool, got "
                f"{type(enabled).__name__}; pass True or False"
            )
        self._enabled, self._before = enabled, is_batch_invariant()
        _native.engine.set_batch_invariant(enabled)

    def __enter__(self) -> None:
        _native.engine.set_batch_invariant(self._enabled)

    def __exit__(self, *error: object) -> None:
        _native.engine.set_batch_invariant(self._before)


def is_batch_invariant() -> bool:
    """Whether `set_batch_invariant` or ``KIMI_OPS_BATCH_INVARIANT=1`` is in force."""
    return bool(_native.engine.batch_invariant())
