# SPDX-License-Identifier: MIT
"""The seam below Newton-Schulz, QK-Clip and MuonClip: every product, every chain of products and
every elementwise pass goes through one of these functions. Tensors in fp32, bf16 and fp16
take the native kernels, all others the twins in `kimi_ops.reference`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from kimi_ops import _native
from kimi_ops.operators import muon_clip, newton_schulz, qk_clip
from kimi_ops.reference import muon_clip as twin_passes
from kimi_ops.reference import newton_schulz as twin
from kimi_ops.reference import qk_clip as twin_clip

Triple = tuple[float, float, float]
_BUILT_FOR_CUDA = bool(_native._C.cuda_architectures())  # compilers do not look into the module


def served(op: str, *tensors: Tensor | None) -> bool:
    """Whether the native kernels of `op` take these tensors."""
    devices = ("cpu", "cuda") if _BUILT_FOR_CUDA and op in _native.CUDA_OPS else ("cpu",)
    return all(
        t is None or (t.device.type in devices and t.dtype in _native.DTYPES) for t in tensors
    )


# ---- products


def syrk(a: Tensor, c: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """alpha a a^T + beta c, lower triangle computed and mirrored; a [m, k]."""
    if served("newton_schulz", a, c):
        return newton_schulz.matrix_product(a, a.mT, c, alpha, beta, True)
    return twin.syrk(a, c, alpha, beta)


def symmetric_matmul(
    a: Tensor, b: Tensor, c: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    """alpha a b + beta c where that is symmetric, lower triangle computed and mirrored; [m, m]."""
    if served("newton_schulz", a, b, c):
        return newton_schulz.matrix_product(a, b, c, alpha, beta, True)
    return twin.symmetric_matmul(a, b, c, alpha, beta)


def matmul(
    a: Tensor, b: Tensor, c: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    """alpha a b + beta c; a [m, k], b [k, n]."""
    if served("newton_schulz", a, b, c):
        return newton_schulz.matrix_product(a, b, c, alpha, beta, False)
    return twin.matmul(a, b, c, alpha, beta)


PRODUCTS = twin.Products(matmul, syrk, symmetric_matmul)


def cheapest(g: Tensor, dtype: torch.dtype) -> str:
    """The method that ``auto`` means for g [..., m, n] in `dtype`: the fastest of its engine.

    Never the Gram form in bf16, which is too coarse for it. The native products do half the work
    for a symmetric result, so that the Gram form costs less from n = m on; plain ones save nothing
    by symmetry, and there the Gram form wins where its larger products pay for its more numerous
    small ones (measured on a CPU).
    """
    m, n = sorted(g.shape[-2:])
    exact = dtype in (torch.float32, torch.float16)
    if served("newton_schulz", g) and dtype in _native.DTYPES:
        return "gram" if exact and 2 * n >= 3 * m else "symmetric"
    return "gram" if exact and m >= 192 and n >= 3 * m else "standard"


def orthogonalize(
    matrices: Sequence[Tensor],
    rows: tuple[Triple, ...],
    *,
    method: str,
    restarts: tuple[int, ...],
    dtype: torch.dtype,
    eps: float,
) -> list[Tensor]:
    """The chains of independent matrices [m, n] of any strides, each result in its matrix's dtype.

    A result does not depend on the other matrices of the call. Native: matrices that agree in
    shape, dtype and strides share a call.
    """
    images: list[Tensor | None] = [None] * len(matrices)
    alike: dict[Any, list[int]] = {}
    for i, matrix in enumerate(matrices):
        if served("newton_schulz", matrix) and dtype in _native.DTYPES:
            alike.setdefault((matrix.shape, matrix.dtype, matrix.stride()), []).append(i)
            continue
        images[i] = twin.newton_schulz(
            matrix, rows, method=method, restarts=restarts, dtype=dtype, eps=eps, products=PRODUCTS
        )
    numbers = [number for row in rows for number in row]
    code = newton_schulz.METHODS[method]
    for members in alike.values():
        group = [matrices[i] for i in members]
        done = newton_schulz.newton_schulz(group, numbers, restarts, code, dtype, eps)
        for i, image in zip(members, done, strict=True):
            images[i] = image
    return [image for image in images if image is not None]


# ---- QK-Clip


def attention_max_logits(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    """Largest logit of each head; q [B, heads, Sq, D], k [B, kv_heads, Sk, D]."""
    if served("qk_clip", q, k):
        return qk_clip.attention_max_logits(q, k, scale, causal)
    return twin_clip.attention_max_logits(q, k, scale, causal)


def clip_rows_(
    weights: Sequence[Tensor],
    max_logits: Tensor,
    layers: Sequence[twin_clip.Layer],
    rows: Sequence[twin_clip.Rows],
    powers: Sequence[float],
    tau: float,
) -> Tensor:
    """Clip the weights of all layers as the twin does, in one pass; gamma [H]."""
    if served("qk_clip", *weights) and max_logits.dtype == torch.float32:
        numbers = [[number for entry in entries for number in entry] for entries in (layers, rows)]
        return qk_clip.clip_rows_(weights, max_logits, *numbers, powers, tau)
    return twin_clip.clip_rows_(weights, max_logits, layers, rows, powers, tau)


# ---- passes of the optimizer over lists of tensors; `alive[i]` as in the twins


def momenta_(
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    *,
    momentum: float,
    nesterov: bool,
    maximize: bool,
    alive: Sequence[Tensor | None],
) -> list[Tensor]:
    """Move the buffers towards the gradients; returns what Newton-Schulz takes, new tensors."""
    updates: list[Tensor | None] = [None] * len(grads)
    for members in _alike(alive, grads, buffers):
        done = muon_clip.muon_momentum_(
            [grads[i] for i in members], [buffers[i] for i in members], momentum, nesterov, maximize
        )
        for i, update in zip(members, done, strict=True):
            updates[i] = update
    for i, update in enumerate(updates):
        if update is None:
            updates[i] = twin_passes.momentum_(
                grads[i],
                buffers[i],
                momentum=momentum,
                nesterov=nesterov,
                maximize=maximize,
                alive=alive[i],
            )
    return [update for update in updates if update is not None]


def apply_(
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    rates: Sequence[float],
    *,
    lr: float,
    weight_decay: float,
    cautious: bool,
    alive: Sequence[Tensor | None],
) -> None:
    """Decay the matrices `params` by lr weight_decay, step against `directions` by `rates`."""
    left = set(range(len(params)))
    for members in _alike(alive, params, directions):
        muon_clip.muon_update_(
            [params[i] for i in members],
            [directions[i] for i in members],
            [rates[i] for i in members],
            lr * weight_decay,
            cautious,
        )
        left.difference_update(members)
    for i in sorted(left):
        twin_passes.apply_(
            params[i],
            directions[i],
            lr=lr,
            rate=rates[i],
            weight_decay=weight_decay,
            cautious=cautious,
            alive=alive[i],
        )


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[int],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
    cautious: bool,
    alive: Sequence[Tensor | None],
) -> None:
    """One AdamW update of each parameter; `steps` count from 1."""
    left = set(range(len(params)))
    for members in _alike(alive, params, grads, exp_avgs, exp_avg_sqs):
        lists = [[x[i] for i in members] for x in (params, grads, exp_avgs, exp_avg_sqs)]
        if any(state.dtype != torch.float32 for state in lists[2] + lists[3]):
            continue
        numbers = [steps[i] for i in members]
        muon_clip.adamw_(*lists, numbers, lr, *betas, eps, weight_decay, maximize, cautious)
        left.difference_update(members)
    for i in sorted(left):
        twin_passes.adamw_(
            params[i],
            grads[i],
            exp_avgs[i],
            exp_avg_sqs[i],
            steps[i],
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            maximize=maximize,
            cautious=cautious,
            alive=alive[i],
        )


def squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of squares of each tensor in fp64, [tensors], on their device."""
    device = tensors[0].device if tensors else None
    sums = torch.zeros(len(tensors), dtype=torch.float64, device=device)
    for members in _alike([None] * len(tensors), tensors):
        sums[members] = muon_clip.squares([tensors[i] for i in members])
    for i, tensor in enumerate(tensors):
        if not served("muon_clip", tensor):
            norm = torch.linalg.vector_norm(tensor.contiguous(), dtype=torch.float64)
            sums[i] = norm.square()
    return sums


def _alike(alive: Sequence[Tensor | None], *lists: Sequence[Tensor]) -> Iterable[list[int]]:
    """Numbers of the tensors that a native pass takes, those of equal dtypes together."""
    groups: dict[tuple[torch.dtype, ...], list[int]] = {}
    for i, tensors in enumerate(zip(*lists, strict=True)):
        if alive[i] is None and served("muon_clip", *tensors):
            groups.setdefault(tuple(tensor.dtype for tensor in tensors), []).append(i)
    return groups.values()
