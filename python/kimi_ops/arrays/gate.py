# SPDX-License-Identifier: MIT
"""The router's choice."""

import math
from typing import Any, get_args

from kimi_ops import _arguments as check
from kimi_ops.arrays.door import DenseGate, Door, Gate, Plan, name_of
from kimi_ops.choices import ScoreFunction, Selection

EPSILON = 1e-20  # added to the sum of scores
SCORES = get_args(ScoreFunction)


class Gates(Door):
    def topk_gate(
        self,
        logits: Any,
        k: int | None = None,
        *,
        score_function: ScoreFunction = "sigmoid",
        expert_bias: Any = None,
        num_groups: int = 1,
        topk_groups: int = 1,
        group_score_topk: int = 2,
        renormalize: bool = True,
        scaling_factor: float = 1.0,
        valid: Any = None,
        select: Selection = "scores",
        ids: Any = None,
        mask: Any = None,
    ) -> Gate:
        """`kimi_ops.topk_gate`: k of E experts for each row of logits [..., E], and their weights;
        or the weights of `ids` [..., k] that were chosen elsewhere.

        Examples
        --------
        >>> import numpy as np
        >>> import kimi_ops.numpy as kn
        >>> logits = np.array([[0, 2, 1, -1]], np.float32)
        >>> kn.topk_gate(logits, 2).indices
        array([[1, 2]], dtype=int32)
        >>> kn.topk_gate(logits, ids=np.array([[3, -1]])).weights
        array([[1., 0.]], dtype=float32)
        >>> kn.topk_gate(logits, 2, mask=np.array([True, False, True, True])).indices
        array([[2, 0]], dtype=int32)
        """
        op, options = "topk_gate", (score_function, bool(renormalize), float(scaling_factor))
        choice = (num_groups, topk_groups, group_score_topk)
        if ids is None and mask is None and k is not None and getattr(logits, "ndim", 2) == 2:
            return self._chosen(logits, k, expert_bias, choice, options, valid, select)
        logits = self.array(logits)
        if logits.ndim == 0:
            raise ValueError(f"{op}: logits: expected shape [..., E], got []")
        shape, experts = logits.shape[:-1], logits.shape[-1]
        xp, rows = self.space(logits), logits.reshape(math.prod(shape), experts)
        if valid is not None:
            check.shape(op, "valid", valid, shape)
            valid = self.array(valid).reshape(-1)
        if mask is not None:
            if ids is not None:
                raise ValueError(
                    f"{op}: mask: expected none beside ids, got both; they are the choice"
                )
            mask = self.array(mask)
            if name_of(mask.dtype) != "bool":
                raise TypeError(
                    f"{op}: mask: expected bool, got {name_of(mask.dtype)}; compare it with 0"
                )
            each = () if mask.ndim == 1 else shape
            check.shape(op, "mask", mask, (*each, experts), "or [E], one for all tokens")
            mask = xp.broadcast_to(mask.reshape(-1, mask.shape[-1]), rows.shape)
            rows = xp.where(mask, rows, xp.asarray(math.nan, dtype=rows.dtype))
        if ids is None:
            if k is None:
                raise TypeError(f"{op}: k: expected an int, got None; pass it, or ids")
            gate = self._chosen(rows, k, expert_bias, choice, options, valid, select)
            if mask is None:
                return _shaped(gate, shape)
            there = xp.take_along_axis(mask, xp.clip(gate.indices, 0, None), 1)
            ids = self.constant(xp.where(there, gate.indices, -1))
        else:
            check.shape(op, "ids", ids, (*shape, "k" if k is None else k), "experts of each token")
            check.choice(op, "select", select, ("scores", "logits"))
            ids = self.ids(self.array(ids).reshape(rows.shape[0], ids.shape[-1]))
        return _shaped(Gate(*self.run("topk_gate_given", rows, ids, *options, valid)), shape)

    def _chosen(
        self, logits: Any, k: int, bias: Any, choice: tuple[int, ...], options: tuple[Any, ...],
        valid: Any, select: str,
    ) -> Gate:  # fmt: skip
        score, *weighting = options
        return Gate(
            *self.run("topk_gate", logits, k, score, bias, *choice, *weighting, valid, select)
        )

    def gate_plan(
        self,
        logits: Any,
        k: int,
        *,
        score_function: ScoreFunction = "sigmoid",
        expert_bias: Any = None,
        num_groups: int = 1,
        topk_groups: int = 1,
        group_score_topk: int = 2,
        renormalize: bool = True,
        scaling_factor: float = 1.0,
        valid: Any = None,
        select: Selection = "scores",
    ) -> tuple[Gate, Plan]:
        """`topk_gate` of logits [T, E], and `permute_plan` of its ids, in one call."""
        *gate, row_map, source, offsets = self.run(
            "gate_plan", logits, k, score_function, expert_bias, num_groups, topk_groups,
            group_score_topk, bool(renormalize), float(scaling_factor), valid, select,
        )  # fmt: skip
        return Gate(*gate), Plan(row_map, source, offsets, gate[2])

    def dense_gate(self, logits: Any, k: int | None = None, **options: Any) -> DenseGate:
        """`topk_gate` with a place for every expert: weights, 0 elsewhere, and who was chosen.

        Examples
        --------
        >>> import numpy as np
        >>> import kimi_ops.numpy as kn
        >>> kn.dense_gate(np.array([[0, 2, 2]], np.float32), 2).probs
        array([[0. , 0.5, 0.5]], dtype=float32)
        """
        logits = self.array(logits)
        gate, xp = self.topk_gate(logits, k, **options), self.space(logits)
        experts = xp.arange(logits.shape[-1], dtype="int32")
        chosen = gate.indices[..., None] == experts  # [..., K, E]
        probs = xp.where(chosen, gate.weights[..., None], 0).sum(-2).astype(logits.dtype)
        return DenseGate(probs, chosen.any(-2), gate.tokens_per_expert)

    def normalized_scores(self, logits: Any, score_function: ScoreFunction = "sigmoid") -> Any:
        """`kimi_ops.normalized_scores`: ``s / (sum s + 1e-20)`` [..., E] float32.

        Examples
        --------
        >>> import numpy as np
        >>> import kimi_ops.numpy as kn
        >>> kn.normalized_scores(np.zeros((1, 4), np.float32))
        array([[0.25, 0.25, 0.25, 0.25]], dtype=float32)
        """
        check.choice("normalized_scores", "score_function", score_function, SCORES)
        logits = self.array(logits)
        xp = self.space(logits)
        z = logits if str(logits.dtype) == "float64" else logits.astype("float32")
        most = xp.finfo(z.dtype).max
        z = xp.clip(xp.where(xp.isnan(z), -math.inf, z), None, most)
        if score_function == "softmax":
            peak = xp.clip(self.constant(z.max(-1, keepdims=True)), -most, None)
            powers = xp.exp(z - peak)
            total = powers.sum(-1, keepdims=True)
            return powers / xp.where(total == 0, 1, total)
        if score_function == "sigmoid":
            scores = self.sigmoid(z)
        else:
            rising = self.softplus(z)
            there = rising > 0  # the square root has no gradient at 0
            scores = xp.where(there, xp.sqrt(xp.where(there, rising, 1)), 0)
        return scores / (scores.sum(-1, keepdims=True) + EPSILON)


def _shaped(gate: Gate, shape: tuple[int, ...]) -> Gate:
    k = gate.weights.shape[1]
    return Gate(
        gate.weights.reshape(*shape, k), gate.indices.reshape(*shape, k), gate.tokens_per_expert
    )
