# SPDX-License-Identifier: MIT
"""What a forward is given: ids or embeddings, and which tokens see each other.

A token sees those before it in its document, and itself. A document is a sequence without its
padding; where `position_ids` are given and no padding mask, a sequence is packed from several, and
one ends where the positions do not go on.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kimi_ops.models.kimi_k2.config import KimiK2Config

__all__ = ["Inputs", "check_inputs"]


@dataclass(frozen=True)
class Inputs:
    """Arguments of `Decoder.forward` that fit together."""

    positions: Tensor  # [S], or [B, S] where they were given
    documents: Tensor | None  # [B, S] int64, the number of each token's document; -1: padding
    shape: tuple[int, int]  # B, S


def check_inputs(
    config: KimiK2Config,
    past: int,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
) -> Inputs:
    """Refuse what no forward can do, before anything changes."""
    if (input_ids is None) == (inputs_embeds is None):
        both = "both" if input_ids is not None else "neither"
        raise ValueError(f"KimiK2: input_ids: expected ids or inputs_embeds, got {both}; pass one")
    if inputs_embeds is not None:
        _check_embeddings(config, inputs_embeds)
        given = inputs_embeds
    else:
        assert input_ids is not None
        _check_ids(config, input_ids)
        given = input_ids
    batch, length = given.shape[:2]
    if past + length > config.max_position_embeddings:
        raise ValueError(
            f"KimiK2: input_ids: expected at most {config.max_position_embeddings} "
            f"positions, got {past + length}; shorten the sequence"
        )
    documents = None
    if attention_mask is not None:
        documents = _of_mask(attention_mask, (batch, length), past)
    positions = torch.arange(past, past + length, device=given.device)
    if position_ids is not None:
        positions = _of_positions(config, position_ids, (batch, length))
        if documents is None and past == 0:
            documents = _packed(positions)
    return Inputs(positions, documents, (batch, length))


def _readable(values: Tensor) -> bool:
    """Whether looking at values costs no synchronisation and breaks no graph."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_ids(config: KimiK2Config, ids: Tensor) -> None:
    if ids.dtype != torch.int64:
        raise TypeError(f"KimiK2: input_ids: expected int64, got {ids.dtype}; use input_ids.long()")
    if ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(
            "KimiK2: input_ids: expected shape [B, S] with B, S >= 1, got "
            f"{list(ids.shape)}; add a batch dimension"
        )
    if _readable(ids):
        low, high = (int(v) for v in ids.aminmax())
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"KimiK2: input_ids: expected ids in 0 .. {config.vocab_size - 1}, got "
                f"{low} .. {high}; use this model's tokenizer"
            )


def _check_embeddings(config: KimiK2Config, embeddings: Tensor) -> None:
    fits = embeddings.dim() == 3 and embeddings.shape[2] == config.hidden_size
    if not fits or embeddings.numel() == 0:
        raise ValueError(
            f"KimiK2: inputs_embeds: expected shape [B, S, {config.hidden_size}], got "
            f"{list(embeddings.shape)}; they are rows of model.model.embed_tokens"
        )


def _of_mask(mask: Tensor, shape: tuple[int, int], past: int) -> Tensor:
    """Documents of an attention mask over the new tokens, or over all that a cache has too."""
    batch, length = shape
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] not in (length, past + length):
        raise ValueError(
            f"KimiK2: attention_mask: expected shape {[batch, past + length]}, got "
            f"{list(mask.shape)}; 1 is a token and 0 is padding"
        )
    if mask.dtype != torch.bool and mask.dtype not in (torch.int64, torch.int32, torch.uint8):
        raise TypeError(
            f"KimiK2: attention_mask: expected bool or int64, got {mask.dtype}; 1 is a token and "
            "0 is padding"
        )
    if _readable(mask) and mask.dtype != torch.bool and bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(
            "KimiK2: attention_mask: expected 0 and 1, got other numbers; packed documents are "
            "told by position_ids"
        )
    return mask[:, -length:].bool().long() - 1


def _of_positions(config: KimiK2Config, positions: Tensor, shape: tuple[int, int]) -> Tensor:
    if positions.dtype != torch.int64:
        raise TypeError(f"KimiK2: position_ids: expected int64, got {positions.dtype}; use .long()")
    if positions.shape not in (shape, (1, shape[1])):
        raise ValueError(
            f"KimiK2: position_ids: expected shape {list(shape)}, got {list(positions.shape)}; "
            "give one for each token"
        )
    if _readable(positions):
        low, high = (int(v) for v in positions.aminmax())
        if low < 0 or high >= config.max_position_embeddings:
            raise ValueError(
                f"KimiK2: position_ids: expected 0 .. {config.max_position_embeddings - 1}, got "
                f"{low} .. {high}; shorten the sequence"
            )
    return positions.expand(shape)


def _packed(positions: Tensor) -> Tensor | None:
    """Numbers of the documents that positions [B, S] run through; None where there is one each."""
    starts = torch.zeros_like(positions)
    starts[:, 1:] = positions.diff(dim=1) != 1
    return None if _readable(starts) and not bool(starts.any()) else starts.cumsum(1)
