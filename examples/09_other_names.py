# SPDX-License-Identifier: MIT
"""Code of vLLM and of Megatron with one import changed.

python examples/09_other_names.py
"""

import torch

from kimi_ops.compat.megatron import permute, topk_routing_with_score_function, unpermute
from kimi_ops.compat.vllm import fused_experts, fused_topk

# These were: from megatron.core.transformer.moe.moe_utils import permute, ...
# from vllm.model_executor.layers.fused_moe import fused_experts, fused_topk

torch.manual_seed(0)
x, logits = torch.randn(12, 32), torch.randn(12, 8)
w1, w2 = torch.randn(8, 2 * 16, 32) / 6, torch.randn(8, 32, 16) / 4
weights, ids, _ = fused_topk(x, logits, topk=2, renormalize=True)
y = fused_experts(x, w1, w2, weights, ids)

probs, routing_map = topk_routing_with_score_function(logits, 2, score_function="softmax")
rows, _, tokens, _, _ = permute(x, routing_map, num_out_tokens=24)
home = unpermute(rows, tokens, x.shape, probs=probs, routing_map=routing_map)

assert y.shape == x.shape and ids.dtype == torch.int32
torch.testing.assert_close(home, x * probs.sum(1, keepdim=True))
print("vLLM's and Megatron's calls, by the kernels of this library")
