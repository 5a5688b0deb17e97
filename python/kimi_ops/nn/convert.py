# SPDX-License-Identifier: MIT
"""Experts of other modules as stacks of matrices, and whether they compute what ours do."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from kimi_ops.activations import ActivationName
from kimi_ops.reference.fused_experts import gated

__all__ = ["Stacked", "stacked"]

_OP = "from_experts"
_ACTIVATIONS = get_args(ActivationName)
_NAMES = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("gate_up_proj", "down_proj"),
)
_ROWS = 16  # of the comparison


class Stacked(NamedTuple):
    gate_up: Tensor  # [E, 2F, H]
    down: Tensor  # [E, H, F]
    activation: str
    trained: bool


@torch.no_grad()
def stacked(
    experts: Sequence[nn.Module] | nn.ModuleList,
    names: Sequence[str] | None,
    activation: str | None,
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
    like: dict[str, Any] = {"device": first[0].device, "dtype": first[0].dtype}
    result = Stacked(
        torch.empty(len(modules), 2 * width, hidden, **like),
        torch.empty(len(modules), *down, **like),
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
        if getattr(layer, "bias", None) is not None:
            raise ValueError(
                f"{_OP}: experts: expected {name} of expert {place} without a bias, got one; "
                "kimi_ops.grouped_gemm takes biases"
            )
        matrices.append(weight)
    return matrices


def _activation(expert: nn.Module, names: Sequence[str], wanted: str | None) -> str:
    """The activation with which a copy of an expert, its weights drawn anew, gives what ours
    does."""
    expert = copy.deepcopy(expert)
    if any(parameter.is_meta for parameter in expert.parameters()):
        expert = expert.to_empty(device="cpu")
    expert = expert.float().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in expert.parameters():
        fan_in = parameter.shape[-1] if parameter.dim() else 1
        values = torch.randn(parameter.shape, generator=generator) * 2 / fan_in**0.5
        parameter.copy_(values)
    *gates, down = _matrices(expert, names, 0)
    x = torch.randn(_ROWS, down.shape[0], generator=generator).to(down.device)
    theirs = expert(x)
    gate, up = (x @ torch.cat(gates).t()).chunk(2, dim=1)
    if wanted and wanted not in _ACTIVATIONS:
        raise ValueError(
            f"{_OP}: activation: expected one of {', '.join(_ACTIVATIONS)}, got {wanted!r}"
        )
    if isinstance(theirs, Tensor):
        names = (wanted,) if wanted else _ACTIVATIONS
        ours = {name: gated(gate, up, name) @ down.t() for name in names}
        # the closest: the two GELUs are hard to tell apart
        name = min(ours, key=lambda one: float((ours[one] - theirs).abs().max()))
        if torch.allclose(theirs, ours[name], rtol=1e-4, atol=1e-4):
            return name
    raise ValueError(
        f"{_OP}: experts: expected experts that compute down(act(gate(x)) * up(x)) with "
        f"{wanted or ' or '.join(_ACTIVATIONS)}, got {type(expert).__name__}, which gives "
        "something else; compute it by grouped_gemm"
    )
