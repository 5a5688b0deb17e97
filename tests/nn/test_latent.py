# SPDX-License-Identifier: MIT
"""Experts narrower than the model, and a norm behind their sum: Kimi K3 and its relatives."""

import pytest
import torch
from torch import Tensor

from kimi_ops import ExpertParallel, LocalWorld, fused_experts
from kimi_ops.nn import MLP, Experts, Latent, MoE, Router
from tests.nn.parts import EXPERTS, HIDDEN, TOP_K, WIDTH

NARROW = 10


def k3(dtype: torch.dtype = torch.float64, *, norm: bool = True) -> MoE:
    torch.manual_seed(0)
    factory = {"dtype": dtype}
    gate = Router(HIDDEN, EXPERTS, TOP_K, **factory)
    gate.e_score_correction_bias.normal_(0, 0.1)
    experts = Experts(EXPERTS, NARROW, WIDTH, activation="situ", **factory)
    latent = Latent(HIDDEN, NARROW, norm=norm, **factory)
    if norm:
        torch.nn.init.normal_(latent.norm.weight, 1.0, 0.3)
    return MoE(gate, experts, MLP(HIDDEN, 2 * WIDTH, activation="situ", **factory), latent=latent)


def situ(g: Tensor, u: Tensor) -> Tensor:
    return 4 * torch.tanh(g / 4) * torch.sigmoid(g) * 25 * torch.tanh(u / 25)


def by_hand(moe: MoE, x: Tensor) -> Tensor:
    """Token by token; the norm sees the weighted sum of all experts of a token."""
    gate, experts, latent, shared = moe.gate, moe.experts, moe.latent, moe.shared_experts
    rows = []
    for token in x:
        scores = torch.sigmoid(gate.weight @ token)
        ids = (scores + gate.e_score_correction_bias).topk(TOP_K).indices
        weights = scores[ids] / scores[ids].sum()
        z = latent.down_proj.weight @ token
        y = torch.zeros_like(z)
        for weight, e in zip(weights, ids, strict=True):
            y = y + weight * (experts.down_proj[e] @ situ(*(experts.gate_up_proj[e] @ z).chunk(2)))
        if latent.norm is not None:
            y = y / (y.square().mean() + 1e-5).sqrt() * latent.norm.weight
        both = shared.gate_proj.weight @ token, shared.up_proj.weight @ token
        rows.append(latent.up_proj.weight @ y + shared.down_proj.weight @ situ(*both))
    return torch.stack(rows)


@pytest.mark.parametrize("norm", [True, False])
def test_value_and_gradients_are_those_of_the_formula(norm):
    moe = k3(norm=norm)
    x = torch.randn(7, HIDDEN, dtype=torch.float64, requires_grad=True)
    leaves, dy = [x, *moe.parameters()], torch.randn(7, HIDDEN, dtype=torch.float64)
    ours, theirs = moe(x), by_hand(moe, x)
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(
        torch.autograd.grad(ours, leaves, dy), torch.autograd.grad(theirs, leaves, dy), strict=True
    ):
        torch.testing.assert_close(mine, other)


def test_half_precision_and_a_compiled_layer():
    moe, x = k3().eval(), torch.randn(9, HIDDEN, dtype=torch.float64)
    want = moe(x)
    half = moe.bfloat16()
    y = half(x.bfloat16())
    assert y.dtype == torch.bfloat16 and (y - want).norm() < 3e-2 * want.norm()
    torch._dynamo.reset()
    compiled = torch.compile(half, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x.bfloat16()), y)


def test_over_ranks_the_norm_comes_behind_the_sum_of_all():
    """Experts over two ranks: dispatch and combine are the routed part, in place of the experts."""
    moe = k3(torch.float32).eval()
    torch.manual_seed(1)
    x = torch.randn(2, 5, HIDDEN)
    want = moe(x)

    def work(group) -> Tensor:
        here = slice(group.rank * 3, group.rank * 3 + 3)
        up, down = moe.experts.gate_up_proj[here], moe.experts.down_proj[here]
        ep = ExpertParallel(group, num_experts=EXPERTS, hidden=NARROW, max_tokens_per_rank=8)

        def routed(z: Tensor) -> Tensor:
            came = ep.dispatch(z, gate.indices, gate.weights)
            rows, ends = came.x, came.offsets
            own = torch.searchsorted(ends, torch.arange(len(rows)).int(), right=True)
            out = fused_experts(
                rows, up, down, torch.ones(len(rows), 1), own.int()[:, None], activation="situ"
            )
            return ep.combine(out, came.handle)

        with torch.no_grad():
            tokens = x[group.rank]
            _, gate, _ = moe.gate(tokens)
            return moe.latent(tokens, routed) + moe.shared_experts(tokens)

    for mine, other in zip(LocalWorld(2).run(work), want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_state_and_sizes():
    names = {name for name in k3().state_dict() if name.startswith("latent")}
    assert names == {f"latent.{part}.weight" for part in ("down_proj", "norm", "up_proj")}
    gate, latent = Router(HIDDEN, EXPERTS, TOP_K), Latent(HIDDEN, NARROW)
    with pytest.raises(
        ValueError, match="experts: expected 6 experts of hidden size 10, as of lat"
    ):
        MoE(gate, Experts(EXPERTS, HIDDEN, WIDTH), latent=latent)
    with pytest.raises(ValueError, match="latent: expected hidden size 24, as of the gate, got 25"):
        MoE(gate, Experts(EXPERTS, NARROW, WIDTH), latent=Latent(HIDDEN + 1, NARROW))
