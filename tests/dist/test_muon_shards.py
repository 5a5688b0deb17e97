# SPDX-License-Identifier: MIT
"""MuonClip over a process group: 1, 2 and 4 ranks give the bits of one process, and a rank keeps
only what it owns. Four processes with gloo over loopback; the smaller groups are part of them."""

import math
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from kimi_ops import MuonClip, QKClip
from kimi_ops.optim.muon_blocks import cost
from kimi_ops.optim.muon_routes import Owners
from kimi_ops.optim.muon_shards import Shards
from tests.dist.world import launch

PROCESSES = 4
STEPS = 4
SHAPES = {
    "wide": (24, 40),
    "tall": (40, 24),
    "square": (16, 16),
    "fused": (6, 8, 10),
    "stack": (10, 4, 6),
    "low": (16, 8),
    "never": (8, 8),
    "lonely": (8, 12),
    "q": (12, 5),
    "kv": (14, 5),
    "embedding": (50, 8),
    "gain": (7,),
    "scalar": (),
}


class Attention(nn.Module):
    """The part of an MLA layer that QK-Clip sees."""

    def __init__(self, q: nn.Parameter, kv: nn.Parameter) -> None:
        super().__init__()
        self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim = 4, 2, 3
        self.q_b_proj, self.kv_b_proj = nn.Linear(5, 12, bias=False), nn.Linear(5, 14, bias=False)
        self.q_b_proj.weight, self.kv_b_proj.weight = q, kv
        self.register_buffer("max_logits", torch.full((2,), -math.inf), persistent=False)


def build(
    group: dist.ProcessGroup | None, half: bool = False, **options
) -> tuple[dict, MuonClip, Attention]:
    generator = torch.Generator().manual_seed(0)
    params = {
        name: nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in SHAPES.items()
    }
    for name in params if half else ("low",):
        params[name].data = params[name].data.bfloat16()
    adamw = ("embedding", "gain", "scalar")
    named = list(params.items())
    special = ("fused", "q")
    groups = [
        {"params": [pair for pair in named if pair[0] not in (*adamw, *special)]},
        {"params": [("fused", params["fused"])], "split_sizes": (4, 4)},
        {"params": [("q", params["q"])], "num_heads": 2},
        {
            "params": [(name, params[name]) for name in adamw],
            "algorithm": "adamw",
            "max_grad_norm": 0.5,
        },
    ]
    layer = Attention(params["q"], params["kv"])
    clip = QKClip([layer], tau=10.0)
    optimizer = MuonClip(groups, lr=0.05, qk_clip=clip, process_group=group, **options)
    return params, optimizer, layer


def micro(name: str, step: int, part: int) -> torch.Tensor | None:
    """Gradient of one of four micro-batches: small integers, whose sums are exact in any order."""
    if name == "never" or (name == "lonely" and (part != 1 or step == 2)):
        return None
    seed = 1000 * step + 10 * list(SHAPES).index(name) + part
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randint(-4, 5, SHAPES[name], generator=generator).float()
    if step == 2 and part == 3 and name in ("stack", "gain"):
        grad[5] = math.nan
    return grad


def take_step(
    params: dict, optimizer: MuonClip, layer: Attention, step: int, rank: int, world: int
):
    """The step of a rank that has every world-th part of the batch."""
    share = PROCESSES // world
    mine = range(rank * share, (rank + 1) * share)
    for name, param in params.items():
        grads = [g for part in mine if (g := micro(name, step, part)) is not None]
        total = torch.stack(grads).sum(0) / share if grads else None
        param.grad = None if total is None else total.to(param.dtype)
    for part in mine:  # the attention of each micro-batch raises the maxima
        seen = torch.tensor([3.0 + part, 5.0 + 10 * ((part + step) % 4)])
        if step == 3 and part == 2:
            seen[0] = math.nan
        layer.max_logits.copy_(torch.maximum(layer.max_logits, seen))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()


def run(group: dist.ProcessGroup | None, rank: int, world: int, **options):
    params, optimizer, layer = build(group, **options)
    flags = []
    for step in range(STEPS):
        take_step(params, optimizer, layer, step, rank, world)
        clip = optimizer.qk_clip
        flags.append((optimizer.nonfinite_parameters(), clip.gamma.clone(), clip.nonfinite.clone()))
    return params, optimizer, flags


def same_state(one: dict, other: dict) -> None:
    assert one["state"].keys() == other["state"].keys()
    for number, state in one["state"].items():
        assert state.keys() == other["state"][number].keys()
        for key, value in state.items():
            twin = other["state"][number][key]
            assert value.dtype == twin.dtype and torch.equal(value, twin), (number, key)


