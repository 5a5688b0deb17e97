# SPDX-License-Identifier: MIT
"""Experts over four ranks: tokens travel to their experts, results come home.

python examples/07_expert_parallel.py                               # ranks are threads
torchrun --nproc-per-node 4 examples/07_expert_parallel.py          # or processes
"""

import os
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from kimi_ops import ExpertParallel, LocalWorld, fused_experts, grouped_gemm, topk_gate

TOKENS, HIDDEN, WIDTH, EXPERTS, K = 128, 64, 32, 16, 4
torch.manual_seed(0)  # every rank draws the same
x = torch.randn(TOKENS, HIDDEN)
w_gate_up = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN) / HIDDEN**0.5
w_down = torch.randn(EXPERTS, HIDDEN, WIDTH) / WIDTH**0.5
gate = topk_gate(torch.randn(TOKENS, EXPERTS), K)
whole = fused_experts(x, w_gate_up, w_down, gate.weights, gate.indices)


def rank(group: Any) -> None:
    ep = ExpertParallel(
        group,
        num_experts=EXPERTS,
        hidden=HIDDEN,
        max_tokens_per_rank=TOKENS,
        wire_dtype=torch.float32,
    )
    share = TOKENS // ep.world
    mine = slice(ep.rank * share, (ep.rank + 1) * share)
    here = slice(ep.experts.start, ep.experts.stop)

    rows = ep.dispatch(x[mine], gate.indices[mine], gate.weights[mine])
    gate_rows, up_rows = grouped_gemm(rows.x, w_gate_up[here].mT, rows.offsets).chunk(2, dim=1)
    out = grouped_gemm(F.silu(gate_rows) * up_rows, w_down[here].mT, rows.offsets)
    y = ep.combine(out, rows.handle)

    torch.testing.assert_close(y, whole[mine], atol=1e-4, rtol=1e-4)
    print(f"rank {ep.rank}, {ep.backend}: experts {ep.experts}, {int(rows.offsets[-1])} rows")


if "RANK" in os.environ:
    dist.init_process_group("gloo")
    rank(None)
    dist.destroy_process_group()
else:
    LocalWorld(4).run(rank)
