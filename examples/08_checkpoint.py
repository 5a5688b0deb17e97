# SPDX-License-Identifier: MIT
"""A Kimi K2 in the layout of Hugging Face: saved, read whole and in part, sampled.

python examples/08_checkpoint.py
"""

import tempfile

import torch

from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config, load_layer

model = KimiK2(KimiK2Config.tiny()).eval()
model.init_weights(seed=0)
ids = torch.arange(12).view(2, 6)

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder, max_shard_bytes=50_000)  # shards and an index
    again = KimiK2.from_pretrained(folder).eval()
    layer = load_layer(folder, 1)  # reads the files of this layer alone
assert torch.equal(again(ids), model(ids))
assert torch.equal(layer.mlp.gate.weight, model.model.layers[1].mlp.gate.weight)

sample = again.generate(ids, max_new_tokens=8, temperature=0.8, top_p=0.95, seed=0)
print(sample.tolist())
assert torch.equal(sample[:, :6], ids) and sample.shape == (2, 14)
