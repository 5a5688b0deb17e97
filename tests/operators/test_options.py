# SPDX-License-Identifier: MIT
"""Options together, drawn at random: topk_gate, fused_experts and grouped_gemm against the plain
torch twins in fp64, values and gradients."""

import random
from typing import Any

import pytest
import torch
from rounding import error
from torch import Tensor

from kimi_ops import (
    Fp8BlockWeight,
    Int4GroupWeight,
    fused_experts,
    grouped_gemm,
    grouped_gemm_wgrad,
    join_gate_up_,
    permute_plan,
    topk_gate,
)
from kimi_ops.activations import GPT_OSS, Activation, of, situ, swiglu, ungated
from kimi_ops.reference import fused_experts as reference
from kimi_ops.reference import topk_gate as gate_reference

CASES = range(20)
BOUND = {torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
FORMS = [
    of("silu"), of("gelu"), of("gelu_tanh"), of("relu2"), situ(3.0, 2.0), situ(2.0, None), GPT_OSS,
    swiglu(1.5), swiglu(0.5, clamp="after"), ungated("relu2"), ungated(GPT_OSS), ungated("situ"),
]  # fmt: skip


def drawn(case: int) -> random.Random:
    torch.manual_seed(case)
    return random.Random(case)


def maybe(rng: random.Random, value: Any) -> Any:
    return value if rng.random() < 0.5 else None


def same_gradients(ours: Tensor, theirs: Tensor, mine: Any, other: Any, bound: float) -> None:
    """Of the leaves that both have; of sums that weigh every element."""
    along = torch.randn(ours.shape, dtype=torch.float64)
    leaves = [(a, b) for a, b in zip(mine, other, strict=True) if a is not None and a.requires_grad]
    if not leaves or not ours.requires_grad:
        assert not leaves and not ours.requires_grad
        return
    found = torch.autograd.grad(ours, [a for a, _ in leaves], along.to(ours.dtype))
    wanted = torch.autograd.grad(theirs, [b for _, b in leaves], along)
    for (leaf, _), got, want in zip(leaves, found, wanted, strict=True):
        assert got.dtype == leaf.dtype and got.shape == leaf.shape
        away = (got.double() - want).norm()  # of rows that cancel no digit is left
        assert away < bound * (want.norm() + 1e-3), list(leaf.shape)


@pytest.mark.parametrize("case", CASES)
def test_topk_gate(engine, case):
    rng = drawn(case)
    groups = rng.choice([1, 1, 2, 4])
    size = rng.choice([1, 2, 5, 16])
    kept = rng.randint(1, groups)
    experts, k = groups * size, rng.randint(1, min(kept * size, 8))
    shape = rng.choice([(), (1,), (7,), (2, 3), (0,)])
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16])
    logits = (torch.randn(*shape, experts) * 2).to(dtype)
    if rng.random() < 0.3 and logits.numel():
        logits.view(-1)[0] = rng.choice([float("nan"), float("inf"), -float("inf")])
    options: dict[str, Any] = {
        "score_function": rng.choice(["sigmoid", "softmax", "sqrtsoftplus"]),
        "renormalize": rng.random() < 0.5,
        "scaling_factor": rng.choice([1.0, 2.5]),
        "valid": maybe(rng, torch.rand(shape) < 0.7),
    }
    if rng.random() < 0.3:  # experts from elsewhere, -1 and E among them
        options["ids"] = torch.randint(-1, experts + 1, (*shape, k)).to(
            rng.choice([torch.int32, torch.int64])
        )
    else:
        options |= {
            "k": k, "num_groups": groups, "topk_groups": kept,
            "group_score_topk": rng.randint(1, min(size, 2)),
            "expert_bias": maybe(rng, torch.randn(experts)),
            "select": rng.choice(["scores", "logits"]),
            "mask": maybe(rng, torch.rand(*rng.choice([(), shape]), experts) < 0.6),
        }  # fmt: skip
    mine, other = logits.clone().requires_grad_(), logits.double().requires_grad_()
    gate = topk_gate(mine, **options)
    flat = {
        name: value.reshape(-1, value.shape[-1]) if name in ("ids", "mask") else value.flatten()
        for name, value in options.items()
        if name in ("ids", "mask", "valid") and value is not None
    }
    rows = other.reshape(-1, experts)
    weights, indices, counts = gate_reference.topk_gate(rows, **{**options, **flat})
    assert torch.equal(gate.indices, indices.view(gate.indices.shape))
    assert torch.equal(gate.tokens_per_expert, counts)
    assert error(gate.weights, weights.view(gate.weights.shape)) < 2e-6
    bound = 6e-6 if dtype == torch.float32 else BOUND[dtype]
    same_gradients(gate.weights, weights.view(gate.weights.shape), [mine], [other], bound)


