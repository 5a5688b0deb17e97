# SPDX-License-Identifier: MIT
"""The planner against figures that others published, draws at random, and what was measured."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kimi_ops.models.kimi_k2 import KimiK2Config
from kimi_ops.models.kimi_k2.parameters import parameter_report
from kimi_ops.plan import HARDWARE, plan
from kimi_ops.plan.counts import count
from kimi_ops.plan.layer import moe_layer
from kimi_ops.plan.memory import buffer_bytes, memory
from kimi_ops.plan.rates import K2_EXPERT, TABLE, expert_products, measured_tflops
from kimi_ops.plan.traffic import copies, distinct, transfer
from kimi_ops.plan.work import Layout, Work

ROOT = Path(__file__).resolve().parents[2]
BF16, FP8 = 2 * 7168, 7168 + 4 * 56  # a row of 7168, FP8 with a scale for 128
K2 = count(KimiK2Config.k2())


def near(value, published, tolerance):
    assert value == pytest.approx(published, rel=tolerance)


def drawn(experts, k, ep, domain, tokens=32768, groups=(1, 1), start=0):
    """Copies of random choices, counted one by one: ranks, NVLink, network."""
    generator = np.random.default_rng(0)
    scores = generator.random((tokens, experts))
    closed = generator.random((tokens, groups[0])).argsort(axis=1).argsort(axis=1) >= groups[1]
    scores[np.repeat(closed, experts // groups[0], axis=1)] = 2
    chosen = scores.argpartition(k, axis=1)[:, :k]
    sizes = [experts // ep + (n < experts % ep) for n in range(ep)]
    rank_of = np.repeat(np.arange(ep), sizes)
    source = generator.integers(ep, size=tokens)
    nodes, place = -(-(start + ep) // domain), np.arange(ep) + start
    to_rank = np.zeros((tokens, ep), bool)
    np.put_along_axis(to_rank, rank_of[chosen], True, axis=1)
    to_node = np.zeros((tokens, nodes), bool)
    np.put_along_axis(to_node, place[rank_of[chosen]] // domain, True, axis=1)
    away = np.arange(nodes) != (place[source] // domain)[:, None]
    # what arrives at a node is forwarded to its ranks but the one it came in by, any of them
    ranks = np.bincount(place // domain, minlength=nodes)
    first = np.maximum(np.arange(nodes) * domain - start, 0)
    entries = first + generator.integers(ranks, size=(tokens, nodes))
    entries[np.arange(tokens), place[source] // domain] = source
    entry = np.zeros((tokens, ep), bool)
    np.put_along_axis(entry, entries, True, axis=1)
    return (
        to_rank.sum(1).mean(),
        (to_rank & ~entry).sum(1).mean(),
        (to_node & away).sum(1).mean(),
    )


@pytest.mark.parametrize("ep", [4, 8, 16, 32, 64, 128, 40])
def test_expected_copies_are_those_of_random_draws(ep):
    sent = copies(384, 8, ep, 8)
    ranks, inside, across = drawn(384, 8, ep, 8)
    near(sent.ranks, ranks, 0.005)
    near(sent.nvlink, inside, 0.005)
    assert sent.network == pytest.approx(across, abs=0.02)
    assert distinct(384, 8, ep) == pytest.approx(sent.ranks)


@pytest.mark.parametrize("ep", [4, 8, 16, 64])
def test_copies_of_a_choice_limited_to_groups(ep):
    """DeepSeek-V3: experts of 4 of 8 groups, so at most 4 nodes of 8 are met."""
    sent = copies(256, 8, ep, 8, groups=(8, 4))
    ranks, inside, across = drawn(256, 8, ep, 8, groups=(8, 4))
    near(sent.ranks, ranks, 0.005)
    near(sent.nvlink, inside, 0.005)
    assert sent.network == pytest.approx(across, abs=0.02)
    free = copies(256, 8, ep, 8)
    assert (sent.ranks < free.ranks) == (ep > 1) and sent.network <= free.network
    assert distinct(256, 8, 8, (8, 4)) < 4 < distinct(256, 8, 8)


@pytest.mark.parametrize(("ep", "start"), [(5, 5), (20, 4), (12, 4), (12, 0), (3, 6)])
def test_copies_of_a_group_that_begins_inside_a_node(ep, start):
    sent = copies(384, 8, ep, 8, start=start)
    ranks, inside, across = drawn(384, 8, ep, 8, start=start)
    near(sent.ranks, ranks, 0.005)
    near(sent.nvlink, inside, 0.01)
    assert sent.network == pytest.approx(across, abs=0.02)
    assert sent.nodes == -(-(start + ep) // 8)
    chosen = copies(384, 8, ep, 8, start=start, deduplicated=False)
    assert chosen.nvlink + chosen.network == pytest.approx(8 * (1 - 1 / ep))


def test_copies_by_choice_sum_to_the_choices():
    for ep, domain in ((8, 8), (20, 8), (96, 8), (72, 72), (7, 8)):
        sent = copies(384, 8, ep, domain, deduplicated=False)
        assert sent.nvlink + sent.network == pytest.approx(8 * (1 - 1 / ep))
        assert sent.off_rank == pytest.approx(8 * (1 - 1 / ep))


def test_uccl_on_eight_h200():
    """UCCL-EP, 4096 tokens, 256 experts, top 8: 500 us dispatch in FP8, 973 us combine in bf16."""
    sent = copies(256, 8, 8, 8)
    near(transfer(HARDWARE["h200"], sent, 4096, FP8)[0], 500e-6, 0.05)
    near(transfer(HARDWARE["h200"], sent, 4096, BF16)[0], 973e-6, 0.05)


@pytest.mark.parametrize(("nodes", "published"), [(2, 90e9), (4, 61e9)])
def test_deepep_v2_over_the_network(nodes, published):
    """Its GB/s are logical: a copy for each distinct node, the token's own included."""
    sent = copies(256, 8, 8 * nodes, 8)
    seconds, link = transfer(HARDWARE["h200"], sent, 8192, FP8)
    near(8192 * distinct(256, 8, nodes) * FP8 / seconds, published, 0.05)
    assert link == "network"


