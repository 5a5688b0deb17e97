# SPDX-License-Identifier: MIT
"""Continuations: the prompt once, in pieces, then a token a step over the latents so far."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from kimi_ops.models.kimi_k2.attention import LatentCache
from kimi_ops.models.kimi_k2.decode_graphs import CudaGraphs, DecodeGraphs
from kimi_ops.models.kimi_k2.decoder import Decoder
from kimi_ops.models.kimi_k2.sampling import Sampling

__all__ = ["Ending", "Prompt", "Streamer", "generate"]


class Streamer(Protocol):
    """What is told of every id as it comes; transformers' streamers are such."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


class Decodes(Protocol):
    """A tokenizer, as far as stop strings need it."""

    def decode(self, token_ids: list[int]) -> str: ...


def _error(name: str, expected: str, came: object, mend: str) -> ValueError:
    return ValueError(f"generate: {name}: expected {expected}, got {came}; {mend}")


@dataclass
class Prompt:
    """The sequences to continue, of different lengths where they are padded on the left."""

    ids: Tensor  # [B, S]
    mask: Tensor | None  # [B, S] bool

    def __post_init__(self) -> None:
        if self.ids.dim() != 2 or self.ids.shape[1] < 1:
            raise _error(
                "input_ids",
                "shape [B, S] with S >= 1",
                list(self.ids.shape),
                "start with at least one token",
            )
        if self.mask is None:
            return
        if self.mask.shape != self.ids.shape:
            raise _error(
                "attention_mask",
                f"shape {list(self.ids.shape)}",
                list(self.mask.shape),
                "1 is a token and 0 is padding",
            )
        self.mask = self.mask.bool()
        falls = self.mask[:, :-1] & ~self.mask[:, 1:]
        if bool(falls.any()) or not bool(self.mask[:, -1].all()):
            raise _error(
                "attention_mask",
                "padding on the left, and a token in every sequence",
                "padding after a token",
                "pad on the left: what is generated follows the last column",
            )

    def repeated(self, times: int) -> "Prompt":
        mask = None if self.mask is None else self.mask.repeat_interleave(times, 0)
        return Prompt(self.ids.repeat_interleave(times, 0), mask)

    def add(self, chosen: Tensor) -> None:
        self.ids = torch.cat((self.ids, chosen[:, None]), dim=1)
        if self.mask is not None:
            more = torch.ones_like(chosen[:, None], dtype=torch.bool)
            self.mask = torch.cat((self.mask, more), dim=1)

    def positions(self, start: int, end: int) -> dict[str, Any]:
        """What the columns from `start` to `end` add to the arguments of a forward."""
        if self.mask is None:
            return {}
        positions = (self.mask.long().cumsum(1) - 1).clamp(min=0)
        return {"attention_mask": self.mask[:, :end], "position_ids": positions[:, start:end]}


@dataclass
class Ending:
    """When a sequence is at its end, and what stands behind it."""

    ids: Tensor  # [n], any of which ends a sequence
    filler: int
    strings: Sequence[str] = ()
    tokenizer: Decodes | None = None
    finished: Tensor = field(init=False)  # [B] bool

    def start(self, batch: int) -> None:
        self.finished = torch.zeros(batch, dtype=torch.bool, device=self.ids.device)

    def fill(self, chosen: Tensor) -> Tensor:
        return torch.where(self.finished, self.filler, chosen)

    def look(self, chosen: Tensor, new: Tensor) -> bool:
        """Whether all sequences are finished with `chosen` [B] as the last of `new` [B, n]."""
        if len(self.ids):
            self.finished = self.finished | torch.isin(chosen, self.ids)
        if self.strings:
            assert self.tokenizer is not None
            for row in (~self.finished).nonzero()[:, 0].tolist():
                text = self.tokenizer.decode(new[row].tolist())
                self.finished[row] = any(string in text for string in self.strings)
        return bool(len(self.ids) or self.strings) and bool(self.finished.all())


