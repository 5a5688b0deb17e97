# SPDX-License-Identifier: MIT
"""attention_max_logits against torch: the scores in blocks of 512 queries, their largest kept.

Peers: "torch" multiplies in the dtype of q and k and never looks at keys beyond a block; "twin" is
kimi_ops.reference, in fp32 and blocks of 128; "attention" is scaled_dot_product_attention on the
same q and k, what the maxima come on top of. Causal. Roof: torch's large dense product of the
same dtype in the same run; half of all scores are counted.

    python -m benchmarks.bench_qk_clip [--help]
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import LogitsCase, logits_cases
from benchmarks.marks import parametrize
from benchmarks.measure import Functions
from benchmarks.session import Session, main
from kimi_ops import attention_max_logits
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


def compare(session: Session) -> None:
    table = session.table("qk_clip")
    for case in session.select(logits_cases(session.quick)):
        work = case.batch * case.heads * case.queries * (case.queries + 1) * case.dim
        roof = session.peak(getattr(torch, case.dtype))
        table.compare(case, ways(case, session.device), work, "TFLOP/s", roof)


@parametrize("case", logits_cases(quick=True), ids=str)
@parametrize("way", ["kimi_ops", "torch"])
def test_qk_clip(benchmark, case, way):  # type: ignore[no-untyped-def]
    benchmark.group = f"qk_clip {case}"
    benchmark(ways(case, "cpu")[way])


if __name__ == "__main__":
    main(compare)
