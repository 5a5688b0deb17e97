# SPDX-License-Identifier: MIT
"""attention_max_logits against torch: the scores in blocks of 512 queries, their largest kept.

Peers: "torch" multiplies in the dtype of q and k and never looks at keys beyond a block; "twin" is
kimi_ops.reference, in fp32 and blocks of 128; "attention" is scaled_dot_product_attention on the
same q and k, what the maxima come on top of. Causal. Roof: torch's product of 4096 x 4096 matrices
of the same dtype in the same run; half of all scores are counted.

    python -m benchmarks.bench_qk_clip [--quick] [--json FILE] [--plot FILE]
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import LogitsCase, arguments, logits_cases
from benchmarks.measure import measure, peak_memory
from benchmarks.report import Report, Row
from kimi_ops import attention_max_logits
from kimi_ops.reference.qk_clip import attention_max_logits as twin

Functions = dict[str, Callable[[], object]]
BLOCK = 512


def torch_max_logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """[heads], the largest causal logit of each."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    largest = torch.full((q.shape[1],), float("-inf"))
    for start in range(0, q.shape[2], BLOCK):
        stop = min(start + BLOCK, q.shape[2])
        scores = q[:, :, start:stop] @ k[:, :, :stop].mT
        above = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)
        scores[..., start:].masked_fill_(above, float("-inf"))
        largest = torch.maximum(largest, scores.amax(dim=(0, 2, 3)).float())
    return largest * scale


def ways(case: LogitsCase) -> Functions:
    dtype = getattr(torch, case.dtype)
    q = torch.randn(case.batch, case.queries, case.heads, case.dim).to(dtype).transpose(1, 2)
    k = torch.randn(case.batch, case.keys, case.kv_heads, case.dim).to(dtype).transpose(1, 2)
    scale, grouped = case.dim**-0.5, case.heads != case.kv_heads
    return {
        "kimi_ops": lambda: attention_max_logits(q, k, scale),
        "torch": lambda: torch_max_logits(q, k, scale),
        "twin": lambda: twin(q, k, scale, True),
        "attention": lambda: F.scaled_dot_product_attention(
            q, k, k, is_causal=True, enable_gqa=grouped
        ),
    }


def product_roof(dtype: torch.dtype, device: str) -> float:
    """Operations a second of torch's product."""
    a, b = torch.randn(4096, 4096).to(dtype), torch.randn(4096, 4096).to(dtype)
    return 2 * 4096**3 / measure({"matmul": lambda: a @ b}, device, quick=True)["matmul"].p10


def main(argv: list[str] | None = None) -> None:
    options = arguments(__doc__ or "").parse_args(argv)
    cases = logits_cases(options.quick)
    roofs = {d: product_roof(getattr(torch, d), options.device) for d in {c.dtype for c in cases}}
    report = Report("qk_clip", options.device, options)
    for case in cases:
        named = ways(case)
        times = measure(named, options.device, options.quick)
        ours = times.pop("kimi_ops")
        work = case.batch * case.heads * case.queries * (case.queries + 1) * case.dim
        row = Row(str(case), ours, work, "TFLOP/s", roofs[case.dtype], times)
        row.peak_bytes = peak_memory(named["kimi_ops"], options.device)
        row.peer_bytes = peak_memory(named["torch"], options.device)
        report.add(row)
    report.finish()


@pytest.mark.parametrize("case", logits_cases(quick=True), ids=str)
@pytest.mark.parametrize("way", ["kimi_ops", "torch"])
def test_qk_clip(benchmark, case, way):  # type: ignore[no-untyped-def]
    benchmark.group = f"qk_clip {case}"
    benchmark(ways(case)[way])


if __name__ == "__main__":
    main()
