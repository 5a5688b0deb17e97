# SPDX-License-Identifier: MIT
"""One good call of every kind that enters the native functions."""

import torch

import kimi_ops
from kimi_ops.operators import fp8, muon_clip, newton_schulz, qk_clip
from tests.repo import messages

f, i = messages.f, messages.i
OFFSETS = i(2, 6)
WEIGHT = messages.fp8_weight(2, 5, 8)
PLAN = messages.plan()
STEPS = [3.4445, -4.775, 2.0315] * 2


def _written(operator, target, *arguments):
    """An operator without results, and what it wrote."""
    operator(*arguments)
    return target


# name -> (function of tensors alone, a maker of them)
CALLS = {
    "topk_gate": (lambda x: kimi_ops.topk_gate(x, 2), lambda: [f(4, 16)]),
    "permute_plan": (lambda x: kimi_ops.permute_plan(x, 4), lambda: [messages.ids()]),
    "permute": (lambda x: kimi_ops.permute(x, PLAN), lambda: [f(4, 6)]),
    "unpermute": (lambda y, w: kimi_ops.unpermute(y, PLAN, w), lambda: [f(8, 6), f(4, 2)]),
    "grouped_gemm": (
        lambda a, b: kimi_ops.grouped_gemm(a, b, OFFSETS), lambda: [f(6, 8), f(2, 8, 5)],
    ),
    "grouped_gemm_out": (
        lambda out, a, b: kimi_ops.grouped_gemm(a, b, OFFSETS, out=out),
        lambda: [f(6, 5), f(6, 8), f(2, 8, 5)],
    ),
    "wgrad_accumulate": (
        lambda out, a, dc: kimi_ops.grouped_gemm_wgrad(a, dc, OFFSETS, out=out, accumulate=True),
        lambda: [f(2, 8, 5), f(6, 8), f(6, 5)],
    ),
    "quantised": (
        lambda a: kimi_ops.grouped_gemm(a, WEIGHT, OFFSETS),
        lambda: [f(6, 8)],
    ),
    "fp8_rows": (fp8.fp8_rows, lambda: [f(5, 200)]),
    "fused_experts": (
        kimi_ops.fused_experts,
        lambda: [f(4, 8), f(4, 12, 8), f(4, 8, 6), f(4, 2), messages.ids()],
    ),
    "newton_schulz": (
        lambda x, y: newton_schulz.newton_schulz([x, y], STEPS, [], 2, torch.float32, 1e-7, True),
        lambda: [f(4, 6), f(4, 6) + 1],
    ),
    "muon_momentum": (
        lambda buffer, grad: muon_clip.muon_momentum_(
            [grad], [buffer], 0.9, True, False, None, []
        ),
        lambda: [f(4, 6), f(4, 6) + 1],
    ),
    "muon_update": (
        lambda p, d: _written(
            muon_clip.muon_update_, p, [p], [d], [0.1], 0.1, True, None, [], None, None
        ),
        lambda: [f(4, 6), f(4, 6) + 1],
    ),
    "clip_rows": (
        lambda w, s: (qk_clip.clip_rows_([w], s, [2, 1], [0, 2, 6, 0, 4, 2], [0.5], 0.01), w),
        lambda: [f(12, 3), f(2) + 1],
    ),
    "update_expert_bias": (
        lambda b, n: kimi_ops.update_expert_bias_(b, n, 0.1),
        lambda: [f(16), i(*range(16))],
    ),
}  # fmt: skip


def flat(results):
    """The tensors of a result."""
    if isinstance(results, torch.Tensor):
        return [results]
    return [x for part in results for x in flat(part)]


def same(results, others):
    pairs = zip(flat(results), flat(others), strict=True)
    return all(torch.equal(a.detach().float(), b.detach().float()) for a, b in pairs)
