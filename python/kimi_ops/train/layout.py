# SPDX-License-Identifier: MIT
"""What numbers of processes, of layers and of sequences go together; each function raises a
ValueError that names an option."""

from __future__ import annotations

from typing import get_args

from kimi_ops.choices import PipelineSchedule
from kimi_ops.plan.work import Layout

SCHEDULES = get_args(PipelineSchedule)


def check_layout(world: int, expert_parallel: int, pipeline_parallel: int) -> None:
    """Raise unless so many ranks can be stages, each of replicas of `expert_parallel`."""
    if not 1 <= pipeline_parallel <= world or world % pipeline_parallel:
        raise ValueError(
            f"kimi-ops: --pipeline-parallel: expected a divisor of the {world} processes, got "
            f"{pipeline_parallel}; lower it, or start a multiple of it with torchrun"
        )
    stage = world // pipeline_parallel
    if not 1 <= expert_parallel <= stage or stage % expert_parallel:
        whose = f"{stage} processes" + " of a stage" * (pipeline_parallel > 1)
        raise ValueError(
            f"kimi-ops: --expert-parallel: expected a divisor of the {whose}, got "
            f"{expert_parallel}; lower it, or start a multiple of it with torchrun"
        )


def check_schedule(schedule: str) -> None:
    """Raise unless a schedule is known."""
    if schedule not in SCHEDULES:
        raise ValueError(
            f"kimi-ops: --schedule: expected {' or '.join(SCHEDULES)}, got {schedule}; choose one"
        )


def check_stages(layers: int, pipeline_parallel: int) -> None:
    """Raise unless every stage gets a layer."""
    if pipeline_parallel > layers:
        raise ValueError(
            f"kimi-ops: --pipeline-parallel: expected at most the model's {layers} layers, got "
            f"{pipeline_parallel}; lower it"
        )


def check_experts(experts: int, expert_parallel: int) -> None:
    """Raise unless the experts of a layer can be shared out evenly."""
    if experts % expert_parallel:
        raise ValueError(
            f"kimi-ops: --expert-parallel: expected a divisor of the model's {experts} experts, "
            f"got {expert_parallel}; choose one"
        )


def check_overlap(overlap: bool, expert_parallel: int, pipeline_parallel: int) -> None:
    """Raise where two micro-batches are wanted side by side and there are no messages to hide, or
    where a schedule has its own order of them."""
    if overlap and pipeline_parallel > 1:
        raise ValueError(
            "kimi-ops: --overlap: expected --pipeline-parallel 1, since the schedule of stages "
            f"takes one micro-batch at a time, got {pipeline_parallel}; leave one of them out"
        )
    if overlap and expert_parallel == 1:
        raise ValueError(
            "kimi-ops: --overlap: expected experts over several processes, whose messages it "
            "hides, got --expert-parallel 1; leave it out, or raise --expert-parallel"
        )


def check_batch(
    sequences: int, accumulate: int, recompute: str, layout: Layout, overlap: bool, schedule: str
) -> None:
    """Raise unless every rank gets as many sequences of a micro-batch, twos can be computed, and
    stages have enough of them."""
    if overlap and recompute == "full":
        raise ValueError(
            "train: --recompute: expected none or selective beside --overlap, got full, of which a "
            "layer of one micro-batch would exchange anew beside the other's; change it (a resumed "
            "run may), or leave --overlap out"
        )
    if overlap and accumulate % 2:
        raise ValueError(
            f"train: --accumulate: expected an even number beside --overlap, which takes "
            f"micro-batches in twos, got {accumulate}; change it (a resumed run may, with "
            "--sequences), or leave --overlap out"
        )
    if schedule == "1F1B" and accumulate < layout.pp:
        raise ValueError(
            f"train: --accumulate: expected at least the {layout.pp} stages, so that each has a "
            f"micro-batch, got {accumulate}; raise it (a resumed run may, with --sequences), or "
            "choose --schedule GPipe"
        )
    if sequences % layout.dp:
        whose = f"{layout.dp} processes" + " of a stage" * (layout.pp > 1)
        raise ValueError(
            f"train: --sequences: expected a multiple of the {whose}, which share each "
            f"micro-batch, got {sequences}; change it (a resumed run may, with --accumulate), or "
            "start another number of processes"
        )
