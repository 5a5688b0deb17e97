# SPDX-License-Identifier: MIT
"""What `ExpertParallel` takes; everything is checked by the rank that it was given to."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.distributed as dist

from kimi_ops import _check, _native
from kimi_ops.choices import AnyBackend, Overflow
from kimi_ops.moe.quantized import Fp8Rows
from kimi_ops.parallel.errors import EPMisuse
from kimi_ops.parallel.layout import LAYOUTS
from kimi_ops.parallel.local import LocalGroup
from kimi_ops.parallel.process_group import BACKENDS
from kimi_ops.parallel.results import Handle
from kimi_ops.parallel.wire import FP8

MAX_EXPERTS = 1024  # of permute_plan
_MOST = 2**31 - 1
# What the ranks of a dispatch have to have in common; `dispatch` gives a number for each.
AGREED = ("top_k", "dtype of x", "weights given", "gradients wanted")
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_BACKENDS, _OVERFLOW = get_args(AnyBackend), get_args(Overflow)
_OP = "ExpertParallel"


@dataclass(frozen=True)
class Limits:
    """What the tokens of every dispatch are held to."""

    num_experts: int
    hidden: int
    max_tokens: int
    wire_dtype: torch.dtype | None
    device: torch.device


def connection(
    group: Any, backend: str, timeout: float, device: torch.device | None, nodes: bool
) -> None:
    _check.choice(_OP, "backend", backend, _BACKENDS)
    if not _check.number(_OP, "timeout", timeout) > 0:
        raise ValueError(f"{_OP}: timeout: expected seconds above 0, got {timeout}")
    local = isinstance(group, LocalGroup)
    if group is None and not dist.is_initialized():
        raise ValueError(
            f"{_OP}: group: expected a process group, got None without a default group; call "
            "torch.distributed.init_process_group, or pass a rank of a LocalWorld"
        )
    if not local and not isinstance(group, (dist.ProcessGroup, type(None))):
        raise TypeError(
            f"{_OP}: group: expected a ProcessGroup or a rank of a LocalWorld, got "
            f"{type(group).__name__}; this process may be no member of it"
        )
    offered = ("reference", "cuda") if local else BACKENDS
    if backend not in ("auto", *offered):
        raise ValueError(
            f"{_OP}: backend: expected {' or '.join(offered)} for a "
            f"{'LocalWorld' if local else 'process group'}, got {backend}; 'auto' chooses"
        )
    if nodes and backend in ("shm", "cuda"):
        raise ValueError(
            f"{_OP}: ranks_per_node: expected None with {backend}, whose ranks reach each other's "
            "memory; pass backend='gloo' or 'nccl' for ranks on several hosts"
        )
    if backend == "nccl" and device is not None and device.type != "cuda":
        raise ValueError(f"{_OP}: device: expected a GPU for nccl, got {device}")
    gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    if backend == "cuda" and not gpu and not _native.engine.cpu_tensors_go_to_cuda():
        raise ValueError(
            f"{_OP}: device: expected a GPU for cuda, got {device or 'none'}; 'auto' chooses"
        )
    if backend == "shm" and device is not None and device.type != "cpu":
        raise ValueError(f"{_OP}: device: expected cpu for shm, got {device}; pass backend='auto'")


def place(group: Any) -> tuple[int, int]:
    """(rank, number of ranks)."""
    if isinstance(group, LocalGroup):
        return group.rank, group.size
    group = group or dist.group.WORLD
    return group.rank(), group.size()


def maskable(
    rank: int, active: tuple[int, ...], ranks: tuple[Any, ...], per_node: int | None
) -> None:
    """Check what `mask_rank` is given."""
    if not ranks:
        raise ValueError("mask_rank: ranks: expected at least one, got none; name those to mask")
    for each in ranks:
        _check.integer("mask_rank", "ranks", each)
        if each not in active or each == rank:
            others = [other for other in active if other != rank]
            raise ValueError(
                f"mask_rank: ranks: expected some of {others}, got {each}; this is rank {rank}, "
                f"and active are {list(active)}"
            )
    left = Counter(each // per_node for each in active if each not in ranks) if per_node else {}
    if len(set(left.values())) > 1:
        told = ", ".join(f"{count} on node {node}" for node, count in sorted(left.items()))
        raise ValueError(
            f"mask_rank: ranks: expected equally many left on every node, got {told}; mask the "
            "other ranks of that node, too"
        )


def fault_of(world: int, options: dict[str, Any]) -> Exception | None:
    """What is wrong with the options of an ExpertParallel over `world` ranks."""
    try:
        _options(world, **options)
    except (TypeError, ValueError) as error:
        return error
    return None


def _options(
    world: int,
    num_experts: Any,
    hidden: Any,
    max_tokens_per_rank: Any,
    layout: Any,
    wire_dtype: Any,
    expert_alignment: Any,
    capacity: Any,
    overflow: Any,
    num_buffers: Any,
    timeout: Any,
    ranks_per_node: Any,
) -> None:
    why = f" (an expert for each of {world} ranks)"
    _check.between(_OP, "num_experts", num_experts, world, MAX_EXPERTS, why)
    _check.between(_OP, "hidden", hidden, 1, _MOST)
    _check.between(_OP, "max_tokens_per_rank", max_tokens_per_rank, 0, _MOST)
    _check.between(_OP, "expert_alignment", expert_alignment, 1, _MOST)
    _check.between(_OP, "num_buffers", num_buffers, 1, _MOST)
    _check.choice(_OP, "layout", layout, LAYOUTS)
    _check.choice(_OP, "overflow", overflow, _OVERFLOW)
    if capacity is not None:
        _check.between(_OP, "capacity", capacity, 1, _MOST)
    elif overflow != "raise":
        raise ValueError(
            f"{_OP}: overflow: expected 'raise' without a capacity, got {overflow!r}; "
            "pass capacity="
        )
    if ranks_per_node is not None:
        _check.between(_OP, "ranks_per_node", ranks_per_node, 1, world, f" ({world} ranks)")
        if world % ranks_per_node:
            raise ValueError(
                f"{_OP}: ranks_per_node: expected a divisor of the {world} ranks, got "
                f"{ranks_per_node}; every node has equally many"
            )
        if layout != "rank_dedup":
            raise ValueError(
                f"{_OP}: layout: expected rank_dedup with ranks_per_node, got {layout}, whose "
                "results all come home; pass ranks_per_node=None"
            )
    if wire_dtype not in (None, torch.bfloat16, torch.float32, FP8):
        raise ValueError(
            f"{_OP}: wire_dtype: expected None, torch.bfloat16, torch.float32 or "
            f"torch.float8_e4m3fn, got {wire_dtype}"
        )


def dispatch(limits: Limits, x: Any, indices: Any, weights: Any) -> list[int]:
    """Check a dispatch; the numbers of AGREED."""
    tokens = _tokens(limits, x)
    _check.tensor("dispatch", "indices", indices)
    _check.dtype("dispatch", "indices", indices, (torch.int32, torch.int64))
    _check.shape("dispatch", "indices", indices, (tokens, "K"), "pass a row for each token")
    _on_device(limits, "indices", indices)
    if indices.shape[1] == 0:
        raise ValueError("dispatch: indices: expected at least one expert a token, got K = 0")
    if indices.device.type == "cpu" and indices.numel():
        low, high = (int(edge) for edge in indices.aminmax())
        if low < -1 or high > limits.num_experts:
            raise ValueError(
                f"dispatch: indices: expected ids in -1 .. {limits.num_experts}, got {low} .. "
                f"{high}; mark dropped pairs with -1"
            )
    _weights(limits, x, weights, tuple(indices.shape))
    kind = len(_FLOATS) if isinstance(x, Fp8Rows) else _FLOATS.index(x.dtype)
    given = [part for part in (x, weights) if isinstance(part, torch.Tensor)]
    wanted = torch.is_grad_enabled() and any(part.requires_grad for part in given)
    return [indices.shape[1], kind, int(weights is not None), int(wanted)]


def readable(name: str, values: list[int]) -> list[Any]:
    """The numbers of `dispatch` as people write them."""
    if name == "top_k":
        return values
    if name != "dtype of x":
        return [bool(value) for value in values]
    kinds = [*(str(dtype).removeprefix("torch.") for dtype in _FLOATS), "Fp8Rows"]
    return [kinds[value] for value in values]


def again(limits: Limits, owner: Any, x: Any, indices: Any, weights: Any, handle: Any) -> None:
    """Check a dispatch by the layout of an earlier one."""
    _handle(owner, "dispatch", handle)
    if indices is not None:
        raise ValueError("dispatch: indices: expected None beside a handle, which has them")
    tokens, pairs = _tokens(limits, x), handle.route.pairs
    if tokens != pairs[0]:
        raise ValueError(
            f"dispatch: x: expected {pairs[0]} tokens as in the handle's dispatch, got {tokens}"
        )
    _weights(limits, x, weights, pairs)


def combine(limits: Limits, owner: Any, out: Any, handle: Any) -> None:
    _handle(owner, "combine", handle)
    if handle.combined:
        raise EPMisuse(
            "combine: handle: expected one that was not combined yet; dispatch again with handle=, "
            "which needs no counts"
        )
    _check.tensor("combine", "out", out)
    _check.dtype("combine", "out", out, (handle.dtype,))
    rows = len(handle.route.here.source)
    _check.shape(
        "combine", "out", out, (rows, limits.hidden), "pass a row for each row of dispatch"
    )
    _on_device(limits, "out", out, "combine")


def _handle(owner: Any, op: str, handle: Any) -> None:
    if not isinstance(handle, Handle):
        raise TypeError(
            f"{op}: handle: expected the handle of a dispatch, got {type(handle).__name__}; pass "
            ".handle of its result"
        )
    if handle.route.owner is not owner:
        raise EPMisuse(f"{op}: handle: expected one of this ExpertParallel, got another's")


def _tokens(limits: Limits, x: Any) -> int:
    """T of valid tokens."""
    values = x.data if isinstance(x, Fp8Rows) else x
    _check.tensor("dispatch", "x", values)
    if not isinstance(x, Fp8Rows):
        _check.dtype("dispatch", "x", x, _FLOATS)
    elif limits.wire_dtype not in (None, FP8):
        raise ValueError(
            f"dispatch: x: expected a tensor for a wire of {limits.wire_dtype}, got Fp8Rows; pass "
            "wire_dtype=None"
        )
    _check.shape("dispatch", "x", values, ("T", limits.hidden), "pass tokens of the hidden size")
    _on_device(limits, "x", values)
    if len(values) > limits.max_tokens:
        raise ValueError(
            f"dispatch: x: expected at most max_tokens_per_rank = {limits.max_tokens} tokens, got "
            f"{len(values)}; split them"
        )
    return len(values)


def _weights(limits: Limits, x: Any, weights: Any, pairs: tuple[int, ...]) -> None:
    if weights is None:
        return
    _check.tensor("dispatch", "weights", weights)
    double = isinstance(x, torch.Tensor) and x.dtype == torch.float64
    kinds = (torch.float64,) if double else (torch.float32, torch.bfloat16, torch.float16)
    _check.dtype("dispatch", "weights", weights, kinds)
    _check.shape("dispatch", "weights", weights, pairs, "pass one for each id")
    _on_device(limits, "weights", weights)


def _on_device(limits: Limits, name: str, value: torch.Tensor, op: str = "dispatch") -> None:
    if value.device != limits.device:
        raise ValueError(
            f"{op}: {name}: expected on {limits.device}, got {value.device}; "
            "move it, or pass device="
        )
