# SPDX-License-Identifier: MIT
"""A Kimi K2 in miniature under FSDP2, trained by MuonClip: the losses of one process.

    torchrun --nproc-per-node 2 examples/fsdp2_muonclip.py --checkpoint /tmp/miniature

Every parameter is a DTensor whose rows the ranks share; MuonClip needs no argument for it. Each
rank takes its share of one batch and QK-Clip the largest logits of all, so that 1, 2 and 4
processes print the same losses but for the last digits, which the order of sums decides. The
checkpoint is written by torch.distributed.checkpoint; a later run, of any number of processes, goes
on from it. One GPU a process where there are any.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from kimi_ops import MuonClip, QKClip, muon_param_groups
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config

BATCH, LENGTH = 8, 32


def build(mesh: DeviceMesh) -> tuple[KimiK2, MuonClip]:
    model = KimiK2(KimiK2Config.tiny(), device=mesh.device_type)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    groups = muon_param_groups(model, per_head=True, adamw={"max_grad_norm": 1.0})
    clip = QKClip(model.attention_layers(), tau=0.003)  # so low that these few steps meet it
    return model, MuonClip(groups, lr=5e-3, qk_clip=clip)


def train_step(model: KimiK2, optimizer: MuonClip, step: int, vocabulary: int) -> float:
    """One step; the mean loss over all ranks."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(0, vocabulary, (BATCH, 1), generator=generator)
    batch = (starts + 3 * torch.arange(LENGTH)) % vocabulary  # sequences that can be learnt
    ids = batch.chunk(dist.get_world_size())[dist.get_rank()].to(next(model.parameters()).device)
    loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    total = loss.detach()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def load(folder: str, model: KimiK2, optimizer: MuonClip) -> int:
    """Go on from the checkpoint in a folder, if there is one; the steps that it has seen."""
    if not Path(folder, ".metadata").exists():
        return 0
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "steps": 0}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return state["steps"]


def save(folder: str, model: KimiK2, optimizer: MuonClip, steps: int) -> None:
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "steps": steps}
    dcp.save(state, checkpoint_id=folder)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=8, help="of the whole training")
    parser.add_argument("--checkpoint", help="folder to go on from, and to save to at the end")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    model, optimizer = build(mesh)
    first = load(options.checkpoint, model, optimizer) if options.checkpoint else 0
    for step in range(first, options.steps):
        loss = train_step(model, optimizer, step, model.config.vocab_size)
        if dist.get_rank() == 0:
            assert optimizer.qk_clip is not None and optimizer.qk_clip.gamma is not None
            gamma = float(optimizer.qk_clip.gamma.min())
            print(f"step {step} loss {loss:.4f} smallest gamma {gamma:.3f}", flush=True)
    if options.checkpoint:
        save(options.checkpoint, model, optimizer, options.steps)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