def experts_case(rng: random.Random) -> tuple[Any, ...]:
    """Leaves x, w_gate_up, w_down, weights, biases; the same in fp64; ids, options, the bound."""
    form = rng.choice(FORMS)
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16])
    tokens, experts, k = rng.choice([1, 6, 17]), rng.choice([1, 4]), rng.choice([1, 2, 3])
    hidden, width = rng.choice([8, 40]), rng.choice([8, 24])
    both = 2 * width if form.gated else width
    shapes = (experts, both, hidden), (experts, hidden, width), (experts, both), (experts, hidden)
    matrices = [(torch.randn(shape) / shape[-1] ** 0.5).to(dtype) for shape in shapes]
    biases = [maybe(rng, 2 * bias) for bias in matrices[2:]]
    floats = [torch.randn(tokens, hidden).to(dtype), *matrices[:2], torch.rand(tokens, k), *biases]
    weights_dtype = rng.choice([torch.float32, torch.bfloat16])
    floats[3] = floats[3].to(weights_dtype)
    ids = torch.randint(-1, experts + 1, (tokens, k)).to(rng.choice([torch.int32, torch.int64]))
    options = {"activation": form, "weights_first": rng.random() < 0.4}
    bound = max(BOUND[dtype], BOUND[weights_dtype] if weights_dtype != torch.float32 else 0)
    return floats, ids, options, bound


@pytest.mark.parametrize("case", CASES)
def test_fused_experts(gemm_engine, case):
    rng = drawn(case)
    floats, ids, options, bound = experts_case(rng)
    mine = [t if t is None else t.requires_grad_(rng.random() < 0.7) for t in floats]
    other = [t if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in mine]
    x, w_gate_up, w_down, weights, *biases = mine
    given: Any = w_gate_up
    if options["activation"].gated and rng.random() < 0.4:
        given = tuple(part.clone() for part in w_gate_up.chunk(2, dim=1))
        if rng.random() < 0.5 and not w_gate_up.requires_grad:
            join_gate_up_(*given)
    plan = maybe(rng, permute_plan(ids, len(w_down)))
    y = fused_experts(
        x, given, w_down, weights, ids, b_gate_up=biases[0], b_down=biases[1], plan=plan,
        recompute=rng.random() < 0.5, **options,
    )  # fmt: skip
    want = reference.fused_experts(*other[:4], ids, options["activation"], *other[4:])
    assert y.dtype == x.dtype and error(y, want) < bound
    same_gradients(y, want, mine, other, 3 * bound)


@pytest.mark.parametrize("case", CASES)
def test_fused_experts_of_stored_weights(case):
    rng = drawn(case)
    floats, ids, options, bound = experts_case(rng)
    kinds = [rng.choice([Fp8BlockWeight, Int4GroupWeight, None]) for _ in range(2)]
    stored: list[Any] = list(floats)
    for place, kind in zip((1, 2), kinds, strict=True):
        if kind is not None:
            stored[place] = kind.quantize(floats[place])
            floats[place] = stored[place].dequantize(floats[0].dtype)
    mine = [t.requires_grad_(rng.random() < 0.5) if isinstance(t, Tensor) else t for t in stored]
    other = [t if t is None else t.detach().double() for t in floats]
    for a, b in zip(mine, other, strict=True):
        if isinstance(a, Tensor):
            b.requires_grad_(a.requires_grad)
    x, w_gate_up, w_down, weights, *biases = mine
    y = fused_experts(
        x, w_gate_up, w_down, weights, ids, b_gate_up=biases[0], b_down=biases[1],
        plan=maybe(rng, permute_plan(ids, other[2].shape[0])), **options,
    )  # fmt: skip
    want = reference.fused_experts(*other[:4], ids, options["activation"], *other[4:])
    assert error(y, want) < bound
    leaves = [t if isinstance(t, Tensor) else None for t in mine]
    same_gradients(y, want, leaves, other, 3 * bound)


