# SPDX-License-Identifier: MIT
"""Small layers, and what they stand for written out."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimi_ops.nn import MLP, Experts, MoE, Router

HIDDEN, WIDTH, EXPERTS, TOP_K = 24, 16, 6, 2


def layer(**options) -> MoE:
    """A MoE with shared experts and a bias of the selection that matters."""
    torch.manual_seed(0)
    gate = Router(HIDDEN, EXPERTS, TOP_K, scaling_factor=2.5)
    gate.e_score_correction_bias.normal_(0, 0.1)
    return MoE(gate, Experts(EXPERTS, HIDDEN, WIDTH), MLP(HIDDEN, WIDTH), **options)


def by_hand(moe: MoE, x: Tensor, valid: Tensor | None = None) -> Tensor:
    """Token by token, expert by expert, in the dtype of the parameters."""
    gate, experts = moe.gate, moe.experts
    scores = torch.sigmoid(x @ gate.weight.T)
    ids = (scores + gate.e_score_correction_bias).topk(gate.top_k, dim=-1).indices
    weights = scores.gather(-1, ids)
    weights = weights / weights.sum(-1, keepdim=True) * gate.options["scaling_factor"]
    rows = []
    for t, token in enumerate(x):
        y = moe.shared_experts(token)
        for weight, e in zip(weights[t], ids[t], strict=True):
            if valid is None or valid[t]:
                gates, ups = (experts.gate_up_proj[e] @ token).chunk(2)
                y = y + weight * (experts.down_proj[e] @ (F.silu(gates) * ups))
        rows.append(y)
    return torch.stack(rows)


class Mixtral(nn.Module):
    """An expert as older checkpoints name it."""

    def __init__(self, act=F.silu, bias=False, hidden=HIDDEN, width=WIDTH):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(hidden, width, bias=bias) for _ in range(2))
        self.w2, self.act = nn.Linear(width, hidden, bias=bias), act

    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class Phi(nn.Module):
    """Gate and up rows in one layer."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Linear(HIDDEN, 2 * WIDTH, bias=False)
        self.down_proj = nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * F.silu(gate))
