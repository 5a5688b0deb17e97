# SPDX-License-Identifier: MIT
"""The operators behind `kimi_ops.MuonClip` on CPU tensors: passes over lists of tensors, at least
one each (torch finds the kernels by the tensors)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kimi_ops import _check, _native
from kimi_ops.operators.registry import define

_FLOATS = tuple(_native.DTYPES)


def _addresses(tensors: Sequence[Tensor]) -> Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)


def _sizes(tensors: Sequence[Tensor]) -> Tensor:
    return torch.tensor([tensor.numel() for tensor in tensors], dtype=torch.int64)


def _check_lists(op: str, **lists: Sequence[Tensor]) -> None:
    """Lists of the same length, tensors of the same shapes, one dtype a list."""
    (first, like), *others = lists.items()
    for name, tensors in lists.items():
        for index, tensor in enumerate(tensors):
            _check.dtype(op, f"{name}[{index}]", tensor, _FLOATS)
            _check.dtype(op, f"{name}[{index}]", tensor, (tensors[0].dtype,), "call once a dtype")
    for name, tensors in others:
        if len(tensors) != len(like):
            raise ValueError(
                f"{op}: {name}: expected {len(like)} tensors as {first}, got {len(tensors)}"
            )
        for index, (tensor, other) in enumerate(zip(tensors, like, strict=True)):
            _check.shape(op, f"{name}[{index}]", tensor, tuple(other.shape))


def _written_back(targets: Sequence[Tensor], dense: Sequence[Tensor]) -> None:
    """After a pass over `dense`: what is not the target itself is copied into it."""
    for target, written in zip(targets, dense, strict=True):
        if written is target:
            torch.autograd.graph.increment_version(target)
        else:
            target.copy_(written)


def _dense(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


# ---- momentum


def _momentum_implementation(
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    momentum: float,
    nesterov: bool,
    maximize: bool,
) -> list[Tensor]:
    _check_lists("muon_momentum", grads=grads, buffers=buffers)
    updates = _momentum_outputs(grads, buffers, momentum, nesterov, maximize)
    from_, moved = _dense(grads), _dense(buffers)
    lists = (_addresses(from_), _addresses(moved), _addresses(updates), _sizes(grads))
    _native.call(
        "muon_momentum", from_[0], *(x.data_ptr() for x in lists), 0, len(grads), momentum,
        nesterov, maximize, _native.DTYPES[grads[0].dtype], _native.DTYPES[buffers[0].dtype],
    )  # fmt: skip
    _written_back(buffers, moved)
    return updates


def _momentum_outputs(
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    momentum: float,
    nesterov: bool,
    maximize: bool,
) -> list[Tensor]:
    return [grad.new_empty(grad.shape, dtype=torch.float32) for grad in grads]


muon_momentum_ = define(
    "muon_momentum_(Tensor[] grads, Tensor(a!)[] buffers, float momentum, bool nesterov, "
    "bool maximize) -> Tensor[]",
    _momentum_implementation,
    _momentum_outputs,
)

# ---- decay and step along the orthogonal direction


def _update_implementation(
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    rates: Sequence[float],
    decay: float,
    cautious: bool,
) -> None:
    op = "muon_update"
    _check_lists(op, params=params, directions=directions)
    if len(rates) != len(params):
        raise ValueError(f"{op}: rates: expected {len(params)} numbers, got {len(rates)}")
    for index, param in enumerate(params):
        _check.shape(op, f"params[{index}]", param, ("m", "n"))
    targets, sources = [_rows(x) for x in params], [_rows(x) for x in directions]
    shapes = torch.tensor(
        [(*t.shape, t.stride(0), s.stride(0)) for t, s in zip(targets, sources, strict=True)],
        dtype=torch.int64,
    )
    numbers = torch.tensor(rates, dtype=torch.float64)
    lists = (_addresses(targets), _addresses(sources))
    _native.call(
        "muon_update", targets[0], *(x.data_ptr() for x in lists), 0, shapes.data_ptr(),
        numbers.data_ptr(), len(params), decay, cautious, _native.DTYPES[targets[0].dtype],
        _native.DTYPES[sources[0].dtype],
    )  # fmt: skip
    _written_back(params, targets)


def _rows(x: Tensor) -> Tensor:
    """x with elements of a row side by side; the row stride stays free."""
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def _no_update(
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    rates: Sequence[float],
    decay: float,
    cautious: bool,
) -> None:
    return None


muon_update_ = define(
    "muon_update_(Tensor(a!)[] params, Tensor[] directions, float[] rates, float decay, "
    "bool cautious) -> ()",
    _update_implementation,
    _no_update,
)

# ---- AdamW


def _adamw_implementation(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[int],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    cautious: bool,
) -> None:
    op = "adamw"
    _check_lists(op, params=params, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    for state in (*exp_avgs, *exp_avg_sqs):
        _check.dtype(op, "exp_avgs, exp_avg_sqs", state, (torch.float32,))
    if len(steps) != len(params):
        raise ValueError(f"{op}: steps: expected {len(params)} numbers, got {len(steps)}")
    tensors = [_dense(x) for x in (params, grads, exp_avgs, exp_avg_sqs)]
    lists = [_addresses(x) for x in tensors]
    lists += [_sizes(params), torch.tensor(steps, dtype=torch.int64)]
    _native.call(
        op, tensors[0][0], *(x.data_ptr() for x in lists), len(params), lr, beta1, beta2, eps,
        weight_decay, maximize, cautious, _native.DTYPES[params[0].dtype],
        _native.DTYPES[grads[0].dtype],
    )  # fmt: skip
    written = tensors[:1] + tensors[2:]
    for targets, dense in zip((params, exp_avgs, exp_avg_sqs), written, strict=True):
        _written_back(targets, dense)


def _no_adamw(*arguments: object) -> None:
    return None


adamw_ = define(
    "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "int[] steps, float lr, float beta1, float beta2, float eps, float weight_decay, "
    "bool maximize, bool cautious) -> ()",
    _adamw_implementation,
    _no_adamw,
)

# ---- sums of squares


def _squares_implementation(x: Sequence[Tensor]) -> Tensor:
    _check_lists("squares", x=x)
    sums = _squares_output(x)
    dense = _dense(x)
    lists = (_addresses(dense), _sizes(dense), sums)
    _native.call(
        "squares", dense[0], *(y.data_ptr() for y in lists), len(x), _native.DTYPES[x[0].dtype]
    )
    return sums


def _squares_output(x: Sequence[Tensor]) -> Tensor:
    return torch.empty((len(x),), dtype=torch.float64)


squares = define("squares(Tensor[] x) -> Tensor", _squares_implementation, _squares_output)
