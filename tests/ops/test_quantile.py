# SPDX-License-Identifier: MIT
"""Quantile balancing: the histogram in exact arithmetic, its solution, what loads become."""

import pytest
import torch

from kimi_ops import quantile_bias, quantile_histogram_, topk_gate
from kimi_ops.reference import balance as reference

WORKED = torch.tensor(
    [[0.9, 0.1, 0.2, 0.3], [0.8, 0.2, 0.1, 0.4], [0.7, 0.6, 0.3, 0.2], [0.9, 0.5, 0.4, 0.1]]
)
BOUNDS = torch.tensor([-1.0, 1.0])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def histogram(experts, bins=1000, device="cpu"):
    return torch.zeros(experts, bins, dtype=torch.int32, device=device)


def test_worked_case(engine):
    """k = 1 of 4: cutoffs .3, .4, .6, .5 and the least r (-.6, 0, .1, 0). Every token chose expert
    0, and with the bias one does; where two tie either may win."""
    z, bounds = WORKED.logit().to(engine.device), BOUNDS.to(engine.device) - 0.001  # r mid-bin
    assert topk_gate(z, 1).indices.flatten().tolist() == [0, 0, 0, 0]
    counts = quantile_histogram_(histogram(4, device=engine.device), z, 1, bounds=bounds)
    assert counts.sum().item() == 16
    bias = quantile_bias(counts, 1, bounds=bounds)
    want = torch.tensor([-0.47425, 0.12475, 0.22475, 0.12475])  # -.6 and half a bin, centred
    torch.testing.assert_close(bias.cpu(), want, rtol=0, atol=1e-6)
    first, *others, last = topk_gate(z, 1, expert_bias=bias).indices.flatten().tolist()
    assert first == 0 and others == [3, 1] and last in (1, 2)


