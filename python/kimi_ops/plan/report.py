# SPDX-License-Identifier: MIT
"""A plan as text and as an object for JSON."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from kimi_ops.models.kimi_k2.parameters import parameter_report
from kimi_ops.plan.estimate import Estimate
from kimi_ops.plan.planner import Plan
from kimi_ops.plan.work import Layout

__all__ = ["as_dict", "as_text"]

LABEL = "predicted by a model, not measured; only rates called measured were"
GB = 1e9


def layout_name(layout: Layout, training: bool) -> str:
    if not training:
        return f"EP {layout.ep} x {layout.replicas}"
    return f"EP {layout.ep}, PP {layout.pp}, DP {layout.dp}, recompute {layout.recompute}"


def _utilization(plan: Plan, found: Estimate) -> float:
    """6 FLOP a token and active parameter by the dense bf16 peak; attention's pairs not counted."""
    active = parameter_report(plan.counts.config).active_without_embedding
    return found.tokens_per_gpu * 6 * active / plan.hardware.bf16


def _number(value: float) -> str:
    return f"{value:,.2f}" if value < 10 else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _head(plan: Plan) -> Iterator[str]:
    work, hardware = plan.work, plan.hardware
    yield f"{work.mode}: {plan.counts.total:,} parameters on {plan.gpus} x {hardware.gpu}"
    yield f"All of it is {LABEL}. Links: fitted to {hardware.source}."
    what = {
        "train": f"tokens a rank and micro-batch, batch {work.batch_tokens:,}",
        "prefill": "tokens a rank",
        "decode": "sequences a rank, one token each",
    }[work.mode]
    yield (
        f"{work.tokens:,} {what}, context {work.context:,}, skew {work.skew:g}"
        f"{' x that of the loads' if work.loads else ''}, {work.weights} weights, "
        f"rows dispatched in {work.wire}"
        f"{f', {work.redundant} redundant experts' if work.redundant else ''}"
        f"{', micro-batches in twos, side by side' * work.overlap}"
    )


def _sizes(plan: Plan) -> Iterator[str]:
    training = plan.work.training
    yield (
        f"  {'EP':>4} {'PP':>3} {'DP':>5} {'recompute':<10}{'skew':>5} {'GB a GPU':>9} {'left':>8} "
        f"{'dispatch':>9} {'experts':>8} {'combine':>8}  {'bound':<8} {'tokens/s a GPU':>14} "
        f"{'overlapped':>10}"
    )
    unit = f"ms a {'micro-batch' if training else 'step'} and layer"
    yield f"{'':>51}{unit:>29}"
    for found in plan.by_ep:
        layout = found.layout
        mark = ">" if found.layout == plan.chosen.layout and found.fits else " "
        times = [1e3 * found.piece(n).seconds for n in ("dispatch", "experts", "combine")]
        cells = " ".join(
            f"{time:>{width}.3f}" for time, width in zip(times, (9, 8, 8), strict=True)
        )
        overlapped = found.tokens / found.overlapped / found.gpus
        yield (
            f"{mark} {layout.ep:>4} {layout.pp:>3} {layout.dp:>5} "
            f"{layout.recompute if training else '-':<10}{found.skew:>5.2f} "
            f"{found.memory.total / GB:>9.1f} {-found.missing / GB:>8.1f} {cells}  "
            f"{found.bound:<8} {found.tokens_per_gpu:>14,.0f} {overlapped:>10,.0f}"
        )


