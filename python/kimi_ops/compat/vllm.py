# SPDX-License-Identifier: MIT
"""vLLM's experts and routers (`vllm.model_executor.layers.fused_moe`), the signatures of 0.11 and,
for the routers and `moe_align_block_size`, of 0.33.

SGLang's ids and weights have the same form: fp32 weights and int32 ids, -1 for a padded token. All
functions are differentiable where the results are floats.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_ops import _check
from kimi_ops.compat._arguments import only
from kimi_ops.moe import fused_experts as experts
from kimi_ops.moe.permute import permute_plan
from kimi_ops.moe.quantized import QuantizedWeight
from kimi_ops.moe.topk_gate import topk_gate
from kimi_ops.routing import as_int32

__all__ = ["fused_experts", "fused_moe", "fused_topk", "grouped_topk", "moe_align_block_size"]
_SCORES = ("softmax", "sigmoid")


def fused_topk(
    hidden_states: Tensor,
    gating_output: Tensor,
    topk: int,
    renormalize: bool,
    indices_type: torch.dtype | None = None,
    scoring_func: Literal["softmax", "sigmoid"] = "softmax",
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose experts and weigh them: `kimi_ops.topk_gate`.

    Parameters
    ----------
    hidden_states : Tensor [T, ...]
        Its T is compared.
    gating_output : Tensor [T, E], float32, bfloat16 or float16
    topk : int
    renormalize : bool
        Divide by the sum of the chosen.
    indices_type : torch.dtype, optional
        Of the ids; int32 where absent.
    scoring_func : {"softmax", "sigmoid"}

    Returns
    -------
    Tensor [T, topk] float32, Tensor [T, topk]
        Weights and ids, best first; equal scores go to the lower expert.
    Tensor [T, topk] int32
        ``token_expert_indices[t, k] = k * T + t``.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.compat.vllm import fused_topk
    >>> weights, ids, pairs = fused_topk(torch.ones(1, 8), torch.tensor([[0.0, 2.0, 2.0]]), 2, True)
    >>> weights.tolist(), ids.tolist(), pairs.tolist()
    ([[0.5, 0.5]], [[1, 2]], [[0, 1]])
    """
    _check_tokens("fused_topk", hidden_states, gating_output)
    _check.choice("fused_topk", "scoring_func", scoring_func, _SCORES)
    gate = topk_gate(gating_output, topk, score_function=scoring_func, renormalize=renormalize)
    pairs = torch.arange(gate.indices.numel(), dtype=torch.int32, device=gate.indices.device)
    ids = gate.indices if indices_type is None else gate.indices.to(indices_type)
    return gate.weights, ids, pairs.view(topk, -1).t().contiguous()


