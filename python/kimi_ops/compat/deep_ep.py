# SPDX-License-Identifier: MIT
"""DeepEP's `Buffer` over `kimi_ops.ExpertParallel`, the signatures of its legacy buffer in 2.1.

A row for each token and rank that has one of its experts, as there: ranks take the place of
experts. Ids and weights travel as columns of an exchange of their own. Low-latency calls are not
served.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kimi_ops import _check
from kimi_ops.compat._arguments import only
from kimi_ops.moe.quantized import Fp8Rows
from kimi_ops.parallel import call_checks
from kimi_ops.parallel.expert_parallel import ExpertParallel
from kimi_ops.parallel.results import Handle

__all__ = ["Buffer", "EventOverlap"]
_Rows = Tensor | tuple[Tensor, Tensor]


class EventOverlap:
    """Results are in the order of the caller's stream: there is nothing to wait for."""

    def current_stream_wait(self) -> None:
        """Return at once."""


@dataclass(eq=False)
class _Handle:
    rows: Handle
    hidden: int
    columns: Handle | None  # of the ids and weights
    topk: int


class Buffer:
    """Dispatch and combine of tokens between the ranks of a group.

    Parameters
    ----------
    group : ProcessGroup, a rank of a `LocalWorld`, or None
    num_nvl_bytes, num_rdma_bytes, num_qps_per_rank : int
        Sizes elsewhere; memory is sized by what is sent.
    low_latency_mode, enable_shrink, comm
        Not served.
    allow_nvlink_for_low_latency_mode, allow_mnnvl, explicitly_destroy : bool
        No difference.
    max_tokens_per_rank : int
        This library's own: the most tokens of a dispatch, the same on every rank.

    Notes
    -----
    Everything is done when a call returns, in the order of the caller's stream: `previous_event` is
    waited for, `async_finish` and `allocate_on_comm_stream` change nothing, and the event that is
    returned has nothing to wait for. Errors are those of `kimi_ops.parallel`.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops import LocalWorld
    >>> from kimi_ops.compat.deep_ep import Buffer
    >>> def work(group):
    ...     buffer = Buffer(group)
    ...     x, ids = torch.full((1, 2), group.rank + 1.0), torch.tensor([[0, 3]])
    ...     per_rank, _, per_expert, inside, _ = buffer.get_dispatch_layout(ids, num_experts=4)
    ...     rows, local, weights, counts, handle, _ = buffer.dispatch(
    ...         x, num_tokens_per_rank=per_rank, is_token_in_rank=inside,
    ...         num_tokens_per_expert=per_expert, topk_idx=ids, topk_weights=torch.ones(1, 2))
    ...     return local.tolist(), counts, buffer.combine(rows, handle)[0].tolist()
    >>> LocalWorld(2).run(work)[0]
    ([[0, -1], [0, -1]], [2, 0], [[2.0, 2.0]])
    """

    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
        *,
        max_tokens_per_rank: int = 4096,
    ) -> None:
        only("Buffer", "low_latency_mode", low_latency_mode, False, "use dispatch and combine")
        only("Buffer", "enable_shrink", enable_shrink, False, "use ExpertParallel.mask_rank")
        only("Buffer", "comm", comm, None, "pass a process group")
        self._most = max_tokens_per_rank
        self._exchanges: dict[int, ExpertParallel] = {}
        self.rank, self.group_size = call_checks.place(group)
        self.group = group

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, None, Tensor, Tensor, EventOverlap]:
        """Count what goes where; every rank owns ``num_experts / P`` neighbouring experts.

        Returns
        -------
        Tensor [P] int32, None, Tensor [num_experts] int32, Tensor [T, P] bool, EventOverlap
            Tokens of each rank, of each expert, and whether a token goes to a rank.
        """
        op = "get_dispatch_layout"
        _wait(previous_event)
        _check.tensor(op, "topk_idx", topk_idx)
        _check.dtype(op, "topk_idx", topk_idx, (torch.int64, torch.int32))
        _check.shape(op, "topk_idx", topk_idx, ("T", "K"))
        self._per_rank(op, num_experts)
        known = torch.where(topk_idx < 0, num_experts, topk_idx).long()
        chosen = torch.zeros(len(known), num_experts + 1, dtype=torch.bool, device=known.device)
        chosen = chosen.scatter(1, known, True)[:, :num_experts]
        inside = chosen.unflatten(1, (self.group_size, -1)).any(2)
        counts = (each.sum(0, dtype=torch.int32) for each in (inside, chosen))
        per_rank, per_expert = counts
        return per_rank, None, per_expert, inside, EventOverlap()

    def dispatch(
        self,
        x: _Rows,
        handle: Any = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Any = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[_Rows, Tensor | None, Tensor | None, list[int] | None, Any, EventOverlap]:
        """Bring tokens to the ranks of their experts, once to each.

        Parameters
        ----------
        x : Tensor [T, H], or float8_e4m3fn [T, H] with float32 scales [T, H / 128]
        handle
            Of an earlier dispatch: its layout again; only rows come then.
        num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert : Tensor
            From `get_dispatch_layout`.
        num_tokens_per_rdma_rank, num_worst_tokens
            Not served.
        topk_idx : Tensor [T, K], topk_weights : Tensor [T, K] float32, optional
            Both or neither.
        expert_alignment : int
            Rounds the counts up.
        config
            A launch's shape elsewhere; no difference.

        Returns
        -------
        recv_x : as x, [R, H]
            By (source rank, source token).
        recv_topk_idx : Tensor [R, K] int64 or None
            Experts of this rank, from 0; -1 for others.
        recv_topk_weights : Tensor [R, K] float32 or None
            0 for others.
        counts : list of int, or None
            Rows of each expert of this rank, rounded up; read on the host. Empty without ids.
        handle, EventOverlap
        """
        op = "dispatch"
        _wait(previous_event)
        only(op, "num_tokens_per_rdma_rank", num_tokens_per_rdma_rank, None, "pass None")
        only(op, "num_worst_tokens", num_worst_tokens, 0, "use ExpertParallel(capacity=)")
        tokens = Fp8Rows(*x) if isinstance(x, tuple) else x
        hidden = (x[0] if isinstance(x, tuple) else x).shape[1]
        exchange = self._exchange(hidden)
        if handle is not None:
            rows = exchange.dispatch(tokens, handle=handle.rows)
            return _plain(rows.x), None, None, None, None, EventOverlap()
        for name, value in (
            ("num_tokens_per_rank", num_tokens_per_rank), ("is_token_in_rank", is_token_in_rank),
            ("num_tokens_per_expert", num_tokens_per_expert),
        ):  # fmt: skip
            _check.tensor(op, name, value)
        if (topk_idx is None) != (topk_weights is None):
            raise ValueError(f"{op}: topk_weights: expected topk_idx and topk_weights, got one")
        assert is_token_in_rank is not None and num_tokens_per_expert is not None
        ranks = torch.arange(self.group_size, dtype=torch.int32, device=is_token_in_rank.device)
        places = torch.where(is_token_in_rank, ranks, -1)
        rows = exchange.dispatch(tokens, places)
        made = _Handle(rows.handle, hidden, None, 0)
        if topk_idx is None or topk_weights is None:
            return _plain(rows.x), None, None, [], made, EventOverlap()
        made.topk = topk_idx.shape[1]
        columns = torch.cat([topk_idx.float(), topk_weights.float()], dim=1)
        came = self._exchange(2 * made.topk).dispatch(columns, places)
        made.columns = came.handle
        per_rank = self._per_rank(op, len(num_tokens_per_expert))
        arrived: Any = came.x
        ids, weights = arrived.split(made.topk, dim=1)
        local = ids.detach().long() - self.rank * per_rank
        mine = (local >= 0) & (local < per_rank)
        counts = torch.bincount(local[mine], minlength=per_rank).tolist()
        counts = [-(-count // expert_alignment) * expert_alignment for count in counts]
        local, weights = torch.where(mine, local, -1), torch.where(mine, weights, 0)
        return _plain(rows.x), local, weights, counts, made, EventOverlap()

    def combine(
        self,
        x: Tensor,
        handle: Any,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        config: Any = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Bring rows home and add them up, without weights.

        Parameters
        ----------
        x : Tensor [R, H], the dtype of the tokens (bfloat16 after FP8)
        handle
            Of `dispatch`; as often as wanted.
        topk_weights : Tensor [R, K] float32, optional
            Added up beside the rows.
        bias
            Not served: add it to the result.

        Returns
        -------
        Tensor [T, H] the dtype of x, Tensor [T, K] float32 or None, EventOverlap
            Sums in fp32 in the order of the ranks, rounded once.
        """
        _wait(previous_event)
        only("combine", "bias", bias, None, "add it to the result")
        sums = self._exchange(handle.hidden).combine(x, replace(handle.rows, combined=False))
        if topk_weights is None:
            return sums, None, EventOverlap()
        if handle.columns is None:
            raise ValueError("combine: topk_weights: expected a dispatch with topk_idx, got others")
        columns = torch.nn.functional.pad(topk_weights.float(), (handle.topk, 0))
        home = self._exchange(2 * handle.topk)
        whole = home.combine(columns, replace(handle.columns, combined=False))
        return sums, whole[:, handle.topk :], EventOverlap()

    def destroy(self) -> None:
        """Give back the communicators."""
        while self._exchanges:
            self._exchanges.popitem()[1].close()

    @staticmethod
    def capture() -> EventOverlap:
        """An event of this moment."""
        return EventOverlap()

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> None:
        """None: nothing is to be configured."""

    @staticmethod
    def get_combine_config(num_ranks: int) -> None:
        """None: nothing is to be configured."""

    def _exchange(self, columns: int) -> ExpertParallel:
        """That of rows of so many columns; all ranks ask for it in the same order."""
        if columns not in self._exchanges:
            self._exchanges[columns] = ExpertParallel(
                self.group, num_experts=self.group_size, hidden=columns,
                max_tokens_per_rank=self._most,
            )  # fmt: skip
        return self._exchanges[columns]

    def _per_rank(self, op: str, experts: int) -> int:
        if experts % self.group_size:
            raise ValueError(
                f"{op}: num_experts: expected a multiple of {self.group_size} ranks, got {experts}"
                "; kimi_ops.ExpertParallel takes any number"
            )
        return experts // self.group_size


def _wait(event: EventOverlap | None) -> None:
    if event is not None:
        event.current_stream_wait()


def _plain(rows: Tensor | Fp8Rows) -> _Rows:
    return (rows.data, rows.scale) if isinstance(rows, Fp8Rows) else rows
