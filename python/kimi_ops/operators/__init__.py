# SPDX-License-Identifier: MIT
"""``torch.ops.kimi_ops.*``: a file an op, with its schemas, shapes for fake tensors and gradients.

`registry.Operator` is how all are built. What a kernel cannot do, and so is done in torch (float64,
copies for TMA), stands in an op's file too.
"""
