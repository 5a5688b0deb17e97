# SPDX-License-Identifier: MIT
"""`python -m benchmarks report` at a small size. Other libraries are stood in for by the modules of
`kimi_ops.compat`, which have their signatures: a call that theirs would refuse fails here too."""

import json
import re
import sys
import types
from importlib.machinery import ModuleSpec

import pytest
import torch
import torch.nn.functional as F

import benchmarks.__main__
from benchmarks.comparison import run
from benchmarks.comparison.libraries import LIBRARIES
from benchmarks.comparison.work import Experts, Matrices, Products, Router, Rows, Way
from kimi_ops import compat, fused_experts

WORK = {
    "topk_gate": [lambda: Router.of(6, 16, 4, "cpu")],
    "permute": [lambda: Rows.of(6, 2, 8, 32, "cpu")],
    "grouped_gemm": [lambda: Products.of("mini gate+up", 4, 8, "cpu")],
    "fused_experts": [lambda: Experts.of(8, 32, 24, 6, "cpu")],
    "newton_schulz": [lambda: Matrices.of(8, 24, 2, "cpu")],
}
REAL = {"transformers", "sglang", "deep_ep"}  # installed, or without a way of any work


def module(name, **functions):
    made = types.ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    made.__dict__.update(functions)
    return made


class LigerFusedMoEFunction(torch.autograd.Function):
    """Its operands in its order."""

    @staticmethod
    def forward(ctx, x, gate_up_proj, down_proj, top_k_index, top_k_weights):
        return fused_experts(x, gate_up_proj, down_proj, top_k_weights, top_k_index)


def cutlass_fused_moe(
    input, token_selected_experts, token_final_scales, fc1_expert_weights, fc2_expert_weights,
    output_dtype, quant_scales,
):  # fmt: skip
    """Up rows first, as flashinfer has them."""
    y = torch.zeros_like(input, dtype=torch.float32)
    for t, k in torch.cartesian_prod(*map(torch.arange, token_selected_experts.shape)).tolist():
        e = token_selected_experts[t, k]
        up, gate = (fc1_expert_weights[e].float() @ input[t].float()).chunk(2)
        out = fc2_expert_weights[e].float() @ (F.silu(gate) * up)
        y[t] += token_final_scales[t, k] * out
    return [y.to(output_dtype)]


@pytest.fixture
def libraries(monkeypatch):
    """All of them as if they were installed."""
    from kimi_ops.compat import deep_gemm, grouped_gemm, megatron, transformer_engine, vllm

    names = {
        "vllm": vllm, "vllm.model_executor.layers.fused_moe": vllm,
        "transformer_engine": transformer_engine,
        "transformer_engine.pytorch": transformer_engine,
        "transformer_engine.pytorch.router": transformer_engine,
        "megatron": compat, "megatron.core.transformer.moe.moe_utils": megatron,
        "grouped_gemm": grouped_gemm, "grouped_gemm.ops": grouped_gemm.ops,
        "deep_gemm": deep_gemm, "liger_kernel": compat, "flashinfer": compat,
        "liger_kernel.ops.fused_moe": module("moe", LigerFusedMoEFunction=LigerFusedMoEFunction),
        "flashinfer.fused_moe": module("moe", cutlass_fused_moe=cutlass_fused_moe),
    }  # fmt: skip
    for name, found in names.items():
        monkeypatch.setitem(sys.modules, name, found)


def test_every_library_does_every_work_that_it_has(libraries):
    """Each adapter's calls are understood, and what they give is ours."""
    seen = set()
    for makers in WORK.values():
        work = makers[0]()
        for library in LIBRARIES:
            with torch.no_grad():
                ways = work.ways() | library.ways(work)
                kept, wrong = run.agreeing(ways, work.tolerance)
            assert wrong == {} and kept.keys() == ways.keys()
            seen |= {(library.name, type(work))} if ways.keys() > work.ways().keys() else set()
    wanted = {(library.name, kind) for library in LIBRARIES for kind in library.adapters}
    assert seen == wanted and {name for name, _ in seen} | REAL == {lib.name for lib in LIBRARIES}


def test_a_way_that_fails_or_computes_something_else_has_no_time():
    work = WORK["topk_gate"][0]()

    def fails():
        raise KeyError("no such kernel")

    ours = work.ways()["kimi_ops"]
    ways = {
        "kimi_ops": ours,
        "broken": Way(fails),
        "other": Way(ours.call, lambda g: 1.1 * ours.result(g)),
    }
    kept, wrong = run.agreeing(ways, work.tolerance)
    assert list(kept) == ["kimi_ops"]
    assert wrong == {
        "broken": "KeyError: 'no such kernel'",
        "other": "its result differs from ours by 0.1",
    }


def test_the_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "all_work", lambda quick, device: WORK)
    monkeypatch.setattr("benchmarks.session.read_bandwidth", lambda device: 1e9)
    monkeypatch.setattr("benchmarks.session.compute_peak", lambda dtype, device: 1e12)
    monkeypatch.setattr(run.os, "getloadavg", lambda: (99.0, 0, 0))
    broken = module("moe")
    monkeypatch.setitem(sys.modules, "vllm", compat)
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.fused_moe", broken)
    out, found = tmp_path / "report.html", tmp_path / "report.json"
    benchmarks.__main__.main(["report", "--no-compile", "--out", str(out), "--json", str(found)])
    report, page = json.loads(found.read_text()), out.read_text()
    assert [table["op"] for table in report["tables"]] == list(WORK)
    row = report["tables"][3]["rows"][0]
    assert {"torch grouped_mm", "transformers eager"} <= row["ratios"].keys()
    assert "has no attribute 'fused_experts'" in row["left_out"]["vllm"]
    assert report["libraries"]["torch"] == torch.__version__
    assert report["libraries"]["deep_gemm"] == "not installed"
    assert report["libraries"]["transformers"][0].isdigit()
    title = re.search(r"<h1>(.*)</h1>", page)[1]
    assert report["info"]["cpu"]["processor"] in title and report["date"] in title
    assert report["info"]["torch"] in title and f"<title>{title}" in page
    assert page.count("<svg ") == len(WORK) and page.count("<h2>") == len(WORK) + 2
    for word in ("deep_gemm", "not installed", "against torch", "without vllm", "of the roof"):
        assert word in page
    for table in report["tables"]:
        assert f"{table['rows'][0]['ratios'].popitem()[1]:.2f}x" in page
    assert "Other work ran beside this: load 99.0 on" in page
    monkeypatch.setattr(run.os, "getloadavg", lambda: (0.1, 0, 0))
    benchmarks.__main__.main(["report", "--no-compile", "--out", str(out), "--cases", "T 6, E 16"])
    quiet = out.read_text()
    assert "Other work" not in quiet and quiet.count("<svg ") == 1
    assert not re.search(r"""(src|href)=['"]?http""", page), "the page needs nothing else"
    assert "wrote" in capsys.readouterr().out


def test_all_cases_are_named_once_and_work_is_counted():
    for quick in (True, False):
        made = run.all_work(quick, "cpu")
        assert made.keys() == WORK.keys() and all(made.values())
    products = WORK["grouped_gemm"][0]()
    assert products.work() == 2 * 32 * 128 * 128
    assert Router.of(6, 16, 4, "cpu").work() == 4 * 6 * 16 + 8 * 6 * 4
    assert Rows.of(6, 2, 8, 32, "cpu").work() == 2 * 32 * 6 * (1 + 2 + 2 + 1)
