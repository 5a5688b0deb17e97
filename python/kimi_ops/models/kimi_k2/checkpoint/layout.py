# SPDX-License-Identifier: MIT
"""The tensors of a Hugging Face checkpoint as views of a model's memory.

In memory the experts of a layer are two stacks; in a file every expert has its own gate_proj,
up_proj and down_proj. Where ranks share the experts, each has its own.
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from kimi_ops.models.kimi_k2.config import KimiK2Config

__all__ = ["Entry", "Part", "Ranks"]

_STACK = re.compile(r"(.+\.experts\.)(gate_up|down)(_proj|\.weight\w*)")


class Ranks(Protocol):
    """Who has which experts, as `ExpertRanks` says it."""

    rank: int
    experts: range

    def owner(self, expert: int) -> int: ...

    def to_first(self, tensor: Tensor, owner: int) -> Tensor | None: ...


class Entry(NamedTuple):
    """A tensor of a checkpoint: its name, a view of the model's memory, which expert rank has it.

    Where that is not this one, the view is of another expert, which has the shape and the dtype.
    """

    name: str
    tensor: Tensor
    owner: int | None  # None: every rank has it


class Part(NamedTuple):
    """A model, or a part of one: names in a checkpoint are those of the module behind `prefix`, and
    all that begin with `own` are its."""

    module: nn.Module
    config: KimiK2Config
    ranks: Ranks | None = None
    prefix: str = ""
    own: str | tuple[str, ...] = ""

    def entries(self) -> Iterator[Entry]:
        """All tensors of the checkpoint, in its order."""
        for name, tensor in self.module.state_dict(prefix=self.prefix).items():
            if name == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            stack = _STACK.fullmatch(name)
            if stack is None:
                yield Entry(name, tensor, None)
            else:
                yield from self._of_experts(stack, tensor)

    def _of_experts(self, stack: re.Match[str], tensor: Tensor) -> Iterator[Entry]:
        prefix, kind, suffix = stack.groups()
        suffix = "weight" if suffix == "_proj" else suffix.removeprefix(".")
        here = range(len(tensor)) if self.ranks is None else self.ranks.experts
        for expert in range(self.config.n_routed_experts):
            owner = None if self.ranks is None else self.ranks.owner(expert)
            matrix = tensor[expert - here.start if expert in here else 0]
            if kind == "down":
                yield Entry(f"{prefix}{expert}.down_proj.{suffix}", matrix, owner)
            else:
                gate, up = matrix.chunk(2)
                yield Entry(f"{prefix}{expert}.gate_proj.{suffix}", gate, owner)
                yield Entry(f"{prefix}{expert}.up_proj.{suffix}", up, owner)

    def tensors(self) -> Mapping[str, Tensor]:
        """Those that this process has, by name."""
        here = None if self.ranks is None else self.ranks.rank
        return {
            name: tensor for name, tensor, owner in self.entries() if owner is None or owner == here
        }