def grouped_topk(
    hidden_states: Tensor,
    gating_output: Tensor,
    topk: int,
    renormalize: bool,
    num_expert_group: int = 0,
    topk_group: int = 0,
    scoring_func: Literal["softmax", "sigmoid"] = "softmax",
    routed_scaling_factor: float = 1.0,
    e_score_correction_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose experts of the best groups: `kimi_ops.topk_gate`.

    A group scores its best expert, or the sum of its two best where there is a bias.

    Parameters
    ----------
    hidden_states : Tensor [T, ...]
        Its T is compared.
    gating_output : Tensor [T, E], float32, bfloat16 or float16
        Scored in fp32.
    topk : int
    renormalize : bool
    num_expert_group, topk_group : int
        Both at least 1.
    scoring_func : {"softmax", "sigmoid"}
    routed_scaling_factor : float
    e_score_correction_bias : Tensor [E], optional
        Selects, never weighs.

    Returns
    -------
    Tensor [T, topk] float32, Tensor [T, topk] int32
        Best first.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.compat.vllm import grouped_topk
    >>> logits = torch.tensor([[3.0, 0.0, 2.0, 2.0]])
    >>> grouped_topk(torch.ones(1, 8), logits, 2, True, 2, 1)[1].tolist()
    [[0, 1]]
    """
    op, bias = "grouped_topk", e_score_correction_bias
    _check_tokens(op, hidden_states, gating_output)
    _check.choice(op, "scoring_func", scoring_func, _SCORES)
    _check.between(op, "num_expert_group", num_expert_group, 1, gating_output.shape[1])
    gate = topk_gate(
        gating_output, topk, score_function=scoring_func, num_groups=num_expert_group,
        topk_groups=topk_group, group_score_topk=1 if bias is None else 2,
        expert_bias=None if bias is None else bias.detach().float(), renormalize=renormalize,
        scaling_factor=routed_scaling_factor,
    )  # fmt: skip
    return gate.weights, gate.indices


def moe_align_block_size(
    topk_ids: Tensor,
    block_size: int,
    num_experts: int,
    expert_map: Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sort pairs by expert, each expert's padded to blocks: `kimi_ops.permute_plan`.

    Parameters
    ----------
    topk_ids : Tensor [T, K] int32, int64 or uint32
        -1 and `num_experts` are dropped pairs.
    block_size, num_experts : int
        With `expert_map` the experts of all ranks.
    expert_map : Tensor [num_experts] int32 or int64, optional
        Local expert, -1 on other ranks.
    pad_sorted_ids : bool
        Round the size of the first result up to blocks.
    ignore_invalid_experts : bool
        Leave pairs of other ranks out; otherwise their blocks have expert -1.

    Returns
    -------
    Tensor [cap] int32
        Pairs t * K + k, in the order (expert, pair); T * K is padding.
        ``cap = T K + num_experts (block_size - 1)``, at most a block for each pair.
    Tensor [ceil(cap / block_size)] int32
        Expert of each block, -1 behind the last.
    Tensor [1] int32
        Rows, padding included, of all experts.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.compat.vllm import moe_align_block_size
    >>> pairs, expert, rows = moe_align_block_size(torch.tensor([[2, 0], [0, 1]]), 2, 3)
    >>> pairs.tolist(), expert.tolist(), rows.tolist()
    ([1, 2, 3, 4, 0, 4, 4], [0, 1, 2, -1], [6])
    """
    op = "moe_align_block_size"
    _check.between(op, "block_size", block_size, 1, 2**20)
    ids = _ids(op, topk_ids)
    if expert_map is not None and ignore_invalid_experts:
        ids = _local(op, ids, expert_map, num_experts)
    plan = permute_plan(ids, num_experts, align=block_size)
    pairs, capacity = ids.numel(), len(plan.source)
    if pad_sorted_ids:
        capacity = -(-capacity // block_size) * block_size
    if pairs < num_experts:
        capacity = min(pairs * block_size, capacity)
    source = F.pad(plan.source, (0, max(0, capacity - len(plan.source))), value=-1)[:capacity]
    first = torch.arange(-(-capacity // block_size), device=ids.device) * block_size
    expert = torch.searchsorted(plan.offsets, first.int(), right=True)
    last, inside = plan.offsets[-1:], first < plan.offsets[-1]
    if expert_map is not None and not ignore_invalid_experts:
        expert = _known(op, expert_map, num_experts)[expert.clamp(max=num_experts - 1)]
    expert = as_int32(torch.where(inside, expert, -1))
    return torch.where(source < 0, pairs, source), expert, last.clone()


def fused_experts(
    hidden_states: Tensor,
    w1: Tensor | QuantizedWeight,
    w2: Tensor | QuantizedWeight,
    topk_weights: Tensor,
    topk_ids: Tensor,
    inplace: bool = False,
    activation: Any = "silu",
    apply_router_weight_on_input: bool = False,
    global_num_experts: int = -1,
    expert_map: Tensor | None = None,
    quant_config: None = None,
    allow_deep_gemm: bool = False,
    allow_cutlass_block_scaled_grouped_gemm: bool = False,
) -> Tensor:
    """Send every token through its experts and add their outputs: `kimi_ops.fused_experts`.

    Parameters
    ----------
    hidden_states : Tensor [T, H]
    w1 : Tensor [E, 2 F, H], gate rows first, or a quantised weight of this library
    w2 : Tensor [E, H, F], or a quantised weight of this library
    topk_weights : Tensor [T, K], any floating dtype
    topk_ids : Tensor [T, K] int32, int64 or uint32
        -1 adds nothing.
    inplace : bool
        Write the result into `hidden_states`; not with gradients.
    activation : {"silu", "gelu"}, or an enumeration with that value
        gelu is the exact one.
    apply_router_weight_on_input : bool
        Weigh the tokens instead of the outputs; one expert a token.
    global_num_experts : int
        Experts of all ranks: the size of `expert_map`.
    expert_map : Tensor [global_num_experts] int32 or int64, optional
        Local expert, -1 on other ranks, whose pairs add nothing.
    quant_config
        Not served: pass w1 and w2 as `kimi_ops.Fp8BlockWeight` or `kimi_ops.Int4GroupWeight`.
    allow_deep_gemm, allow_cutlass_block_scaled_grouped_gemm : bool
        Leaves that this library need not take.

    Returns
    -------
    Tensor [T, H], the dtype of hidden_states

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.compat.vllm import fused_experts, fused_topk
    >>> x, w1, w2 = torch.randn(5, 8), torch.randn(4, 12, 8), torch.randn(4, 8, 6)
    >>> weights, ids, _ = fused_topk(x, torch.randn(5, 4), 2, True)
    >>> fused_experts(x, w1, w2, weights, ids).shape
    torch.Size([5, 8])
    """
    op = "fused_experts"
    only(op, "quant_config", quant_config, None, "pass a quantised weight as w1 and w2")
    name = getattr(activation, "value", activation)
    _check.choice(op, "activation", name, ("silu", "gelu"))
    weights = topk_weights.to(torch.promote_types(hidden_states.dtype, torch.float32))
    x, ids, local = hidden_states, _ids(op, topk_ids), w1.shape[0]
    if expert_map is None:
        if global_num_experts != -1:
            mend = "pass expert_map where a rank has a part of them"
            only(op, "global_num_experts", global_num_experts, local, mend)
    else:
        total = len(expert_map) if global_num_experts < 0 else global_num_experts
        ids = _local(op, ids, expert_map, total)
    if apply_router_weight_on_input:
        _check.shape(op, "topk_weights", weights, (len(x), 1), "weights on the input go with K = 1")
        x, weights = x * weights.to(x.dtype), torch.ones_like(weights)
    if (
        inplace
        and torch.is_grad_enabled()
        and any(isinstance(t, Tensor) and t.requires_grad for t in (x, w1, w2, weights))
    ):
        raise ValueError(
            f"{op}: inplace: expected False where a gradient is wanted, got True; pass False, or "
            "call under torch.no_grad()"
        )
    y = experts.fused_experts(x, w1, w2, weights, ids, activation=name)
    return hidden_states.copy_(y) if inplace else y


def fused_moe(
    hidden_states: Tensor,
    w1: Tensor | QuantizedWeight,
    w2: Tensor | QuantizedWeight,
    gating_output: Tensor,
    topk: int,
    renormalize: bool,
    inplace: bool = False,
    activation: Any = "silu",
    use_grouped_topk: bool = False,
    num_expert_group: int | None = None,
    topk_group: int | None = None,
    custom_routing_function: Callable[..., tuple[Tensor, Tensor]] | None = None,
    global_num_experts: int = -1,
    expert_map: Tensor | None = None,
    quant_config: None = None,
) -> Tensor:
    """A router (`grouped_topk`, the given function or `fused_topk`) and `fused_experts`.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.compat.vllm import fused_moe
    >>> x, w1, w2 = torch.randn(5, 8), torch.randn(4, 12, 8), torch.randn(4, 8, 6)
    >>> fused_moe(x, w1, w2, torch.randn(5, 4), 2, True).shape
    torch.Size([5, 8])
    """
    routed = hidden_states, gating_output, topk, renormalize
    if use_grouped_topk:
        weights, ids = grouped_topk(*routed, num_expert_group or 0, topk_group or 0)
    elif custom_routing_function is not None:
        weights, ids = custom_routing_function(*routed)
    else:
        weights, ids, _ = fused_topk(*routed)
    return fused_experts(
        hidden_states, w1, w2, weights, ids, inplace, activation,
        global_num_experts=global_num_experts, expert_map=expert_map, quant_config=quant_config,
    )  # fmt: skip


def _check_tokens(op: str, hidden_states: Tensor, gating_output: Tensor) -> None:
    _check.tensor(op, "hidden_states", hidden_states)
    _check.tensor(op, "gating_output", gating_output)
    _check.shape(op, "gating_output", gating_output, (len(hidden_states), "E"))


def _ids(op: str, topk_ids: Tensor) -> Tensor:
    _check.tensor(op, "topk_ids", topk_ids)
    _check.dtype(op, "topk_ids", topk_ids, (torch.int32, torch.int64, torch.uint32))
    return as_int32(topk_ids).int()


def _known(op: str, expert_map: Tensor, experts: int) -> Tensor:
    _check.tensor(op, "expert_map", expert_map)
    _check.shape(op, "expert_map", expert_map, (experts,), "one for each expert of all ranks")
    _check.dtype(op, "expert_map", expert_map, (torch.int32, torch.int64))
    return as_int32(expert_map)


def _local(op: str, ids: Tensor, expert_map: Tensor, experts: int) -> Tensor:
    """Ids of this rank's experts; -1 for those of others."""
    places, known = _known(op, expert_map, experts), (ids >= 0) & (ids < experts)
    return torch.where(known, places[torch.where(known, ids, 0).long()], -1)
