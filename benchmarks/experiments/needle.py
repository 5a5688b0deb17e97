# SPDX-License-Identifier: MIT
"""A needle in a haystack: does a small Kimi K2 find words far beyond the lengths it was trained on?

    python -m benchmarks.experiments.needle --minutes 5 --longest 131072

    hay hay [mark key w w w w] hay ... hay [mark key] -> w w w w

Random words, one after the other. The model (two layers, 0.1 M parameters) has K2's positions, 4096
that YaRN stretches to 131 072, and trains on haystacks that double in length once it finds their
needles; then it looks for needles at five depths of longer and longer ones. A needle is found if
all four words are right, greedily.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_ops import MuonClip, QKClip, muon_param_groups, update_expert_bias_
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config

WORDS, FOUND = 64, 4
SPAN = FOUND + 2  # a mark, a key, the words
POSITIONS = 131072
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
TOKENS = 3072  # of a step


def config() -> KimiK2Config:
    k2 = KimiK2Config.k2()
    return replace(
        KimiK2Config.tiny(),
        vocab_size=WORDS + 1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        q_lora_rank=None,
        kv_lora_rank=32,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        max_position_embeddings=POSITIONS,
        rope_theta=k2.rope_theta,
        rope_scaling=k2.rope_scaling,
    )


def haystacks(count: int, length: int, generator: torch.Generator, depth: float | None) -> Tensor:
    """[count, length + 1] ids, of which the last FOUND are to be found."""
    ids = torch.randint(0, WORDS, (count, length + 1), generator=generator)
    needle = torch.randint(0, WORDS, (count, SPAN), generator=generator)
    needle[:, 0] = WORDS
    room = length + 1 - 2 * SPAN
    if depth is None:
        first = torch.randint(0, room + 1, (count, 1), generator=generator)
    else:
        first = torch.full((count, 1), int(depth * room))
    ids.scatter_(1, first + torch.arange(SPAN), needle)
    ids[:, -SPAN:] = needle
    return ids


def train(model: KimiK2, minutes: float, longest: int, lr: float = 0.01) -> int:
    """Longer haystacks whenever the loss is small; the longest that it learnt."""
    clip = QKClip(model.attention_layers(), tau=100.0)
    optimizer = MuonClip(muon_param_groups(model), lr=lr, weight_decay=0.0, qk_clip=clip)
    generator = torch.Generator().manual_seed(1)
    end, length, learnt, mean, step = time.monotonic() + 60 * minutes, 24, 0, 3.0, 0
    while time.monotonic() < end and length <= longest:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20)
        ids = haystacks(max(2, TOKENS // length), length, generator, None)
        logits = model(ids[:, :-1], logits_to_keep=FOUND)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, -FOUND:].flatten())
        (loss + model.auxiliary_loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        for moe in model.moe_layers():
            update_expert_bias_(moe.gate.e_score_correction_bias, moe.tokens_per_expert, 1e-3)
        model.reset_statistics()
        mean, step = 0.95 * mean + 0.05 * loss.item(), step + 1
        if mean < 0.05:
            print(f"{length:>7} tokens learnt after {step} steps", flush=True)
            learnt, length, mean = length, 2 * length, 3.0
    return learnt


@torch.no_grad()
def found(model: KimiK2, length: int, depth: float, count: int) -> float:
    """The share of needles that are found at this depth."""
    generator = torch.Generator().manual_seed(length)
    right = 0
    for _ in range(count):
        ids = haystacks(1, length, generator, depth)
        right += int((model(ids[:, :-1], logits_to_keep=FOUND).argmax(-1) == ids[:, -FOUND:]).all())
    return right / count


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="of training (5)")
    parser.add_argument("--trained", type=int, default=768, help="longest haystack of it (768)")
    parser.add_argument("--longest", type=int, default=POSITIONS, help="looked through (131072)")
    parser.add_argument("--needles", type=int, default=4, help="a length and depth (4)")
    options = parser.parse_args()
    model = KimiK2(config()).train()
    learnt = train(model, options.minutes, options.trained)
    if not learnt:
        raise SystemExit("needle: no length was learnt; raise --minutes")
    model.eval()
    print(" tokens   at depth", *DEPTHS)
    length = learnt
    while length <= options.longest:
        shares = [found(model, length, depth, options.needles) for depth in DEPTHS]
        print(f"{length:>7}", *(f"{share:5.0%}" for share in shares), flush=True)
        length = POSITIONS if length < POSITIONS < 2 * length else 2 * length


if __name__ == "__main__":
    main()
