# SPDX-License-Identifier: MIT
"""Rows to their experts and back."""

from typing import Any

from kimi_ops import _arguments as check
from kimi_ops.arrays.door import Door, Plan, name_of


class Permute(Door):
    def permute_plan(
        self,
        indices: Any,
        num_experts: int,
        *,
        align: int = 1,
        capacity: int | None = None,
        num_out_tokens: int | None = None,
    ) -> Plan:
        """`kimi_ops.permute_plan` of ids [T, K], or of a routing map [T, E] of bools. The number of
        rows is one of the shapes: T K + E (align - 1), E capacity or num_out_tokens.

        Examples
        --------
        >>> import numpy as np
        >>> import kimi_ops.numpy as kn
        >>> kn.permute_plan(np.array([[1, 0], [1, 2]], np.int32), 3).offsets
        array([1, 3, 4], dtype=int32)
        >>> kn.permute_plan(np.array([[True, False], [True, True]]), 2, capacity=1).source
        array([0, 3], dtype=int32)
        """
        op = "permute_plan"
        if name_of(indices.dtype) == "bool":
            check.shape(op, "indices", indices, ("T", num_experts), "a routing map has all experts")
            there = self.array(indices)
            xp = self.space(there)
            indices = xp.where(there, xp.arange(num_experts, dtype="int32"), -1).astype("int32")
        ids = self.ids(indices)
        plan = Plan(*self.run(op, ids, num_experts, align))
        if capacity is not None:
            if align != 1 or num_out_tokens is not None:
                raise ValueError(
                    f"{op}: capacity: expected align = 1 and no num_out_tokens beside it, got "
                    f"{align} and {num_out_tokens}; groups have exactly so many rows"
                )
            check.between(op, "capacity", capacity, 0, (2**31 - 1) // num_experts)
            return self._padded(plan, self.array(ids), capacity)
        if num_out_tokens is None or num_out_tokens == plan.source.shape[0]:
            return plan
        check.between(op, "num_out_tokens", num_out_tokens, 0, 2**31 - 1)
        row_map, source, offsets, counts = map(self.array, plan)
        xp = self.space(source)
        missing = max(0, num_out_tokens - source.shape[0])
        return Plan(
            xp.where(row_map < num_out_tokens, row_map, -1),
            xp.pad(source, (0, missing), constant_values=-1)[:num_out_tokens],
            xp.clip(offsets, None, num_out_tokens),
            counts,
        )

    def _padded(self, plan: Plan, ids: Any, capacity: int) -> Plan:
        """Groups of exactly `capacity` rows."""
        row_map, source, offsets, counts = map(self.array, plan)
        xp, experts = self.space(source), offsets.shape[0]
        starts = offsets - counts
        expert = xp.where(row_map < 0, 0, ids)
        place = row_map - starts[expert]
        kept = (row_map >= 0) & (place < capacity)
        of_row = xp.arange(experts, dtype="int32")[:, None]
        within = xp.arange(capacity, dtype="int32")[None]
        first = xp.pad(source, (0, 1), constant_values=-1)  # never empty
        rows = xp.clip(starts[:, None] + within, None, source.shape[0])
        taken = xp.where(within < counts[:, None], first[rows], -1)
        return Plan(
            xp.where(kept, expert * capacity + place, -1),
            taken.reshape(-1),
            (of_row[:, 0] + 1) * capacity,
            xp.clip(counts, None, capacity),
        )

    def permute(self, x: Any, plan: Plan) -> Any:
        """Rows [R, H] grouped by expert, of tokens x [T, H] of any dtype but float64; padding is
        zero. Its gradient sums the rows of a token in slot order."""
        return self.run("permute", x, plan.row_map, plan.source)

    def permute_weights(self, weights: Any, plan: Plan) -> Any:
        """The weight of every row [R] float32, of weights [T, K] of pairs; 0 for padding."""
        op = "permute_weights"
        check.shape(op, "weights", weights, tuple(plan.row_map.shape), "one for each pair")
        column = self.array(self.as_weights(weights)).reshape(-1, 1)
        rows = self.array(plan.row_map).reshape(-1, 1)  # a pair is a token with one slot
        return self.array(self.run("permute", column, rows, plan.source)).reshape(-1)

    def unpermute(self, y: Any, plan: Plan, weights: Any = None, *, out_dtype: Any = None) -> Any:
        """Tokens [T, H]: the sums of their rows y [R, H], times weights [T, K] where there are any.
        ``out_dtype="float32"`` keeps the sums as they are."""
        if out_dtype is not None and name_of(out_dtype) != name_of(y.dtype):
            if name_of(out_dtype) != "float32":
                raise TypeError(
                    "unpermute: out_dtype: expected None, float32 or the dtype of y, got "
                    f"{name_of(out_dtype)}; round the result"
                )
            y = self.array(y).astype("float32")
        weights = None if weights is None else self.as_weights(weights)
        return self.run("unpermute", y, plan.row_map, plan.source, weights)

    def sort_chunks(self, x: Any, split_sizes: Any, order: Any, *, inverse: bool = False) -> Any:
        """`kimi_ops.sort_chunks`: the chunks of rows of x [R, H] in a new order; `inverse` undoes
        it, and is its gradient."""
        return self.run("sort_chunks", x, self.ids(split_sizes), self.ids(order), bool(inverse))
