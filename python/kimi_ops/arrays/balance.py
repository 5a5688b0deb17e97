# SPDX-License-Identifier: MIT
"""What keeps the experts' loads even and the logits small, and experts of limited capacity."""

import math
from typing import Any

from kimi_ops import _arguments as check
from kimi_ops.arrays.door import Counts, Door, Gate, name_of
from kimi_ops.choices import DropRule, ScoreFunction


class Balance(Door):
    def sequence_counts(
        self,
        indices: Any,
        num_experts: int,
        *,
        num_sequences: int = 1,
        offsets: Any = None,
        valid: Any = None,
    ) -> Counts:
        """`kimi_ops.sequence_counts`: how often each sequence chose each expert of indices [T, K],
        and how many tokens it has.

        Examples
        --------
        >>> import numpy as np
        >>> import kimi_ops.numpy as kn
        >>> kn.sequence_counts(np.array([[0, 1], [0, 2]]), 3).tokens_per_expert
        array([[2, 1, 1]], dtype=int32)
        """
        ends = self.optional_ids(offsets)
        sequences = _sequences("sequence_counts", num_sequences, ends)
        counts = self.run("sequence_counts", self.ids(indices), num_experts, sequences, ends, valid)
        return Counts(*counts)

    def sequence_balance_loss(
        self,
        logits: Any,
        indices: Any,
        *,
        num_sequences: int = 1,
        offsets: Any = None,
        valid: Any = None,
        tokens_per_expert: Any = None,
        sequence_tokens: Any = None,
        score_function: ScoreFunction = "sigmoid",
        coefficient: float = 1e-4,
    ) -> Any:
        """The loss [] of `kimi_ops.sequence_balance_loss` of logits [T, E] and indices [T, K]."""
        op = "sequence_balance_loss"
        counts = self.counted(
            op, logits, indices, num_sequences, offsets, valid, tokens_per_expert, sequence_tokens
        )
        return self.run(op, logits, *counts, score_function, float(coefficient))

    def counted(
        self, op: str, logits: Any, indices: Any, num_sequences: int, offsets: Any, valid: Any,
        tokens_per_expert: Any, sequence_tokens: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        """Counts, tokens, offsets, valid and K, as the native functions take them."""
        check.shape(op, "logits", logits, ("T", "E"), "flatten batch and sequence first")
        check.shape(op, "indices", indices, (logits.shape[0], "K"))
        if (tokens_per_expert is None) != (sequence_tokens is None):
            raise ValueError(
                f"{op}: sequence_tokens: expected beside tokens_per_expert, got one of the two; "
                "both are what sequence_counts gives"
            )
        experts, k = logits.shape[1], indices.shape[1]
        ends = self.optional_ids(offsets)
        sequences = _sequences(op, num_sequences, ends)
        if tokens_per_expert is None:
            counts, tokens = self.sequence_counts(
                indices, experts, num_sequences=sequences, offsets=ends, valid=valid
            )
        else:
            counts, tokens = self.ids(tokens_per_expert), self.ids(sequence_tokens)
            check.shape(op, "tokens_per_expert", counts, (sequences, experts))
        return counts, tokens, ends, valid, k

    def z_loss(self, logits: Any, *, coefficient: float = 1e-3, valid: Any = None) -> Any:
        """The loss [] of `kimi_ops.z_loss` of logits [T, E]."""
        return self.run("z_loss", logits, float(coefficient), valid)[0]

    def update_expert_bias(
        self, bias: Any, tokens_per_expert: Any, rate: float, centered: bool = False
    ) -> Any:
        """The bias [E] float32 one step nearer to balance, by the rule of
        `kimi_ops.update_expert_bias_`, of tokens_per_expert [E] int32 or int64. NumPy changes
        `bias`; JAX returns a new one."""
        arguments = bias, tokens_per_expert, float(rate), bool(centered)
        return self.run("update_expert_bias_", *arguments)

    def quantile_histogram(
        self,
        histogram: Any,
        logits: Any,
        k: int,
        *,
        bounds: Any,
        expert_bias: Any = None,
        score_function: ScoreFunction = "sigmoid",
        valid: Any = None,
    ) -> Any:
        """Adds to histogram [E, bins] int32, as `kimi_ops.quantile_histogram_`, how much the scores
        of logits [T, E] lack to be among the k best, in bins between the two bounds [2] float32.
        NumPy changes `histogram`; JAX returns a new one."""
        op = "quantile_histogram_"
        check.shape(op, "logits", logits, ("T", "E"), "flatten batch and sequence first")
        why = " (below E, so that a score is left out)"
        check.between(op, "k", k, 1, min(logits.shape[1] - 1, 31), why)
        weights, ids, _ = self.run(
            "topk_gate", logits, k + 1, score_function, expert_bias, 1, 1, 2, False, 1.0, None,
            "scores",
        )  # fmt: skip
        cutoffs = self.array(weights)[:, k]
        if expert_bias is not None:
            cutoffs = cutoffs + self.array(expert_bias)[self.array(ids)[:, k]]
        return self.run(op, histogram, logits, cutoffs, bounds, score_function, valid)

    def quantile_bias(self, histogram: Any, k: int, *, bounds: Any) -> Any:
        """`kimi_ops.quantile_bias`: the bias [E] float32 with which every expert is chosen equally
        often, from histogram [E, bins] and bounds [2].

        Examples
        --------
        >>> import numpy as np
        >>> import kimi_ops.numpy as kn
        >>> histogram = np.array([[2, 0], [0, 2]], np.int32)
        >>> kn.quantile_bias(histogram, 1, bounds=np.array([0, 2], np.float32))
        array([-0.5,  0.5], dtype=float32)
        """
        op = "quantile_bias"
        check.shape(op, "histogram", histogram, ("E", "bins"))
        experts, bins = histogram.shape
        check.between(op, "k", k, 1, experts)
        check.shape(op, "bounds", bounds, (2,))
        counts, bounds = self.array(histogram), self.array(bounds)
        if name_of(counts.dtype) not in ("int32", "int64"):
            raise TypeError(
                f"{op}: histogram: expected int32, int64, got {name_of(counts.dtype)}; convert it"
            )
        xp = self.space(counts)
        until = counts.cumsum(1)
        whole, rest = until[:, -1:] // experts, until[:, -1:] % experts
        rank = whole * k + (rest * k + experts - 1) // experts  # ceil(n k / E), within int32
        bin = xp.clip((until < rank).sum(1, keepdims=True), None, bins - 1)
        here, upto = (xp.take_along_axis(x, bin, 1) for x in (counts, until))
        wide = xp.asarray(0.0).dtype  # float64, or JAX's own
        inside = (rank - (upto - here)).astype(wide) / xp.clip(here, 1, None)
        low, high = bounds.astype(wide)
        bias = low + (bin + inside)[:, 0] * ((high - low) / bins)
        return (bias - bias.mean()).astype("float32")

    def drop_to_capacity(
        self,
        weights: Any,
        indices: Any,
        num_experts: int,
        capacity: int,
        *,
        by: DropRule = "weights",
    ) -> Gate:
        """`kimi_ops.drop_to_capacity`: every expert keeps its `capacity` best pairs of weights and
        indices [T, K], or its first (``by="position"``); dropped ones have id -1 and weight 0.
        A weight of NaN counts as -inf.

        Examples
        --------
        >>> import numpy as np
        >>> import kimi_ops.numpy as kn
        >>> w, ids = np.array([[0.1], [0.9], [0.5]], np.float32), np.zeros((3, 1), np.int32)
        >>> kn.drop_to_capacity(w, ids, 2, 2).indices.ravel()
        array([-1,  0,  0], dtype=int32)
        """
        op = "drop_to_capacity"
        check.choice(op, "by", by, ("weights", "position"))
        check.shape(op, "indices", indices, ("T", "K"))
        check.shape(op, "weights", weights, tuple(indices.shape), "one for each id")
        check.between(op, "capacity", capacity, 0, 2**31 - 1)
        weights, ids = self.array(weights), self.array(self.ids(indices))
        xp, pairs = self.space(ids), ids.reshape(-1, 1)
        order = xp.arange(pairs.shape[0])
        if by == "weights":  # from the largest, equal ones in their order
            size = self.constant(weights).reshape(-1)
            size = size if name_of(size.dtype) == "float64" else size.astype("float32")
            order = self.order(-xp.where(xp.isnan(size), -math.inf, size))
        pairs = pairs[order]
        row_map, _, offsets, counts = map(
            self.array, self.run("permute_plan", pairs, num_experts, 1)
        )
        place = row_map - (offsets - counts)[xp.where(row_map < 0, 0, pairs)]
        kept = (row_map >= 0) & (place < capacity)
        stays = kept[self.order(order)].reshape(ids.shape)
        return Gate(
            xp.where(stays, weights, 0), xp.where(stays, ids, -1), xp.clip(counts, None, capacity)
        )


def _sequences(op: str, num_sequences: int, offsets: Any) -> int:
    """How many there are."""
    if offsets is None:
        return num_sequences
    check.shape(op, "offsets", offsets, ("N",))
    if num_sequences not in (1, offsets.shape[0]):
        raise ValueError(
            f"{op}: num_sequences: expected {offsets.shape[0]} as offsets are, got "
            f"{num_sequences}; leave it out"
        )
    return int(offsets.shape[0])
