# SPDX-License-Identifier: MIT
"""A Kimi K2 in miniature over pipeline stages, in a loop of one's own: the losses of one process.

    torchrun --nproc-per-node 2 examples/12_pipeline.py --save /tmp/staged

`kimi-ops train --pipeline-parallel` is the whole program; this is the seam that it uses. Every
process has some neighbouring layers and their optimizer; torch moves hidden values and gradients of
micro-batches between them. Each sum is that of one process, and so are the bits.
"""

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from kimi_ops import MuonClip, QKClip, muon_param_groups, update_expert_bias_
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config, Stage
from kimi_ops.plan.work import Layout

MICRO_BATCHES, SEQUENCES, LENGTH = 4, 2, 32


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=8)
parser.add_argument("--save", help="folder for the model of all stages, as Hugging Face has it")
options = parser.parse_args()
dist.init_process_group()
ranks, rank = dist.get_world_size(), dist.get_rank()

model = KimiK2(KimiK2Config.tiny())
layers = Layout(1, ranks, 1).stages(model.config.num_hidden_layers)[rank]
stage = Stage(model, layers, stages=dist.group.WORLD)
clip = QKClip(stage.attention_layers(), tau=0.003)  # so low that these few steps meet it
groups = muon_param_groups(stage, adamw={"max_grad_norm": 0.5})  # over all stages
optimizer = MuonClip(groups, lr=5e-3, qk_clip=clip, stages=dist.group.WORLD)

ids = torch.empty(SEQUENCES, LENGTH, dtype=torch.int64, device="meta")
hidden = torch.empty(*ids.shape, stage.config.hidden_size, device="meta", requires_grad=True)
logits = torch.empty(*ids.shape, stage.config.vocab_size, device="meta", requires_grad=True)
given, made = ids if stage.first else hidden, logits if stage.last else hidden
part = PipelineStage(stage, rank, ranks, torch.device("cpu"), input_args=given, output_args=made)
schedule = Schedule1F1B(part, MICRO_BATCHES, loss_fn=next_token_loss)

for step in range(options.steps):
    generator = torch.Generator().manual_seed(step)
    vocabulary = stage.config.vocab_size
    starts = torch.randint(0, vocabulary, (MICRO_BATCHES * SEQUENCES, 1), generator=generator)
    batch = (starts + 3 * torch.arange(LENGTH)) % vocabulary  # sequences that can be learnt
    losses: list[Tensor] = []
    last = {"target": batch, "losses": losses} if stage.last else {}
    schedule.step(*([batch] if stage.first else []), return_outputs=False, **last)
    balance = stage.auxiliary_loss() / MICRO_BATCHES
    optimizer.step()
    optimizer.zero_grad()
    for moe in stage.moe_layers():
        update_expert_bias_(moe.gate.e_score_correction_bias, moe.tokens_per_expert, rate=1e-3)
    stage.reset_statistics()
    dist.reduce(balance, ranks - 1)
    if stage.last:
        loss = torch.stack(losses).detach().mean()
        print(f"step {step} loss {float(loss):.9f} balance {float(balance):.6f}", flush=True)
if options.save:
    stage.save_pretrained(options.save)
dist.destroy_process_group()
