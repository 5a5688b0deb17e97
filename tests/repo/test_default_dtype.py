# SPDX-License-Identifier: MIT
"""torch.set_default_dtype says what new parameters are, and changes no result."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kimi_ops import formats, gpu
from kimi_ops.agentic import rollout
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config
from kimi_ops.models.kimi_k2.checkpoint import stored
from kimi_ops.nn import convert
from kimi_ops.train import TrainSettings
from kimi_ops.train.passes import Whole
from kimi_ops.train.staged import Staged
from tests.repo import outputs

PACKED = outputs.whole(4, 32, high=256).to(torch.uint8)
SCALES = outputs.whole(4, 2, low=120, high=135).to(torch.uint8)
TOKENS = outputs.whole(4, 33, high=64).long()
SETTINGS = TrainSettings(preset="tiny", window=32, sequences=2, accumulate=2)
torch.manual_seed(0)
MODEL = KimiK2(KimiK2Config.tiny(), dtype=torch.float32)


def steps() -> tuple[Tensor, ...]:
    ranks: Any = SimpleNamespace(layout=SimpleNamespace(dp=1), overlap=False)
    MODEL.zero_grad()
    found = Whole(MODEL, SETTINGS, ranks).step(TOKENS)
    return *found, *(p.grad for p in MODEL.parameters() if p.grad is not None)


class Schedule:
    def step(self, *windows: Tensor, target: Tensor, losses: list[Tensor], **_: Any) -> None:
        losses += [outputs.numbers(1 + 2**-20)[0], outputs.numbers(2**-20)[0]]


def stage_losses() -> tuple[Tensor]:
    stage: Any = SimpleNamespace(first=True, last=True, auxiliary_loss=lambda: None)
    staged = Staged(stage, SETTINGS, SimpleNamespace(schedule="1F1B"))  # type: ignore[arg-type]
    staged._schedule = lambda *_: Schedule()  # type: ignore[assignment, method-assign]
    return (staged.step(TOKENS)[0],)


def exponents() -> tuple[Tensor]:
    shards: Any = SimpleNamespace(
        tensor=lambda name: SCALES.view(torch.float8_e8m0fnu), header=lambda name: (None, "F8_E8M0")
    )
    return (stored.scales("scale", shards),)


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        like: Any = {"bias": False, "dtype": torch.float32}
        self.gate_proj, self.up_proj = nn.Linear(8, 6, **like), nn.Linear(8, 6, **like)
        self.down_proj = nn.Linear(6, 8, **like)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def stacked_experts() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    found = convert.stacked([Expert(), Expert()], None, None)
    return found.gate_up, found.down


def drawn() -> tuple[Tensor]:
    row: Any = SimpleNamespace(
        temperature=0.7, enforcer=None, allowed=lambda logits: logits,
        roll=SimpleNamespace(waiting=False, episode=SimpleNamespace(finished=False)),
    )  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    return (torch.tensor(rollout._choose(outputs.uniform(9, 50) * 3, [row] * 9, draw)),)


CASES = {
    "one rank's step": steps,
    "a stage's losses": stage_losses,
    "MXFP4": lambda: formats.mxfp4_parts(PACKED, SCALES),
    "MXFP4 as numbers": lambda: (formats.dequantize_mxfp4(PACKED, SCALES),),
    "scales that are exponents": exponents,
    "stacked experts": stacked_experts,
    "draws of a rollout": drawn,
} | {
    name: function
    for name, (engines, function) in outputs.CASES.items()
    if "portable" in engines
}  # fmt: skip


@pytest.mark.parametrize("other", [torch.float64, torch.bfloat16], ids=str)
def test_results_are_the_same_bits(other):
    assert torch.get_default_dtype() == torch.float32
    for name, compute in CASES.items():
        want = outputs._digest(compute())
        torch.set_default_dtype(other)
        try:
            got = outputs._digest(compute())
        finally:
            torch.set_default_dtype(torch.float32)
        assert got == want, name


def test_a_gpu_is_tried_in_float32(monkeypatch):
    seen = []

    def topk_gate(logits: Tensor, k: int) -> Any:
        seen.append(logits.dtype)
        return SimpleNamespace(indices=torch.tensor([[1, 2]]))

    monkeypatch.setattr(gpu, "topk_gate", topk_gate)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(gpu._native, "_C", SimpleNamespace(cuda_architectures=lambda: "90"))
    torch.set_default_dtype(torch.float64)
    try:
        gpu._try_gpu("cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    assert seen == [torch.float32]
