# SPDX-License-Identifier: MIT
"""What a dispatch gives: rows, and the handle that brings their results home."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from kimi_ops.moe.permute import PermutePlan
from kimi_ops.moe.quantized import Fp8Rows

Result = TypeVar("Result")


@dataclass(eq=False)
class Route:
    """The layout of a dispatch, from which others can be made; nothing of it depends on x."""

    owner: Any  # the ExpertParallel
    pairs: tuple[int, int]  # T, K
    direct: bool  # records are pairs, not tokens
    there: PermutePlan
    here: PermutePlan
    tokens: list[int]  # T of every rank
    records: list[list[int]]  # [P, P]: those of each rank for each rank
    sent: list[int]  # the row of this rank
    received: list[int]  # and its column
    loads: Tensor
    dropped: int | Tensor
    ids: Tensor | None = None  # [N, K] of the tokens that came, among the experts of this rank
    places: Any = None  # what a backend keeps of it
    relay: Any = None  # what this rank hands on, where tokens travel by nodes


@dataclass(eq=False)
class Handle:
    """What `ExpertParallel.combine` needs of one dispatch.

    Attributes
    ----------
    loads : Tensor [P, E] int32, on the host
        Pairs that each rank sent to each expert.
    dropped : int
        Pairs of this rank's experts that passed its capacity.

    Notes
    -----
    Where a GPU has counted, reading these waits for it.
    """

    route: Route
    dtype: torch.dtype  # of the experts' results
    weights: Tensor | None  # where the layout applies them
    tie: Tensor
    combined: bool = False

    @property
    def loads(self) -> Tensor:
        return self.route.loads.cpu()

    @property
    def dropped(self) -> int:
        return int(self.route.dropped)


@dataclass(frozen=True, eq=False)
class Dispatched:
    """The rows of this rank's experts.

    Attributes
    ----------
    x : Tensor [R, H] or Fp8Rows, as the tokens were given
        By (local expert, source rank, source token, slot); every expert's rows padded with zero
        rows to a multiple of `expert_alignment`.
    offsets : Tensor [experts of this rank] int32
        Inclusive ends, as `grouped_gemm` takes them.
    tokens_per_expert : Tensor [experts of this rank] int32, without padding
    handle : Handle
    """

    x: Tensor | Fp8Rows
    offsets: Tensor
    tokens_per_expert: Tensor
    handle: Handle


class Pending(Generic[Result]):
    """A dispatch or combine that is under way; `wait` gives its result, as often as it is asked."""

    def __init__(self, finish: Callable[[], Result]) -> None:
        self._finish: Callable[[], Result] | None = finish
        self._result: Result | None = None
        self._error: BaseException | None = None

    def wait(self) -> Result:
        finish, self._finish = self._finish, None
        if finish is not None:
            try:
                self._result = finish()
            except BaseException as error:
                self._error = error
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]
