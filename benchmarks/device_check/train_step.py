# SPDX-License-Identifier: MIT
"""Steps of the preset `mini`, 4096 tokens each: forward and backward, then the optimizer; and how
many torch ops and kernels a step is made of."""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import kimi_ops
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config

SEQUENCES, WINDOW, STEPS = 16, 256, 8


class Training:
    def __init__(self, preset: str, device: str) -> None:
        torch.manual_seed(0)
        self.device = device
        self.model = KimiK2(getattr(KimiK2Config, preset)())
        self.model.init_weights(seed=0)
        self.model.to(device)
        self.optimizer = kimi_ops.MuonClip(kimi_ops.muon_param_groups(self.model), lr=2e-3)
        config = self.model.config
        window = min(WINDOW, config.max_position_embeddings)
        highest = min(256, config.vocab_size)  # bytes, where the model knows them
        self.ids = torch.randint(0, highest, (SEQUENCES, window + 1), device=device)

    def step(self) -> dict[str, float]:
        """Seconds of both halves, and the loss."""
        start = self.now()
        logits = self.model(self.ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), self.ids[:, 1:].flatten())
        loss.backward()
        half = self.now()
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = self.now()
        return {
            "forward_backward_s": half - start, "optimizer_s": end - half, "loss": loss.item()
        }  # fmt: skip

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def counts(self) -> dict[str, Any]:
        """One step under the profiler: ops that the host starts, kernels and their time."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profile:
            self.step()
        averages = profile.key_averages()
        on_gpu = [
            event
            for event in averages
            if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
        ]
        longest = sorted(on_gpu, key=lambda e: -e.self_device_time_total)[:15]
        return {
            "torch_ops": sum(e.count for e in averages if e.key.startswith("aten::")),
            "kernels": sum(e.count for e in on_gpu),
            "kernel_s": sum(e.self_device_time_total for e in on_gpu) * 1e-6,
            "longest": {e.key[:80]: [e.count, e.self_device_time_total * 1e-6] for e in longest},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--preset", default="mini", choices=["mini", "tiny"])
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    training = Training(options.preset, options.device)
    steps: list[dict[str, float]] = []
    report: dict[str, Any] = {"tokens": training.ids[:, 1:].numel(), "steps": steps}
    for number in range(STEPS):
        steps.append(training.step())
        print(number, "  ".join(f"{k} {v:.4f}" for k, v in steps[-1].items()), flush=True)
    settled = steps[2:]
    median = statistics.median(s["forward_backward_s"] + s["optimizer_s"] for s in settled)
    report |= {"median_s": median, "tokens_per_s": report["tokens"] / median}
    print(f"median {median:.4f} s, {report['tokens_per_s']:.0f} tokens/s", flush=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    report["profile"] = training.counts()
    print(json.dumps(report["profile"], indent=1))
    options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