def groups_of(rng: random.Random, count: int, most: int) -> tuple[Tensor, Tensor, int]:
    """Starts and ends of groups with gaps, and a number of rows behind them."""
    row, starts, ends = 0, [], []
    for _ in range(count):
        row += rng.choice([0, 0, 2])
        starts.append(row)
        row += rng.randint(0, most)
        ends.append(row)
    return torch.tensor(starts), torch.tensor(ends), row + rng.choice([0, 3])


def loop(a: Tensor, b: Tensor, spans: list[tuple[int, int]], bias: Tensor | None) -> Tensor:
    """[R, N]: the rows of each span by its matrix, others zero; differentiable."""
    parts, end = [], 0
    for e, (start, stop) in enumerate(spans):
        product = a[start:stop] @ b[e]
        parts += [a.new_zeros(start - end, b.shape[2]), product]
        if bias is not None:
            parts[-1] = product + bias[e]
        end = stop
    return torch.cat([*parts, a.new_zeros(len(a) - end, b.shape[2])])


@pytest.mark.parametrize("case", CASES)
def test_grouped_gemm_of_rows(gemm_engine, case):
    """By offsets, starts and gaps or counts; into out or not, added or not; every stride order."""
    rng = drawn(case)
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16])
    experts, depth, n = rng.choice([1, 3]), rng.choice([1, 8, 33]), rng.choice([1, 24])
    masked = rng.random() < 0.3
    if masked:
        most = 5
        counts = torch.tensor([rng.randint(0, most) for _ in range(experts)])
        spans = [(e * most, e * most + int(c)) for e, c in enumerate(counts)]
        a, groups = torch.randn(experts, most, depth), {"counts": maybe(rng, counts)}
        if groups["counts"] is None:
            spans = [(e * most, (e + 1) * most) for e in range(experts)]
    else:
        starts, ends, rows = groups_of(rng, experts, 6)
        kind = rng.choice([torch.int32, torch.int64])
        groups = {"offsets": ends.to(kind), "starts": starts.to(kind)}
        if rng.random() < 0.5:  # without gaps
            del groups["starts"]
            starts = torch.cat([starts.new_zeros(1), ends[:-1]])
        spans = list(zip(starts.tolist(), ends.tolist(), strict=True))
        a = torch.randn(rows, depth)
    b = torch.randn(experts, depth, n) if rng.random() < 0.5 else torch.randn(experts, n, depth).mT
    bias = maybe(rng, torch.randn(experts, n).to(dtype))
    a, b = a.to(dtype), b.to(dtype)
    wide = rng.choice([None, torch.float32])
    bound = BOUND[torch.float32 if wide else dtype]
    exact = [t if t is None else t.double().requires_grad_() for t in (a, b, bias)]
    want = loop(exact[0].reshape(-1, depth), exact[1], spans, exact[2])
    shape = (*a.shape[:-1], n)
    if rng.random() < 0.5:
        add = rng.random() < 0.5
        out = torch.randn(shape).to(wide or dtype)
        before = out.double().view(want.shape)
        live = torch.zeros(len(want), 1, dtype=torch.bool)
        for start, stop in spans:
            live[start:stop] = True
        given = grouped_gemm(a, b, **groups, bias=bias, out=out, accumulate=add)
        assert given is out
        total = torch.where(live, before + want, before) if add else want
        assert error(out.view(want.shape), total) < bound
        return
    leaves = [t if t is None else t.requires_grad_() for t in (a, b, bias)]
    c = grouped_gemm(a, b, **groups, bias=bias, out_dtype=wide)
    assert (
        c.dtype == (wide or dtype) and c.shape == shape and error(c.view(want.shape), want) < bound
    )
    same_gradients(c.view(want.shape), want, leaves, exact, 3 * BOUND[dtype])


