# SPDX-License-Identifier: MIT
"""What one call of each public function costs the host, and the GPU in a CUDA graph, at few tokens.

The GPU is waited for every 200 calls only, so the time is that of Python, checks, allocations and
launches, except for those functions whose kernels take longer.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import kimi_ops
from benchmarks.measure import Function, Functions

SECONDS = 0.25  # for a function
IN_FLIGHT = 200  # calls before the GPU is waited for
REPLAYED = 20  # calls in a graph


def calls(device: str) -> Functions:
    """Four tokens of 512, 384 experts of 128; torch's own calls to compare with."""
    x = torch.randn(4, 384, device=device)
    bias = torch.zeros(384, device=device)
    gate = kimi_ops.topk_gate(x, 8, expert_bias=bias)
    h = torch.randn(4, 512, device=device).bfloat16()
    up = torch.randn(384, 256, 512, device=device).bfloat16()
    down = torch.randn(384, 512, 128, device=device).bfloat16()
    plan = kimi_ops.permute_plan(gate.indices, 384)
    rows = kimi_ops.permute(h, plan)
    dc = torch.randn(len(rows), 256, device=device).bfloat16()
    sums = torch.zeros(384, 256, 512, device=device)
    wanted = [t.clone().requires_grad_() for t in (h, up, down)]
    dy = torch.randn_like(h)
    sizes = torch.tensor([16, 16], dtype=torch.int32, device=device)
    order = torch.tensor([1, 0], dtype=torch.int32, device=device)
    q = torch.randn(1, 4, 64, 96, device=device).bfloat16()

    def with_gradients() -> object:
        with torch.enable_grad():
            y = kimi_ops.fused_experts(*wanted, gate.weights, gate.indices)
            return torch.autograd.grad(y, wanted, dy)

    named: Functions = {
        "torch: x + x": lambda: x + x,
        "torch: three empty": lambda: [torch.empty(4, 8, device=device) for _ in range(3)],
        "torch: F.grouped_mm": lambda: F.grouped_mm(rows, up.mT, offs=plan.offsets),
        "topk_gate": lambda: kimi_ops.topk_gate(x, 8, expert_bias=bias),
        "permute_plan": lambda: kimi_ops.permute_plan(gate.indices, 384),
        "permute": lambda: kimi_ops.permute(h, plan),
        "permute_weights": lambda: kimi_ops.permute_weights(gate.weights, plan),
        "unpermute": lambda: kimi_ops.unpermute(rows, plan, gate.weights),
        "sort_chunks": lambda: kimi_ops.sort_chunks(rows, sizes, order),
        "grouped_gemm": lambda: kimi_ops.grouped_gemm(rows, up.mT, plan.offsets),
        "grouped_gemm_wgrad": lambda: kimi_ops.grouped_gemm_wgrad(
            dc, rows, plan.offsets, out=sums, accumulate=True
        ),
        "fused_experts": lambda: kimi_ops.fused_experts(h, up, down, gate.weights, gate.indices),
        "fused_experts, gradients": with_gradients,
        "update_expert_bias_": lambda: kimi_ops.update_expert_bias_(
            bias, gate.tokens_per_expert, 0.0
        ),
        "sequence_balance_loss": lambda: kimi_ops.sequence_balance_loss(x, gate.indices),
        "z_loss": lambda: kimi_ops.z_loss(x),
    }
    if device == "cuda":
        packed, fp8 = kimi_ops.Fp8BlockWeight.quantize(up), kimi_ops.Fp8Rows.quantize(rows)
        named["Fp8Rows.quantize"] = lambda: kimi_ops.Fp8Rows.quantize(rows)
        named["grouped_gemm, FP8"] = lambda: kimi_ops.grouped_gemm(fp8, packed, plan.offsets)
    named["attention_max_logits"] = lambda: kimi_ops.attention_max_logits(q, q, 0.1)
    # last: a twin in torch on a GPU, which no graph may be able to capture
    return named | {"newton_schulz": lambda: kimi_ops.newton_schulz(x)}


def host_seconds(function: Function, device: str) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    for _ in range(10):
        function()
    wait()
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        for _ in range(IN_FLIGHT):
            function()
            done += 1
            if time.perf_counter() - start > 4 * SECONDS:
                break
        wait()
    return (time.perf_counter() - start) / done


def graph_seconds(function: Function) -> float:
    """The best of five replays of many calls."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(REPLAYED):
            function()
    times = []
    for _ in range(6):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3 / REPLAYED)
    return min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    rows: dict[str, dict[str, float | str]] = {}
    with torch.no_grad():
        for name, function in calls(options.device).items():
            row = rows[name] = {"host_us": host_seconds(function, options.device) * 1e6}
            if options.device == "cuda":
                try:
                    row["graph_us"] = graph_seconds(function) * 1e6
                except RuntimeError as error:  # reads a value on the host, or needs a generator
                    row["graph"] = str(error).splitlines()[0][:160]
            shown = "  ".join(f"{v:8.2f}" if isinstance(v, float) else v for v in row.values())
            print(f"{name:<28}{shown}", flush=True)
            options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
