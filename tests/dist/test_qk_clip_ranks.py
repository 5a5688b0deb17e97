# SPDX-License-Identifier: MIT
"""QKClip over ranks: data parallel ranks join their maxima, tensor parallel ones keep their heads,
and rows of a DTensor are clipped where they lie. Two gloo processes over loopback."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)

from kimi_ops import QKClip
from tests.dist.world import launch

WORLD, HEADS, NOPE, ROPE, V = 2, 3, 4, 2, 3


class Latent(nn.Module):
    def __init__(self, heads: int = HEADS) -> None:
        super().__init__()
        self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim = NOPE, ROPE, V
        self.q_proj = nn.Linear(5, heads * (NOPE + ROPE))
        self.kv_b_proj = nn.Linear(5, heads * (NOPE + V), bias=False)
        self.register_buffer("max_logits", torch.full((heads,), -math.inf), persistent=False)


def model() -> list[Latent]:
    torch.manual_seed(0)
    return [Latent(), Latent()]


def maxima(rank: int) -> list[torch.Tensor]:
    """What a data parallel rank has seen: each has the largest of some heads, one a NaN."""
    seen = [torch.tensor([400.0, 90.0, 5.0]), torch.tensor([1.0, math.nan, 160.0])]
    other = [torch.tensor([3.0, 250.0, 7.0]), torch.tensor([121.0, 2.0, 130.0])]
    return (seen, other)[rank]


def fill(layers: list[Latent], values: list[torch.Tensor]) -> None:
    for layer, value in zip(layers, values, strict=True):
        layer.max_logits.copy_(value)


def joined() -> tuple[list[Latent], QKClip]:
    """All data on one process."""
    layers = model()
    clip = QKClip(layers)
    fill(layers, [torch.fmax(a, b) for a, b in zip(maxima(0), maxima(1), strict=True)])
    layers[1].max_logits[1] = math.nan
    clip.step()
    return layers, clip


def shard(layers: list[Latent], mesh: dist.DeviceMesh, *placements: object) -> None:
    for layer in layers:
        for module in (layer.q_proj, layer.kv_b_proj):
            for name, parameter in list(module.named_parameters()):
                tensor = distribute_tensor(parameter.detach(), mesh, placements)
                setattr(module, name, nn.Parameter(tensor))


def same(layers: list[Latent], clip: QKClip, whole: list[Latent], want: QKClip) -> None:
    for layer, twin in zip(layers, whole, strict=True):
        for a, b in zip(layer.parameters(), twin.parameters(), strict=True):
            assert torch.equal(getattr(a, "full_tensor", lambda a=a: a)(), b)
    for name in ("gamma", "nonfinite", "max_logits"):
        assert torch.equal(getattr(clip, name), getattr(want, name)), name
    assert all(torch.isneginf(layer.max_logits).all() for layer in layers)


def worker(rank: int, folder: str) -> None:
    whole, want = joined()
    assert want.nonfinite.tolist() == [[False] * 3, [False, True, False]]
    mesh = init_device_mesh("cpu", (WORLD,))
    alone = [dist.new_group([r]) for r in range(WORLD)][rank]

    # Data parallel: the group of the step, that of the clip, which wins.
    for own, given in ((None, dist.group.WORLD), (dist.group.WORLD, alone)):
        layers = model()
        clip = QKClip(layers, process_group=own)
        fill(layers, maxima(rank))
        clip.step(given)
        same(layers, clip, whole, want)

    # Rows of a DTensor, 9 of 18 and 11 of 21: cut within a head. Without a group those of its mesh.
    for group in (None, dist.group.WORLD):
        for placement in (Shard(0), Replicate()):
            layers = model()
            shard(layers, mesh, placement)
            clip = QKClip(layers)
            fill(layers, maxima(rank))
            clip.step(group)
            same(layers, clip, whole, want)

    # Tensor parallel: two heads a rank, plain tensors or DTensors, which nobody else's maxima move.
    torch.manual_seed(1)
    full = Latent(4)
    rows = {name: p.detach().chunk(WORLD)[rank].clone() for name, p in full.named_parameters()}
    seen = torch.tensor([400.0, 90.0, 150.0, 5.0])
    for distributed in (False, True):
        layer = Latent(2) if not distributed else copy.deepcopy(full)
        if distributed:
            shard([layer], mesh, Shard(0))
            layer.max_logits = torch.zeros(2)
        else:
            layer.load_state_dict(rows)
        layer.max_logits.copy_(seen.chunk(WORLD)[rank])
        clip = QKClip([layer])
        clip.step()
        assert clip.gamma.tolist() == [[0.25, 1.0] if rank == 0 else [pytest.approx(2 / 3), 1.0]]
        query = layer.q_proj.weight
        query = query.to_local() if distributed else query
        assert torch.equal(query[NOPE : NOPE + ROPE], rows["q_proj.weight"][NOPE : NOPE + ROPE]
                           * clip.gamma[0, 0])  # fmt: skip
        assert torch.equal(query[NOPE + ROPE :], rows["q_proj.weight"][NOPE + ROPE :])

    for placement in (Shard(1), Partial()):
        layer = Latent()
        broken = DTensor.from_local(layer.q_proj.weight.detach(), mesh, [placement])
        layer.q_proj.weight = nn.Parameter(broken)
        with pytest.raises(
            ValueError, match=r"layers.0..q_proj.weight: expected a DTensor that is repl"
        ):
            QKClip([layer])


def test_ranks_clip_as_one_process_does(tmp_path: Path):
    launch(worker, tmp_path, WORLD)
