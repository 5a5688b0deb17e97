# SPDX-License-Identifier: MIT
"""The experts of a model of transformers by this library, and its training by MuonClip.

python examples/06_transformers.py
"""

import torch
import transformers

from kimi_ops import MuonClip, muon_param_groups
from kimi_ops.interop.transformers import register

register()  # once a process
torch.manual_seed(0)
config = transformers.Qwen3MoeConfig(
    hidden_size=64, intermediate_size=96, moe_intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8,
    num_experts_per_tok=2, vocab_size=128,
)  # fmt: skip
model = transformers.Qwen3MoeForCausalLM(config)  # or from_pretrained(folder)
ids = torch.randint(0, 128, (2, 24))

model.set_experts_implementation("eager")
expected = model(ids).logits
model.set_experts_implementation("kimi_ops")
logits = model(ids).logits
torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)

optimizer = MuonClip(muon_param_groups(model), lr=1e-2)
first = last = model(ids, labels=ids).loss
for _ in range(5):
    last.backward()
    optimizer.step()
    optimizer.zero_grad()
    last = model(ids, labels=ids).loss
print(f"logits agree to {(logits - expected).abs().max():.1e}; loss {first:.3f} to {last:.3f}")
assert last < first