@pytest.mark.parametrize(
    ("hardware", "ep", "published", "tolerance"),
    [("b200", 8, 726e9, 0.05), ("b200", 8, 740e9, 0.05), ("nvl72", 8, 764e9, 0.13),
     ("nvl72", 16, 666e9, 0.1), ("nvl72", 36, 614e9, 0.05)],
)  # fmt: skip
def test_logical_bandwidth_inside_nvlink(hardware, ep, published, tolerance):
    """DeepEP V2 on SM100, HybridEP on GB200: rows of distinct ranks, the own one included."""
    sent = copies(256, 8, ep, HARDWARE[hardware].domain)
    seconds, link = transfer(HARDWARE[hardware], sent, 32768, BF16)
    near(32768 * sent.ranks * BF16 / seconds, published, tolerance)
    assert link == "NVLink"


@pytest.mark.parametrize(
    ("ep", "dispatch", "combine"),
    [(8, 77, 114), (16, 118, 195), (32, 155, 273), (64, 173, 314), (128, 192, 369),
     (256, 194, 360)],
)  # fmt: skip
def test_deepep_low_latency(ep, dispatch, combine):
    """DeepEP V1 on H800, 128 tokens, top 8, microseconds; EP 8 is 17 % slower than predicted."""
    sent = copies(256, 8, ep, 8, deduplicated=False)
    tolerance = 0.18 if ep == 8 else 0.1
    near(1e6 * transfer(HARDWARE["h800"], sent, 128, FP8)[0], dispatch, tolerance)
    near(1e6 * transfer(HARDWARE["h800"], sent, 128, BF16)[0], combine, tolerance)


def test_serving_as_sglang_does_on_128_h200():
    """K2, 2000 tokens in, 100 out: 56k tokens/s a node of 8 in prefill (4 nodes), 24k in decode
    (12 nodes, batch 480, 96 redundant experts). Both hide traffic; neither is fitted."""
    for mode, gpus, tokens, context, redundant, published in (
        ("prefill", 32, 8192, 2000, 0, 56e3), ("decode", 96, 480, 2050, 96, 24e3),
    ):  # fmt: skip
        sizes = {"tokens_per_rank": tokens, "context": context, "redundant": redundant}
        made = plan("k2", "h200", gpus, mode=mode, **sizes)
        found = next(e for e in made.estimates if e.layout.ep == gpus)
        near(found.tokens_per_gpu, published / 8, 0.1)


def test_k2s_parameters_are_shared_out_whole():
    """The ranks of one stage hold its experts, all of them everything else: 1.026 T in all."""
    report = parameter_report(KimiK2Config.k2())
    for layout in (Layout(16, 16, 16), Layout(8, 32, 8), Layout(1, 1, 1), Layout(384, 1, 384)):
        stages = [K2.stage(layers, layout.ep) for layers in layout.stages(61)]
        held = sum(layout.ep * experts + matrices + rest for experts, matrices, rest in stages)
        # the final norm, 7168 numbers, is left out
        assert report.parameters - held == 7168


