# SPDX-License-Identifier: MIT
"""The bits of every output and gradient, by engine, over small hard cases.

Inputs come from NumPy's generator, which gives the same numbers on every machine. Where part of a
result is torch's own arithmetic (its matmul in a gradient of quantised weights), it is left out.
"""

import hashlib
import itertools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy
import torch
from torch import Tensor

import kimi_ops
from kimi_ops import Fp8BlockWeight, Fp8Rows, Int4GroupWeight
from kimi_ops.operators.muon_clip import unpacked

DTYPES = ("float32", "bfloat16", "float16")
SCORES = ("sigmoid", "softmax", "sqrtsoftplus")
PAYLOAD = 0x7E55  # a quiet fp16 NaN that conversion by hardware would hand on

CPU = ("portable", "avx2", "avx512", "avx512_bf16", "amx", "amx_model")
SIMT = ("simt", "simt_sm80")
CASES: dict[str, tuple[tuple[str, ...], Callable[[], Iterable[Tensor]]]] = {}


def case(engines: tuple[str, ...] = CPU + SIMT, **grid: Iterable[Any]) -> Any:
    """Registers a function once for each choice of its options, as `name(option, ...)`."""

    def register(function: Callable[..., Iterable[Tensor]]) -> Callable[..., Iterable[Tensor]]:
        for values in itertools.product(*grid.values()):
            options = dict(zip(grid, values, strict=True))
            words = [getattr(value, "__name__", str(value)) for value in values]
            name = f"{function.__name__}({', '.join(words)})"
            CASES[name] = engines, lambda options=options: function(**options)
        return function

    return register


