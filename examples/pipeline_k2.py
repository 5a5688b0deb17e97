# SPDX-License-Identifier: MIT
"""A Kimi K2 in miniature over pipeline stages, in a loop of one's own: the losses of one process.

    torchrun --nproc-per-node 2 examples/pipeline_k2.py --save /tmp/staged

`kimi-ops train --pipeline-parallel` is the whole program, with expert ranks, checkpoints that
resume and metrics; this is the seam that it uses. Every process has some neighbouring layers and
their optimizer; torch.distributed.pipelining moves hidden values and gradients of micro-batches
between them. The number of processes decides nothing: each sum is that of one process, and so are
the bits. One GPU a process where there are any.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from kimi_ops import MuonClip, QKClip, muon_param_groups, update_expert_bias_
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config, Stage
from kimi_ops.plan.work import Layout

MICRO_BATCHES, SEQUENCES, LENGTH = 4, 2, 32


def build(device: torch.device) -> tuple[Stage, MuonClip]:
    """This rank's layers and their optimizer."""
    model = KimiK2(KimiK2Config.tiny(), device=device)
    layers = Layout(1, dist.get_world_size(), 1).stages(model.config.num_hidden_layers)
    stage = Stage(model, layers[dist.get_rank()], stages=dist.group.WORLD)
    clip = QKClip(stage.attention_layers(), tau=0.003)  # so low that these few steps meet it
    groups = muon_param_groups(stage, adamw={"max_grad_norm": 0.5})  # over all stages
    return stage, MuonClip(groups, lr=5e-3, qk_clip=clip, stages=dist.group.WORLD)


def scheduled(stage: Stage, device: torch.device) -> Schedule1F1B:
    """Shapes are given, so that no forward has to find them out."""
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
    return Schedule1F1B(part, MICRO_BATCHES, loss_fn=next_token_loss)


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def batch_of(step: int, vocabulary: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(0, vocabulary, (MICRO_BATCHES * SEQUENCES, 1), generator=generator)
    return ((starts + 3 * torch.arange(LENGTH)) % vocabulary).to(device)  # can be learnt


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--save", help="folder for the model of all stages, as Hugging Face has it")
    options = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group()
    stage, optimizer = build(device)
    schedule = scheduled(stage, device)
    for step in range(options.steps):
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
    if options.save:
        stage.save_pretrained(options.save)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