def test_k2s_training_layout():
    """Its report: PP 16, EP 16, 256 GPUs; bf16 and fp32 gradients about 6 TB, 30 GB a GPU."""
    work = Work("train", 4096, 4096, 1.0, "bf16", "bf16", 2**26)
    parts = memory(K2, work, Layout(16, 16, 16, "selective")).parts
    near(parts["weights"] + parts["gradients"], 30e9, 0.05)
    near(6 * K2.total, 6e12, 0.03)


def test_the_smallest_units_that_serve_k2():
    """FP8 needs 16 H200 (Kimi K2's README); INT4 experts (Kimi K2 Thinking) fit into 8."""
    assert plan("k2", "h200", 16, mode="serve").chosen.fits
    assert not plan("k2", "h200", 8, mode="serve").chosen.fits
    assert plan("k2", "h200", 8, mode="serve", weights="int4").chosen.fits
    fp8 = memory(K2, plan("k2", mode="serve").work, Layout(16, 1, 16)).parts["weights"]
    near(fp8, 63.4e9 + 14.2e9, 0.01)  # a sixteenth of the experts and all of the rest


def test_slots_of_dispatch_and_combine():
    work = Work("train", 4096, 4096, 1.0, "bf16", "bf16", 2**26)
    assert buffer_bytes(K2, work, 8) == 8 * 4096 * (BF16 + 72) + 8 * 4096 * BF16
    assert buffer_bytes(K2, work, 16) == 16 * 4096 * (BF16 + 72) + 8 * 4096 * BF16
    assert buffer_bytes(K2, work, 1) == 0
    one_each = replace(work, mode="decode", tokens=128)  # by choice: E slots a token, K come home
    assert buffer_bytes(K2, one_each, 64) == 128 * (384 * (BF16 + 72) + 8 * BF16)
    assert buffer_bytes(K2, one_each, 2) == 128 * (2 * 8 * (BF16 + 72) + 8 * BF16)


def test_the_measured_rates_are_those_of_the_results():
    results = json.loads((ROOT / "benchmarks/results/h100_grouped_gemm.json").read_text())
    found = {row["case"]: row["TFLOP/s"] for row in results["rows"]}
    for (product, pass_), table in TABLE.items():
        for rows, rate in table.items():
            experts = 4 if rows == 8192 else 48
            assert found[f"K2 {product} E{experts} x{rows} {pass_}"] == rate
            assert measured_tflops(product, pass_, rows) == pytest.approx(rate)
    copies_ = json.loads((ROOT / "benchmarks/results/h100_permute.json").read_text())
    moved = {row["case"]: row["GB/s"] for row in copies_["rows"]}
    h100 = HARDWARE["h100"]
    near(h100.hbm * h100.copy, 1e9 * moved["permute 4096x8 H7168"], 0.05)
    near(h100.hbm * h100.stream, 2.43e12, 0.01)
    near(h100.bf16 * h100.gemm, 1e12 * found["K2 gate+up E48 x1024 fwd"], 0.01)
    near(h100.fp8 * h100.gemm_fp8, 1e15 * results["fp8"][1]["PFLOP/s"][0], 0.01)


def test_measured_rates_serve_k2_on_an_h100_alone():
    def source(name, shape=K2_EXPERT, weights="bf16"):
        rows, experts = 48 * 1024, 48 * 3 * shape[0] * shape[1]
        return expert_products(HARDWARE[name], shape, rows, 1024, experts, weights)

    seconds, bound, label = source("h100")
    pair = 2 * 48 * 1024 * 7168 * 4096
    assert seconds == pytest.approx(pair / 695.1e12 + pair / 2 / 677.1e12) and "measured" in label
    assert bound == "tensor"
    for other in (source("h200"), source("h100", (2048, 768)), source("h100", weights="fp8")):
        assert other[2] == "model"
    # few rows read the weights, whatever the rows: the rate goes with them
    assert measured_tflops("gate+up", "fwd", 1) == pytest.approx(9.8 / 4)
    assert measured_tflops("gate+up", "fwd", 1e6) == 695.7
    assert 328.9 < measured_tflops("gate+up", "fwd", 180) < 619.0


@pytest.mark.parametrize("tokens", [16, 256, 4096])
def test_the_layer_is_near_the_measured_one(tokens):
    """48 of K2's experts, those of one of eight ranks: what fused_experts does, and it as timed."""
    results = json.loads((ROOT / "benchmarks/results/h100_fused_experts.json").read_text())
    found = {row["case"]: row["us"] for row in results["rows"]}
    work = Work("train", tokens, 4096, 1.0, "bf16", "bf16", 2**26)
    pieces = moe_layer(HARDWARE["h100"], K2, work, 8)
    parts = [p.seconds for p in pieces if p.name in ("permute", "experts", "unpermute")]
    near(1e-6 * found[f"experts E48 H7168 F2048 T {tokens} fwd"], sum(parts), 0.15)
