# SPDX-License-Identifier: MIT
"""grouped_gemm, the products of MegaBlocks: ``from kimi_ops.compat import grouped_gemm``.

Signatures of 0.1.6 (`ops.gmm`, `backend.gmm`) and of the fork 1.1.4 that Megatron used to ask for
(`ops.permute`, `ops.unpermute`). Any floating dtype, either device; batch sizes on the host or on
the device, which is not waited for.
"""

from kimi_ops.compat.grouped_gemm import backend, ops

__all__ = ["backend", "ops"]
