# SPDX-License-Identifier: MIT
"""Sampling continuations."""

import torch
from torch import Tensor

from kimi_ops.models.kimi_k2.attention import LatentCache
from kimi_ops.models.kimi_k2.decoder import Decoder

__all__ = ["generate", "sample"]


def sample(
    logits: Tensor,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One id for each row of logits [B, V]: [B] int64.

    Temperature 0 takes the largest logit (the lowest id of equals). Otherwise ids are drawn from
    softmax(logits / temperature), restricted to the most likely ids whose probabilities first reach
    `top_p` together.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = (logits.float() / temperature).softmax(dim=-1)
    if top_p < 1:
        ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        ordered = ordered.masked_fill(before >= top_p, 0.0)  # the first is always kept
        probabilities = torch.zeros_like(ordered).scatter(-1, ids, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


@torch.no_grad()
def generate(
    model: Decoder,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    eos_token_id: int | list[int] | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Continue every sequence; see `KimiK2.generate`."""
    _check(model, input_ids, max_new_tokens, temperature, top_p, seed, generator)
    if seed is not None:
        generator = torch.Generator(device=input_ids.device).manual_seed(seed)
    eos = eos_token_id if eos_token_id is not None else model.config.eos_token_id
    ends = torch.tensor([] if eos is None else eos, device=input_ids.device).long().view(-1)
    batch, length = input_ids.shape
    weight = model.lm_head.weight
    cache = None
    if use_cache:
        capacity = length + max_new_tokens
        cache = LatentCache(model.config, batch, capacity, device=weight.device, dtype=weight.dtype)
    was_training = model.training
    model.eval()
    try:
        ids, new = input_ids, input_ids
        finished = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
        for _ in range(max_new_tokens):
            logits = model(ids if cache is None else new, cache=cache)[:, -1]
            chosen = sample(logits, temperature=temperature, top_p=top_p, generator=generator)
            if len(ends):
                chosen = torch.where(finished, ends[0], chosen)
                finished = finished | torch.isin(chosen, ends)
            new = chosen[:, None]
            ids = torch.cat((ids, new), dim=1)
            if len(ends) and bool(finished.all()):
                break
        return ids
    finally:
        model.train(was_training)


def _check(
    model: Decoder,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    generator: torch.Generator | None,
) -> None:
    if input_ids.dim() != 2 or input_ids.shape[1] < 1:
        raise ValueError(
            "generate: input_ids: expected shape [B, S] with S >= 1, got "
            f"{list(input_ids.shape)}; start with at least one token"
        )
    if max_new_tokens < 1:
        raise ValueError(
            f"generate: max_new_tokens: expected at least 1, got {max_new_tokens}; raise it"
        )
    limit = model.config.max_position_embeddings
    if input_ids.shape[1] + max_new_tokens > limit:
        raise ValueError(
            f"generate: max_new_tokens: expected at most {limit - input_ids.shape[1]} after "
            f"{input_ids.shape[1]} tokens, got {max_new_tokens}; lower it or shorten the prompt"
        )
    if not 0 <= temperature < float("inf"):
        raise ValueError(
            f"generate: temperature: expected at least 0 and finite, got {temperature}; 1 samples "
            "from the model's own distribution"
        )
    if not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p: expected 0 < top_p <= 1, got {top_p}; use 1 for all")
    if seed is not None and generator is not None:
        raise ValueError(
            "generate: seed: expected none beside a generator, got both; pass one of them"
        )
