# SPDX-License-Identifier: MIT
"""Experts spread over ranks: tokens go to the ranks of their experts, results come home."""

from collections.abc import Sequence
from typing import Any, Literal, Self, overload

import torch
import torch.distributed as dist
from torch import Tensor

from kimi_ops.choices import AnyBackend, DispatchLayout, Overflow
from kimi_ops.moe.quantized import Fp8Rows
from kimi_ops.parallel import call_checks
from kimi_ops.parallel.connection import Connection
from kimi_ops.parallel.layout import Placement, Rules
from kimi_ops.parallel.local import LocalGroup
from kimi_ops.parallel.results import Dispatched, Handle, Pending
from kimi_ops.parallel.router import Router
from kimi_ops.parallel.transport import Motions
from kimi_ops.parallel.wire import FP8, Form
from kimi_ops.routing import as_int32

__all__ = ["ExpertParallel"]


class ExpertParallel:
    """Dispatch and combine of tokens between ranks that own neighbouring experts each.

    ``dispatch`` brings every token to the ranks of its experts, in expert order; ``combine`` adds
    the experts' results up: ``y[t] = sum_k weights[t, k] * out[row of (t, k)]``. Each is the
    other's gradient. With ``grouped_gemm`` between them they are `fused_experts`
    over any number of ranks.

    Parameters
    ----------
    group : ProcessGroup, a rank of a `LocalWorld`, or None
        The ranks; None is torch's default group. All of them make the object, with the same
        arguments, and call it in the same order.
    num_experts : int
        E, from P to 1024. Rank r owns E // P experts, one more where r < E % P: `experts`.
    hidden : int
        H, columns of a token.
    max_tokens_per_rank : int
        The most tokens of a dispatch.
    backend : {"auto", "shm", "gloo", "nccl", "cuda", "reference"}
        What moves the rows. "auto" takes nccl for a GPU where the group has it, shm (shared
        memory) for CPU tensors of ranks on one host, else gloo; "reference" is a `LocalWorld`.
        "cuda" has kernels for GPUs that reach each other's memory, and for a `LocalWorld` on one.
        `backend` and `backend_reason` say what was taken, and so does the log
        ``kimi_ops.parallel``.
    layout : {"rank_dedup", "expert_direct"}
        A token travels once to a rank, and the rank adds up its experts' results; or once to every
        expert, and all results come home, where they are added up: more bytes, and bits that do not
        depend on the number of ranks.
    wire_dtype : torch.dtype, optional
        bfloat16, float32 or float8_e4m3fn: what tokens travel in, their own dtype by default. FP8
        has a scale for each 128 columns, and is for dispatch alone: results and gradients travel in
        the dtype of the tokens then.
    expert_alignment : int
        Every expert's rows are padded to a multiple of it.
    capacity : int, optional
        The number of rows that a dispatch gives, on every rank; None gives as many as there are.
    overflow : {"raise", "drop", "grow"}
        What more rows than `capacity` do: an `EPOverflow` on every rank; are left out (of every
        expert the last beyond a level that is the highest to fit); raise `capacity` for good. With
        cuda the host asks for no counts but to "grow": the `EPOverflow` is that of the next call
        that looks, and the object is out of use then.
    num_buffers : int
        How many operations may be under way at once.
    timeout : float
        Seconds until a rank that does not come is an `EPTimeout`.
    device : torch.device or str, optional
        Of all tensors; by default the GPU with nccl, the CPU otherwise.
    ranks_per_node : int, optional
        Neighbouring ranks of one host: a token then crosses the network once for each host of its
        experts, to the rank of the same number there, which hands it on; and one sum of each host
        comes back. For gloo, nccl and reference, with `layout` rank_dedup. Rows are the same as
        without; sums are rounded once more.

    Attributes
    ----------
    rank, world : int
    active_ranks : tuple of int
        All, but those that `mask_rank` has left out.
    experts : range
        Those of this rank.
    capacity : int or None

    Raises
    ------
    TypeError, ValueError
        An argument that no rank could take; it is raised where it was given, and the other ranks
        raise `EPPeerError`.
    EPMismatch, EPTimeout, EPRankLost
        Ranks with other arguments, or without any. See `kimi_ops.parallel`.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops import ExpertParallel, LocalWorld
    >>> def work(group):
    ...     ep = ExpertParallel(group, num_experts=4, hidden=2, max_tokens_per_rank=8)
    ...     x = torch.full((1, 2), group.rank + 1.0)
    ...     rows = ep.dispatch(x, torch.tensor([[0, 3]], dtype=torch.int32), torch.ones(1, 2))
    ...     y = ep.combine(rows.x * (ep.rank + 1), rows.handle)
    ...     return rows.offsets.tolist(), y.tolist()
    >>> LocalWorld(2).run(work)
    [([2, 2], [[3.0, 3.0]]), ([0, 2], [[6.0, 6.0]])]

    Notes
    -----
    Names are those of DeepEP (dispatch, combine, handle). Order and rounding are specified, see
    docs/ops/all_to_all.md: every backend gives the same bits.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | LocalGroup | None = None,
        *,
        num_experts: int,
        hidden: int,
        max_tokens_per_rank: int,
        backend: AnyBackend = "auto",
        layout: DispatchLayout = "rank_dedup",
        wire_dtype: torch.dtype | None = None,
        expert_alignment: int = 1,
        capacity: int | None = None,
        overflow: Overflow = "raise",
        num_buffers: int = 1,
        timeout: float = 30.0,
        device: torch.device | str | None = None,
        ranks_per_node: int | None = None,
    ) -> None:
        where = None if device is None else torch.device(device)
        call_checks.connection(group, backend, timeout, where, ranks_per_node is not None)
        self.rank, self.world = call_checks.place(group)
        self._arguments = group, backend, timeout, where, num_buffers
        self._options: dict[str, Any] = {
            "num_experts": num_experts,
            "hidden": hidden,
            "max_tokens_per_rank": max_tokens_per_rank,
            "layout": layout,
            "wire_dtype": wire_dtype,
            "expert_alignment": expert_alignment,
            "capacity": capacity,
            "overflow": overflow,
            "num_buffers": num_buffers,
            "timeout": timeout,
            "ranks_per_node": ranks_per_node,
        }
        self._direct, self._left = layout == "expert_direct", list[Motions]()
        self._connect(range(self.world), capacity)
        self._limits = call_checks.Limits(
            num_experts, hidden, max_tokens_per_rank, wire_dtype, self.device
        )

    def _connect(self, members: Sequence[int], capacity: int | None) -> None:
        """A connection of those ranks, which all call this."""
        options = self._options | {"capacity": capacity}
        nodes = options["ranks_per_node"]
        connection = Connection(*self._arguments, members, nodes is not None)
        try:
            connection.agree(options, call_checks.fault_of(self.world, options))
            per_node = nodes and sum(rank // nodes == members[0] // nodes for rank in members)
            if per_node:
                connection.split(per_node)
        except BaseException:
            connection.close()
            raise
        self._connection, self.active_ranks = connection, tuple(members)
        self.device, self.backend_reason = connection.device, connection.reason
        self.backend = connection.transport.name
        placement = Placement(options["num_experts"], self.world, members)
        rules = Rules(
            placement, self._direct, options["expert_alignment"], options["overflow"], per_node or 0
        )
        self._router, self._motions = Router(connection, rules, capacity), connection.motions
        self.experts = self._router.experts

    def mask_rank(self, *ranks: int) -> None:
        """Go on without ranks that are lost: after an `EPTimeout` or `EPRankLost`, or any time.

        All ranks that are left call it, with the same ranks; then they have a connection of their
        own, and this object works as before, with the same `rank`, `world` and `experts`. Pairs of
        experts that a masked rank has are dropped, as ids -1 are: no row, weight gradient 0. What
        was under way is lost, and handles of dispatches before are of no use. With
        `ranks_per_node` as many ranks have to be left on every node that has any.

        Parameters
        ----------
        *ranks : int
            Those to mask, of `active_ranks`; this rank is not among them.

        Raises
        ------
        TypeError, ValueError
            Not ranks that can be masked. Nothing has changed.
        EPTimeout
            Ranks that are left did not come within `timeout`: mask them, too. With a process group
            they meet at its store, which has to be there still.
        """
        per_node = self._options["ranks_per_node"]
        call_checks.maskable(self.rank, self.active_ranks, ranks, per_node)
        capacity = self.capacity
        if self._connection.lays_rows_out:  # kernels of a rank that is late still write there
            self._left.append(self._motions)
        self._connection.close()
        self._connect([rank for rank in self.active_ranks if rank not in ranks], capacity)

    def check(self) -> None:
        """Wait for the GPU, and raise what its kernels have found.

        With backend cuda a fault is found by kernels and raised by the next call that looks. A
        replay of a graph is no call: look now and then. With other backends nothing is found late.

        Raises
        ------
        EPTimeout, EPMismatch, EPOverflow
            The object is out of use then, see `mask_rank`.
        """
        self._connection.check(self._motions)

    def abandon(self) -> None:
        """Give up what is under way, after an error between its beginning and its `wait()`.

        The buffers are free again; a `wait()` that comes all the same is an `EPMisuse`, a backward
        through it likewise. All ranks call it where all have begun the same operations, and go on.
        Where one rank alone has failed the others wait for it until their `EPTimeout`.
        """
        self._connection.abandon()

    @property
    def capacity(self) -> int | None:
        """The rows of a dispatch on every rank, None for as many as there are."""
        return self._router.capacity

    def close(self) -> None:
        """Give back the communicator. The object is of no use afterwards."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @overload
    def dispatch(
        self, x: Tensor | Fp8Rows, indices: Tensor | None = None, weights: Tensor | None = None, *,
        handle: Handle | None = None, async_op: Literal[False] = False,
    ) -> Dispatched: ...  # fmt: skip
    @overload
    def dispatch(
        self, x: Tensor | Fp8Rows, indices: Tensor | None = None, weights: Tensor | None = None, *,
        handle: Handle | None = None, async_op: Literal[True],
    ) -> Pending[Dispatched]: ...  # fmt: skip

    def dispatch(
        self,
        x: Tensor | Fp8Rows,
        indices: Tensor | None = None,
        weights: Tensor | None = None,
        *,
        handle: Handle | None = None,
        async_op: bool = False,
    ) -> Dispatched | Pending[Dispatched]:
        """Bring tokens to their experts.

        Parameters
        ----------
        x : Tensor [T, H] bfloat16, float16, float32 or float64, or Fp8Rows
            T may be 0 and differ between ranks. Values of `Fp8Rows` travel as they are.
        indices : Tensor [T, K] int32 or int64
            Experts of each token; -1 and E are dropped pairs. K is the same on every rank.
        weights : Tensor [T, K] float32 or 16 bits (float64 beside float64 tokens), optional
            What `combine` multiplies with; 1 where absent.
        handle : Handle, optional
            Of an earlier dispatch, in place of `indices`: its layout again, without counts.
        async_op : bool
            Give a `Pending` once the rows are on their way; `wait()` gives the result.

        Returns
        -------
        Dispatched
            ``x`` [R, H], ``offsets``, ``tokens_per_expert``, ``handle``.

        Raises
        ------
        TypeError, ValueError, EPPeerError
            Arguments that this rank or another one refuses, before a row moves.
        EPMismatch, EPOverflow, EPMisuse, EPTimeout, EPRankLost

        Notes
        -----
        Differentiable in x and the weights; the gradient passes FP8 as if it did not round.
        """
        self._connection.ready("dispatch")
        if handle is None:
            route = self._router.meet(self._limits, x, indices, weights)
        else:
            call_checks.again(self._limits, self._router, x, indices, weights, handle)
            route = handle.route
        given = isinstance(x, Fp8Rows)
        dtype = torch.bfloat16 if isinstance(x, Fp8Rows) else x.dtype
        if weights is not None:
            weights = weights.to(torch.float64 if dtype == torch.float64 else torch.float32)
        tokens = (x.data, x.scale) if isinstance(x, Fp8Rows) else (x,)
        wire = FP8 if given else self._limits.wire_dtype or dtype
        back = Form(0, torch.float32, torch.float32) if given else self._home(dtype, dtype)
        form = Form(self._limits.hidden, None if given else dtype, wire)
        carried = None if self._direct else weights
        ids = None if indices is None else as_int32(indices)
        leaving = self._motions.away("dispatch", route, form, back, tokens, carried, ids)

        def result() -> Dispatched:
            ids = leaving.ids()
            whole = route if handle is not None else self._router.arrived(route, ids)
            tie, arrived, rows = leaving.finish(whole)
            kept = weights if self._direct else arrived
            return Dispatched(
                Fp8Rows(*rows) if given else rows[0],
                whole.here.offsets,
                whole.here.tokens_per_expert,
                Handle(whole, dtype, kept, tie),
            )

        pending = Pending(result)
        return pending if async_op else pending.wait()

    @overload
    def combine(
        self, out: Tensor, handle: Handle, *, async_op: Literal[False] = False
    ) -> Tensor: ...
    @overload
    def combine(
        self, out: Tensor, handle: Handle, *, async_op: Literal[True]
    ) -> Pending[Tensor]: ...

    def combine(
        self, out: Tensor, handle: Handle, *, async_op: bool = False
    ) -> Tensor | Pending[Tensor]:
        """Bring the experts' results home and add them up.

        Parameters
        ----------
        out : Tensor [R, H], the dtype of the tokens (bfloat16 after `Fp8Rows`)
            A row for each row of the dispatch.
        handle : Handle
            Of that dispatch; each is combined once.
        async_op : bool
            As in `dispatch`.

        Returns
        -------
        Tensor [T, H], the dtype of `out`
            Added up in fp32 in a fixed order; rows of padding and dropped pairs add nothing.

        Raises
        ------
        TypeError, ValueError, EPMisuse, EPTimeout, EPRankLost

        Notes
        -----
        Differentiable in `out` and the weights of the dispatch.
        """
        self._connection.ready("combine")
        call_checks.combine(self._limits, self._router, out, handle)
        handle.combined = True
        route, direct = handle.route, self._direct
        summed = out
        form = self._home(out.dtype, out.dtype)
        if form.wire != out.dtype and out.dtype != torch.float64:
            form, summed = self._home(torch.float32, out.dtype), out.float()
        weights = (None, handle.weights) if direct else (handle.weights, None)
        sums = self._motions.home("combine", route, form, handle.tie, summed, *weights)
        pending = Pending(lambda: sums().to(out.dtype))
        return pending if async_op else pending.wait()

    def _home(self, dtype: torch.dtype, own: torch.dtype) -> Form:
        """How sums of `dtype` of tokens of dtype `own` travel: results, and all gradients."""
        wire = self._limits.wire_dtype if self._limits.wire_dtype not in (None, FP8) else own
        return Form(self._limits.hidden, dtype, wire or own)
