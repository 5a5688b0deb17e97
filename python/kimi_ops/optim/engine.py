# SPDX-License-Identifier: MIT
"""The seam below Newton-Schulz, QK-Clip and MuonClip: every product, every chain of products and
every elementwise pass goes through one of these functions. Tensors in fp32, bf16 and fp16
take the native kernels, all others the twins in `kimi_ops.reference`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from kimi_ops import _native
from kimi_ops._forms import fastest_method
from kimi_ops.operators import muon_clip, newton_schulz, qk_clip
from kimi_ops.reference import muon_clip as twin_passes
from kimi_ops.reference import newton_schulz as twin
from kimi_ops.reference import qk_clip as twin_clip

Triple = tuple[float, float, float]
_device, _dtype = attrgetter("device"), attrgetter("dtype")
_BUILT_FOR_CUDA = bool(_native._C.cuda_architectures())  # compilers do not look into the module


def served(
    op: str, *tensors: Tensor | None, dtypes: Sequence[torch.dtype] = _native.DTYPES
) -> bool:
    """Whether the native kernels of `op` take these tensors."""
    devices = _devices(op)
    return all(t is None or (t.device.type in devices and t.dtype in dtypes) for t in tensors)


def _devices(op: str) -> tuple[str, ...]:
    return ("cpu", "cuda") if _BUILT_FOR_CUDA and op in _native.CUDA_OPS else ("cpu",)


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

    Plain products save nothing by symmetry, and there the Gram form wins where its larger products
    pay for its more numerous small ones (measured on a CPU).
    """
    m, n = sorted(g.shape[-2:])
    exact = dtype in (torch.float32, torch.float16)
    if served("newton_schulz", g) and dtype in _native.DTYPES:
        name = str(dtype).removeprefix("torch.")
        return fastest_method(m, n, name, g.device.type == "cuda")
    return "gram" if exact and m >= 192 and n >= 3 * m else "standard"


def orthogonalize(
    matrices: Sequence[Tensor],
    rows: tuple[Triple, ...],
    *,
    method: str,
    restarts: tuple[int, ...],
    dtype: torch.dtype,
    eps: float,
    aol: bool,
) -> list[Tensor]:
    """The chains of independent matrices [m, n] of any strides, each result in its matrix's dtype.

    `aol`: a matrix is scaled before the steps that `rows` are. A result does not depend on the
    other matrices of the call. Native: matrices that agree in shape, dtype and strides share one.
    """
    images: list[Tensor | None] = [None] * len(matrices)
    alike: dict[Any, list[int]] = {}
    for i, matrix in enumerate(matrices):
        key = matrix.shape, matrix.dtype, matrix.stride(), matrix.device
        alike.setdefault(key, []).append(i)
    numbers = [number for row in rows for number in row]
    code = newton_schulz.METHODS[method]
    for members in alike.values():
        group = [matrices[i] for i in members]
        if served("newton_schulz", group[0]) and dtype in _native.DTYPES:
            chain = newton_schulz.newton_schulz
            done = chain(group, numbers, restarts, code, dtype, eps, aol).unbind(0)
        else:
            keys: dict[str, Any] = {"method": method, "restarts": restarts, "dtype": dtype}
            keys |= {"eps": eps, "aol": aol, "products": PRODUCTS}
            done = [twin.newton_schulz(x, rows, **keys) for x in group]
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


# ---- passes of the optimizer over lists of tensors; a tensor is left alone where one of its
# `pieces` of `squares`, sums of squares of gradients, is not finite

Scalar = float | Tensor  # a tensor lies where the parameters do


def on_host(tensor: Tensor) -> bool:
    """Whether reading a value of `tensor` waits for no device."""
    return tensor.device.type == "cpu" and not _native.engine.cpu_tensors_go_to_cuda()


def momenta_(
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    *,
    momentum: float,
    nesterov: bool,
    maximize: bool,
    squares: Tensor | None = None,
    pieces: Sequence[range] = (),
) -> list[Tensor]:
    """Move the buffers towards the gradients; returns what Newton-Schulz takes, new tensors."""
    updates: dict[int, Tensor] = {}
    keys: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov, "maximize": maximize}
    for members, native in _alike(grads, buffers):
        if native:
            chosen = _chosen(members, grads, buffers)
            flags = _flags(squares, pieces, members, chosen[0][0])
            done = muon_clip.muon_momentum_(*chosen, momentum, nesterov, maximize, *flags)
            updates.update(zip(members, muon_clip.unpacked(done, chosen[0]), strict=True))
            continue
        for i in members:
            alive = _alive(squares, pieces, i, grads[i])
            updates[i] = twin_passes.momentum_(grads[i], buffers[i], **keys, alive=alive)
    return [updates[i] for i in range(len(grads))]


