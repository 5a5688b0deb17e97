# SPDX-License-Identifier: MIT
"""K2's whole context: 131 072 positions of a small model with K2's YaRN, in bounded memory."""

import resource
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from test_kimi_k2_model import hf_config, randomize, relative_error, to_transformers

from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config, LatentCache
from kimi_ops.models.kimi_k2.rope import rotary_tables, rotate

WHOLE = 131072


def small(**changes) -> KimiK2Config:
    """One head and layer, and the positions of K2 as released: 4096 stretched to 131 072."""
    k2 = KimiK2Config.k2()
    positions = {
        "rope_scaling": k2.rope_scaling,
        "rope_theta": k2.rope_theta,
        "max_position_embeddings": k2.max_position_embeddings,
        "qk_rope_head_dim": k2.qk_rope_head_dim,
    }
    size = {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 2}
    return replace(KimiK2Config.tiny(), **positions | size | changes)


def test_positions_up_to_the_last_are_those_of_transformers():
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

    config = small()
    assert config.max_position_embeddings == WHOLE
    positions = torch.arange(WHOLE)
    rotary = theirs.DeepseekV3RotaryEmbedding(hf_config(config))
    for ours, other in zip(
        rotary_tables(config, positions), rotary(torch.zeros(1), positions[None]), strict=True
    ):
        torch.testing.assert_close(ours, other[0, :, : ours.shape[1]], rtol=0, atol=1e-6)


def test_8192_tokens_equal_transformers():
    model = KimiK2(small()).eval()
    randomize(model)
    other = to_transformers(model).eval()
    other.config._attn_implementation = "sdpa"
    ids = torch.randint(0, 64, (1, 8192), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model(ids, logits_to_keep=512)
        assert relative_error(ours, other(ids, logits_to_keep=512).logits) < 1e-5
        chunked = model.generate(ids, max_new_tokens=2, temperature=0.0, prefill_chunk=1024)
        assert torch.equal(chunked[:, -2], ours[:, -1].argmax(-1))


def whole_context() -> None:
    """The last logits of 131 072 tokens, by one forward and over a cache; what they took."""
    config = small(num_hidden_layers=1, first_k_dense_replace=0, qk_rope_head_dim=16)
    model = KimiK2(config).eval()
    randomize(model)
    ids = torch.randint(0, 64, (1, WHOLE), generator=torch.Generator().manual_seed(2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.no_grad():
        at_once = model(ids, logits_to_keep=4)
        # The only layer's entries are known without attention.
        (attention,) = model.attention_layers()
        layer = model.model.layers[0]
        entries = attention.kv_a_proj_with_mqa(layer.input_layernorm(model.model.embed_tokens(ids)))
        latent, key = entries.split([config.kv_lora_rank, 16], dim=-1)
        key = rotate(key, *rotary_tables(config, torch.arange(WHOLE)))
        cache = LatentCache(config, 1, WHOLE)
        cache.write(0, torch.cat((attention.kv_a_layernorm(latent), key), dim=-1))
        cache.length = WHOLE - 4
        stepped = torch.cat([model(ids[:, [t]], cache=cache) for t in range(WHOLE - 4, WHOLE)], 1)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    print(relative_error(stepped, at_once), grown, cache.nbytes)


def test_131072_tokens_in_bounded_memory():
    command = [sys.executable, "-c", "import test_kimi_k2_long as t; t.whole_context()"]
    path = [*sys.path, __file__.rpartition("/")[0]]
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(filter(None, path)), "PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    error, grown, cache = (float(word) for word in run.stdout.split())
    assert error < 1e-5
    assert cache == 4 * WHOLE * (16 + 16)
    # The scores of all pairs would be 69 GB; a few rows of a token's width are this much.
    assert grown < 4 * WHOLE * 1200


def test_a_token_beyond_the_context_is_refused():
    config = small(num_hidden_layers=1)
    with pytest.raises(ValueError, match="expected at most 131072"):
        KimiK2(config)(torch.zeros(1, WHOLE + 1, dtype=torch.int64))
