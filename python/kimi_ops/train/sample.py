# SPDX-License-Identifier: MIT
"""Text from a trained byte model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from kimi_ops.gpu import choose_device
from kimi_ops.models.kimi_k2 import ExpertRanks, KimiK2, KimiK2Config
from kimi_ops.train.checkpoint import CheckpointError, find_checkpoint
from kimi_ops.train.data import END_OF_FILE, VOCABULARY
from kimi_ops.train.ranks import Ranks
from kimi_ops.train.settings import DTYPES

MAX_TOKENS = 256  # where the caller names no number


def load_model(
    path: Path,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    tell: Callable[[str], None] = print,
    ranks: Ranks | None = None,
) -> KimiK2:
    """The model of a run folder (its latest checkpoint), a checkpoint or a Hugging Face folder.

    Parameters
    ----------
    path : Path
    device : str
        ``cpu``, ``cuda`` or ``auto``.
    dtype : str, optional
        Of the weights; the checkpoint's where absent.
    tell : callable
        Hears of a GPU that ``auto`` finds unusable.
    ranks : Ranks, optional
        Processes that share the experts; all of them load the model, and continue the same text.

    Raises
    ------
    CheckpointError
        Nothing there that can be read whole, or not a model of bytes.
    DeviceError, ValueError
        A device or a dtype that is not there.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"generate: --dtype: expected {' or '.join(DTYPES)}, got {dtype}; choose")
    ranks = Ranks() if ranks is None else ranks
    with ranks.together():
        folder = path if (path / "config.json").is_file() else find_checkpoint(path, "generate")
        place = choose_device(device, "generate", tell)
        config = _config(folder)
    spread = ranks.spread(config, config.max_position_embeddings, place)
    with ranks.together():
        model = _read(folder, place, None if dtype is None else getattr(torch, dtype), spread)
    return model.eval()


def _config(folder: Path) -> KimiK2Config:
    try:
        config = KimiK2Config.from_file(folder / "config.json")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"generate: {folder}: cannot be loaded: {error}") from error
    if config.vocab_size != VOCABULARY:
        raise CheckpointError(
            f"generate: {folder}: expected a model of {VOCABULARY} byte values, got a vocabulary "
            f"of {config.vocab_size}; give a run of kimi-ops train"
        )
    return config


def _read(
    folder: Path, place: torch.device, dtype: torch.dtype | None, spread: ExpertRanks | None
) -> KimiK2:
    try:
        return KimiK2.from_pretrained(folder, device=place, dtype=dtype, expert_ranks=spread)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"generate: {folder}: cannot be loaded: {error}") from error


def sample_text(
    model: KimiK2,
    prompt: str,
    *,
    max_tokens: int | None = None,
    temperature: float,
    top_p: float,
    seed: int,
) -> str:
    """`prompt` continued by up to `max_tokens` bytes; stops at the end of a file.

    Without a number it is 256, or what the model has positions for behind the prompt. Bytes that
    are not UTF-8 appear as the replacement character. A seed gives the same text on the same
    device.

    Raises
    ------
    ValueError
        The prompt and the tokens do not fit into the model's positions, or a number out of range.
    """
    # a command line that is not UTF-8 arrives with its bytes escaped
    prefix = bytes([END_OF_FILE]) + prompt.encode(errors="surrogateescape")
    if not 0 <= seed < 2**63:
        raise ValueError(f"generate: seed: expected 0 to 2**63 - 1, got {seed}; choose another")
    limit = model.config.max_position_embeddings
    room = limit - len(prefix)
    if room < 1:
        raise ValueError(
            f"generate: --prompt: expected at most {limit - 2} bytes, for a model of {limit} "
            f"positions, got {len(prefix) - 1}; shorten it"
        )
    count = min(MAX_TOKENS, room) if max_tokens is None else max_tokens
    if not 1 <= count <= room:
        raise ValueError(
            f"generate: --max-tokens: expected 1 to {room}, which with the prompt is within "
            f"{limit} positions, got {count}; choose another number"
        )
    ids = model.generate(
        torch.tensor([list(prefix)], device=model.lm_head.weight.device),
        max_new_tokens=count,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        eos_token_id=END_OF_FILE,
    )
    text = bytes(ids[0, 1:].tolist())
    return text.split(bytes([END_OF_FILE]))[0].decode(errors="replace")
