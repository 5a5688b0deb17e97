# SPDX-License-Identifier: MIT
"""A model's turn, and the program that talks with it."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kimi_ops.cli import app
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config, chat
from kimi_ops.models.kimi_k2.chat import ByteTokenizer, parse, render, reply

USER = {"role": "user", "content": "Hello"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def model() -> KimiK2:
    return KimiK2(KimiK2Config.mini()).eval()


def test_a_reply_is_what_the_model_generates(model):
    tokenizer = ByteTokenizer()
    ids, _ = render([USER], TOOLS, generation_prompt=True).encode(tokenizer)
    expected = model.generate(torch.tensor([ids]), max_new_tokens=30, eos_token_id=0xF5)
    events = []
    turn = reply(model, tokenizer, [USER], TOOLS, max_new_tokens=30, tell=events.append)
    text = tokenizer.decode(expected[0, len(ids) :].tolist(), skip_special_tokens=True)
    assert turn.content and text.startswith(turn.content)
    assert "".join(one for one in events if isinstance(one, str)) == turn.content


def test_a_reply_takes_the_positions_that_are_left(model):
    limit = model.config.max_position_embeddings
    used = len(render([{**USER, "content": ""}], generation_prompt=True).encode(ByteTokenizer())[0])
    seen = []

    def count(ids, logits):
        seen.append(ids.shape[1])
        return logits.index_fill(1, torch.tensor([0xF5]), -torch.inf)

    long = {**USER, "content": "x" * (limit - used - 3)}
    reply(model, ByteTokenizer(), [long], logits_processor=[count])
    assert seen == [limit - 3, limit - 2, limit - 1]
    with pytest.raises(ValueError, match=f"the {limit} positions of the model, got {limit}"):
        reply(model, ByteTokenizer(), [{**USER, "content": "x" * (limit - used)}])


def test_the_program_talks(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model.save_pretrained(tmp_path)
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    call = "<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
    answers = [parse(f"Wait.{call}", TOOLS), parse("Done.")]
    heard = []

    def scripted(model, tokenizer, messages, tools, *, tell, **options):
        heard.append((list(messages), tools, options["max_new_tokens"]))
        turn = answers.pop(0)
        for event in (turn.content, *turn.calls):
            tell(event)
        return turn

    monkeypatch.setattr(chat, "reply", scripted)
    arguments = ["chat", str(tmp_path), "--system=S", f"--tools={tmp_path / 'tools.json'}"]
    result = CliRunner().invoke(app, [*arguments, "--max-tokens=9"], input="Hello\n3\n")
    assert result.exit_code == 0, result.output
    assert result.stdout.split("\n")[:3] == ["Wait.", "[call f {}]", ""]
    assert "Done." in result.stdout and "tokenizer: bytes" in result.stderr
    assert "functions.f:0> " in result.stderr
    (first, tools, most), (second, _, _) = heard
    assert first == [{"role": "system", "content": "S"}, USER] and tools == TOOLS and most == 9
    assert second[-1]["content"] == "3" and second[-1]["tool_call_id"] == "functions.f:0"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "--tools: expected JSON"),
        ("{}", "expected a list of tools, got a dict"),
        ("[1]", "tools"),
    ],
)
def test_the_program_says_what_is_wrong(model, tmp_path: Path, content: str, message: str):
    model.save_pretrained(tmp_path)
    (tmp_path / "tools.json").write_text(content)
    result = CliRunner().invoke(
        app, ["chat", str(tmp_path), f"--tools={tmp_path / 'tools.json'}"], input="Hello\n"
    )
    assert result.exit_code == 1 and message in result.stderr and "Traceback" not in result.output


def test_the_program_without_a_checkpoint(tmp_path: Path):
    result = CliRunner().invoke(app, ["chat", str(tmp_path)])
    assert result.exit_code == 1 and result.stderr.startswith("error: chat: ")
