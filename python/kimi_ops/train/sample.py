# SPDX-License-Identifier: MIT
"""Text from a trained byte model."""

from __future__ import annotations

from pathlib import Path

import torch

from kimi_ops.models.kimi_k2 import KimiK2
from kimi_ops.train.checkpoint import CheckpointError, find_checkpoint
from kimi_ops.train.data import END_OF_FILE, VOCABULARY


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
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"generate: {folder}: cannot be loaded: {error}") from error
    if model.config.vocab_size != VOCABULARY:
        raise CheckpointError(
            f"generate: {folder}: expected a model of {VOCABULARY} byte values, got a vocabulary "
            f"of {model.config.vocab_size}; give a run of kimi-ops train"
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
        The prompt and the tokens do not fit into the model's positions, or a number out of range.
    """
    prefix = bytes([END_OF_FILE]) + prompt.encode()
    if not 0 <= seed < 2**63:
        raise ValueError(f"generate: seed: expected 0 to 2**63 - 1, got {seed}; choose another")
    limit = model.config.max_position_embeddings
    if len(prefix) + max_tokens > limit:
        raise ValueError(
            f"generate: max_tokens: expected prompt and tokens within {limit} bytes, got "
            f"{len(prefix)} + {max_tokens}; shorten one of them"
        )
    with torch.no_grad():
        ids = model.generate(
            torch.tensor([list(prefix)]),
            max_new_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            eos_token_id=END_OF_FILE,
        )
    text = bytes(ids[0, 1:].tolist())
    return text.split(bytes([END_OF_FILE]))[0].decode(errors="replace")
