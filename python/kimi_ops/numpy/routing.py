# SPDX-License-Identifier: MIT
"""The router's ops, and rows to their experts and back, on arrays."""

from typing import Any, NamedTuple

import numpy as np

from kimi_ops.numpy.arrays import as_weights, call, ids


class Gate(NamedTuple):
    """weights [T, K] float32, indices [T, K] int32, tokens_per_expert [E] int32."""

    weights: np.ndarray
    indices: np.ndarray
    tokens_per_expert: np.ndarray


class Counts(NamedTuple):
    """tokens_per_expert [N, E] and tokens [N] of sequences; both int32."""

    tokens_per_expert: np.ndarray
    tokens: np.ndarray


class Plan(NamedTuple):
    """row_map [T, K], source [R], offsets [E], tokens_per_expert [E]; all int32."""

    row_map: np.ndarray
    source: np.ndarray
    offsets: np.ndarray
    tokens_per_expert: np.ndarray


def topk_gate(
    logits: Any,
    k: int,
    *,
    score_function: str = "sigmoid",
    expert_bias: Any = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score_topk: int = 2,
    renormalize: bool = True,
    scaling_factor: float = 1.0,
    valid: Any = None,
    select: str = "scores",
) -> Gate:
    """`kimi_ops.topk_gate` on arrays; `topk_gate_given` where the experts are chosen already.

    Examples
    --------
    >>> import numpy as np
    >>> import kimi_ops.numpy as kn
    >>> kn.topk_gate(np.array([[0, 2, 1, -1]], np.float32), 2).indices
    array([[1, 2]], dtype=int32)
    """
    return Gate(
        *call(
            "topk_gate", logits, k, score_function, expert_bias, num_groups, topk_groups,
            group_score_topk, renormalize, scaling_factor, valid, select,
        )
    )  # fmt: skip


def topk_gate_given(
    logits: Any,
    given: Any,
    *,
    score_function: str = "sigmoid",
    renormalize: bool = True,
    scaling_factor: float = 1.0,
    valid: Any = None,
) -> Gate:
    """The weights of experts `given` [T, K] that were chosen elsewhere; -1 and E are no expert."""
    return Gate(
        *call(
            "topk_gate_given", logits, ids(given), score_function, renormalize, scaling_factor,
            valid,
        )
    )  # fmt: skip


def topk_gate_backward(
    grad_weights: Any,
    logits: Any,
    indices: Any,
    *,
    score_function: str = "sigmoid",
    renormalize: bool = True,
    scaling_factor: float = 1.0,
) -> np.ndarray:
    """The gradient of `topk_gate`'s logits from that of its weights."""
    return call(
        "topk_gate_backward", grad_weights, logits, ids(indices), score_function, renormalize,
        scaling_factor,
    )  # fmt: skip


def update_expert_bias_(
    bias: Any, tokens_per_expert: Any, rate: float, centered: bool = False
) -> None:
    """`kimi_ops.update_expert_bias_`: changes `bias` [E] float32 in place."""
    call("update_expert_bias_", bias, tokens_per_expert, rate, centered)


def sequence_balance_loss(
    logits: Any,
    indices: Any,
    *,
    num_sequences: int = 1,
    offsets: Any = None,
    valid: Any = None,
    score_function: str = "sigmoid",
    coefficient: float = 1.0,
) -> tuple[np.ndarray, Counts]:
    """The loss [] of `kimi_ops.sequence_balance_loss`, and the counts for its backward."""
    chosen, ends = ids(indices), None if offsets is None else ids(offsets)
    sequences = num_sequences if ends is None else ends.shape[0]
    counts = Counts(*call("sequence_counts", chosen, logits.shape[-1], sequences, ends, valid))
    loss = call(
        "sequence_balance_loss", logits, *counts, ends, valid, chosen.shape[-1], score_function,
        coefficient,
    )  # fmt: skip
    return loss, counts


def sequence_balance_loss_backward(
    grad_loss: Any,
    logits: Any,
    counts: Counts,
    k: int,
    *,
    offsets: Any = None,
    valid: Any = None,
    score_function: str = "sigmoid",
    coefficient: float = 1.0,
) -> np.ndarray:
    """The gradient of the logits; `counts` are the loss's second result."""
    return call(
        "sequence_balance_loss_backward", grad_loss, logits, *counts,
        None if offsets is None else ids(offsets), valid, k, score_function, coefficient,
    )  # fmt: skip


def quantile_histogram_(
    histogram: Any,
    logits: Any,
    cutoffs: Any,
    bounds: Any,
    *,
    score_function: str = "sigmoid",
    valid: Any = None,
) -> None:
    """Adds to `histogram` [E, bins] int32 how far cutoffs [T] lie above scores of logits [T, E];
    the bins lie between the two bounds [2]. `kimi_ops.quantile_histogram_` finds the cutoffs."""
    call("quantile_histogram_", histogram, logits, cutoffs, bounds, score_function, valid)


def z_loss(
    logits: Any, *, coefficient: float = 1.0, valid: Any = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The loss [] of `kimi_ops.z_loss`, and for its backward log_sum_exp [T], valid_tokens []."""
    return call("z_loss", logits, coefficient, valid)


def z_loss_backward(
    grad_loss: Any, logits: Any, log_sum_exp: Any, valid_tokens: Any, *, coefficient: float = 1.0
) -> np.ndarray:
    """The gradient of the logits of `z_loss`."""
    return call("z_loss_backward", grad_loss, logits, log_sum_exp, valid_tokens, coefficient)


def permute_plan(indices: Any, num_experts: int, *, align: int = 1) -> Plan:
    """`kimi_ops.permute_plan` on arrays.

    Examples
    --------
    >>> import numpy as np
    >>> import kimi_ops.numpy as kn
    >>> kn.permute_plan(np.array([[1, 0], [1, 2]], np.int32), 3).offsets
    array([1, 3, 4], dtype=int32)
    """
    return Plan(*call("permute_plan", ids(indices), num_experts, align))


def permute(x: Any, plan: Plan) -> np.ndarray:
    """Rows [R, H] grouped by expert, of tokens x [T, H]."""
    return call("permute", x, plan.row_map, plan.source)


def unpermute(y: Any, plan: Plan, weights: Any = None) -> np.ndarray:
    """Tokens [T, H]: the weighted sums of their rows y [R, H]."""
    return call(
        "unpermute", y, plan.row_map, plan.source, None if weights is None else as_weights(weights)
    )


def unpermute_backward(
    grad_x: Any, y: Any, plan: Plan, weights: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The gradients of `unpermute`'s rows and weights."""
    return call("unpermute_backward", grad_x, y, plan.row_map, plan.source, as_weights(weights))


def sort_chunks(x: Any, split_sizes: Any, order: Any, *, inverse: bool = False) -> np.ndarray:
    """`kimi_ops.sort_chunks` on arrays; `inverse` undoes it."""
    return call("sort_chunks", x, ids(split_sizes), ids(order), inverse)