def _chosen(plan: Plan) -> Iterator[str]:
    found, training = plan.chosen, plan.work.training
    title = "chosen" if found.fits else "lacks least"
    yield f"{title}: {layout_name(found.layout, training)}; bound: {found.bound}"
    parts = [f"{name} {_number(size / GB)}" for name, size in found.memory.parts.items() if size]
    host = f"; on the host {_number(found.memory.host / GB)}" if found.memory.host else ""
    yield f"  memory of the fullest rank, GB: {', '.join(parts)}{host}; of {found.capacity / GB:g}"
    passes = "forward, backward and what is repeated" if training else "forward"
    yield f"  a layer with experts, {passes}:"
    yield f"    {'':<16}{'ms':>9}  {'bound':<9}{'MB NVLink':>10} {'MB network':>10}  rate"
    for piece in found.layer:
        sent = " ".join(
            f"{size / 1e6:>10.1f}" if size else f"{'-':>10}"
            for size in (piece.nvlink_bytes, piece.network_bytes)
        )
        yield (
            f"    {piece.name:<16}{1e3 * piece.seconds:>9.3f}  {piece.bound:<9}{sent}  "
            f"{piece.source}"
        )
    if not training and found.fits:
        most = plan.most_tokens(found.layout)
        yield f"  the most {plan.work.items} a rank that fit: {most:,}"
    if training:
        outside = ", ".join(f"{name} {_number(s)} s" for name, s in found.outside.items() if s)
        yield (
            f"  step: {_number(found.seconds)} s, {_number(found.overlapped)} s where dispatch and "
            f"combine hide behind the rest; {found.micro_batches:,} micro-batches, bubble "
            f"{found.bubble:.1%}; {outside}"
        )
        yield f"  model FLOP/s: {_utilization(plan, found):.1%} of the dense bf16 peak"
    else:
        yield (
            f"  step: {_number(1e3 * found.seconds)} ms, {_number(1e3 * found.overlapped)} ms "
            "where dispatch and combine hide behind the rest"
        )


def _mending(plan: Plan) -> Iterator[str]:
    found = plan.chosen
    yield f"does not fit: {_number(found.missing / GB)} GB a GPU are missing. One change more each:"
    for remedy in plan.remedies:
        best = remedy.best
        layout = layout_name(best.layout, plan.work.training)
        end = "fits" if best.fits else f"{_number(best.missing / GB)} GB are missing"
        yield f"  + {remedy.changes[-1]}: {end} ({layout})"
    if not plan.work.training and plan.most:
        yield f"  without any, {plan.most:,} {plan.work.items} a rank are the most that fit"
    for remedies, name in ((False, "as asked"), (True, "with all of these changes")):
        fewest = plan.fewest_gpus(remedies=remedies)
        answer = "no number tried is" if fewest is None else f"{fewest} GPUs are"
        yield f"  {name}: {answer} enough (nodes doubled)"


def _sensitivity(plan: Plan) -> Iterator[str]:
    yield "what the choice hangs on: tokens/s of the chosen layout, and the best layout then"
    for row in plan.sensitivity:
        if row.layout == plan.chosen.layout:
            best = "the same"
        else:
            best = layout_name(row.layout, plan.work.training) if row.layout else "none fits"
            best += "" if row.fits else "; the chosen one does not fit"
        yield f"  {row.change:<20}{row.ratio:>7.1%}  {best}"


def as_text(plan: Plan) -> str:
    """Tables and sentences."""
    blocks = [_head(plan), _sizes(plan), _chosen(plan)]
    blocks.append(_sensitivity(plan) if plan.chosen.fits else _mending(plan))
    return "\n\n".join("\n".join(block) for block in blocks)


def _estimate(found: Estimate) -> dict[str, Any]:
    derived = ("fits", "missing", "tokens_per_gpu", "bound")
    values = {**asdict(found), **{name: getattr(found, name) for name in derived}}
    return {**values, "memory_bytes": found.memory.total}


def as_dict(plan: Plan) -> dict[str, Any]:
    """Everything in seconds, bytes and tokens."""
    fits = plan.chosen.fits
    return {
        "label": LABEL,
        "parameters": plan.counts.total,
        "hardware": asdict(plan.hardware),
        "gpus": plan.gpus,
        "work": {**asdict(plan.work), "loads": plan.work.loads is not None},
        "fits": fits,
        "chosen": _estimate(plan.chosen),
        "by_ep": [_estimate(found) for found in plan.by_ep],
        "most_tokens": None if plan.work.training else plan.most_tokens(plan.chosen.layout),
        "sensitivity": [asdict(row) for row in plan.sensitivity] if fits else [],
        "remedies": [
            {"changes": remedy.changes, **_estimate(remedy.best)} for remedy in plan.remedies
        ],
        "fewest_gpus": None
        if fits
        else {
            "as_asked": plan.fewest_gpus(),
            "with_all_remedies": plan.fewest_gpus(remedies=True),
        },
    }
