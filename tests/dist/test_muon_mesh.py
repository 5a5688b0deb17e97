# SPDX-License-Identifier: MIT
"""MuonClip on DTensor parameters: on meshes of 1, 2, 4 and 2 x 2 ranks the bits of one process with
the averaged gradients. Four processes with gloo over loopback; smaller meshes are part of them."""

import copy
import math
import os
import time
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from kimi_ops import MuonClip
from kimi_ops.optim import muon_routes
from kimi_ops.optim.muon_mesh import circle_of, edges_of

PROCESSES = 4
STEPS = 4
SHAPES = {
    "wide": (24, 40),
    "tall": (41, 12),  # uneven
    "short": (5, 9),  # 2, 2, 1 and no rows
    "single": (1, 6),  # all on one rank
    "low": (16, 8),
    "double": (6, 7),
    "never": (8, 8),
    "lonely": (8, 12),
    "stack": (10, 4, 6),
    "deep": (3, 2, 4, 5),  # two batch dimensions, a rank without any
    "fused": (6, 8, 10),
    "q": (12, 5),
    "kv": (14, 3),
    "qkv": (11, 4),
    "o": (9, 8),
    "columns": (7, 8),
    "conv": (6, 3, 2, 2),
    "embedding": (50, 8),
    "bias": (9,),
    "gain": (7,),
}
GROUPS = [
    ({}, ("wide", "tall", "short", "single", "low", "double", "never", "lonely", "stack", "deep")),
    ({"split_sizes": (4, 4)}, ("fused",)),
    ({"num_heads": 2, "ns_method": "gram", "ns_dtype": "float32", "maximize": True}, ("q",)),
    ({"num_heads": 2, "split_sizes": (4, 3), "momentum_dtype": "bfloat16"}, ("kv",)),
    ({"split_sizes": (6, 4, 1), "foreach": False}, ("qkv",)),
    ({"num_heads": 2, "head_dim": 1, "cautious_weight_decay": True}, ("o",)),
    ({"split_sizes": (7, 1), "head_dim": 1, "nesterov": False}, ("columns",)),
    ({"batch_dims": "flatten", "adjust_lr_fn": "match_rms_adamw"}, ("conv",)),
    ({"algorithm": "adamw", "max_grad_norm": 0.5}, ("embedding", "bias")),
    ({"algorithm": "adamw", "maximize": True}, ("gain",)),
]
DTYPES = {"low": torch.bfloat16, "double": torch.float64}
Placements = tuple[Replicate | Shard, ...]


def spread(tensor: Tensor, mesh: DeviceMesh | None, placements: Placements) -> Tensor:
    """The rows of this rank, taken from a tensor that every rank has."""
    if mesh is None:
        return tensor
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def build(mesh: DeviceMesh | None = None, placements: Placements = ()) -> tuple[dict, MuonClip]:
    generator = torch.Generator().manual_seed(0)
    params = {}
    for name, shape in SHAPES.items():
        full = torch.randn(shape, generator=generator).to(DTYPES.get(name))
        params[name] = nn.Parameter(spread(full, mesh, placements))
    groups = [{**keys, "params": [(n, params[n]) for n in members]} for keys, members in GROUPS]
    return params, MuonClip(groups, lr=0.05)


def gradient(name: str, step: int) -> Tensor | None:
    """Small integers: squared norms are exact in any order."""
    if name == "never":
        return None
    generator = torch.Generator().manual_seed(100 * step + list(SHAPES).index(name))
    grad = torch.randint(-4, 5, SHAPES[name], generator=generator).to(
        DTYPES.get(name, torch.float32)
    )
    if step == 2 and name in ("wide", "stack", "gain"):
        grad[5] = math.nan
    return grad


def take_step(params: dict, optimizer: MuonClip, step: int, lonely: int) -> None:
    """`lonely`: the first rows of that parameter, whose gradient other ranks lack."""
    for name, param in params.items():
        grad = gradient(name, step)
        if name == "lonely" and grad is not None:
            grad[lonely:] = 0
        param.grad = None
        if grad is not None and isinstance(param, DTensor):
            grad = spread(grad, param.device_mesh, param.placements)
            circle = circle_of(param)
            if name == "lonely" and circle is not None and dist.get_rank(circle) > 0:
                grad = None
        param.grad = grad
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()


def run(steps: range, params: dict, optimizer: MuonClip, lonely: int) -> list[list[str]]:
    told = []
    for step in steps:
        take_step(params, optimizer, step, lonely)
        told.append(optimizer.nonfinite_parameters())
    return told


def same_params(params: dict, single: dict, where: object) -> None:
    for name, param in params.items():
        full = param.full_tensor() if isinstance(param, DTensor) else param
        assert torch.equal(full, single[name]), (where, name, dist.get_rank())


def same_state(one: dict, other: dict) -> None:
    assert one["state"].keys() == other["state"].keys()
    for number, state in one["state"].items():
        assert state.keys() == other["state"][number].keys()
        for key, value in state.items():
            twin = other["state"][number][key]
            assert not isinstance(value, DTensor)
            assert value.dtype == twin.dtype and torch.equal(value, twin), (number, key)


def check_bits(mesh: DeviceMesh, placements: Placements) -> None:
    """All of a run on this mesh against one process."""
    params, optimizer = build(mesh, placements)
    circle = circle_of(params["lonely"])
    ranks = 1 if circle is None else dist.get_world_size(circle)
    lonely = edges_of(params["lonely"], ranks)[1]
    single, lone = build()
    told = run(range(STEPS), single, lone, lonely)
    assert told[2] == ["wide", "stack", "gain"]
    assert run(range(STEPS), params, optimizer, lonely) == told
    same_params(params, single, mesh)
    moments = [v for s in optimizer.state.values() for k, v in s.items() if k != "step"]
    assert all(isinstance(v, DTensor) and v.placements == placements for v in moments)
    assert optimizer.state[params["kv"]]["momentum_buffer"].dtype == torch.bfloat16

    full = optimizer.gather_state_dict()
    assert (full is None) == (dist.get_rank() != 0)
    if full is not None:
        same_state(full, lone.state_dict())
    # the state of one process, and a rank's own, go on with the same bits
    whole = copy.deepcopy(lone.state_dict())
    take_step(single, lone, STEPS, lonely)
    for state in (whole, optimizer.state_dict()):
        again, fresh = build(mesh, placements)
        fresh.load_state_dict(copy.deepcopy(state))
        for name in again:
            again[name].data.copy_(params[name].data)
        take_step(again, fresh, STEPS, lonely)
        same_params(again, single, mesh)
    if ranks > 1:  # owners, by cost
        owners = [route.owner for route in optimizer._shards.routes.values()]
        assert set(owners) == set(range(ranks))
        assert params["stack"] not in optimizer._shards.routes


def start(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=PROCESSES)


def bits_worker(rank: int, folder: str) -> None:
    start(rank, folder)
    for world in (1, 2, 4):
        mesh = DeviceMesh("cpu", torch.arange(world))
        if rank < world:
            check_bits(mesh, (Shard(0),))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    check_bits(grid, (Replicate(), Shard(0)))
    muon_routes._BUCKET = 1  # a turn of matrices in each bucket
    check_bits(grid["shard"], (Shard(0),))
    check_bits(grid["shard"], (Replicate(),))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_every_mesh_gives_the_bits_of_one_process(tmp_path: Path):
    mp.spawn(bits_worker, (str(tmp_path),), nprocs=PROCESSES)