def test_solution_of_the_published_histogram():
    """The same with r at the edges of bins: -.6 below its own, the others above theirs."""
    counts = histogram(4)
    counts[0, [199, 299, 349, 399]] = 1
    counts[1, [500, 600]] = counts[2, [550, 650]] = counts[3, [500, 700]] = 2
    want = torch.tensor([-0.47575, 0.12525, 0.22525, 0.12525])
    torch.testing.assert_close(quantile_bias(counts, 1, bounds=BOUNDS), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax", "sqrtsoftplus"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bins_of_the_reference(engine, score_function, dtype):
    """In powers of two the bins' edges are exact: fp64 sees the scores of fp32 in the same ones."""
    z = (random(60, 37) * 3).to(dtype)
    z[3], z[4, ::2], z[5, 0] = float("nan"), float("-inf"), float("inf")
    cutoffs, valid = random(60, seed=2) / 2, torch.arange(60) % 7 != 3
    bounds, bins = torch.tensor([-0.5, 1.5]), 64
    start = torch.arange(37 * bins, dtype=torch.int32).view(37, bins)
    got = start.clone().to(engine.device)
    torch.ops.kimi_ops.quantile_histogram_(
        got, z.to(engine.device), cutoffs.to(engine.device), bounds.to(engine.device),
        score_function, valid.to(engine.device),
    )  # fmt: skip
    want = reference.quantile_histogram_(
        start.clone(), z.double(), cutoffs, bounds, score_function, valid
    )
    moved = (got.cpu() - want).abs().sum().item()
    assert moved <= 4 and (got.cpu() - start).sum() == int(valid.sum()) * 37


def test_any_division_of_the_tokens_gives_the_same_bits(engine, two_thread_counts):
    z, bias = random(300, 24).to(engine.device), random(24, seed=1).to(engine.device) / 4
    bounds = torch.tensor([-1.5, 1.5], device=engine.device)
    found = []
    for threads in two_thread_counts:
        torch.set_num_threads(threads)
        for parts in (1, 3, 7):
            counts = histogram(24, 100, engine.device)
            for part in z.chunk(parts)[::-1]:
                quantile_histogram_(counts, part, 3, bounds=bounds, expert_bias=bias)
            found.append(counts)
    assert all(torch.equal(counts, found[0]) for counts in found)
    assert found[0].sum() == 300 * 24


def test_padding_is_left_out(engine):
    z, valid = random(80, 16).to(engine.device), torch.arange(80, device=engine.device) < 50
    z[50:] = float("nan")
    counts, alone = histogram(16, 50, engine.device), histogram(16, 50, engine.device)
    bounds = BOUNDS.to(engine.device)
    quantile_histogram_(counts, z, 2, bounds=bounds, valid=valid)
    quantile_histogram_(alone, z[:50], 2, bounds=bounds)
    assert torch.equal(counts, alone)


def test_strided_histogram(engine):
    wide = histogram(16, 100, engine.device)
    z, bounds = random(20, 16).to(engine.device), BOUNDS.to(engine.device)
    quantile_histogram_(wide[:, ::2], z, 2, bounds=bounds)
    dense = quantile_histogram_(histogram(16, 50, engine.device), z, 2, bounds=bounds)
    assert torch.equal(wide[:, ::2], dense) and not wide[:, 1::2].any()


@pytest.mark.parametrize("experts,k", [(16, 2), (64, 6), (128, 8)])
def test_loads_become_even(experts, k):
    """From a router that prefers some experts, in a few steps; the sign rule takes hundreds."""
    z = random(8192, experts) + torch.linspace(-2, 2, experts)
    bias, mean = torch.zeros(experts), 8192 * k / experts
    before = topk_gate(z, k).tokens_per_expert.max() / mean
    for _ in range(4):
        bounds = torch.stack([bias.min() - 1, bias.max() + 1])
        counts = histogram(experts)
        for part in z.chunk(4):
            quantile_histogram_(counts, part, k, bounds=bounds, expert_bias=bias)
        bias = quantile_bias(counts, k, bounds=bounds)
        assert abs(bias.mean()) < 1e-6
    loads = topk_gate(z, k, expert_bias=bias).tokens_per_expert
    assert loads.max() < 1.1 * mean and loads.min() > 0.85 * mean and before > 1.25


def test_bias_in_a_straight_line_inside_its_bin():
    counts = torch.tensor([[1, 3, 0, 0], [0, 0, 4, 0], [0, 0, 0, 4], [4, 0, 0, 0]])
    bias = quantile_bias(counts, 2, bounds=torch.tensor([0.0, 4.0]))  # the 2nd of 4
    raw = torch.tensor([1 + 1 / 3, 2.5, 3.5, 0.5])
    torch.testing.assert_close(bias, raw - raw.mean())
    many = quantile_bias(counts * 2**29, 2, bounds=torch.tensor([0.0, 4.0]))  # past 32 bits
    torch.testing.assert_close(many, bias, rtol=0, atol=1e-6)
    assert not quantile_bias(torch.zeros(3, 5).int(), 1, bounds=BOUNDS).any()


def test_compile_full_graph():
    torch._dynamo.reset()

    def step(counts, z, bias):
        quantile_histogram_(counts, z * 1.5, 2, bounds=BOUNDS, expert_bias=bias)
        return quantile_bias(counts, 2, bounds=BOUNDS)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (20, 33):
        a, b, z = histogram(12, 50), histogram(12, 50), random(tokens, 12)
        assert torch.equal(compiled(a, z, torch.zeros(12)), step(b, z, torch.zeros(12)))
        assert torch.equal(a, b) and a.any()


Z, VALID = torch.zeros(4, 8), torch.ones(3).bool()


@pytest.mark.parametrize(
    "error,text,call",
    [
        (ValueError, r"quantile_histogram_: k: expected 1..7 \(below E",
         lambda: quantile_histogram_(histogram(8), Z, 8, bounds=BOUNDS)),
        (ValueError, "quantile_histogram_: bounds: expected two finite .* low < high, got 1, -1",
         lambda: quantile_histogram_(histogram(8), Z, 2, bounds=BOUNDS.flip(0))),
        (ValueError, "quantile_histogram_: bounds: expected two finite numbers",
         lambda: quantile_histogram_(histogram(8), Z, 2, bounds=BOUNDS * float("inf"))),
        (TypeError, "quantile_histogram_: histogram: expected int32, got int64",
         lambda: quantile_histogram_(histogram(8).long(), Z, 2, bounds=BOUNDS)),
        (ValueError, r"quantile_histogram_: logits: expected shape \[T, 9\], got \[4, 8\]",
         lambda: quantile_histogram_(histogram(9), Z, 2, bounds=BOUNDS)),
        (ValueError, r"quantile_histogram_: valid: expected shape \[4\]",
         lambda: quantile_histogram_(histogram(8), Z, 2, bounds=BOUNDS, valid=VALID)),
        (TypeError, "quantile_bias: histogram: expected int32, int64, got float32",
         lambda: quantile_bias(Z, 2, bounds=BOUNDS)),
        (ValueError, "quantile_bias: k: expected 1..8, got 9",
         lambda: quantile_bias(histogram(8), 9, bounds=BOUNDS)),
    ],
)  # fmt: skip
def test_bad_input(error, text, call):
    with pytest.raises(error, match=text):
        call()
