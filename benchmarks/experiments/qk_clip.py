# SPDX-License-Identifier: MIT
"""What QK-Clip does to attention logits: AdamW, Muon and MuonClip on the same small model and text.

    python -m benchmarks.experiments.qk_clip --out docs/qk_clip_experiment.svg

A dense Kimi K2 in miniature (latent attention, no QK norm, bytes of the standard library) is
trained three times from the same weights on the same batches, at a learning rate where Muon's
largest attention logit grows past 3 tau. Printed are the losses and the largest logits; the figure
shows them step by step. Minutes on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from kimi_ops import MuonClip, QKClip, muon_param_groups
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config
from kimi_ops.train.data import Corpus, load_corpus, training_batch, validation_set
from kimi_ops.train.plot import require_matplotlib
from kimi_ops.train.schedule import warmup_stable_decay

ARMS = {"AdamW": "#666666", "Muon": "#D55E00", "MuonClip": "#0072B2"}


@dataclass
class Run:
    """What one arm showed: a number a step, and how it ended."""

    arm: str
    losses: list[float] = field(default_factory=list)
    maxima: list[float] = field(default_factory=list)
    clipped: list[int] = field(default_factory=list)
    validation: float = math.nan
    seconds: float = 0.0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="SVG or PNG to write")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.02, help="of Muon and MuonClip")
    parser.add_argument("--adamw-lr", type=float, default=0.003, help="of the AdamW arm")
    parser.add_argument("--tau", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch has")
    return parser.parse_args(arguments)


def build(arm: str, options: argparse.Namespace) -> tuple[KimiK2, MuonClip]:
    """A fresh model and its optimizer; arms without QK-Clip have a tau that nothing reaches."""
    config = dataclasses.replace(
        KimiK2Config.mini(),
        num_hidden_layers=options.layers,
        first_k_dense_replace=options.layers,
    )
    model = KimiK2(config)
    model.init_weights(options.seed)
    groups = muon_param_groups(model)
    if arm == "AdamW":
        everything = [pair for group in groups for pair in group["params"]]
        groups = [{"params": everything, "algorithm": "adamw"}]
    tau = options.tau if arm == "MuonClip" else 1e30
    clip = QKClip(model.attention_layers(), tau=tau)
    optimizer = MuonClip(
        groups, lr=options.lr, weight_decay=0.0, ns_dtype="float32", max_grad_norm=1.0, qk_clip=clip
    )
    return model.train(), optimizer


def loss_of(model: KimiK2, batch: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def train(arm: str, corpus: Corpus, options: argparse.Namespace) -> Run:
    """One arm, from the same weights on the same batches as the others."""
    run, started = Run(arm), time.monotonic()
    model, optimizer = build(arm, options)
    peak = options.adamw_lr if arm == "AdamW" else options.lr
    warmup, decay = round(0.05 * options.steps), round(0.3 * options.steps)
    for step in range(options.steps):
        factor = warmup_stable_decay(step, options.steps, warmup=warmup, decay=decay)
        for group in optimizer.param_groups:
            group["lr"] = peak * factor
        batch = training_batch(
            corpus.train,
            seed=options.seed,
            step=step,
            batch=options.sequences,
            window=options.window,
        )
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        clip = optimizer.qk_clip
        assert clip is not None and clip.max_logits is not None and clip.gamma is not None
        run.losses.append(loss.item())
        run.maxima.append(clip.max_logits.max().item())
        run.clipped.append(int((clip.gamma < 1).sum()))
    model.eval()
    windows = validation_set(corpus.validation, count=64, window=options.window)
    with torch.no_grad():
        parts = [loss_of(model, part) * len(part) for part in windows.split(options.sequences)]
    run.validation = (torch.stack(parts).sum() / len(windows)).item()
    run.seconds = time.monotonic() - started
    return run


def growth(maxima: Sequence[float], tau: float) -> float:
    """Largest factor from one step to the next among logits of at least tau / 2."""
    pairs = zip(maxima, maxima[1:], strict=False)
    return max((new / old for old, new in pairs if old >= tau / 2), default=1.0)


def table(runs: dict[str, Run], options: argparse.Namespace) -> str:
    """The numbers, and whether they are what the paper leads one to expect."""
    heads = KimiK2Config.mini().num_attention_heads * options.layers
    lines = [
        f"{'arm':<10}{'lr':>7}{'validation loss':>17}{'largest logit':>15}{'over tau':>10}"
        f"{'last logit':>12}{'heads clipped a step':>22}{'seconds':>9}"
    ]
    for run in runs.values():
        lr = options.adamw_lr if run.arm == "AdamW" else options.lr
        largest = max(run.maxima)
        share = f"{sum(run.clipped) / len(run.clipped):.2f} of {heads}"
        lines.append(
            f"{run.arm:<10}{lr:>7g}{run.validation:>17.4f}{largest:>15.1f}"
            f"{largest / options.tau:>9.2f}x{run.maxima[-1]:>12.1f}{share:>22}{run.seconds:>9.0f}"
        )
    muon, clip = runs["Muon"], runs["MuonClip"]
    lines += [
        "",
        f"tau {options.tau:g}; Muon passes it {max(muon.maxima) / options.tau:.1f} times over",
        f"MuonClip's largest logit is {max(clip.maxima) / options.tau:.2f} tau; unclipped, Muon's "
        f"grows by up to {growth(muon.maxima, options.tau):.2f} in one step",
        f"MuonClip's loss is {clip.validation - muon.validation:+.4f} nats a byte from Muon's",
    ]
    return "\n".join(lines)


def plot(runs: dict[str, Run], options: argparse.Namespace) -> None:
    """Largest logit and loss of every arm, step by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "kimi_ops"  # equal runs give equal files
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    steps = range(1, options.steps + 1)
    for run in runs.values():
        style: dict[str, Any] = {"color": ARMS[run.arm], "label": run.arm, "linewidth": 1.2}
        left.plot(steps, run.maxima, **style)
        smooth = [
            sum(run.losses[max(0, i - 9) : i + 1]) / len(run.losses[max(0, i - 9) : i + 1])
            for i in range(options.steps)
        ]
        right.plot(steps, smooth, **style)
    left.axhline(options.tau, color="black", linestyle="--", linewidth=0.8, label="tau")
    left.set_yscale("log")
    left.set_ylabel("largest attention logit [1]")
    left.set_title("Largest logit of all layers and heads")
    right.set_ylabel("training loss [nats per byte]")
    right.set_title("Loss, mean of 10 steps")
    for axes in (left, right):
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(options.out, metadata={"Date": None} if options.out.suffix == ".svg" else None)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> dict[str, Run]:
    options = parse(arguments)
    if options.out is not None:
        require_matplotlib()
    if options.threads:
        torch.set_num_threads(options.threads)
    corpus = load_corpus(None, window=options.window)
    runs = {}
    for arm in ARMS:
        runs[arm] = train(arm, corpus, options)
        print(f"{arm} done in {runs[arm].seconds:.0f} s", flush=True)
    print()
    print(table(runs, options))
    if options.out is not None:
        plot(runs, options)
        print(f"\nfigure {options.out}")
    return runs


if __name__ == "__main__":
    main()
