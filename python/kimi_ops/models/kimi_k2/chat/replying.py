# SPDX-License-Identifier: MIT
"""A model's turn in a conversation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from kimi_ops.models.kimi_k2.chat.dialogue import IM_END, Message
from kimi_ops.models.kimi_k2.chat.tokenizer import Tokenizer
from kimi_ops.models.kimi_k2.chat.tool_call_parser import Event, TurnStream
from kimi_ops.models.kimi_k2.chat.tool_calls import Turn
from kimi_ops.models.kimi_k2.model import KimiK2

__all__ = ["reply"]


def reply(
    model: KimiK2,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    max_new_tokens: int | None = None,
    tell: Callable[[Event], None] | None = None,
    **options: Any,
) -> Turn:
    """What the model answers to a conversation.

    Parameters
    ----------
    model, tokenizer : KimiK2, Tokenizer
        The tokenizer that `load_tokenizer` finds for the model.
    messages, tools
        As of :func:`~kimi_ops.models.kimi_k2.chat.render`.
    max_new_tokens : int, optional
        As many as the model has positions for where absent.
    tell : callable, optional
        Given parts of the content as they come, and calls when they are complete.
    **options
        Of :meth:`KimiK2.generate`: `temperature`, `top_p`, `seed`, `logits_processor` ...

    Returns
    -------
    Turn
        Its `message` continues the conversation.

    Raises
    ------
    ValueError
        As `render` and `generate`; a conversation beyond the model's positions.

    Examples
    --------
    >>> from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config
    >>> from kimi_ops.models.kimi_k2.chat import ByteTokenizer
    >>> from kimi_ops.models.kimi_k2.chat import reply
    >>> model = KimiK2(KimiK2Config.mini())  # not trained: it babbles
    >>> turn = reply(model, ByteTokenizer(), [{"role": "user", "content": "Hi"}], max_new_tokens=4)
    >>> turn.message["role"]
    'assistant'
    """
    ids, _ = tokenizer.render(messages, tools, generation_prompt=True).encode(tokenizer)
    room = model.config.max_position_embeddings - len(ids)
    if room < 1:
        raise ValueError(
            f"reply: messages: expected fewer tokens than the {room + len(ids)} positions of the "
            f"model, got {len(ids)}; shorten the conversation"
        )
    stream = TurnStream(tokenizer, tell, tools)
    model.generate(
        torch.tensor([ids], device=model.lm_head.weight.device),
        max_new_tokens=room if max_new_tokens is None else max_new_tokens,
        eos_token_id=tokenizer.markers[IM_END],
        streamer=stream,
        **options,
    )
    return stream.turn
