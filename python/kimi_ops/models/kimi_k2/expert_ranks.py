# SPDX-License-Identifier: MIT
"""The experts of a model over the ranks of a group: each owns as many neighbours of every layer.

Everything else of the model is whole on every rank, which brings its own tokens. A forward, a
backward and a save are calls of all ranks of the group, in the same order.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from kimi_ops import ExpertParallel, TopkGate, fused_experts
from kimi_ops._autocast import autocast
from kimi_ops.models.kimi_k2.config import KimiK2Config
from kimi_ops.moe.quantized import QuantizedWeight

__all__ = ["ExpertRanks"]


class ExpertRanks:
    """Who owns which experts of a model, and the way there.

    Parameters
    ----------
    group : ProcessGroup
        All of its ranks make the object, with the same arguments, and a model with it.
    config : KimiK2Config
        Of the model; the number of ranks divides its experts.
    max_tokens : int
        The most tokens of a forward on a rank.
    device : torch.device or str
        Of the model.
    timeout : float
        Seconds until a rank that does not come is an error.

    Attributes
    ----------
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
        group: dist.ProcessGroup,
        config: KimiK2Config,
        *,
        max_tokens: int,
        device: torch.device | str = "cpu",
        timeout: float = 30.0,
    ) -> None:
        self.group, self.count = group, config.n_routed_experts
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
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
            timeout=timeout,
            device=device,
        )
        self.experts, self.backend = self._parallel.experts, self._parallel.backend

    def owner(self, expert: int) -> int:
        """The rank of the group that has an expert."""
        return expert * self.world // self.count

    def mixed(
        self,
        x: Tensor,
        w_gate_up: Tensor | QuantizedWeight,
        w_down: Tensor | QuantizedWeight,
        gate: TopkGate,
        activation: str,
    ) -> Tensor:
        """`fused_experts` of x [T, H] over the experts of all ranks; the matrices are this rank's.

        A rank adds up its experts' weighted outputs of a token, the token's own rank adds up those
        sums, in the order of the ranks: one rounding more than where all experts are at home.
        """
        x, w_gate_up, w_down = autocast(x, w_gate_up, w_down)
        rows = self._parallel.dispatch(x, gate.indices, gate.weights)
        assert isinstance(rows.x, Tensor)
        numbers = torch.arange(len(self.experts), dtype=torch.int32, device=x.device)
        expert = numbers.repeat_interleave(rows.tokens_per_expert, output_size=len(rows.x))
        once = gate.weights.new_ones(len(rows.x), 1)
        out = fused_experts(rows.x, w_gate_up, w_down, once, expert[:, None], activation=activation)
        return self._parallel.combine(out, rows.handle)

    def to_first(self, tensor: Tensor, owner: int) -> Tensor | None:
        """`tensor` as its owner has it, on the host of rank 0; None on the others.

        All ranks but these two may leave the call out. Elsewhere than on the owner `tensor` only
        says what comes: its shape and dtype.
        """
        if self.rank == 0:
            if owner != 0:
                tensor = torch.empty_like(tensor)
                dist.recv(tensor, dist.get_global_rank(self.group, owner), group=self.group)
            return tensor.cpu()
        if self.rank == owner:
            dist.send(tensor.contiguous(), dist.get_global_rank(self.group, 0), group=self.group)
        return None

    def close(self) -> None:
        """Give back the connection; the model is of no use for a forward then."""
        self._parallel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