def digests(engine: str) -> dict[str, str]:
    """By case, on an engine that is set; one thread, as results depend on no number of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # some forms are slower on some engines
        found = {name: _digest(f()) for name, (engines, f) in CASES.items() if engine in engines}
    torch.set_num_threads(threads)
    return found


def _digest(results: Iterable[Tensor]) -> str:
    """16 digits for the dtypes, shapes and bytes of all results."""
    digest = hashlib.sha256()
    for x in results:
        x = x.detach().cpu().contiguous()
        digest.update(f"{x.dtype}{list(x.shape)}".encode())
        digest.update(x.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


# ---- inputs


def uniform(*shape: int, dtype: str = "float32", seed: int = 0) -> Tensor:
    """[*shape], in [-1, 1)."""
    numbers = numpy.random.default_rng([seed, *shape]).random(shape) * 2 - 1
    return torch.tensor(numbers, dtype=torch.float32).to(getattr(torch, dtype))


def whole(*shape: int, high: int, low: int = 0, seed: int = 0) -> Tensor:
    numbers = numpy.random.default_rng([seed, *shape]).integers(low, high, shape)
    return torch.tensor(numbers, dtype=torch.int32)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def wanted(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def strided(x: Tensor) -> Tensor:
    """x with rows further apart than they are long."""
    wide = x.new_empty((*x.shape[:-1], x.shape[-1] + 3))
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def with_payload(x: Tensor) -> Tensor:
    """x, whose second row is NaN of one payload in every column."""
    x = x.clone()
    x.view(torch.int16)[1] = PAYLOAD
    return x


def gradients(y: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    weights = uniform(*y.shape, seed=9).to(y.dtype)
    return torch.autograd.grad(y, inputs, weights)


def routes(tokens: int, k: int, experts: int) -> Tensor:
    """[T, K] different ids a token; every third one is dropped, and the last expert has none."""
    order = uniform(tokens, experts - 1, seed=5).argsort(dim=1, stable=True)
    ids = order[:, :k].int().contiguous()
    ids.view(-1)[::3] = -1
    return ids


# ---- gating and balance


def logits(tokens: int, experts: int, dtype: str) -> Tensor:
    """Rows of NaN, infinities, ties and saturated values among uniform ones."""
    x = uniform(tokens, experts) * 6
    for row, value in zip(range(1, tokens, 2), ("nan", "-inf", "inf", "1", "-200"), strict=False):
        x[row] = float(value)
    x[0, ::2] = float("nan")
    return x.to(getattr(torch, dtype))


@case(dtype=DTYPES, score=SCORES, size=((1, 1), (17, 5), (384, 8)))
def topk_gate(dtype, score, size):
    experts, k = size
    z = wanted(strided(logits(11, experts, dtype)))
    valid = torch.arange(11) != 4
    gate = kimi_ops.topk_gate(
        z, k, score_function=score, expert_bias=uniform(experts) / 8, scaling_factor=2.827,
        valid=valid,
    )  # fmt: skip
    return *gate, *gradients(gate.weights, z)


@case(dtype=DTYPES, score=SCORES)
def topk_gate_given(dtype, score):
    z = wanted(strided(logits(11, 64, dtype)))
    valid = torch.arange(11) != 4
    ids = routes(11, 5, 65)
    ids[7] = ids[7, :1]
    gate = kimi_ops.topk_gate(z, ids=ids, score_function=score, valid=valid)
    return *gate, *gradients(gate.weights, z)


@case(dtype=DTYPES, groups=(1, 4))
def topk_gate_by_logits(dtype, groups):
    return kimi_ops.topk_gate(
        logits(11, 64, dtype), 6, select="logits", expert_bias=uniform(64), num_groups=groups,
        topk_groups=(groups + 1) // 2,
    )  # fmt: skip


@case(dtype=DTYPES, score=SCORES)
def gate_plan(dtype, score):
    z = wanted(strided(logits(19, 72, dtype)))
    valid = torch.arange(19) != 4
    gate, plan = kimi_ops.gate_plan(z, 6, score_function=score, valid=valid)
    return *gate, *plan, *gradients(gate.weights, z)


@case(dtype=DTYPES, groups=((8, 4, 2), (4, 1, 3), (1, 1, 2)))
def topk_gate_groups(dtype, groups):
    z = wanted(logits(11, 64, dtype))
    names = ("num_groups", "topk_groups", "group_score_topk")
    options = dict(zip(names, groups, strict=True))
    gate = kimi_ops.topk_gate(z, 6, renormalize=False, **options)
    return *gate, *gradients(gate.weights, z)


@case(dtype=DTYPES, score=SCORES)
def sequence_balance_loss(dtype, score):
    z = wanted(uniform(12, 37, dtype=dtype) * 4)
    ids = routes(12, 4, 37)
    loss = kimi_ops.sequence_balance_loss(z, ids, num_sequences=3, score_function=score)
    return loss, *gradients(loss, z)


@case(dtype=DTYPES)
def sequence_balance_loss_of_lengths(dtype):
    z, ids = wanted(strided(uniform(140, 37, dtype=dtype) * 4)), routes(140, 4, 37)
    offsets, valid = torch.tensor([70, 70, 139]), torch.arange(140) % 5 != 0
    loss = kimi_ops.sequence_balance_loss(z, ids, offsets=offsets, valid=valid)
    counts = kimi_ops.sequence_counts(ids, 37, offsets=offsets, valid=valid)
    return loss, *gradients(loss, z), *counts


@case(dtype=DTYPES, score=SCORES)
def quantile_histogram_(dtype, score):
    histogram = torch.ones(37, 50, dtype=torch.int32)
    kimi_ops.quantile_histogram_(
        histogram, uniform(40, 37, dtype=dtype) * 4, 4, expert_bias=uniform(37) / 8,
        bounds=numbers(-0.75, 1.0), score_function=score, valid=torch.arange(40) % 5 != 0,
    )  # fmt: skip
    return (histogram,)


@case(dtype=DTYPES)
def z_loss(dtype):
    z = wanted(strided(uniform(12, 37, dtype=dtype) * 9))
    loss = kimi_ops.z_loss(z, valid=torch.arange(12) % 5 != 0)
    return loss, *gradients(loss, z)


@case(dtype=("int32", "int64"), centered=(False, True))
def update_expert_bias_(dtype, centered):
    counts = whole(385, high=50).to(getattr(torch, dtype))
    return (kimi_ops.update_expert_bias_(uniform(385), counts, 1e-3, centered=centered),)


# ---- permutation


@case(align=(1, 4), size=((0, 2), (1, 1), (29, 3)))
def permute_plan(align, size):
    return tuple(kimi_ops.permute_plan(routes(*size, 9), 9, align=align))


@case(dtype=(*DTYPES, "uint8"), columns=(1, 19, 72))
def permute(dtype, columns):
    plan = kimi_ops.permute_plan(routes(13, 3, 7), 7, align=4)
    if dtype == "uint8":
        return (kimi_ops.permute(whole(13, columns, high=256).to(torch.uint8), plan),)
    x = wanted(strided(uniform(13, columns, dtype=dtype)))
    y = kimi_ops.permute(x, plan)
    weights = wanted(uniform(13, 3))
    pairs = kimi_ops.permute_weights(weights, plan)
    return y, *gradients(y, x), pairs, *gradients(pairs, weights)


@case(dtype=DTYPES, columns=(1, 19, 72), weighted=(False, True))
def unpermute(dtype, columns, weighted):
    plan = kimi_ops.permute_plan(routes(13, 3, 7), 7, align=4)
    y = wanted(strided(uniform(plan.source.numel(), columns, dtype=dtype)))
    weights = wanted(uniform(13, 3)) if weighted else None
    x = kimi_ops.unpermute(y, plan, weights)
    return x, *gradients(x, *filter(lambda t: t is not None, (y, weights)))


@case(columns=(19, 67), weighted=(False, True))
def unpermute_nan(columns, weighted):
    """Known: vectors keep the payload where the last columns of a row and portable have 0x7e00."""
    plan = kimi_ops.permute_plan(routes(13, 3, 7), 7)
    y = with_payload(uniform(plan.source.numel(), columns, dtype="float16"))
    weights = uniform(13, 3) if weighted else None
    return (kimi_ops.unpermute(y, plan, weights),)


@case(dtype=DTYPES)
def sort_chunks(dtype):
    x = wanted(strided(uniform(14, 19, dtype=dtype)))
    split_sizes = torch.tensor([3, 0, 6, 4], dtype=torch.int32)
    y = kimi_ops.sort_chunks(x, split_sizes, torch.tensor([2, 0, 3, 1], dtype=torch.int32))
    return y, *gradients(y, x)


# ---- grouped products


def ends(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@case(
    dtype=DTYPES, transposed=(False, True),
    size=((13, 17, 9), (13, 1, 5), (3, 40, 33), (75, 70, 66)),
)  # fmt: skip
def grouped_gemm(dtype, transposed, size):
    rows, k, n = size
    a = wanted(strided(uniform(rows, k, dtype=dtype)))
    b = uniform(4, n, k, dtype=dtype).mT if transposed else uniform(4, k, n, dtype=dtype)
    b, bias = wanted(b), wanted(uniform(4, n, dtype=dtype))
    c = kimi_ops.grouped_gemm(a, b, ends(rows // 3, rows // 3, rows - 1, rows - 1), bias=bias)
    return c, *gradients(c, a, b, bias)


@case(dtype=DTYPES)
def grouped_gemm_out(dtype):
    """Into fp32, into a strided tensor, and a weight gradient added to what is there."""
    a, b = uniform(13, 17, dtype=dtype), uniform(3, 17, 9, dtype=dtype)
    dc, offsets = uniform(13, 9, dtype=dtype, seed=1), ends(4, 4, 12)
    out = strided(torch.zeros(13, 9, dtype=torch.float32))
    kimi_ops.grouped_gemm(a, b, offsets, out=out)
    wide = kimi_ops.grouped_gemm(a, b, offsets, out_dtype=torch.float32)
    dw = uniform(3, 17, 9)
    kimi_ops.grouped_gemm_wgrad(a, dc, offsets, out=dw, accumulate=True)
    across = uniform(3, 9, 17).to(a.dtype).mT
    kimi_ops.grouped_gemm_wgrad(a, dc, offsets, out=across)
    return out, wide, dw, across


@case(form=(Fp8BlockWeight, Int4GroupWeight), dtype=DTYPES, rows=(3, 40), engines=CPU)
def grouped_gemm_quantized(form, dtype, rows):
    weight = form.quantize(uniform(3, 150, 200))
    a, bias = uniform(rows, 200, dtype=dtype), uniform(3, 150, dtype=dtype)
    offsets = ends(1, 1, rows - 1)
    return (
        *weight.tensors().values(), kimi_ops.grouped_gemm(a, weight, offsets, bias=bias),
        kimi_ops.grouped_gemm(a, weight, offsets, out_dtype=torch.float32),
    )  # fmt: skip


@case(dtype=DTYPES, columns=(16, 200))
def fp8_rows(dtype, columns):
    rows = Fp8Rows.quantize(strided(uniform(9, columns, dtype=dtype)))
    weight = Fp8BlockWeight.quantize(uniform(2, 130, columns))
    bias = uniform(2, 130, dtype=dtype)
    out_dtype = getattr(torch, dtype)
    c = kimi_ops.grouped_gemm(rows, weight, ends(5, 8), bias=bias, out_dtype=out_dtype)
    return rows.data, rows.scale, c


# ---- routed experts


def experts_of(dtype: str, tokens: int = 11) -> tuple[Tensor, ...]:
    """x, w_gate_up, w_down, weights, indices: H 40, F 24, E 6, K 3."""
    ids = routes(tokens, 3, 6)
    matrices = uniform(6, 48, 40, dtype=dtype), uniform(6, 40, 24, dtype=dtype)
    return uniform(tokens, 40, dtype=dtype), *matrices, uniform(tokens, 3), ids


@case(dtype=DTYPES, activation=("silu", "gelu", "situ"), recompute=(False, True))
def fused_experts(dtype, activation, recompute):
    *floats, ids = experts_of(dtype)
    floats[0] = strided(floats[0])
    floats = [wanted(x) for x in floats]
    y = kimi_ops.fused_experts(*floats, ids, activation=activation, recompute=recompute)
    return y, *gradients(y, *floats)


@case(dtype=DTYPES)
def fused_experts_of_one_token(dtype):
    return (kimi_ops.fused_experts(*experts_of(dtype, 1)),)


@case(dtype=DTYPES, engines=CPU)
def fused_experts_of_none(dtype):
    return (kimi_ops.fused_experts(*experts_of(dtype, 0)),)


@case(activation=("silu", "gelu", "situ"))
def fused_experts_nan(activation):
    x, *rest = experts_of("float16")
    floats = [wanted(t) for t in (with_payload(x), *rest[:-1])]
    y = kimi_ops.fused_experts(*floats, rest[-1], activation=activation)
    return y, *gradients(y, *floats)


@case(form=(Fp8BlockWeight, Int4GroupWeight), dtype=DTYPES, tokens=(1, 30), engines=CPU)
def fused_experts_quantized(form, dtype, tokens):
    x, w_gate_up, w_down, weights, ids = experts_of(dtype, tokens)
    gate_up, down = form.quantize(w_gate_up), form.quantize(w_down)
    return (
        kimi_ops.fused_experts(x, gate_up, down, weights, ids),
        kimi_ops.fused_experts(x, w_gate_up, down, weights, ids),
    )


# ---- Newton-Schulz, QK-Clip, the optimizer


@case(
    method=("standard", "symmetric", "gram"), dtype=DTYPES, shape=((5, 5), (33, 70), (70, 33)),
)  # fmt: skip
def newton_schulz(method, dtype, shape):
    arithmetic = getattr(torch, dtype)
    g = uniform(2, *shape), uniform(*reversed(shape), dtype=dtype).mT
    return kimi_ops.newton_schulz(g, method=method, dtype=arithmetic, eps=1e-7)


@case(method=("symmetric", "gram"), dtype=DTYPES)
def newton_schulz_aol(method, dtype):
    g = uniform(9, 20, dtype=dtype), uniform(20, 9)
    options = {"method": method, "dtype": getattr(torch, dtype), "eps": 1e-7}
    return kimi_ops.newton_schulz(g, coefficients="aol", steps=4, **options)


@case(dtype=DTYPES, shape=((1, 1), (7, 30), (70, 33)), engines=CPU)
def syrk(dtype, shape):
    a = uniform(*shape, dtype=dtype)
    square = uniform(shape[0], shape[0], dtype=dtype)
    square = square + square.mT
    return (
        kimi_ops.syrk(a), kimi_ops.syrk(a.mT.contiguous().mT, c=square, alpha=0.5, beta=2.0),
        kimi_ops.symmetric_matmul(square, square, c=square, alpha=-1.5, beta=0.25),
    )  # fmt: skip


@case(dtype=DTYPES, causal=(False, True), engines=CPU)
def attention_max_logits(dtype, causal):
    q, k = uniform(2, 6, 9, 24, dtype=dtype), uniform(2, 19, 3, 24, dtype=dtype).transpose(1, 2)
    return (kimi_ops.attention_max_logits(q, k, 0.25, causal=causal),)


@case(dtype=DTYPES, layout=("mla", "mha", "query_only", "group_max"), engines=CPU)
def qk_clip_(dtype, layout):
    maxima = numbers(50.0, 150.0, 100.0, 1000.0)
    q, k = uniform(4 * 6, 19, dtype=dtype), strided(uniform(4 * 6, 19, dtype=dtype, seed=1))
    geometry = {"layout": layout, "head_dim": 6}
    if layout == "mla":
        geometry = {"qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 2}
    elif layout != "mha":
        k = k[: 2 * 6]
        geometry |= {"layout": "gqa", "num_kv_heads": 2, "gqa_mode": layout}
    return kimi_ops.qk_clip_(maxima, q_weight=q, k_weight=k, **geometry), q, k


@case(dtype=DTYPES, grad=DTYPES, cautious=(False, True))
def optimizer_passes(dtype, grad, cautious):
    ops = torch.ops.kimi_ops
    shapes = (7, 19), (1, 1), (33, 40)
    params = [uniform(*shape, dtype=dtype) for shape in shapes]
    grads = [uniform(*shape, dtype=grad, seed=1) for shape in shapes]
    buffers = [uniform(*shape, seed=2) for shape in shapes]
    squares = [uniform(*shape, seed=3).abs() for shape in shapes]
    steps = [numbers(count)[0] for count in (0, 1, 29)]
    sums, edges = numbers(1.0, 4.0, 9.0).double(), [0, 1, 1, 2, 2, 3]
    sums[1] = torch.inf if cautious else 4.0
    flags, scale = (sums, edges), ops.clip_factor(sums, edges, 3.0)
    updates = ops.muon_momentum_(grads, buffers, 0.95, cautious, not cautious, *flags)
    updates = unpacked(updates, grads)
    ops.muon_update_(params, updates, [0.1, 0.02, 0.3], 0.01, cautious, *flags, None, None)
    options = 0.01, 0.9, 0.95, 1e-8, 0.1, not cautious, cautious
    moments = grads, buffers, squares, steps
    ops.adamw_(params, *moments, *options, *flags, False, scale, None, None)
    measured = torch.zeros(3, dtype=torch.float64)
    ops.squares_(measured, grads, edges, [grad.numel() for grad in grads])
    return *updates, *params, *buffers, *squares, *steps, measured, scale


@case(dtype=DTYPES, engines=CPU)
def muon_clip(dtype):
    """Three steps of stacks and vectors; state and parameters."""
    shapes = {"muon": ((3, 12, 20), (20, 8)), "adamw": ((20,), (9, 5))}
    groups = [
        {"params": [wanted(uniform(*s, dtype=dtype)) for s in each], "algorithm": name}
        for name, each in shapes.items()
    ]
    optimizer = kimi_ops.MuonClip(groups, lr=0.02, ns_dtype="float32", max_grad_norm=0.5)
    params = [p for group in groups for p in group["params"]]
    for step in range(3):
        for param in params:
            param.grad = uniform(*param.shape, dtype=dtype, seed=10 + step)
        optimizer.step()
    states = [optimizer.state[p] for p in params]
    return *params, *(state[key] for state in states for key in sorted(state))
