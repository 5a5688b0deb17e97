# SPDX-License-Identifier: MIT
"""``torch.ops.kimi_ops.*``: schemas, implementations, fake tensors and gradients."""
