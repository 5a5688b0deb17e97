# SPDX-License-Identifier: MIT
"""Conversations and tool calls in the format of Kimi K2; docs/chat.md tells the story."""

from kimi_ops.models.kimi_k2.chat.byte_tokenizer import ByteTokenizer
from kimi_ops.models.kimi_k2.chat.dialogue import Chat, Encodes, Piece, normalised, render
from kimi_ops.models.kimi_k2.chat.enforcer import Enforcer
from kimi_ops.models.kimi_k2.chat.replying import reply
from kimi_ops.models.kimi_k2.chat.tokenizer import Tokenizer, TransformersTokenizer, load_tokenizer
from kimi_ops.models.kimi_k2.chat.tool_call_parser import (
    Event,
    ToolCallParser,
    TurnStream,
    parse,
    parse_ids,
)
from kimi_ops.models.kimi_k2.chat.tool_calls import ToolCall, Turn
from kimi_ops.models.kimi_k2.chat.tool_schema import check_arguments, declare_json
from kimi_ops.models.kimi_k2.chat.tool_typescript import declare_typescript

__all__ = [
    "ByteTokenizer",
    "Chat",
    "Encodes",
    "Enforcer",
    "Event",
    "Piece",
    "Tokenizer",
    "ToolCall",
    "ToolCallParser",
    "TransformersTokenizer",
    "Turn",
    "TurnStream",
    "check_arguments",
    "declare_json",
    "declare_typescript",
    "load_tokenizer",
    "normalised",
    "parse",
    "parse_ids",
    "render",
    "reply",
]
