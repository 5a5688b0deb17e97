# SPDX-License-Identifier: MIT
"""What a sharded step of MuonClip reads on the host, which is nothing that a device holds, and what
it sends. Two processes with gloo over loopback."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kimi_ops import MuonClip
from kimi_ops.optim import engine, muon_routes
from kimi_ops.optim.muon_circle import Circle
from tests.dist.world import launch

PROCESSES = 2
MUON = {"a": (8, 6), "b": (6, 8), "stack": (5, 4, 6), "half": (4, 4), "never": (4, 6)}
ADAMW = {"gain": (7,), "scalar": ()}
PRESENT = [name for name in (*MUON, *ADAMW) if name != "never"]


class Watch(TorchDispatchMode):
    """Refuses what makes a number of a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        assert "_local_scalar_dense" not in name and "is_nonzero" not in name, "a read of the host"
        kwargs = kwargs or {}
        assert "_to_copy" not in name or kwargs.get("device") is None, "a copy to another place"
        return func(*args, **kwargs)


def build(way: str) -> tuple[dict[str, nn.Parameter], MuonClip]:
    params = {}
    for name, shape in (MUON | ADAMW).items():
        tensor = torch.ones(shape, dtype=torch.bfloat16 if name == "half" else torch.float32)
        if way == "mesh":
            mesh = DeviceMesh("cpu", torch.arange(PROCESSES))
            place = Shard(0) if shape else Replicate()
            tensor = distribute_tensor(tensor, mesh, [place], src_data_rank=None)
        params[name] = nn.Parameter(tensor)
        if name in PRESENT:
            params[name].grad = torch.ones_like(tensor)
    groups = [
        {"params": [params[n] for n in MUON]},
        {"params": [params[n] for n in ADAMW], "algorithm": "adamw", "max_grad_norm": 1.0},
    ]
    keys: dict[str, Any] = {} if way == "mesh" else {"process_group": dist.group.WORLD}
    if way == "equal":
        keys["reduce_gradients"] = False
    return params, MuonClip(groups, **keys)


def elements(*names: str) -> int:
    return sum(torch.Size((MUON | ADAMW)[name]).numel() for name in names)


def worker(rank: int, folder: str) -> None:
    patch = pytest.MonkeyPatch()
    sent: Counter[str] = Counter()

    def count(name: str, of: Callable[..., Tensor]) -> None:
        send = getattr(dist, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            sent[name] += of(*arguments).numel() * of(*arguments).element_size()
            return send(*arguments, **options)

        patch.setattr(dist, name, counted)

    count("reduce", lambda x: x)
    count("broadcast", lambda x: x)
    count("all_to_all_single", lambda _, x, *__: x)
    patch.setattr(engine, "on_host", lambda _: False)  # as of a device: no warning reads it
    read: list[torch.dtype] = []
    tolist = Tensor.tolist
    patch.setattr(Tensor, "tolist", lambda x: read.append(x.dtype) or tolist(x))
    for way in ("sum", "equal", "mesh"):
        _, optimizer = build(way)
        optimizer.step()
        sent.clear()
        read.clear()
        with Watch():
            optimizer.step()
        assert read == [torch.uint8], way  # which gradients are there, by the host's connection
        if way == "mesh":
            both = torch.tensor([sent["all_to_all_single"]])
            dist.all_reduce(both)
            assert int(both) == 4 * 2 * elements("a", "b", "half")  # there and back
            assert not sent["reduce"] and not sent["broadcast"]
        else:
            assert sent["broadcast"] == 4 * elements(*PRESENT) - 2 * elements("half")
            assert sent["reduce"] == (4 * elements(*PRESENT) if way == "sum" else 0)
            assert not sent["all_to_all_single"]
    patch.undo()

    # the host's numbers have a way beside a backend of devices alone
    group = dist.new_group(backend="cuda:gloo")
    assert group._device_types == [torch.device("cuda")]
    found = Circle(group).each(torch.tensor([rank, 7]), "numbers")
    assert found.tolist() == [[r, 7] for r in range(PROCESSES)]

    # a bucket for each turn: the same bits
    whole, optimizer = build("sum")
    optimizer.step()
    patch.setattr(muon_routes, "_BUCKET", 1)
    params, optimizer = build("sum")
    optimizer.step()
    patch.undo()
    assert all(torch.equal(params[name], whole[name]) for name in params)


@pytest.mark.slow
def test_a_sharded_step_reads_nothing_of_a_device_and_sends_each_element_once(tmp_path: Path):
    launch(worker, tmp_path, PROCESSES)
