# SPDX-License-Identifier: MIT
"""attention_max_logits against torch: the scores in blocks of 512 queries, their largest kept.

Peers: "torch" multiplies in the dtype of q and k and never looks at keys beyond a block; "twin" is
kimi_ops.reference, in fp32 and blocks of 128; "attention" is scaled_dot_product_attention on the
same q and k, what the maxima come on top of. Causal. Roof: torch's large dense product of the
same dtype in the same run; half of all scores are counted.

Then QKClip.step of many latent layers, one head in eight a little above tau, against the twin
called once a layer. Roof: the bandwidth of the same run; the clipped rows are read and written.

    python -m benchmarks.bench_qk_clip [--help]
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import LogitsCase, logits_cases
from benchmarks.marks import parametrize
from benchmarks.measure import Functions
from benchmarks.session import Session, main
from kimi_ops import QKClip, attention_max_logits
from kimi_ops.reference.qk_clip import Layer, Rows, clip_rows_
from kimi_ops.reference.qk_clip import attention_max_logits as twin

BLOCK = 512


def torch_max_logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """[heads], the largest causal logit of each."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    largest = torch.full((q.shape[1],), float("-inf"), device=q.device)
    for start in range(0, q.shape[2], BLOCK):
        stop = min(start + BLOCK, q.shape[2])
        scores = q[:, :, start:stop] @ k[:, :, :stop].mT
        above = torch.ones_like(scores[0, 0, :, start:], dtype=torch.bool).triu(1)
        scores[..., start:].masked_fill_(above, float("-inf"))
        largest = torch.maximum(largest, scores.amax(dim=(0, 2, 3)).float())
    return largest * scale


def ways(case: LogitsCase, device: str) -> Functions:
    dtype = getattr(torch, case.dtype)
    like = {"dtype": dtype, "device": device}
    q = torch.randn(case.batch, case.queries, case.heads, case.dim).to(**like).transpose(1, 2)
    k = torch.randn(case.batch, case.keys, case.kv_heads, case.dim).to(**like).transpose(1, 2)
    scale, grouped = case.dim**-0.5, case.heads != case.kv_heads
    return {
        "kimi_ops": lambda: attention_max_logits(q, k, scale),
        "torch": lambda: torch_max_logits(q, k, scale),
        "twin": lambda: twin(q, k, scale, True),
        "attention": lambda: F.scaled_dot_product_attention(
            q, k, k, is_causal=True, enable_gqa=grouped
        ),
    }


@dataclass(frozen=True)
class ClipCase:
    """Latent layers: heads of 128 + 64 query rows and 128 + 128 key and value rows."""

    layers: int
    heads: int
    q_rank: int
    kv_rank: int

    def __str__(self) -> str:
        return f"step, {self.layers} layers, heads {self.heads}"

    def work(self) -> int:
        """Bytes of one head in eight, read and written in bf16."""
        rows = 192 * self.q_rank + 128 * self.kv_rank
        return self.layers * (self.heads // 8) * rows * 2 * 2


def clip_cases(quick: bool, device: str) -> list[ClipCase]:
    small = ClipCase(8, 8, 256, 128)
    return [small] if quick or device == "cpu" else [small, ClipCase(61, 64, 1536, 512)]  # K2's


def latent_layer(case: ClipCase, device: str) -> nn.Module:
    like = {"bias": False, "dtype": torch.bfloat16, "device": device}
    layer = nn.Module()
    layer.q_b_proj = nn.Linear(case.q_rank, case.heads * 192, **like)
    layer.kv_b_proj = nn.Linear(case.kv_rank, case.heads * 256, **like)
    layer.qk_nope_head_dim, layer.qk_rope_head_dim, layer.v_head_dim = 128, 64, 128
    layer.register_buffer("max_logits", torch.empty(case.heads, device=device))
    return layer


def clip_ways(case: ClipCase, device: str) -> Functions:
    layers = [latent_layer(case, device) for _ in range(case.layers)]
    buffers = [layer.max_logits for layer in layers]
    seen = torch.where(torch.arange(case.heads, device=device) % 8 == 0, 100.01, 50.0)
    clip = QKClip(layers)
    rows = [Rows(0, case.heads, 192, 0, 128, 64), Rows(0, case.heads, 256, 0, 128, 0)]

    def step() -> None:
        torch._foreach_copy_(buffers, [seen] * case.layers)
        clip.step()

    @torch.no_grad()
    def by_layer() -> None:
        torch._foreach_copy_(buffers, [seen] * case.layers)
        for layer in layers:
            weights = [layer.q_b_proj.weight, layer.kv_b_proj.weight]
            clip_rows_(weights, layer.max_logits, [Layer(case.heads)], rows, [0.5, 0.5], 100.0)
            layer.max_logits.fill_(-torch.inf)

    return {"kimi_ops": step, "torch": by_layer}


def compare(session: Session) -> None:
    table = session.table("qk_clip")
    for case in session.select(logits_cases(session.quick)):
        work = case.batch * case.heads * case.queries * (case.queries + 1) * case.dim
        roof = session.peak(getattr(torch, case.dtype))
        table.compare(case, ways(case, session.device), work, "TFLOP/s", roof)
    for clipped in session.select(clip_cases(session.quick, session.device)):
        table.compare(
            clipped, clip_ways(clipped, session.device), clipped.work(), "GB/s", session.bandwidth
        )


@parametrize("case", logits_cases(quick=True), ids=str)
@parametrize("way", ["kimi_ops", "torch"])
def test_qk_clip(benchmark, case, way):  # type: ignore[no-untyped-def]
    benchmark.group = f"qk_clip {case}"
    benchmark(ways(case, "cpu")[way])


if __name__ == "__main__":
    main(compare)
