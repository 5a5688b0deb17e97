# SPDX-License-Identifier: MIT
"""Memory that ops keep for their next results."""

from kimi_ops import _native

__all__ = ["release_kept_memory"]


def release_kept_memory() -> int:
    """Gives the memory back that ops on CPU tensors keep to use it again.

    Results and working memory of 8 MiB or more come from torch's allocator; when a tensor on them
    is gone, the next one of its size (up to one eighth less) gets the same memory, since the pages
    of new memory can cost ten times what a gradient takes to compute. What is in use and what is
    kept together are never more than was in use at one time since this function was called last;
    Linux takes the pages of kept memory by itself before it runs short. So nobody has to call this:
    it makes room at once, for what another allocator needs or a measurement counts.

    Returns
    -------
    int
        Bytes given back.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops import grouped_gemm_wgrad, release_kept_memory
    >>> rows = torch.zeros(0, 2048), torch.zeros(0, 1024), torch.zeros(1, dtype=torch.int32)
    >>> _ = release_kept_memory()
    >>> gradient = grouped_gemm_wgrad(*rows)
    >>> del gradient
    >>> release_kept_memory() == 2048 * 1024 * 4
    True
    """
    return int(_native._C.release_kept_memory())
