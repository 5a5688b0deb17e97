# SPDX-License-Identifier: MIT
"""A Kimi K2 in miniature under FSDP2, trained by MuonClip: the losses of one process.

    torchrun --nproc-per-node 2 examples/11_fsdp2.py --checkpoint /tmp/miniature

Every parameter is a DTensor whose rows the ranks share; MuonClip needs no argument for it. Any
number of processes prints the same losses but for the last digits, which the order of sums decides,
and goes on from the checkpoint of any other number. One GPU a process where there are any.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from kimi_ops import MuonClip, QKClip, muon_param_groups
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=8, help="of the whole training")
parser.add_argument("--checkpoint", help="folder to go on from, and to save to at the end")
options = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group()
ranks, rank = dist.get_world_size(), dist.get_rank()
mesh = init_device_mesh(device, (ranks,))

model = KimiK2(KimiK2Config.tiny(), device=device)
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
clip = QKClip(model.attention_layers(), tau=0.003)  # so low that these few steps meet it
groups = muon_param_groups(model, per_head=True, adamw={"max_grad_norm": 1.0})
optimizer = MuonClip(groups, lr=5e-3, qk_clip=clip)

first = 0
if options.checkpoint and Path(options.checkpoint, ".metadata").exists():
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "steps": 0}
    dcp.load(state, checkpoint_id=options.checkpoint)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    first = state["steps"]
for step in range(first, options.steps):
    generator = torch.Generator().manual_seed(step)
    vocabulary = model.config.vocab_size
    starts = torch.randint(0, vocabulary, (8, 1), generator=generator)
    batch = (starts + 3 * torch.arange(32)) % vocabulary  # sequences that can be learnt
    ids = batch.chunk(ranks)[rank].to(device)  # this rank's share of one batch
    loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    total = loss.detach() / ranks
    dist.all_reduce(total)
    if rank == 0:
        gamma = clip.gamma.min()
        print(f"step {step} loss {total:.4f} smallest gamma {gamma:.3f}", flush=True)
if options.checkpoint:
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "steps": options.steps}
    dcp.save(state, checkpoint_id=options.checkpoint)
dist.destroy_process_group()
