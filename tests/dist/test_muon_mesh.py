# SPDX-License-Identifier: MIT
"""MuonClip on DTensor parameters: on meshes of 1, 2, 4 and 2 x 2 ranks the bits of one process with
the averaged gradients. Four processes with gloo over loopback; smaller meshes are part of them."""

import copy
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)

from kimi_ops import MuonClip, QKClip, muon_param_groups
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config
from kimi_ops.optim import muon_exchange, muon_routes
from kimi_ops.optim.muon_mesh import circle_of, edges_of
from tests.dist.world import launch

PROCESSES = 4
STEPS = 3
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
    "heads": (6, 3),  # three, of four ranks one each and none
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
    ({"num_heads": 3}, ("heads",)),
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


def travelled(
    params: dict, optimizer: MuonClip, lonely: int, circle: dist.ProcessGroup | None
) -> int:
    """Elements that a step's all-to-alls carry between the ranks of a circle, their own too."""
    sent = torch.zeros((), dtype=torch.int64)
    send = dist.all_to_all_single

    def count(received: Tensor, outgoing: Tensor, *arguments, **options) -> dist.Work:
        sent.add_(outgoing.numel())
        return send(received, outgoing, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", count)
        take_step(params, optimizer, STEPS, lonely)
    if circle is not None:
        dist.all_reduce(sent, group=circle)
    return int(sent)


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
    for name in ("bias", "gain"):  # ranks without rows count steps, too
        assert optimizer.state[params[name]]["step"] == lone.state[single[name]]["step"]

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
    if circle is not None:
        owners = [route.owner for route in optimizer._shards.routes.values()]
        assert set(owners) == set(range(ranks))
    # nothing travels but matrices in shards, there and back
    local = {"never", "stack", "deep", "fused", "embedding", "bias", "gain"}
    local |= {"q", "kv"} if ranks == 2 else {"heads"}  # whole ones on each rank
    there = sum(math.prod(s) for n, s in SHAPES.items() if n not in local) if ranks > 1 else 0
    assert travelled(params, optimizer, lonely, circle) == 2 * there


def bits_worker(rank: int, folder: str) -> None:
    for world in (1, 2, 4):
        mesh = DeviceMesh("cpu", torch.arange(world))
        if rank < world:
            check_bits(mesh, (Shard(0),))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    check_bits(grid, (Replicate(), Shard(0)))
    muon_routes._BUCKET = 1  # a turn of matrices in each bucket
    check_bits(grid["shard"], (Shard(0),))
    check_bits(grid["shard"], (Replicate(),))


def test_a_bucket_is_under_way_while_the_one_before_is_worked():
    done: list[str] = []

    def trip(number: int) -> Iterator[None]:
        for stage in ("there", "back"):
            done.append(f"{stage} {number}")
            yield
        done.append(f"apply {number}")

    muon_exchange.overlapped(trip(number) for number in range(3))
    assert done == [
        *("there 0", "there 1", "back 0", "there 2", "back 1"),
        *("apply 0", "back 2", "apply 1", "apply 2"),
    ]


class Ring:
    """A circle of two ranks that never meet."""

    world, rank = 2, 0


@pytest.mark.parametrize("kind", ["rows", "copies"])
def test_a_bucket_is_whole_turns_up_to_what_a_rank_sends_at_once(monkeypatch, kind: str):
    """12 elements: of rows each rank sends its half, of copies all."""
    monkeypatch.setattr(muon_routes, "_BUCKET", 6 if kind == "rows" else 12)
    turns = [(5, 5), (2,), (1, 9), (1, 1), (13,), (2, 2)]  # elements of owners 0 and 1
    edges = (0, 1, 2) if kind == "rows" else None
    routes = [
        muon_routes.Route(Ring, owner, turn, torch.Size((size,)), edges)
        for turn, sizes in reversed(list(enumerate(turns)))  # not in the order of turns
        for owner, size in enumerate(sizes)
    ]
    found = [[(routes[i].turn, routes[i].owner) for i in b] for b in
             muon_routes.buckets(routes, ["alike"] * len(routes))]  # fmt: skip
    assert found == [
        [(0, 0), (1, 0), (0, 1)],
        [(2, 0), (3, 0), (2, 1), (3, 1)],
        [(4, 0)],
        [(5, 0), (5, 1)],
    ]


@pytest.mark.slow
def test_every_mesh_gives_the_bits_of_one_process(tmp_path: Path):
    launch(bits_worker, tmp_path, PROCESSES)


class Net(nn.Module):
    """Odd sizes: shards of FSDP2 are uneven, and some are empty."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed_tokens, self.up = nn.Embedding(11, 6), nn.Linear(6, 9)
        self.down = nn.Linear(9, 5, bias=False)
        self.gate_up_proj = nn.Parameter(torch.empty(6, 4, 5))
        for param in self.parameters():
            param.data.copy_(torch.randint(-8, 9, param.shape, generator=generator) / 8)

    def forward(self, weights: list[Tensor]) -> Tensor:
        """Its gradients are the weights."""
        return sum((p * w).sum() for p, w in zip(self.parameters(), weights, strict=True))


def net(mesh: DeviceMesh | None = None) -> tuple[Net, MuonClip]:
    model = Net()
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    groups = muon_param_groups(model, adamw={"max_grad_norm": 1.0})
    return model, MuonClip(groups, lr=0.05)


def train(model: Net, optimizer: MuonClip, step: int, rank: int, world: int) -> None:
    """A step on every world-th part of a batch of four, whose gradients are small integers."""
    share = PROCESSES // world
    generator = torch.Generator().manual_seed(step)
    parts = []
    for _ in range(PROCESSES):
        shapes = [p.shape for p in Net().parameters()]
        parts.append([torch.randint(-4, 5, s, generator=generator) / share for s in shapes])
    for weights in parts[rank * share : (rank + 1) * share]:
        model(weights).backward()
    optimizer.step()
    optimizer.zero_grad()


def same_net(model: Net, single: Net) -> None:
    for (name, param), twin in zip(model.named_parameters(), single.parameters(), strict=True):
        full = param.full_tensor() if isinstance(param, DTensor) else param
        assert torch.equal(full, twin), name


def checkpoint_worker(rank: int, folder: str) -> None:
    """2 ranks, then 4, then 1: each goes on from the checkpoint of the one before."""
    single, lone = net()
    saved = None
    for step, world in enumerate((2, 4, 1)):
        train(single, lone, step, 0, 1)
        mesh = DeviceMesh("cpu", torch.arange(world))
        if rank < world:
            circle = mesh.get_group(0)
            model, optimizer = net(mesh)
            if saved is not None:
                state = dict(
                    zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)
                )
                dcp.load(state, checkpoint_id=saved, process_group=circle)
                set_state_dict(
                    model,
                    optimizer,
                    model_state_dict=state["model"],
                    optim_state_dict=state["optimizer"],
                )
            train(model, optimizer, step, rank, world)
            same_net(model, single)
            state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            dcp.save(state, checkpoint_id=f"{folder}/{world}", process_group=circle)
        saved = f"{folder}/{world}"
        dist.barrier()
    # one rank's whole state, as a plain checkpoint holds it
    model, optimizer = net(DeviceMesh("cpu", torch.arange(PROCESSES)))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    parts = copy.deepcopy(get_state_dict(single, lone)) if rank == 0 else ({}, {})
    set_model_state_dict(model, parts[0], options=options)
    set_optimizer_state_dict(model, optimizer, parts[1], options=options)
    train(model, optimizer, 3, rank, PROCESSES)
    train(single, lone, 3, 0, 1)
    same_net(model, single)


@pytest.mark.slow
def test_checkpoints_of_fsdp2_go_on_at_another_number_of_ranks(tmp_path: Path):
    launch(checkpoint_worker, tmp_path, PROCESSES)


def refused(expected: str, *params: Tensor, kind: type = ValueError, **options) -> None:
    with pytest.raises(kind, match=expected):
        MuonClip([{"params": [(f"w{i}", p) for i, p in enumerate(params)]}], **options)


def error_worker(rank: int, folder: str) -> None:
    mesh = DeviceMesh("cpu", torch.arange(PROCESSES))
    full = torch.ones(8, 8)
    row = nn.Parameter(spread(full, mesh, (Shard(0),)))
    refused(r"parameter w1: expected placements .* got .*Shard\(dim=1\)", row,
            nn.Parameter(spread(full, mesh, (Shard(1),))))  # fmt: skip
    refused("Partial", nn.Parameter(DTensor.from_local(full, mesh, (Partial(),))))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    twice = nn.Parameter(spread(full, grid, (Shard(0), Shard(0))))
    refused(r"on the mesh {'data': 2, 'tensor': 2}; shard rows with fully_shard", twice)
    strided = nn.Linear(8, 8)
    distribute_module(strided, grid["tensor"], lambda _, m, mesh: m.register_parameter(
        "weight", nn.Parameter(spread(m.weight.data, mesh, (Shard(0),)))))  # fmt: skip
    fully_shard(strided, mesh=grid["data"])
    refused("_StridedShard", strided.weight)
    elsewhere = DTensor.from_local(full.to("meta"), mesh, (Shard(0),), run_check=False)
    refused("on the mesh's device 'cpu', got meta", nn.Parameter(elsewhere))
    turned = DTensor.from_local(torch.ones(8, 2).mT, mesh, (Shard(0),))
    refused("contiguous shard, got strides", nn.Parameter(turned))
    ragged = DTensor.from_local(
        torch.ones((5, 3, 0, 0)[rank], 8), mesh, (Shard(0),), shape=(8, 8), stride=(8, 1)
    )
    refused("as torch.chunk cuts", nn.Parameter(ragged))
    refused("leave process_group out", row, kind=TypeError, process_group=dist.group.WORLD)
    optimizer = MuonClip([row])
    for grad in (full, DTensor.from_local(full, mesh, (Partial(),))):
        row.grad = grad
        with pytest.raises(TypeError, match="gradient: expected the placements of its parameter"):
            optimizer.step()


@pytest.mark.slow
def test_what_is_not_served_is_refused(tmp_path: Path):
    launch(error_worker, tmp_path, PROCESSES)


def mastered(rank: int, folder: str) -> None:
    """A model in bf16 with masters, plain and sharded, with QK-Clip that acts."""
    mesh, found = init_device_mesh("cpu", (2,)), []
    for sharded in (False, True):
        model = KimiK2(KimiK2Config.tiny()).bfloat16()
        for layer in model.model.layers if sharded else ():
            fully_shard(layer, mesh=mesh)
        if sharded:
            fully_shard(model, mesh=mesh)
        clip = QKClip(model.attention_layers(), tau=1.0)
        groups = muon_param_groups(model)
        optimizer = MuonClip(groups, lr=0.02, qk_clip=clip, master_weights=True)
        for step in range(3):
            for number, param in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(100 * step + number)
                grad = torch.randn(param.shape, generator=generator).bfloat16()
                param.grad = distribute_tensor(grad, mesh, param.placements) if sharded else grad
            for attention in model.attention_layers():
                attention.max_logits.copy_(torch.tensor([0.5, 3.0]))
            optimizer.step()
        states = [optimizer.state[param]["master"] for param in model.parameters()]
        whole = [*(p.detach() for p in model.parameters()), *states]
        found.append([x.full_tensor() if sharded else x for x in whole])
        assert all(state.dtype == torch.float32 for state in states)
        assert all(isinstance(state, DTensor) == sharded for state in states)
    assert all(map(torch.equal, *found))


@pytest.mark.slow
def test_masters_of_shards_are_shards_of_masters(tmp_path: Path):
    launch(mastered, tmp_path, 2)
