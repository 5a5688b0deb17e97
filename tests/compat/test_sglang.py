# SPDX-License-Identifier: MIT
"""SGLang's routers by their names, against their meaning in plain torch."""

import pytest
import torch
from torch import Tensor

from kimi_ops.compat import sglang, vllm

E, GROUPS, KEPT, K = 16, 4, 2, 4


def logits_of(tokens: int = 9) -> Tensor:
    torch.manual_seed(0)
    ladder = 1.1 ** torch.arange(E) / 4 - 2
    return torch.stack([ladder[torch.randperm(E)] for _ in range(tokens)])


def weigh(scores: Tensor, ids: Tensor, renormalize: bool, factor: float | None, ask: bool):
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(1, keepdim=True)
        weights = weights * factor if ask and factor else weights
    return weights


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("count", [None, 0, 5, 9])
def test_fused_topk(renormalize, function, count):
    logits = logits_of()
    given = None if count is None else torch.tensor(count)
    weights, ids = sglang.fused_topk(
        torch.empty(9, 2), logits, K, renormalize, None, function, num_token_non_padded=given
    )
    scores = logits.softmax(1) if function == "softmax" else logits.sigmoid()
    want = scores.topk(K, dim=1).indices
    real = slice(0, count)
    assert ids.dtype == torch.int32 and torch.equal(ids[real].long(), want[real])
    expected = weigh(scores, want, renormalize, None, False)
    torch.testing.assert_close(weights[real], expected[real], rtol=1e-5, atol=1e-6)
    if count is not None:
        assert (ids[count:] == -1).all() and not weights[count:].any()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("factor", [None, 2.5])
@pytest.mark.parametrize("ask", [False, True])
def test_grouped(biased, renormalize, factor, ask):
    logits, bias = logits_of(), torch.randn(E) / 16
    scores = logits.sigmoid() if biased else logits.softmax(1)
    choice = (scores + bias if biased else scores).view(9, GROUPS, -1)
    strength = choice.sort(2, descending=True).values[..., : 2 if biased else 1].sum(2)
    inside = torch.zeros_like(strength, dtype=torch.bool)
    inside.scatter_(1, strength.topk(KEPT, dim=1).indices, True)
    want = choice.masked_fill(~inside[..., None], -torch.inf).flatten(1).topk(K, dim=1).indices
    route = sglang.biased_grouped_topk if biased else sglang.grouped_topk
    weights, ids = route(
        torch.empty(9, 2), logits, *([bias] if biased else []), K, renormalize, GROUPS, KEPT, 0,
        factor, ask, num_token_non_padded=torch.tensor(7),
    )  # fmt: skip
    assert torch.equal(ids[:7].long(), want[:7]) and (ids[7:] == -1).all()
    expected = weigh(scores, want, renormalize, factor, ask)
    torch.testing.assert_close(weights[:7], expected[:7], rtol=1e-5, atol=1e-6)


def test_a_bias_selects_and_never_weighs():
    logits, bias = logits_of(), torch.randn(E)
    weights, ids = sglang.fused_topk(torch.empty(9, 2), logits, K, True, bias, "sigmoid")
    scores = logits.sigmoid()
    want = (scores + bias).topk(K, dim=1).indices
    assert torch.equal(ids.long(), want) and not torch.equal(want, scores.topk(K, dim=1).indices)
    expected = weigh(scores, want, True, None, False)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="fused_topk: scoring_func: expected .sigmoid., got"):
        sglang.fused_topk(torch.empty(9, 2), logits, K, True, bias)
    for count in (torch.tensor(7), bias):  # where releases before 0.5.8 had the number of tokens
        with pytest.raises(ValueError, match="fused_topk: scoring_func: expected|expert_bias: exp"):
            sglang.fused_topk(torch.empty(9, 2), logits, K, True, count)
    with pytest.raises(ValueError, match="num_token_non_padded: expected shape"):
        sglang.fused_topk(torch.empty(9, 2), logits, K, True, num_token_non_padded=bias)


def test_the_rest_is_vllms():
    assert sglang.fused_experts is vllm.fused_experts
    assert sglang.moe_align_block_size is vllm.moe_align_block_size


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(num_fused_shared_experts=1), "num_fused_shared_experts: expected 0, got 1"),
        (dict(expert_location_dispatch_info=object()), "expert_location_dispatch_info: expected"),
        (dict(topk_group=None), "num_expert_group: expected both numbers"),
        (dict(hidden_states=torch.zeros(3, 2)), "gating_output: expected shape"),
    ],
)
def test_what_is_not_served_is_refused(changes, message):
    good = dict(
        hidden_states=torch.zeros(2, 2), gating_output=torch.zeros(2, E), topk=2, renormalize=True,
        num_expert_group=4, topk_group=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"^grouped_topk: {message}"):
        sglang.grouped_topk(**{**good, **changes})
