# SPDX-License-Identifier: MIT
"""The experts of a model over the ranks of a group: each owns as many neighbours of every layer.

Everything else of the model, or of a stage, is whole on every rank, which brings its own tokens. A
forward, a backward and a save are calls of all ranks of the group, in the same order.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from kimi_ops import ExpertParallel, TopkGate, fused_experts
from kimi_ops._autocast import autocast
from kimi_ops.activations import Activation, ActivationName
from kimi_ops.choices import AnyBackend
from kimi_ops.models.kimi_k2.checkpoint import to_first
from kimi_ops.models.kimi_k2.config import KimiK2Config
from kimi_ops.moe.quantized import QuantizedWeight
from kimi_ops.parallel import call_checks
from kimi_ops.parallel.local import LocalGroup
from kimi_ops.parallel.results import Dispatched, Pending

__all__ = ["ExpertRanks", "to_first"]


class ExpertRanks:
    """Who owns which experts of a model, and the way there.

    Parameters
    ----------
    group : ProcessGroup, or a rank of a LocalWorld
        All of its ranks make the object, with the same arguments, and a model with it. The model of
        a `LocalWorld` computes, but is not saved.
    config : KimiK2Config
        Of the model; the number of ranks divides its experts.
    max_tokens : int
        The most tokens of a forward on a rank.
    device : torch.device or str
        Of the model.
    timeout : float
        Seconds until a rank that does not come is an error.
    batches : int
        How many batches may be under way at once; `forward_two` wants two.
    backend : str
        What moves tokens, as `kimi_ops.ExpertParallel` takes it.

    Attributes
    ----------
    batches : int
    experts : range
        Those of this rank.
    backend : str
        What moves tokens, as `kimi_ops.ExpertParallel` has chosen.

    Raises
    ------
    ValueError
        Experts that cannot be shared out evenly.
    EPMismatch, EPTimeout, EPRankLost
        As `kimi_ops.ExpertParallel`.

    Examples
    --------
    On every rank of ``torchrun``; here on the only one.

    >>> import torch
    >>> import torch.distributed as dist
    >>> from kimi_ops.models.kimi_k2 import ExpertRanks, KimiK2, KimiK2Config
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> config = KimiK2Config.tiny()
    >>> with ExpertRanks(dist.group.WORLD, config, max_tokens=8) as ranks:
    ...     KimiK2(config, expert_ranks=ranks)(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 64])
    >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        group: dist.ProcessGroup | LocalGroup,
        config: KimiK2Config,
        *,
        max_tokens: int,
        device: torch.device | str = "cpu",
        timeout: float = 30.0,
        batches: int = 1,
        backend: AnyBackend = "auto",
    ) -> None:
        self.group, self.count, self.batches = group, config.n_routed_experts, batches
        self.rank, self.world = call_checks.place(group)
        if self.count % self.world:
            raise ValueError(
                f"ExpertRanks: group: expected a divisor of the {self.count} experts of a layer, "
                f"got {self.world} ranks; start another number of them"
            )
        self._parallel = ExpertParallel(
            group,
            num_experts=self.count,
            hidden=config.hidden_size,
            max_tokens_per_rank=max_tokens,
            backend=backend,
            num_buffers=batches,
            timeout=timeout,
            device=device,
        )
        self.experts, self.backend = self._parallel.experts, self._parallel.backend

    def owner(self, expert: int) -> int:
        """The rank of the group that has an expert."""
        return expert * self.world // self.count

    def leave(self, x: Tensor, gate: TopkGate) -> Pending[Dispatched]:
        """Tokens x [T, H] on their way to their experts."""
        (x,) = autocast(x)
        return self._parallel.dispatch(x, gate.indices, gate.weights, async_op=True)

    def compute(
        self,
        leaving: Pending[Dispatched],
        w_gate_up: Tensor | QuantizedWeight,
        w_down: Tensor | QuantizedWeight,
        activation: ActivationName | Activation,
        stored: AbstractContextManager[Any] = nullcontext(),  # noqa: B008  (holds nothing)
    ) -> Pending[Tensor]:
        """`fused_experts` of those tokens (in `stored`) on their way home; the matrices are this
        rank's.

        A rank adds up its experts' weighted outputs of a token, the token's own rank adds up those
        sums, in the order of the ranks: one rounding more than where all experts are at home.
        """
        rows = leaving.wait()
        assert isinstance(rows.x, Tensor)
        with record_function("experts"):
            x, w_gate_up, w_down = autocast(rows.x, w_gate_up, w_down)
            numbers = torch.arange(len(self.experts), dtype=torch.int32, device=x.device)
            expert = numbers.repeat_interleave(rows.tokens_per_expert, output_size=len(x))
            once = x.new_ones(len(x), 1, dtype=torch.float32)
            with stored:
                out = fused_experts(
                    x, w_gate_up, w_down, once, expert[:, None], activation=activation
                )
        return self._parallel.combine(out, rows.handle, async_op=True)

    def to_first(self, tensor: Tensor, owner: int) -> Tensor | None:
        """`tensor` as its owner has it, on the host of rank 0; None on the others.

        All ranks but these two may leave the call out. Elsewhere than on the owner `tensor` only
        says what comes: its shape and dtype.
        """
        if isinstance(self.group, LocalGroup):
            raise ValueError(
                "save_pretrained: expert_ranks: expected those of a process group, got a rank of a "
                "LocalWorld; start processes, with torchrun"
            )
        return to_first(self.group, tensor, owner)

    def abandon(self) -> None:
        """Give up what is under way after an error in a forward or backward, so that the next may
        begin; `forward_two` and `backward_two` do it themselves."""
        self._parallel.abandon()

    def close(self) -> None:
        """Give back the connection; the model is of no use for a forward then."""
        self._parallel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
