# SPDX-License-Identifier: MIT
"""DTensor parameters, as FSDP2 makes them: what is served, a rank's rows, and the state of them.

Served are placements ``Replicate()`` and at most one ``Shard(0)``: ranks hold runs of rows, equal
along every other dimension of the mesh. State is placed as the parameter is.
"""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed as dist
from torch import Tensor

from kimi_ops.optim.muon_blocks import names

_HOW = "shard rows with fully_shard(model, mesh=...)"


def sharded(tensor: Any) -> bool:
    """Whether it is a DTensor; torch.distributed.tensor is not imported for the question."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's rows, as a view."""
    return tensor.to_local() if sharded(tensor) else tensor  # type: ignore[attr-defined]


def circle_of(param: Tensor) -> dist.ProcessGroup | None:
    """The ranks that hold the rows of one copy of `param`; None where each holds all of them."""
    if sharded(param):
        mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
        for dim, placement in enumerate(placements):
            if placement.is_shard() and mesh.size(dim) > 1:
                return mesh.get_group(dim)
    return None


def edges_of(param: Tensor, ranks: int) -> tuple[int, ...]:
    """Rank r of a circle holds the rows edges[r] .. edges[r + 1], as torch.chunk cuts them."""
    rows = param.shape[0]
    chunk = -(-rows // ranks)
    return tuple(min(rank * chunk, rows) for rank in range(ranks + 1))


def check_sharded(group: dict[str, Any], process_group: dist.ProcessGroup | None) -> None:
    """Raise for DTensor parameters of a group that are placed as none are served."""
    for name, param in names(group):
        if sharded(param):
            where = f"MuonClip: parameter {name}"
            if process_group is not None:
                raise TypeError(
                    f"{where}: expected a plain tensor beside process_group, got a DTensor, whose "
                    "mesh says which ranks share it; leave process_group out"
                )
            _check_placements(where, param)


def _check_placements(where: str, param: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard

    mesh, placements = param.device_mesh, tuple(param.placements)
    # a _StridedShard is a Shard for is_shard(), but its rows lie apart
    cuts = [p for p in placements if type(p) is not Replicate]
    if len(cuts) > 1 or any(type(p) is not Shard or p.dim != 0 for p in cuts):
        raise ValueError(
            f"{where}: expected placements Replicate() and at most one Shard(0), got {placements} "
            f"on the mesh {_shape(mesh)}; {_HOW}"
        )
    if mesh.get_coordinate() is None:
        raise ValueError(f"{where}: expected a mesh with this rank, got {mesh}; leave it out here")
    rows = param.to_local()
    if rows.device.type != mesh.device_type:
        raise ValueError(
            f"{where}: expected its shard on the mesh's device {mesh.device_type!r}, got "
            f"{rows.device}; CPU offload is not served, leave offload_policy out"
        )
    if not rows.is_contiguous():
        raise ValueError(
            f"{where}: expected a contiguous shard, got strides {rows.stride()}; make the "
            "parameter contiguous before it is sharded"
        )
    circle = circle_of(param)
    if circle is not None:
        rank = mesh.get_coordinate()[placements.index(Shard(0))]
        edges = edges_of(param, dist.get_world_size(circle))
        wanted = (edges[rank + 1] - edges[rank], *param.shape[1:])
        if rank != dist.get_rank(circle) or tuple(rows.shape) != wanted:
            raise ValueError(
                f"{where}: expected {wanted} as rank {rank} of its shards, as torch.chunk cuts "
                f"{tuple(param.shape)}, got {tuple(rows.shape)} as rank {dist.get_rank(circle)}; "
                f"{_HOW}, ranks ascending in the mesh"
            )


def check_gradient(param: Tensor) -> None:
    """Raise for a gradient that is not placed as its parameter."""
    grad: Any = param.grad
    if grad is None or sharded(grad) != sharded(param):
        mine = sharded(param) and grad is not None
    else:
        mine = sharded(param) and not _alike(grad, param)
    if mine:
        raise TypeError(
            "MuonClip: gradient: expected the placements of its parameter "
            f"{tuple(param.placements)}, got "  # type: ignore[attr-defined]
            f"{tuple(grad.placements) if sharded(grad) else 'a plain tensor'}; redistribute it"
        )


def placed(param: Tensor, value: Tensor) -> Tensor:
    """`value`, a state of the whole parameter or one placed as it is, as a state of `param`."""
    if sharded(value):
        if sharded(param) and _alike(value, param):
            return value
        here = tuple(param.placements) if sharded(param) else "none"  # type: ignore[attr-defined]
        raise ValueError(
            "MuonClip: state: expected the placements of the parameter "
            f"({here}), got {tuple(value.placements)}; "  # type: ignore[attr-defined]
            "load gather_state_dict(), or reshard by torch.distributed.checkpoint"
        )
    if not sharded(param):
        return value
    from torch.distributed.tensor import DTensor

    circle = circle_of(param)
    if circle is not None:
        edges, rank = edges_of(param, dist.get_world_size(circle)), dist.get_rank(circle)
        value = value[edges[rank] : edges[rank + 1]].clone()  # the rest is free to go
    return DTensor.from_local(
        value,
        param.device_mesh,  # type: ignore[attr-defined]
        param.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )


def whole_state(state_dict: dict[str, Any], dst: int) -> dict[str, Any] | None:
    """`state_dict` with whole tensors for DTensors, on the host of rank `dst`; None on the others.

    Collective where there are DTensors; the same dict where there are none.
    """
    values = [v for state in state_dict["state"].values() for v in state.values()]
    if not any(map(sharded, values)):
        return state_dict
    here = dist.get_rank() == dst
    whole: dict[Any, dict[str, Any]] = {}
    for number, state in state_dict["state"].items():
        whole[number] = {}
        for key, value in state.items():
            full = value.full_tensor() if sharded(value) else value
            if here:
                whole[number][key] = full.cpu() if sharded(value) else full
    return {**state_dict, "state": whole} if here else None


def meshes_of(param_groups: list[dict[str, Any]]) -> list[list[dist.ProcessGroup]]:
    """For each mesh of the parameters, the groups of its dimensions."""
    meshes: dict[Any, None] = {}
    for group in param_groups:
        for param in group["params"]:
            if sharded(param):
                meshes[param.device_mesh] = None
    return [[mesh.get_group(d) for d in range(mesh.ndim) if mesh.size(d) > 1] for mesh in meshes]


def _alike(one: Any, other: Any) -> bool:
    return bool(one.device_mesh == other.device_mesh and one.placements == other.placements)


def _shape(mesh: Any) -> dict[str, int] | tuple[int, ...]:
    shape = tuple(mesh.shape)
    dims = mesh.mesh_dim_names
    return dict(zip(dims, shape, strict=True)) if dims else shape
