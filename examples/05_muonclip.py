# SPDX-License-Identifier: MIT
"""MuonClip on a Kimi K2 in miniature: Muon for matrices, AdamW for the rest, QK-Clip behind both.

python examples/05_muonclip.py
"""

import torch
import torch.nn.functional as F

from kimi_ops import MuonClip, QKClip, muon_param_groups, update_expert_bias_
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config

model = KimiK2(KimiK2Config.tiny())
model.init_weights(seed=0)
vocabulary = model.config.vocab_size
clip = QKClip(model.attention_layers(), tau=100.0)
optimizer = MuonClip(muon_param_groups(model), lr=5e-3, weight_decay=0.1, qk_clip=clip)
generator = torch.Generator().manual_seed(0)

losses = []
for step in range(20):
    starts = torch.randint(0, vocabulary, (8, 1), generator=generator)
    ids = (starts + 3 * torch.arange(33)) % vocabulary  # sequences that can be learnt
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    (loss + model.auxiliary_loss()).backward()
    optimizer.step()
    optimizer.zero_grad()
    for moe in model.moe_layers():
        update_expert_bias_(moe.gate.e_score_correction_bias, moe.tokens_per_expert, rate=1e-3)
    model.reset_statistics()
    losses.append(loss.item())
    if step % 5 == 4:
        assert clip.max_logits is not None
        print(f"step {step}: loss {losses[-1]:.3f}, largest logit {clip.max_logits.max():.2f}")
assert losses[-1] < 0.8 * losses[0]
