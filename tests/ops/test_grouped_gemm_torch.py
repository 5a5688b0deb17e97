# SPDX-License-Identifier: MIT
"""grouped_gemm at realistic sizes against F.grouped_mm in fp32, products in fp64 and bf16
emulation: 384 experts, awkward sizes, NaN, strides, thread counts."""

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rounding import UNIT, error, sum_bound
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kimi_ops import (
    Fp8BlockWeight,
    Fp8Rows,
    fused_experts,
    grouped_gemm,
    grouped_gemm_wgrad,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def sizes_of(kind: str, experts: int, rows: int) -> Tensor:
    """Rows of each expert, `rows` in all."""
    if kind == "one":
        return F.one_hot(torch.tensor(experts // 2), experts) * rows
    if kind == "balanced":
        return torch.full((experts,), rows // experts)
    hot = rows // 2 if kind == "hot" else 0  # "random": about a third of the experts stay empty
    draws = torch.randint(0, experts, (rows - hot,))
    return torch.bincount(draws, minlength=experts) + F.one_hot(torch.tensor(3), experts) * hot


def tensors(sizes: Tensor, k: int, n: int, dtype: torch.dtype, tail: int = 0):
    """a [R, K], b as weights [E, N, K] transposed, dc [R, N], offsets; the tail is NaN."""
    rows = int(sizes.sum())
    a, dc = torch.randn(rows + tail, k).to(dtype), torch.randn(rows + tail, n).to(dtype)
    a[rows:], dc[rows:] = torch.nan, torch.nan
    weight = (torch.randn(len(sizes), n, k) / k**0.5).to(dtype)
    return a, weight.transpose(1, 2), dc, sizes.cumsum(0).int()


def by_expert(product: Callable[[int, slice], Tensor], offsets: Tensor) -> list[Tensor]:
    ends = [0, *offsets.tolist()]
    return [product(e, slice(*ends[e : e + 2])) for e in range(len(ends) - 1)]


def in_dtype(a: Tensor, b: Tensor, dc: Tensor, offsets: Tensor, wide: torch.dtype):
    """c, da and dw with operands widened to `wide` and no other rounding."""
    a, b, dc = a.to(wide), b.to(wide), dc.to(wide)
    c = torch.cat(by_expert(lambda e, rows: a[rows] @ b[e], offsets))
    da = torch.cat(by_expert(lambda e, rows: dc[rows] @ b[e].t(), offsets))
    dw = torch.stack(by_expert(lambda e, rows: a[rows].t() @ dc[rows], offsets))
    return c, da, dw


@functools.lru_cache(maxsize=4)
def known_case(device: str, kind: str, experts: int, rows: int, k: int, n: int, dtype: torch.dtype):
    """Arguments on a device, c, da and dw in fp64, and the errors of sums in fp32 rounded to
    `dtype`: the same for every engine there, so computed once."""
    arguments = tensors(sizes_of(kind, experts, rows), k, n, dtype)
    exact = in_dtype(*arguments, torch.float64)
    emulated = in_dtype(*arguments, torch.float32)
    return arguments, exact, [error(x.to(dtype), t) for x, t in zip(emulated, exact, strict=True)]


def depths(a: Tensor, b: Tensor, offsets: Tensor) -> tuple[int, int, int]:
    """Of the sums of c, da and dw."""
    return a.shape[1], b.shape[2], int(offsets.diff(prepend=torch.zeros(1)).max())


def ours(a: Tensor, b: Tensor, dc: Tensor, offsets: Tensor):
    """c, da and dw by the op and its autograd."""
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    c = grouped_gemm(a, b, offsets)
    return c.detach(), *torch.autograd.grad(c, (a, b), dc)


@pytest.mark.parametrize("kind", ["balanced", "random", "hot", "one"])
def test_384_experts_equal_grouped_mm_in_float32(gemm_engine, kind):
    experts, k = (70, 96) if gemm_engine.slow else (384, 256)
    (a, b, dc, offsets), exact, _ = known_case(
        gemm_engine.device, kind, experts, 8 * experts, k, 96, torch.float32
    )
    x, w = a.clone().requires_grad_(), b.clone().requires_grad_()
    c = F.grouped_mm(x, w, offs=offsets)
    theirs = c.detach(), *torch.autograd.grad(c, (x, w), dc)
    for mine, other, truth, depth in zip(
        ours(a, b, dc, offsets), theirs, exact, depths(a, b, offsets), strict=True
    ):
        bound = sum_bound(gemm_engine, depth, torch.float32)
        assert error(mine, other) < 2 * bound  # theirs errs as well
        assert error(mine, truth) < bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "experts,rows,k,n", [(384, 1024, 128, 256), (8, 168, 7168, 128), (8, 64, 128, 7168)]
)
def test_errors_are_those_of_emulation(gemm_engine, dtype, experts, rows, k, n):
    """Operands in the dtype, sums in fp32, rounded once: at most 1.25 times the error of that.

    In fp32 the order of a sum is free, and one element after another costs most.
    """
    if gemm_engine.slow:
        experts, rows, k, n = max(8, experts // 8), rows // 4, -(-k // 8), -(-n // 8)
    (a, b, dc, offsets), exact, errors = known_case(
        gemm_engine.device, "random", experts, rows, k, n, dtype
    )
    for mine, emulated, truth, depth in zip(
        ours(a, b, dc, offsets), errors, exact, depths(a, b, offsets), strict=True
    ):
        allowed = 1.25 * emulated
        if dtype == torch.float32:
            allowed = max(allowed, sum_bound(gemm_engine, depth, dtype))
        assert mine.dtype == dtype and error(mine, truth) <= allowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_results_keep_the_accumulator(gemm_engine, dtype):
    a, b, dc, offsets = tensors(sizes_of("random", 16, 160), 512, 96, dtype, tail=5)
    rows = int(offsets[-1])
    c, _, dw = in_dtype(a, b, dc, offsets, torch.float64)
    wide = grouped_gemm(a, b, offsets, out_dtype=torch.float32)
    of_c, _, of_dw = (
        sum_bound(gemm_engine, depth, dtype, torch.float32) for depth in depths(a, b, offsets)
    )
    assert error(wide[:rows], c) < of_c and not wide[rows:].any()
    main = torch.ones(dw.shape)
    grouped_gemm_wgrad(a, dc, offsets, out=main, accumulate=True)
    assert error(main, dw + 1) < of_dw


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 7, 129])
@pytest.mark.parametrize("n", [1, 7, 129])
def test_awkward_sizes(gemm_engine, dtype, k, n):
    sizes = torch.tensor([1, 0, 7, 129, 0, 2, 16, 33])
    a, b, dc, offsets = tensors(sizes, k, n, dtype, tail=3)
    rows = int(sizes.sum())
    for stored in (b, b.contiguous()):
        mine = ours(a, stored, dc, offsets)
        for value, truth, depth in zip(
            (mine[0][:rows], mine[1][:rows], mine[2]),
            in_dtype(a, b, dc, offsets, torch.float64),
            depths(a, b, offsets),
            strict=True,
        ):
            assert error(value, truth) < sum_bound(gemm_engine, depth, dtype)
        assert not mine[0][rows:].any() and not mine[1][rows:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_nan_stays_in_its_row(gemm_engine, dtype, poison):
    sizes = torch.tensor([20, 0, 37, 1, 16])
    a, b, dc, offsets = tensors(sizes, 96, 80, dtype)
    clean = ours(a, b, dc, offsets)
    row, expert = 31, 2  # in the middle of the third group
    a[row, 5], dc[row, 7] = poison, poison
    c, da, dw = ours(a, b, dc, offsets)
    others = torch.arange(len(a)) != row
    assert not c[row].isfinite().any() and not da[row].isfinite().any()
    assert torch.equal(c[others], clean[0][others]) and torch.equal(da[others], clean[1][others])
    others = torch.arange(len(sizes)) != expert
    assert torch.equal(dw[others], clean[2][others])
    assert not dw[expert, 5].isfinite().any() and not dw[expert, :, 7].isfinite().any()
    clean_part = torch.ones(96, 80, dtype=torch.bool)
    clean_part[5], clean_part[:, 7] = False, False
    assert torch.equal(dw[expert][clean_part], clean[2][expert][clean_part])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("experts,expert", [(1, 0), (384, 0), (384, 200), (384, 383)])
def test_a_single_row(gemm_engine, dtype, experts, expert):
    if gemm_engine.slow:
        experts, expert = -(-experts // 8), expert // 8
    sizes = F.one_hot(torch.tensor(expert), experts)
    a, b, dc, offsets = tensors(sizes, 64, 48, dtype)
    exact = in_dtype(a, b, dc, offsets, torch.float64)
    for mine, truth, depth in zip(
        ours(a, b, dc, offsets), exact, depths(a, b, offsets), strict=True
    ):
        assert error(mine, truth) < sum_bound(gemm_engine, depth, dtype)
    dw = ours(a, b, dc, offsets)[2]
    assert not dw[torch.arange(experts) != expert].any()


def test_a_thread_that_has_used_no_device_before(gemm_engine):
    """As autograd's are at first: on CUDA such a thread has no current context."""
    a, b, dc, offsets = tensors(sizes_of("random", 6, 45), 64, 48, torch.bfloat16)
    results: list[Tensor] = []
    thread = threading.Thread(target=lambda: results.append(grouped_gemm(a, b, offsets)))
    thread.start()
    thread.join()
    assert torch.equal(results[0], grouped_gemm(a, b, offsets))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_offsets_of_either_integer(gemm_engine, dtype):
    a, b, dc, offsets = tensors(sizes_of("random", 12, 70), 40, 24, dtype, tail=4)
    strided = torch.stack([offsets.long(), offsets.long() + 1], dim=1)[:, 0]
    for other in (offsets.long(), strided):
        for x, y in zip(ours(a, b, dc, offsets), ours(a, b, dc, other), strict=True):
            assert torch.equal(x, y)
        main = grouped_gemm_wgrad(a, dc, other)
        assert torch.equal(main, grouped_gemm_wgrad(a, dc, offsets))
    if gemm_engine.slow or gemm_engine.device == "cuda":  # what lies on a GPU is not read
        return
    with pytest.raises(ValueError, match="offsets: expected 0 <= .*R = 74, got .42949673"):
        grouped_gemm(a, b, offsets.long() + 2**32)  # would wrap around to good ones


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unset_rows_past_the_last_group_are_never_read(gemm_engine, dtype):
    a, b, dc, offsets = tensors(sizes_of("random", 8, 50), 48, 32, dtype, tail=30)
    rows = int(offsets[-1])
    c, da, dw = ours(a, b, dc, offsets)
    whole = ours(a[:rows], b, dc[:rows], offsets)
    assert torch.equal(c[:rows], whole[0]) and torch.equal(da[:rows], whole[1])
    assert torch.equal(dw, whole[2])
    assert not c[rows:].any() and not da[rows:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_of_every_operand(gemm_engine, dtype):
    a, b, dc, offsets = tensors(sizes_of("random", 6, 45), 40, 24, dtype)
    expected = ours(a, b, dc, offsets)
    layouts: dict[str, Callable[[Tensor], Tensor]] = {
        "transposed": lambda t: t.mT.contiguous().mT,
        "every second column": lambda t: torch.stack([t, t + 1], dim=-1).flatten(-2)[..., ::2],
        "a part of wider rows": lambda t: F.pad(t, (3, 5))[..., 3:-5],
        "every second row": lambda t: torch.stack([t, t + 1], dim=-2).flatten(-3, -2)[..., ::2, :],
    }
    for name, layout in layouts.items():
        strided = layout(a), layout(b), layout(dc)
        for x, y, depth in zip(
            expected, ours(*strided, offsets), depths(a, b, offsets), strict=True
        ):
            # Another layout may take another path, with sums in another order.
            assert error(x, y) < 2 * sum_bound(gemm_engine, depth, dtype), name
    dw = grouped_gemm_wgrad(layouts["transposed"](a), layouts["transposed"](dc), offsets)
    of_dw = sum_bound(gemm_engine, depths(a, b, offsets)[2], dtype)
    assert error(dw, expected[2]) < 2 * of_dw


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expanded_gradients(gemm_engine, dtype):
    """`sum` hands back one number with strides of zero."""
    a, b, dc, offsets = tensors(sizes_of("random", 6, 45), 40, 24, dtype)
    whole = ours(a, b, torch.ones_like(dc), offsets)
    one = ours(a, b, torch.ones((), dtype=dtype).expand(dc.shape), offsets)
    assert all(torch.equal(x, y) for x, y in zip(whole, one, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accumulation_adds_in_the_accumulator(gemm_engine, dtype):
    """Two halves of the rows into one fp32 buffer equal all rows at once; strided buffers too."""
    a, b, dc, offsets = tensors(torch.full((4,), 20), 48, 40, dtype)
    first, second = (torch.arange(80) % 20 < 10), (torch.arange(80) % 20 >= 10)
    half = torch.full((4,), 10).cumsum(0).int()
    _, _, dw = in_dtype(a, b, dc, offsets, torch.float64)
    for main in (torch.full(dw.shape, torch.nan), torch.empty(4, 40, 48).mT):
        grouped_gemm_wgrad(a[first], dc[first], half, out=main)
        grouped_gemm_wgrad(a[second], dc[second], half, out=main, accumulate=True)
        assert error(main, dw) < sum_bound(gemm_engine, 20, dtype, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twenty_repeats_have_the_same_bits(gemm_engine, dtype):
    arguments = tensors(sizes_of("hot", 24, 300), 200, 144, dtype)
    first = ours(*arguments)
    for _ in range(2 if gemm_engine.slow else 19):
        assert all(torch.equal(x, y) for x, y in zip(first, ours(*arguments), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,k,n", [(300, 200, 144), (24, 2048, 65), (2100, 33, 256)])
def test_thread_counts_have_the_same_bits(cpu_engine, two_thread_counts, dtype, rows, k, n):
    a, b, dc, offsets = tensors(sizes_of("hot", 24, rows), k, n, dtype, tail=2)
    results = []
    for threads in two_thread_counts:
        torch.set_num_threads(threads)
        main = torch.ones(24, k, n)
        grouped_gemm_wgrad(a, dc, offsets, out=main, accumulate=True)
        results.append((*ours(a, b, dc, offsets), main))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_graph_follows_new_rows_and_new_groups():
    a, b, dc, offsets = (
        t.cuda() for t in tensors(sizes_of("random", 12, 256), 128, 96, torch.bfloat16)
    )
    main = torch.zeros(12, 128, 96, device="cuda")
    weights = [
        torch.randn(12, 256, 128).bfloat16().cuda(),
        torch.randn(12, 128, 128).bfloat16().cuda(),
    ]
    gates, ids = torch.rand(64, 4).cuda(), torch.randint(0, 12, (64, 4)).int().cuda()
    blocks = Fp8BlockWeight.quantize(b.mT)

    def run() -> list[Tensor]:
        grouped_gemm_wgrad(a, dc, offsets, out=main)
        return [
            grouped_gemm(a, b, offsets), fused_experts(a[:64], *weights, gates, ids),
            grouped_gemm(Fp8Rows.quantize(a), blocks, offsets),
        ]  # fmt: skip

    side = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph, stream=side):
        results = run()
    a.copy_(torch.randn(a.shape))
    offsets.copy_(sizes_of("hot", 12, 256).cumsum(0).int())
    graph.replay()
    torch.cuda.synchronize()
    captured = [t.clone() for t in (*results, main)]
    with torch.no_grad():
        assert all(torch.equal(x, y) for x, y in zip(captured, [*run(), main], strict=True))


class Recorder(TorchDispatchMode):
    """The calls of this library's operators, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "kimi_ops":
            assert not kwargs
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_opcheck(dtype, turned):
    """Of every operator behind the op, its gradient and `grouped_gemm_wgrad`, as it is called."""
    a, b, dc, offsets = tensors(torch.tensor([5, 0, 9]), 24, 16, dtype, tail=2)
    a, dc = a.nan_to_num(), dc.nan_to_num()
    b, bias = (b if turned else b.contiguous()), torch.randn(3, 16).to(dtype)
    leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (a, b, bias)]
    with Recorder() as recorder:
        c = grouped_gemm(leaves[0], leaves[1], offsets, bias=leaves[2])
        torch.autograd.grad(c, leaves, dc)
        with torch.no_grad():
            grouped_gemm(a, b, offsets, out_dtype=torch.float32)
            grouped_gemm(a, b, offsets, out=torch.empty(16, 16, dtype=dtype))
        grouped_gemm_wgrad(a, dc, offsets)
        main = torch.zeros(3, 24, 16)
        grouped_gemm_wgrad(a, dc, offsets, out=main, accumulate=True)
    names = {func._schema.name.removeprefix("kimi_ops::") for func, _ in recorder.calls}
    assert any(name.startswith("grouped_gemm_wgrad") for name in names), names
    assert names & {"grouped_gemm", "grouped_gemm_forward"}, names
    for func, args in recorder.calls:
        torch.library.opcheck(func, tuple(t.detach() if isinstance(t, Tensor) else t for t in args))
    op = torch.ops.kimi_ops.grouped_gemm.default
    forward = next(args for func, args in recorder.calls if func is op)
    torch.library.opcheck(op, (leaves[0], leaves[1], *forward[2:]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_full_graph_with_dynamic_rows(dtype, backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # of other tests

    def layer(x, weight, bias, offsets):
        c = grouped_gemm(torch.tanh(x), weight.transpose(1, 2), offsets, bias=bias)
        return grouped_gemm(c, weight, offsets, out_dtype=torch.float32).square().sum()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for sizes in ([3, 0, 9], [20, 1, 0], [7, 7, 7]):
        a, b, _, offsets = tensors(torch.tensor(sizes), 24, 16, dtype)
        first = [t.clone().requires_grad_() for t in (a, b.mT, torch.randn(3, 16).to(dtype))]
        second = [t.detach().clone().requires_grad_() for t in first]
        x, y = compiled(*first, offsets), layer(*second, offsets)
        x.backward()
        y.backward()
        torch.testing.assert_close(x, y, rtol=1e-2 if dtype != torch.float32 else 1e-6, atol=0)
        for mine, other in zip(first, second, strict=True):
            assert error(mine.grad, other.grad) < max(2 * UNIT[dtype], 2.0**-22)
    assert len(torch._dynamo.utils.counters["graph_break"]) == 0


def test_compiled_weight_gradients_into_a_buffer():
    torch._dynamo.reset()
    a, _, dc, offsets = tensors(torch.tensor([5, 0, 9]), 24, 16, torch.bfloat16)

    def accumulate(rows, gradient, main):
        return grouped_gemm_wgrad(rows * 2, gradient, offsets, out=main, accumulate=True)

    eager, compiled = torch.ones(3, 24, 16), torch.ones(3, 24, 16)
    accumulate(a, dc, eager)
    torch.compile(accumulate, fullgraph=True, dynamic=True, backend="aot_eager")(a, dc, compiled)
    assert torch.equal(eager, compiled) and not torch.equal(eager, torch.ones(3, 24, 16))
