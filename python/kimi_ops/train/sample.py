# SPDX-License-Identifier: MIT
"""Text from a trained byte model."""

from __future__ import annotations

from pathlib import Path

import torch

from kimi_ops.models.kimi_k2 import KimiK2
from kimi_ops.train.checkpoint import CheckpointError, find_checkpoint
from kimi_ops.train.data import kEndOfFile, kVocabulary


def load_model(path: Path) -> KimiK2:
    """The model of a run folder (its latest checkpoint), a checkpoint or a Hugging Face folder.

    Raises
    ------
    CheckpointError
        Nothing there that can be read whole, or not a model of bytes.
    """
    folder = path if (path / "config.json").is_file() else find_checkpoint(path)
    try:
        model = KimiK2.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"generate: {folder} cannot be loaded: {error}") from error
    if model.config.vocab_size != kVocabulary:
        raise CheckpointError(
            f"generate: {folder}: expected a model of {kVocabulary} byte values, its vocabulary "
            f"has "
            f"{model.config.vocab_size}"
        )
    return model.eval()


def sample_text(
    model: KimiK2, prompt: str, *, max_tokens: int, temperature: float, top_p: float, seed: int
) -> str:
    """`prompt` continued by up to `max_tokens` bytes; stops at the end of a file.

    Bytes that are not UTF-8 appear as the replacement character.

    Raises
    ------
    ValueError
        The prompt and the tokens do not fit into the model's positions.
    """
    prefix = bytes([kEndOfFile]) + prompt.encode()
    limit = model.config.max_position_embeddings
    if len(prefix) + max_tokens > limit:
        raise ValueError(
            f"generate: max_tokens: expected prompt and tokens within {limit} bytes, came "
            f"{len(prefix)} + {max_tokens}; shorten one of them"
        )
    with torch.no_grad():
        ids = model.generate(
            torch.tensor([list(prefix)]),
            max_new_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            eos_token_id=kEndOfFile,
        )
    text = bytes(ids[0, 1:].tolist())
    return text.split(bytes([kEndOfFile]))[0].decode(errors="replace")
