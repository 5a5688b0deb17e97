# SPDX-License-Identifier: MIT
"""The `cuda` backend between processes, its kernels run on the host: a file of each rank that all
have mapped is in place of the memory of GPUs."""

import mmap
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from kimi_ops import LocalWorld, _native
from kimi_ops.parallel import peer_memory, peer_transport
from kimi_ops.parallel.local import LocalGroup, LocalTransport
from kimi_ops.parallel.peer_memory import PeerMemory
from kimi_ops.parallel.peers import Peers
from kimi_ops.parallel.wire import Form
from tests.conftest import SIMT
from tests.dist.all_to_all_cases import check, random_case, survive, triple
from tests.dist.test_peers import case_of, graded_case, run
from tests.dist.world import fork, join

pytestmark = pytest.mark.skipif(SIMT is None, reason="built without the kernels on the host")
WORLD = 3


def _over_files(folder: str, talk: Any, world: int, size: int, device: Any, members: Any) -> Any:
    """A file for each rank in place of what CUDA's handles open."""
    name, addresses, maps = f"{talk.world}-{size}", [0] * world, []
    own = Path(folder, f"{name}-{members[talk.rank]}")
    own.write_bytes(bytes(size))
    talk.gather(torch.zeros(1, dtype=torch.int64))
    for rank in members:
        with open(own.with_name(f"{name}-{rank}"), "r+b") as file:
            maps.append(torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8))
        addresses[rank] = maps[-1].data_ptr()
    return PeerMemory(members[talk.rank], torch.tensor(addresses), size, maps, members)


def _work(rank: int, folder: str) -> None:
    os.environ["KIMI_SIMT_PATIENCE"] = "200000"  # what a kernel waits for is in another process
    SIMT.serve_cpu_tensors_by_cuda(True)
    _native.engine, peer_transport.shared = SIMT, partial(_over_files, folder)
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(uuid="one GPU for all")
    join(rank, folder, WORLD)
    for seed in (2, 5):
        case = random_case(seed, WORLD)
        case.x = [x.float() for x in case.x]
        case.weights = case.weights and [w.float() for w in case.weights]
        check(case, dist.group.WORLD, rank, triple, "cuda")
    survive(rank, "cuda")


def test_processes_go_on_without_one_that_ended(tmp_path: Path) -> None:
    fork(_work, WORLD, str(tmp_path))


def _streams(rank: int) -> None:
    os.environ["KIMI_SIMT_PATIENCE"] = "200000"  # what a kernel waits for is in another thread
    SIMT.serve_cpu_tensors_by_cuda(True)
    _native.engine = SIMT
    for seed in (3, 6, 7):  # 4, 3 and 4 ranks
        case = case_of(seed)
        world = LocalWorld(case.world, streams=True)
        world.run(lambda group, case=case: check(case, group, group.rank, triple, "cuda"))
    for seed in (3, 10):
        case = graded_case(seed)
        found = run(case, "cuda", streams=True), run(case, "reference")
        for ours, theirs in zip(*found, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_ranks_of_a_world_with_launches_of_their_own() -> None:
    fork(_streams, 1)


def test_a_world_in_one_launch_on_a_gpu_has_no_gradients() -> None:
    """Autograd runs all ranks' backward in one thread, where none can wait for another."""
    talk = LocalTransport(LocalGroup(LocalWorld(2), 0), 1.0, torch.device("cpu"))
    gpu = torch.device("cuda")
    joint = peer_transport.Together(talk, gpu)
    x, form = torch.ones(1, 2, requires_grad=True), Form(2, torch.float32, torch.float32)
    route = SimpleNamespace(pairs=(1, 1))

    def away(launcher: Any, x: torch.Tensor) -> Any:
        members = range(2)
        link = peer_transport.PeerTransport(talk, gpu, 1.0, 2, members, None, launcher)
        peers = Peers(link, lambda begin: lambda: None, 1)
        return peers.away("dispatch", route, form, form, [x], None, None)

    with pytest.raises(ValueError, match=r"dispatch: .* pass LocalWorld\(size, streams=True\)"):
        away(joint, x)
    assert away(joint, x.detach()) and away(peer_transport.alone, x)
    with torch.no_grad():
        assert away(joint, x)


def test_streams_of_a_world_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    world, gpu, made = LocalWorld(2, streams=True), torch.device("cuda"), []
    monkeypatch.setattr(torch.cuda, "Stream", made.append)
    for crowded, count in ((True, 0), (False, 1)):  # a second one for each rank, or none
        talk = LocalTransport(LocalGroup(world, 0), 1.0, torch.device("cpu"))
        link = peer_transport.PeerTransport(
            talk, gpu, 1.0, 2, range(2), None, peer_transport.alone, crowded
        )
        Peers(link, None, 2)
        assert len(made) == count
    with pytest.raises(ValueError, match="LocalWorld: streams: expected at most 8 ranks, got 9"):
        LocalWorld(9, streams=True)
    assert LocalWorld(9).size == 9


def test_handles_of_the_members_make_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's handles go as text, and are opened on this rank's device; masked ranks have none."""
    opened = []

    class Storage:
        def _share_cuda_(self) -> tuple[Any, ...]:
            return (0, b"\x01\xff", 256, 0, b"counter", 0, b"", False)

        def data_ptr(self) -> int:
            return 11

    def opens(*parts: Any) -> Any:
        opened.append(parts)
        return SimpleNamespace(data_ptr=lambda: 33)

    buffer = SimpleNamespace(untyped_storage=Storage)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: buffer)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared_cuda", opens, raising=False)
    made = []
    monkeypatch.setattr(peer_memory, "PeerMemory", lambda *parts: made.append(parts))
    monkeypatch.setattr(peer_memory, "_table", lambda addresses, _: addresses)
    talk = SimpleNamespace(rank=1, gather=lambda words: torch.stack([words, words]))
    peer_memory.shared(talk, 4, 256, torch.device("cuda", 5), [0, 3])
    assert opened == [(5, b"\x01\xff", 256, 0, b"counter", 0, b"", False)]
    ((rank, table, size, _, members),) = made
    assert (rank, table, size, members) == (3, [33, 0, 0, 11], 256, [0, 3])
