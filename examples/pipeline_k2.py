# SPDX-License-Identifier: MIT
"""A Kimi K2 in miniature over pipeline stages, trained by MuonClip: the losses of one process.

    torchrun --nproc-per-node 2 examples/pipeline_k2.py --schedule 1F1B --checkpoint /tmp/staged

Every process has some neighbouring layers and their optimizer; torch.distributed.pipelining moves
hidden values and gradients of micro-batches between them. The number of processes decides nothing:
each sum is that of one process, and so are the bits. The checkpoint is written by
torch.distributed.checkpoint under the names of the whole model; a later run, of any number of
processes, goes on from it. One GPU a process where there are any.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from kimi_ops import MuonClip, QKClip, muon_param_groups, update_expert_bias_
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config, Stage
from kimi_ops.plan.work import Layout

SCHEDULES = {"1F1B": Schedule1F1B, "GPipe": ScheduleGPipe}
MICRO_BATCHES, SEQUENCES, LENGTH = 4, 2, 32
NAMED = StateDictOptions(flatten_optimizer_state_dict=True)  # ranks have parameters of their own


def build(device: torch.device) -> tuple[Stage, MuonClip]:
    """This rank's layers and their optimizer."""
    model = KimiK2(KimiK2Config.tiny(), device=device)
    layers = Layout(1, dist.get_world_size(), 1).stages(model.config.num_hidden_layers)
    stage = Stage(model, layers[dist.get_rank()])
    clip = QKClip(stage.attention_layers(), tau=0.003)  # so low that these few steps meet it
    optimizer = MuonClip(muon_param_groups(stage), lr=5e-3, qk_clip=clip)
    optimizer.register_load_state_dict_pre_hook(own_names)
    return stage, optimizer


def own_names(optimizer: MuonClip, state: dict[str, Any]) -> dict[str, Any]:
    """Groups of other stages have other parameters; which are here the optimizer knows."""
    pairs = zip(optimizer.param_groups, state["param_groups"], strict=True)
    groups = [{**saved, "param_names": own["param_names"]} for own, saved in pairs]
    return {**state, "param_groups": groups}


def scheduled(stage: Stage, name: str, device: torch.device) -> Schedule1F1B | ScheduleGPipe:
    config = stage.config
    ids = torch.empty(SEQUENCES, LENGTH, dtype=torch.int64, device="meta")
    hidden = torch.empty(SEQUENCES, LENGTH, config.hidden_size, device="meta", requires_grad=True)
    logits = torch.empty(SEQUENCES, LENGTH, config.vocab_size, device="meta", requires_grad=True)
    part = PipelineStage(
        stage,
        dist.get_rank(),
        dist.get_world_size(),
        device,
        input_args=ids if stage.first else hidden,
        output_args=logits if stage.last else hidden,
    )
    return SCHEDULES[name](part, MICRO_BATCHES, loss_fn=next_token_loss)


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def batch_of(step: int, vocabulary: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(0, vocabulary, (MICRO_BATCHES * SEQUENCES, 1), generator=generator)
    return ((starts + 3 * torch.arange(LENGTH)) % vocabulary).to(device)  # can be learnt


def load(folder: str, stage: Stage, optimizer: MuonClip) -> int:
    """Go on from the checkpoint in a folder, if there is one; the steps that it has seen."""
    if not Path(folder, ".metadata").exists():
        return 0
    weights, moments = get_state_dict(stage, optimizer, options=NAMED)
    state = {"model": weights, "optimizer": moments, "steps": 0}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        stage, optimizer, model_state_dict=weights, optim_state_dict=moments, options=NAMED
    )
    return state["steps"]


def save(folder: str, stage: Stage, optimizer: MuonClip, steps: int) -> None:
    weights, moments = get_state_dict(stage, optimizer, options=NAMED)
    dcp.save({"model": weights, "optimizer": moments, "steps": steps}, checkpoint_id=folder)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=8, help="of the whole training")
    parser.add_argument("--schedule", choices=SCHEDULES, default="1F1B")
    parser.add_argument("--recompute", default="none", help="none, selective or full")
    parser.add_argument("--checkpoint", help="folder to go on from, and to save to at the end")
    options = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group()
    stage, optimizer = build(device)
    stage.recompute = options.recompute
    first = load(options.checkpoint, stage, optimizer) if options.checkpoint else 0
    schedule = scheduled(stage, options.schedule, device)
    for step in range(first, options.steps):
        ids = batch_of(step, stage.config.vocab_size, device)
        losses: list[Tensor] = []
        schedule.step(
            *([ids] if stage.first else []),
            target=ids if stage.last else None,
            losses=losses if stage.last else None,
            return_outputs=False,
        )
        balance = stage.auxiliary_loss() / MICRO_BATCHES
        optimizer.step()
        optimizer.zero_grad()
        for moe in stage.moe_layers():
            bias = moe.gate.e_score_correction_bias
            update_expert_bias_(bias, moe.tokens_per_expert, rate=1e-3)
        stage.reset_statistics()
        dist.reduce(balance, dist.get_world_size() - 1)
        if stage.last:
            loss = float(torch.stack(losses).detach().mean())
            print(f"step {step} loss {loss:.9f} balance {float(balance):.6f}", flush=True)
    if options.checkpoint:
        save(options.checkpoint, stage, optimizer, options.steps)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
