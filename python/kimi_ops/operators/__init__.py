# SPDX-License-Identifier: MIT
"""``torch.ops.kimi_ops.*``: a file an op, with its schemas, shapes for fake tensors and gradients.

`registry.Operator` is how all are built. What a kernel cannot do, and so is done in torch (float64,
copies for TMA), stands in an op's file too.
"""

from kimi_ops.operators import (  # noqa: F401  (whichever is loaded first, all are registered)
    balance,
    count_once,
    fp8,
    fused_experts,
    grouped_gemm,
    muon_clip,
    newton_schulz,
    permute,
    qk_clip,
    topk_gate,
)