def apply_(
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    rates: Sequence[float],
    *,
    lr: Scalar,
    weight_decay: Scalar,
    cautious: bool,
    squares: Tensor | None = None,
    pieces: Sequence[range] = (),
) -> None:
    """Decay the matrices `params` by lr weight_decay, step against `directions` by `rates`, which
    are factors of lr where that is a tensor."""
    for members, native in _alike(params, directions):
        if native:
            chosen = _chosen(members, params, directions, rates)
            flags = _flags(squares, pieces, members, params[members[0]])
            lr_number, lr_factor = _split(lr)
            decay_number, decay_factor = _split(weight_decay)
            decay = lr_number * decay_number
            muon_clip.muon_update_(*chosen, decay, cautious, *flags, lr_factor, decay_factor)
            continue
        for i in members:
            twin_passes.apply_(
                params[i],
                directions[i],
                lr=lr,
                rate=rates[i] * lr if isinstance(lr, Tensor) else rates[i],
                weight_decay=weight_decay,
                cautious=cautious,
                alive=_alive(squares, pieces, i, params[i]),
            )


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: Scalar,
    betas: tuple[float, float],
    eps: float,
    weight_decay: Scalar,
    maximize: bool,
    cautious: bool,
    squares: Tensor | None = None,
    pieces: Sequence[range] = (),
    measure: bool = False,
    scale: Tensor | None = None,
) -> None:
    """One AdamW update of each parameter, with `scale` times the gradients; `steps` count them.
    `measure` finds out before which gradients are finite, and the first of their pieces of
    `squares` becomes so or not."""
    for members, native in _alike(params, grads, exp_avgs):
        lists = _chosen(members, params, grads, exp_avgs, exp_avg_sqs, steps)
        device = lists[0][0].device
        here = scale if scale is None else scale.to(device)
        measured = measure
        if squares is not None and measure and (not native or squares.device != device):
            firsts = [pieces[i][:1] for i in members]
            squares_(squares, lists[1], firsts, [[grad.numel()] for grad in lists[1]])
            measured = False
        if native:
            flags = _flags(squares, pieces, members, lists[0][0])
            lr_number, lr_factor = _split(lr)
            decay, decay_factor = _split(weight_decay)
            muon_clip.adamw_(
                *lists, lr_number, *betas, eps, decay, maximize, cautious,
                *flags, measured, here, lr_factor, decay_factor,
            )  # fmt: skip
            continue
        for i, *tensors in zip(members, *lists, strict=True):
            twin_passes.adamw_(
                *tensors,
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                maximize=maximize,
                cautious=cautious,
                alive=_alive(squares, pieces, i, tensors[0]),
                scale=here,
            )


def squares_(
    squares: Tensor,
    tensors: Sequence[Tensor],
    pieces: Sequence[range],
    lengths: Sequence[Sequence[int]],
) -> None:
    """Write the sum of squares of each piece, a run of elements of one of `lengths`, to its place
    in `squares`, fp64."""
    for members, native in _alike(tensors):
        device = tensors[members[0]].device
        target = squares if squares.device == device else torch.zeros_like(squares, device=device)
        if native:
            edges = [edge for i in members for edge in (pieces[i].start, pieces[i].stop)]
            runs = [length for i in members for length in lengths[i]]
            muon_clip.squares_(target, *_chosen(members, tensors), edges, runs)
        else:
            for i in members:
                parts = tensors[i].reshape(-1).split(list(lengths[i]))
                for place, part in zip(pieces[i], parts, strict=True):
                    norm = torch.linalg.vector_norm(part, dtype=torch.float64)
                    target[place] = norm.square()
        if target is not squares:
            squares += target.to(squares.device)


def clip_factor(squares: Tensor, pieces: Sequence[range], max_norm: float) -> Tensor:
    """min(1, max_norm / norm) in fp32, 0-dim: of all gradients that are not left alone."""
    if served("muon_clip", squares, dtypes=(torch.float64,)):
        edges = [edge for piece in pieces for edge in (piece.start, piece.stop)]
        return muon_clip.clip_factor(squares, edges, max_norm)
    return twin_passes.clip_factor(squares, pieces, max_norm)


def _alike(*lists: Sequence[Tensor]) -> Iterator[tuple[Sequence[int], bool]]:
    """Numbers of the tensors of equal dtypes on one device, and whether a native pass takes them:
    the third of `lists` are states, in fp32."""
    keys = list(zip(map(_device, lists[0]), *[map(_dtype, x) for x in lists], strict=True))
    groups: dict[tuple[Any, ...], Sequence[int]] = {}
    if keys and keys.count(keys[0]) == len(keys):
        groups[keys[0]] = range(len(keys))
    else:
        for key in dict.fromkeys(keys):
            groups[key] = [i for i, other in enumerate(keys) if other == key]
    for (device, *dtypes), members in groups.items():
        native = set(dtypes).issubset(_native.DTYPES) and dtypes[2:] in ([], [torch.float32])
        yield members, native and device.type in _devices("muon_clip")


def _chosen(members: Sequence[int], *lists: Sequence[Any]) -> list[Sequence[Any]]:
    """Of each list the `members`, which ascend."""
    return [x if len(members) == len(x) else [x[i] for i in members] for x in lists]


def _flags(
    squares: Tensor | None, pieces: Sequence[range], members: Sequence[int], like: Tensor
) -> tuple[Tensor | None, list[int]]:
    if squares is None:
        return None, []
    edges = [edge for i in members for edge in (pieces[i].start, pieces[i].stop)]
    return squares.to(like.device), edges


def _alive(squares: Tensor | None, pieces: Sequence[range], i: int, like: Tensor) -> Tensor | None:
    if squares is None:
        return None
    return torch.isfinite(squares[pieces[i].start : pieces[i].stop]).all().to(like.device)


def _split(value: Scalar) -> tuple[float, Tensor | None]:
    """A number, and a factor of it on the device."""
    if isinstance(value, Tensor):
        return 1.0, value.to(torch.float64).reshape(())
    return float(value), None