@torch.no_grad()
def generate(
    model: Decoder,
    prompt: Prompt,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    ending: Ending,
    copies: int = 1,
    cache: LatentCache | None = None,
    use_cache: bool = True,
    prefill_chunk: int | None = None,
    streamer: Streamer | None = None,
    cuda_graph: bool = False,
) -> Tensor:
    """Continue every sequence; see `KimiK2.generate`."""
    _check(model, prompt, max_new_tokens, copies, cache, use_cache, prefill_chunk)
    if cuda_graph:
        _check_graph(model, use_cache)
    batch, length = prompt.ids.shape
    weight = model.lm_head.weight
    if use_cache and cache is None:
        place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        cache = LatentCache(model.config, batch, length + max_new_tokens, **place)
    was_training = model.training
    model.eval()
    try:
        if streamer is not None:
            streamer.put(prompt.ids.cpu())
        logits = _prefill(model, prompt, cache, prefill_chunk)
        if copies > 1:
            prompt, logits = prompt.repeated(copies), logits.repeat_interleave(copies, 0)
            cache = None if cache is None else cache.repeated(copies)
        graphs = None
        if cuda_graph and cache is not None:
            graphs = DecodeGraphs(model, cache, CudaGraphs())
        ending.start(batch * copies)
        for step in range(max_new_tokens):
            chosen = ending.fill(sampling.choose(logits, prompt.ids, prompt.mask))
            prompt.add(chosen)
            if streamer is not None:
                streamer.put(chosen.cpu())
            if ending.look(chosen, prompt.ids[:, length:]) or step + 1 == max_new_tokens:
                break
            logits = _last_logits(model, prompt, cache, graphs=graphs)
        if streamer is not None:
            streamer.end()
        return prompt.ids
    finally:
        model.train(was_training)


def _prefill(
    model: Decoder, prompt: Prompt, cache: LatentCache | None, chunk: int | None
) -> Tensor:
    """Logits of the last column; all but it in pieces, where there is a cache to keep them."""
    if cache is not None and chunk is not None:
        while prompt.ids.shape[1] - cache.length > chunk:
            _last_logits(model, prompt, cache, cache.length + chunk)
    return _last_logits(model, prompt, cache)


def _last_logits(
    model: Decoder,
    prompt: Prompt,
    cache: LatentCache | None,
    end: int | None = None,
    graphs: DecodeGraphs | None = None,
) -> Tensor:
    """[B, V] behind the columns before `end`, those that the cache does not hold computed."""
    start = 0 if cache is None else cache.length
    end = prompt.ids.shape[1] if end is None else end
    where = prompt.positions(start, end)
    if graphs is not None:
        return graphs.step(prompt.ids[:, start:end], where.get("position_ids"))
    return model(prompt.ids[:, start:end], cache=cache, logits_to_keep=1, **where)[:, -1]


def _check_graph(model: Decoder, use_cache: bool) -> None:
    device = model.lm_head.weight.device
    if device.type != "cuda":
        raise _error("cuda_graph", "a model on a CUDA device", device, "leave it out")
    if not use_cache:
        raise _error("cuda_graph", "use_cache=True beside it", False, "leave one of them out")
    if model.expert_ranks is not None:
        raise _error(
            "cuda_graph",
            "all experts on this device",
            "expert_ranks, whose calls wait on the host",
            "leave it out",
        )


def _check(
    model: Decoder,
    prompt: Prompt,
    max_new_tokens: int,
    copies: int,
    cache: LatentCache | None,
    use_cache: bool,
    chunk: int | None,
) -> None:
    length, limit = prompt.ids.shape[1], model.config.max_position_embeddings
    if max_new_tokens < 1:
        raise _error("max_new_tokens", "at least 1", max_new_tokens, "raise it")
    if length + max_new_tokens > limit:
        raise _error(
            "max_new_tokens",
            f"at most {limit - length} after {length} tokens",
            max_new_tokens,
            "lower it or shorten the prompt",
        )
    if copies < 1:
        raise _error("num_return_sequences", "at least 1", copies, "raise it")
    if chunk is not None and chunk < 1:
        raise _error("prefill_chunk", "at least 1 token or None", chunk, "raise it")
    if cache is None:
        return
    if not use_cache:
        raise _error("use_cache", "True beside a cache", use_cache, "leave one of them out")
    if copies > 1:
        raise _error(
            "num_return_sequences",
            "1 beside a cache, which holds a prompt once",
            copies,
            "repeat the prompts",
        )
    if cache.length >= length:
        raise _error(
            "cache",
            f"fewer tokens than the {length} of input_ids",
            cache.length,
            "input_ids begins with those that the cache holds",
        )
    if cache.length and prompt.mask is not None and cache.documents is None:
        raise _error(
            "cache",
            "one that was filled with a padding mask",
            "one without padding",
            "pass attention_mask from the first call on",
        )
    cache.check(
        prompt.ids.shape[0], length + max_new_tokens - 1 - cache.length, model.lm_head.weight
    )