@pytest.mark.parametrize("case", CASES)
def test_grouped_gemm_of_columns_and_depth(gemm_engine, case):
    """[E, M, K] by [K, N], and [M, K] by [K, N]: the groups cut N or K."""
    rng = drawn(case)
    dtype = rng.choice([torch.float32, torch.bfloat16])
    experts, m, small = rng.choice([1, 3]), rng.choice([1, 9]), rng.choice([1, 16])
    _, ends, length = groups_of(rng, experts, 6)
    starts = [0, *ends[:-1].tolist()]
    spans = list(zip(starts, ends.tolist(), strict=True))
    by_depth = rng.random() < 0.5
    if by_depth:
        a, b = torch.randn(m, length), torch.randn(length, small)
    else:
        a, b = torch.randn(experts, m, small), torch.randn(small, length)
    a, b = (t.to(dtype).requires_grad_() for t in (a, b))
    exact = [t.detach().double().requires_grad_() for t in (a, b)]
    if by_depth:
        want = torch.stack([exact[0][:, s:t] @ exact[1][s:t] for s, t in spans])
    else:
        parts = [exact[0][e] @ exact[1][:, s:t] for e, (s, t) in enumerate(spans)]
        want = torch.cat([*parts, exact[1].new_zeros(m, length - spans[-1][1])], dim=1)
    add, ends = rng.random() < 0.5, ends.int()
    if rng.random() < 0.5:
        out = torch.randn(want.shape).to(rng.choice([dtype, torch.float32]))
        before = out.double()
        with torch.no_grad():
            grouped_gemm(a, b, ends, out=out, accumulate=add)
        assert error(out, before + want if add else want) < BOUND[out.dtype]
        if by_depth and add:
            again = before.to(out.dtype)
            with torch.no_grad():
                grouped_gemm_wgrad(a.t(), b, ends, out=again, accumulate=True)
            assert torch.equal(again, out)
        return
    c = grouped_gemm(a, b, ends)
    assert c.dtype == dtype and error(c, want) < BOUND[dtype]
    same_gradients(c, want, [a, b], exact, 3 * BOUND[dtype])


WRONG = [
    ({"b_gate_up": torch.ones(3, 16)}, r"b_gate_up: expected shape \[3, {rows}\]"),
    ({"b_down": torch.ones(3, 1)}, r"b_down: expected shape \[3, 8\]"),
    ({"b_down": torch.ones(3, 8).half()}, "b_down: expected {dtype}"),
    ({"w_down": torch.ones(8, 5)}, r"w_down: expected shape"),
    ({"w_down": None}, "w_down: expected"),
    ({"w_down": torch.ones(3, 8, 5).half()}, "w_down: expected"),
    ({"weights": torch.ones(4, 1)}, r"weights: expected"),
    (
        {"indices": torch.full((4, 2), 4)},
        r"indices.*: expected (ids in -1 \.\. 3|an expert in 0\.\.2)",
    ),
    ({"x": torch.ones(4, 8).int()}, "x: expected"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("way", ["one tensor", "two tensors", "no gate", "weights first"])
@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_the_ways_refuse_the_same(way, changes, message, dtype):
    """What a kernel computes as a whole, and what is composed or left to the twin."""
    form: Activation = ungated("relu2") if way == "no gate" else of("silu")
    rows = 10 if form.gated else 5
    call: dict[str, Any] = {
        "x": torch.ones(4, 8), "w_gate_up": torch.ones(3, rows, 8), "w_down": torch.ones(3, 8, 5),
        "weights": torch.ones(4, 2), "indices": torch.zeros(4, 2).int(),
        "b_gate_up": torch.ones(3, rows), "b_down": torch.ones(3, 8),
    }  # fmt: skip
    both = {
        name: value.to(dtype) if isinstance(value, Tensor) and value.dtype == torch.float32
        else value
        for name, value in (call | changes).items()
    }  # fmt: skip
    if way == "two tensors":
        both["w_gate_up"] = (torch.ones(3, 5, 8, dtype=dtype),) * 2
    text = message.format(rows=rows, dtype=str(dtype).removeprefix("torch."))
    with pytest.raises((TypeError, ValueError), match=f"(fused_experts|permute_plan): ({text})"):
        fused_experts(**both, activation=form, weights_first=way == "weights first")
