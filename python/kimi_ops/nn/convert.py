# SPDX-License-Identifier: MIT
"""Experts of other modules as stacks of matrices, and whether they compute what ours do."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimi_ops.activations import ActivationName, of
from kimi_ops.nn.checks import Activated, check_activation
from kimi_ops.reference.fused_experts import activate

__all__ = ["Stacked", "stacked"]

_OP = "from_experts"
_NAMES = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("gate_up_proj", "down_proj"),
)
_ROWS = 16  # of the comparison


class Stacked(NamedTuple):
    gate_up: Tensor  # [E, 2F, H]
    down: Tensor  # [E, H, F]
    gate_up_bias: Tensor | None  # [E, 2F]
    down_bias: Tensor | None  # [E, H]
    activation: Activated
    trained: bool


@torch.no_grad()
def stacked(
    experts: Sequence[nn.Module] | nn.ModuleList,
    names: Sequence[str] | None,
    activation: Activated | None,
) -> Stacked:
    """See `Experts.from_experts`."""
    modules = list(experts)
    if not modules:
        raise ValueError(f"{_OP}: experts: expected one module or more, got none; pass all experts")
    names = _names(modules[0]) if names is None else tuple(names)
    first = _matrices(modules[0], names, 0)
    shapes = [tuple(matrix.shape) for matrix in first]
    (rows, hidden), down = shapes[0], shapes[-1]
    width = rows // 2 if len(names) == 2 else rows
    gates = [(2 * width, hidden)] if len(names) == 2 else [(width, hidden)] * 2
    if shapes != [*gates, (hidden, width)]:
        raise ValueError(
            f"{_OP}: names: expected {' and '.join(names[:-1])} from H to F and {names[-1]} back, "
            f"got weights {shapes}; name the layers in the order gate, up, down"
        )
    biased = any(bias is not None for bias in _biases(modules[0], names))
    like: dict[str, Any] = {"device": first[0].device, "dtype": first[0].dtype}
    result = Stacked(
        torch.empty(len(modules), 2 * width, hidden, **like),
        torch.empty(len(modules), *down, **like),
        torch.zeros(len(modules), 2 * width, **like) if biased else None,
        torch.zeros(len(modules), hidden, **like) if biased else None,
        _activation(modules[0], names, activation),
        any(parameter.requires_grad for parameter in modules[0].parameters()),
    )
    for e, module in enumerate(modules):
        if type(module) is not type(modules[0]):
            raise TypeError(
                f"{_OP}: experts: expected modules of one class, got "
                f"{type(modules[0]).__name__} at 0 and {type(module).__name__} at {e}; convert "
                "them apart"
            )
        matrices = first if e == 0 else _matrices(module, names, e)
        if [tuple(matrix.shape) for matrix in matrices] != shapes:
            raise ValueError(
                f"{_OP}: experts: expected weights {shapes} as of expert 0, got "
                f"{[tuple(matrix.shape) for matrix in matrices]} at {e}; all have the same sizes"
            )
        result.gate_up[e] = torch.cat(matrices[:-1])
        result.down[e] = matrices[-1]
        *ups, down_bias = _biases(module, names)
        if result.gate_up_bias is not None and result.down_bias is not None:
            for part, bias in zip(result.gate_up_bias[e].chunk(len(ups)), ups, strict=True):
                if bias is not None:
                    part.copy_(bias)
            if down_bias is not None:
                result.down_bias[e] = down_bias
        elif any(bias is not None for bias in (*ups, down_bias)):
            raise ValueError(
                f"{_OP}: experts: expected no biases, as in expert 0, got one at {e}; give all one"
            )
    return result


def _names(expert: nn.Module) -> tuple[str, ...]:
    for names in _NAMES:
        if all(hasattr(expert, name) for name in names):
            return names
    known = "; ".join(", ".join(names) for names in _NAMES)
    raise ValueError(
        f"{_OP}: experts: expected layers named {known}, got a {type(expert).__name__} with "
        f"{', '.join(name for name, _ in expert.named_children()) or 'none'}; pass names="
    )


def _matrices(expert: nn.Module, names: Sequence[str], place: int) -> list[Tensor]:
    """The weights of the layers of an expert, or an error."""
    matrices = []
    for name in names:
        layer = getattr(expert, name, None)
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
            raise TypeError(
                f"{_OP}: experts: expected {name} of expert {place} as a linear layer with a "
                f"floating-point weight, got {type(layer).__name__}; convert plain experts, then "
                "take stored()"
            )
        matrices.append(weight)
    return matrices


def _biases(expert: nn.Module, names: Sequence[str]) -> list[Tensor | None]:
    return [getattr(getattr(expert, name), "bias", None) for name in names]


def _activation(expert: nn.Module, names: Sequence[str], wanted: Activated | None) -> Activated:
    """The activation with which a copy of an expert, its weights drawn anew, gives what ours
    does."""
    if wanted is not None:
        check_activation(_OP, wanted, gated=True)
    expert = copy.deepcopy(expert)
    if any(parameter.is_meta for parameter in expert.parameters()):
        expert = expert.to_empty(device="cpu")
    expert = expert.float().eval()
    generator, dtype = torch.Generator().manual_seed(0), torch.float32
    for parameter in expert.parameters():
        spread = 2 / parameter.shape[-1] ** 0.5 if parameter.dim() else 1.0
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype) * spread)
    *gates, down = _matrices(expert, names, 0)
    *ups, down_bias = _biases(expert, names)
    x = torch.randn(_ROWS, down.shape[0], generator=generator, dtype=dtype).to(down.device)
    theirs = expert(x)
    products = [F.linear(x, w, bias) for w, bias in zip(gates, ups, strict=True)]
    gate, up = torch.cat(products, dim=1).chunk(2, dim=1)
    candidates = get_args(ActivationName) if wanted is None else (wanted,)
    for name in candidates:
        ours = F.linear(activate(gate, up, name), down, down_bias)
        if isinstance(theirs, Tensor) and torch.allclose(theirs, ours, rtol=1e-4, atol=1e-4):
            return name
    tried = " or ".join(of(name).name for name in candidates)
    raise ValueError(
        f"{_OP}: experts: expected experts that compute down(act(gate(x)) * up(x)) with {tried}, "
        f"got {type(expert).__name__}, which gives something else; compute it by grouped_gemm"
    )
