# SPDX-License-Identifier: MIT
"""How the ops cut `torch.distributed.tensor.DTensor`: rules for what stays on its rank.

    from kimi_ops.interop.dtensor import register
    register()

    topk_gate                tokens: weights and ids stay, the counts are to be summed
    permute, unpermute,      the hidden size, with a whole plan
    sort_chunks
    grouped_gemm             columns of b (and of the result); or K of both, whose products are to
                             be summed
    grouped_gemm_wgrad       columns of either operand
    every other              whole on every rank

Whatever lies otherwise is brought there by torch. Experts and their tokens over ranks are
`kimi_ops.ExpertParallel`'s: that is not a cut of tensors, tokens travel to where their experts are.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.placement_types import Placement

__all__ = ["RULES", "WHOLE", "register"]

_ROWS, _COLUMNS, _LAST, _SUM = Shard(0), Shard(1), Shard(2), Partial()
Rule = tuple[dict[str, Placement], tuple[Placement, ...]]

# operator -> what its arguments (others are whole) and its results are, a line a way
RULES: dict[str, list[Rule]] = {
    "topk_gate": [({"logits": _ROWS, "valid": _ROWS}, (_ROWS, _ROWS, _SUM))],
    "topk_gate_given": [
        ({"logits": _ROWS, "ids": _ROWS, "valid": _ROWS}, (_ROWS, _ROWS, _SUM)),
    ],
    "topk_gate_backward": [
        ({"grad_weights": _ROWS, "logits": _ROWS, "indices": _ROWS}, (_ROWS,)),
    ],
    "permute": [({"x": _COLUMNS}, (_COLUMNS,))],
    "unpermute": [({"y": _COLUMNS}, (_COLUMNS,))],
    "unpermute_backward": [({"grad_x": _COLUMNS, "y": _COLUMNS}, (_COLUMNS, _SUM))],
    "sort_chunks": [({"x": _COLUMNS}, (_COLUMNS,))],
    "grouped_gemm": [
        ({"b": _LAST, "bias": _COLUMNS}, (_COLUMNS,)),
        ({"a": _COLUMNS, "b": _COLUMNS}, (_SUM,)),
    ],
    "grouped_gemm_wgrad": [({"a": _COLUMNS}, (_COLUMNS,)), ({"dc": _COLUMNS}, (_LAST,))],
}
WHOLE = (
    "gate_plan", "permute_plan", "fused_experts", "fused_experts_backward", "quantized_gemm",
    "sequence_balance_loss", "sequence_balance_loss_backward", "z_loss", "z_loss_backward",
)  # fmt: skip


@cache
def register() -> None:
    """Tell torch the rules of this module. Again is no harm.

    Examples
    --------
    >>> from kimi_ops.interop.dtensor import register
    >>> register()
    """
    for name in (*RULES, *WHOLE):
        for variant in (name, f"{name}_forward"):
            _register(getattr(torch.ops.kimi_ops, variant).default, RULES.get(name, []))


def _register(op: Any, rules: list[Rule]) -> None:
    names = [argument.name for argument in op._schema.arguments]
    results = len(op._schema.returns)

    def placements(*arguments: Any) -> list[tuple[list[Any], list[Any]]]:
        # DTensor shows tensors as descriptions that have a mesh
        given = {n: a for n, a in zip(names, arguments, strict=False) if hasattr(a, "mesh")}
        whole: list[Placement] = [Replicate()] * results
        found = [(whole, _of(arguments, {}, names))]
        for inputs, outputs in rules:
            if outputs == (_SUM,) and "bias" in given:
                continue  # a sum of parts has its bias as often
            found.append((list(outputs), _of(arguments, inputs, names)))
        return found

    register_sharding(op)(placements)


def _of(arguments: tuple[Any, ...], inputs: dict[str, Placement], names: list[str]) -> list[Any]:
    """A placement for every tensor, None for every other argument."""
    pairs = zip(names, arguments, strict=False)
    return [inputs.get(n, Replicate()) if hasattr(a, "mesh") else None for n, a in pairs]