def worker(rank: int, folder: str) -> None:
    single, lone, told = run(None, 0, 1)
    assert told[2][0] == ["stack", "gain"]
    assert told[3][2].tolist() == [[True, False]] and told[3][1][0, 0] == 1
    assert (told[0][1] < 1).any()
    low, mastered, _ = run(None, 0, 1, half=True, master_weights=True)
    whole = sum(v.numel() for s in lone.state.values() for k, v in s.items() if k != "step")
    for world in (1, 2, 4):
        group = dist.new_group(list(range(world)))
        if rank >= world:
            continue
        params, optimizer, flags = run(group, rank, world)
        for name, param in params.items():
            assert torch.equal(param, single[name]), (world, rank, name)
        for ours, theirs in zip(flags, told, strict=True):
            assert ours[0] == theirs[0]
            assert torch.equal(ours[1], theirs[1]) and torch.equal(ours[2], theirs[2])
        kept = sum(v.numel() for s in optimizer.state.values() for k, v in s.items() if k != "step")
        counts = torch.tensor([kept])
        dist.all_reduce(counts, group=group)
        assert int(counts) == whole and (world == 1 or kept < 0.75 * whole)

        full = optimizer.gather_state_dict()
        assert (full is None) == (rank != 0)
        if rank == 0:
            same_state(full, lone.state_dict())
            torch.save(full, f"{folder}/state.pt")
        dist.barrier(group)
        # a state of one process or of another number of ranks goes on with the same bits
        again, fresh, layer = build(group)
        fresh.load_state_dict(torch.load(f"{folder}/state.pt"))
        alone, continued, other = build(None)
        continued.load_state_dict(torch.load(f"{folder}/state.pt"))
        for name in again:
            again[name].data.copy_(params[name].data)
            alone[name].data.copy_(params[name].data)
        take_step(again, fresh, layer, STEPS, rank, world)
        take_step(alone, continued, other, STEPS, 0, 1)
        for name, param in again.items():
            assert torch.equal(param, alone[name]), (world, rank, name)
        # its own part of the state, too
        mine, third, layer = build(group)
        third.load_state_dict(optimizer.state_dict())
        for name in mine:
            mine[name].data.copy_(params[name].data)
        take_step(mine, third, layer, STEPS, rank, world)
        assert all(torch.equal(mine[name], again[name]) for name in mine)
        # gradients that are equal already, as DDP leaves them
        params, optimizer, layer = build(group, reduce_gradients=False)
        for step in range(STEPS):
            take_step(params, optimizer, layer, step, 0, 1)
        assert all(torch.equal(params[name], single[name]) for name in params)
        with pytest.raises(TypeError, match="gather_state_dict"):
            optimizer.__getstate__()
        # masters are with their owners, QK-Clip scales them there
        params, optimizer, _ = run(group, rank, world, half=True, master_weights=True)
        assert all(torch.equal(params[name], twin) for name, twin in low.items())
        full = optimizer.gather_state_dict()
        if rank == 0:
            same_state(full, mastered.state_dict())
            assert sum("master" in state for state in full["state"].values()) == len(SHAPES) - 1
        # 16-bit gradients are added up in fp32: 4 + 6 / 128 has no place in bf16
        param = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
        param.grad = torch.full_like(param, 1 + rank / 128)
        optimizer = MuonClip([param], momentum=0.0, process_group=group)
        optimizer.step()
        for state in optimizer.state.values():
            average = sum(1 + r / 128 for r in range(world)) / world
            assert (state["momentum_buffer"] == average).all()
        dist.barrier(group)


@pytest.mark.slow
def test_any_number_of_ranks_gives_the_bits_of_one_process(tmp_path: Path):
    launch(worker, tmp_path, PROCESSES)


def test_work_is_shared_by_its_cost():
    params, optimizer, _ = build(None)
    shards = Shards(None, True)
    shards.update(optimizer.param_groups)
    costs = [
        cost(shards.pieces[i].shape, group)
        for group in optimizer.param_groups
        for param in group["params"]
        for i in shards.numbers[param]
    ]
    owners = Owners(4)
    given = owners.give(costs)
    loads = [sum(c for c, (o, _) in zip(costs, given, strict=True) if o == r) for r in range(4)]
    assert loads == owners.loads and sum(loads) == sum(costs)
    assert max(loads) - min(loads) <= max(costs)
    for rank in range(4):  # the most expensive in the first turn
        mine = sorted((turn, -c) for c, (o, turn) in zip(costs, given, strict=True) if o == rank)
        assert [turn for turn, _ in mine] == list(range(len(mine)))
        assert [c for _, c in mine] == sorted(c for _, c in mine)
    lightest = loads.index(min(loads))  # what comes later, too, goes on from there
    assert owners.give([1]) == [(lightest, [owner for owner, _ in given].count(lightest))]
    covered = {name: torch.zeros(param.shape) for name, param in params.items()}
    for piece in shards.pieces:
        name = next(n for n, p in params.items() if p is piece.param)
        piece.of(covered[name]).add_(1)
    assert all((count == 1).all() for count in covered.values())
    assert len(shards.numbers[params["stack"]]) == 8 and len(shards.numbers[params["wide"]]) == 1


def test_a_parameter_of_another_shape_is_refused():
    """Its pieces, owners and state are those of the old one."""
    params, optimizer, _ = build(None)
    for param in params.values():
        param.grad = torch.ones_like(param)
    optimizer.step()
    before = params["tall"].clone()
    params["wide"].grad = None
    params["wide"].data = torch.ones(3, 40)
    with pytest.raises(
        ValueError, match=r"shape \(24, 40\) .* got \(3, 40\); make a new optimizer"
    ):
        optimizer.step()
    assert torch.equal(params["tall"], before)


def test_only_what_is_not_finite_is_left_alone():
    """Whatever lies before it in the list: the numbers of pieces are its own."""
    for bad in (0, 1):
        params = [nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
        for i, param in enumerate(params):
            param.grad = torch.full_like(param, math.nan if i == bad else 1.0)
        with pytest.warns(UserWarning, match=f"not finite for #{bad}"):
            MuonClip(params).step()
        assert [bool((param == 1).all()) for param in params] == [bad == 0, bad == 1]
