# SPDX-License-Identifier: MIT
"""Training over ranks: any layout gives the losses of one process, and goes on from the checkpoint
of another; what is wrong is said on every rank, and a lost rank ends a run. gloo over loopback."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from kimi_ops import Int4GroupWeight
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config
from kimi_ops.train import PeerError, RankError, Ranks, TrainResult, checkpoint, loop, train
from kimi_ops.train.metrics import MetricsError, MetricsWriter, read_metrics
from kimi_ops.train.sample import load_model, sample_text
from kimi_ops.train.trainer import Trainer
from tests.dist.world import launch, started

STEPS, HALF = 20, 10
TINY = {
    "preset": "tiny",
    "window": 32,
    "sequences": 4,
    "steps": STEPS,
    "validate_every": HALF,
    "validation_sequences": 7,  # no multiple of any number of ranks
    "checkpoint_every": HALF,
    "threads": 1,
    "tau": 0.05,  # QK-Clip acts
}
# Sums over ranks round in another order than those of one process: 1e-7 of a gradient, which the
# quotients of AdamW and the iteration of Newton-Schulz pass on. While no token changes its experts
# losses of 5 to 2 stay within LOSS, and a step is 0.1; later a score that was as good as another's
# may tip the other way, which is a jump: LATER.
LOSS, WEIGHT, MOMENT, LATER = 2e-6, 3e-5, 2e-4, 3e-3


def text(folder: str | Path) -> Path:
    path = Path(folder) / "text.txt"
    if not path.exists():
        path.write_text("".join(f"value {i} is {i * i}\n" for i in range(2000)))
    return path


def run(out: Path, ranks: Ranks | None, **options) -> TrainResult:
    resume = options.pop("resume", False)
    overrides = options if resume else {**TINY, **options}
    return train(
        out, data=text(out.parent), resume=resume, overrides=overrides, ranks=ranks,
        say=lambda line: None, progress=False,
    )  # fmt: skip


def half_of(source: Path, target: Path) -> Path:
    """A run as it was after the first checkpoint of another."""
    shutil.copytree(source, target)
    shutil.rmtree(target / f"step_{STEPS:06d}")
    (target / "latest.json").write_text(json.dumps({"checkpoint": f"step_{HALF:06d}"}))
    return target


def same(one: Path, other: Path, *, exactly: bool = False) -> None:
    """Two whole runs: losses and loads of all steps, validation, and both checkpoints."""
    a, b = (read_metrics(run / "metrics.jsonl") for run in (one, other))
    assert [row["step"] for row in a] == [row["step"] for row in b] == list(range(1, STEPS + 1))
    assert [r["load_layers"] for r in a[:HALF]] == [r["load_layers"] for r in b[:HALF]]
    for name in ("loss", "auxiliary", "lr", "max_logit", "validation_loss"):
        came, wanted = ([row.get(name, 0) for row in rows] for rows in (a, b))
        assert came[:HALF] == pytest.approx(wanted[:HALF], abs=LOSS * (not exactly)), name
        assert came == pytest.approx(wanted, abs=LATER * (not exactly)), name
    for step in (HALF, STEPS):
        folders = [run / f"step_{step:06d}" for run in (one, other)]
        states = [json.loads((folder / "training.json").read_text()) for folder in folders]
        assert states[0]["optimizer_groups"] == states[1]["optimizer_groups"]
        if exactly:
            assert states[0]["files"] == states[1]["files"]
        for file in ("model.safetensors", "optimizer.safetensors"):
            values, twins = (load_file(folder / file) for folder in folders)
            assert sorted(values) == sorted(twins)
            for name, value in values.items():
                assert value.shape == twins[name].shape and value.dtype == twins[name].dtype
                if step == HALF and file == "model.safetensors":
                    torch.testing.assert_close(value, twins[name], rtol=0, atol=WEIGHT, msg=name)
                elif step == HALF:
                    apart = float((value - twins[name]).norm() / value.norm())
                    assert apart <= MOMENT, (name, apart)


def layouts(rank: int, folder: str) -> None:
    """Two pairs of ranks at once, then all four; checkpoints from one layout to another."""
    root = Path(folder)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    two = Ranks(pairs[0], 1) if rank < 2 else Ranks(pairs[1], 2)
    run(root / ("1x2" if rank < 2 else "2x1"), two)
    two.close()
    if rank == 0:
        assert run(root / "one", None).finished
        half_of(root / "one", root / "from one")
    both, experts = Ranks(dist.group.WORLD, 2), Ranks(dist.group.WORLD, 4)
    assert run(root / "2x2", both).finished and run(root / "4x1", experts).finished
    dist.barrier()
    if rank == 0:
        half_of(root / "2x2", root / "to one")
        half_of(root / "2x2", root / "again")
    dist.barrier()
    # dispatch and combine are a part of what is computed again, and of its order
    assert run(root / "again", both, resume=True, recompute="full").finished
    assert run(root / "from one", experts, resume=True, recompute="selective").finished
    if rank == 0:
        assert run(root / "to one", None, resume=True).finished
    how = {"max_tokens": 12, "temperature": 0.8, "top_p": 0.9, "seed": 3}
    told = sample_text(load_model(root / "again", ranks=experts), "value 3", **how)
    assert told == sample_text(load_model(root / "again"), "value 3", **how)
    for ranks in (both, experts):
        ranks.close()


@pytest.mark.slow
def test_any_layout_learns_as_one_process_does(tmp_path: Path):
    text(tmp_path)
    launch(layouts, tmp_path, 4)
    clipped = [row["clipped_heads"] for row in read_metrics(tmp_path / "one/metrics.jsonl")]
    assert sum(clipped[:HALF]) > 5
    for name in ("1x2", "2x1", "2x2", "4x1", "from one", "to one"):
        same(tmp_path / "one", tmp_path / name)
    same(tmp_path / "2x2", tmp_path / "again", exactly=True)
    for name, source in (("from one", "one"), ("to one", "2x2")):  # the steps after the change
        after, before = (
            [row["loss"] for row in read_metrics(tmp_path / run / "metrics.jsonl")]
            for run in (name, source)
        )
        assert after[HALF : HALF + 4] == pytest.approx(before[HALF : HALF + 4], abs=10 * LOSS)
    facts = json.loads((tmp_path / "from one/step_000020/training.json").read_text())
    assert facts["processes"] == 4


def pack(source: Path, folder: Path) -> None:
    """Write a checkpoint again, with its experts in INT4."""
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        packed = Int4GroupWeight.quantize(tensors.pop(name)[None])
        tensors[f"{name}_packed"], tensors[f"{name}_scale"] = packed.packed[0], packed.scale[0]
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    values = json.loads((source / "config.json").read_text())
    values["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
    }
    (folder / "config.json").write_text(json.dumps(values))


def saves(rank: int, folder: str) -> None:
    root = Path(folder)
    ranks = Ranks(dist.group.WORLD, 4)
    config = KimiK2Config.tiny()
    spread = ranks.spread(config, 16, torch.device("cpu"))
    model = KimiK2(config, expert_ranks=spread)
    assert len(model.moe_layers()[0].experts.gate_up_proj) == config.n_routed_experts // 4
    model.save_pretrained(root / "spread")
    model.save_pretrained(root / "shards", max_shard_bytes=50_000)
    dist.barrier()
    again = KimiK2.from_pretrained(root / "shards", expert_ranks=spread)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    if rank == 0:
        pack(root / "spread", root / "packed")
    dist.barrier()
    kept = KimiK2.from_pretrained(root / "packed", expert_ranks=spread, experts="int4")
    alone = KimiK2.from_pretrained(root / "packed", experts="int4")
    assert len(kept.moe_layers()[0].experts.gate_up_proj.packed) == config.n_routed_experts // 4
    ids = torch.arange(rank, rank + 8)[None]
    with torch.no_grad():
        torch.testing.assert_close(kept(ids), alone(ids), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="expert_ranks: expected ranks of 32 experts, got .* 8"):
        KimiK2(KimiK2Config.mini(), expert_ranks=spread)
    # what ranks are given is judged alike on all
    first = ValueError if rank == 0 else PeerError
    for options, ep, wrong in (
        ({}, 3, "--expert-parallel: expected a divisor of the 4 processes, got 3"),
        ({}, 8, "--expert-parallel: expected a divisor of the 4 processes, got 8"),
        ({"sequences": 6}, 2, "--sequences: expected a multiple of the 4 processes"),
        ({"lr": -1.0}, 2, "train: lr: expected a positive number"),
        ({"lr": 0.1 + rank}, 2, "options: expected the same on every rank, rank 0 has .* rank 1"),
        ({"sequences": rank}, 2 + 2 * (rank == 3), "--expert-parallel: .* rank 0 has 2, rank 3 4"),
    ):
        with pytest.raises(first, match=wrong):
            run(root / "bad", Ranks(dist.group.WORLD, ep), **options)
    read = loop.load_corpus

    def other(source: Path, **options):
        if rank == 2:
            source = source.with_name("other.txt")
            source.write_text("something else\n" * 1000)
        return read(source, **options)

    loop.load_corpus = other
    with pytest.raises(first, match="--data: expected the same on every rank, .* rank 2 "):
        run(root / "bad", Ranks(dist.group.WORLD, 2))
    config = KimiK2Config.from_dict({**config.to_dict(), "n_routed_experts": 6})
    with pytest.raises(first, match="expected a divisor of the model's 6 experts, got 4"):
        ranks.spread(config, 16, torch.device("cpu"))
    assert not (root / "bad").exists()
    ranks.close()


@pytest.mark.slow
def test_a_spread_model_is_saved_as_a_whole_one_and_bad_numbers_are_refused(tmp_path: Path):
    text(tmp_path)
    launch(saves, tmp_path, 4)
    KimiK2(KimiK2Config.tiny()).save_pretrained(tmp_path / "whole")
    for name in ("config.json", "model.safetensors"):
        whole, spread = (tmp_path / kind / name for kind in ("whole", "spread"))
        assert whole.read_bytes() == spread.read_bytes()
    parts = list((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(parts) > 3
    joined = {name: value for part in parts for name, value in load_file(part).items()}
    whole = load_file(tmp_path / "whole/model.safetensors")
    assert joined.keys() == whole.keys()
    assert all(torch.equal(joined[name], value) for name, value in whole.items())


def overlaps(rank: int, folder: str) -> None:
    """Four steps of four micro-batches, one by one and in twos; what does not go is refused."""
    root, more = Path(folder), {"accumulate": 4, "steps": 4, "checkpoint_every": 4}
    for overlap in (False, True):
        ranks = Ranks(dist.group.WORLD, 2, overlap=overlap)
        run(root / f"{overlap}", ranks, dtype="bfloat16", **more)
        assert ("two micro-batches side by side" in ranks.describe()) == overlap
        ranks.close()
    first = ValueError if rank == 0 else PeerError
    with pytest.raises(first, match="--overlap: expected experts over several processes, .* 1;"):
        Ranks(dist.group.WORLD, 1, overlap=True)
    with pytest.raises(first, match="--overlap: expected the same on every rank"):
        Ranks(dist.group.WORLD, 2, overlap=rank == 0)
    ranks = Ranks(dist.group.WORLD, 2, overlap=True)
    with pytest.raises(first, match="--accumulate: expected an even number beside --overlap"):
        run(root / "odd", ranks, accumulate=3)
    with pytest.raises(first, match="--recompute: expected none or selective beside --overlap"):
        run(root / "odd", ranks, accumulate=2, recompute="full")
    ranks.close()


@pytest.mark.slow
def test_micro_batches_side_by_side_train_to_the_same_bits(tmp_path: Path):
    text(tmp_path)
    launch(overlaps, tmp_path, 4)
    one, two = (tmp_path / f"{overlap}" for overlap in (False, True))
    files = [json.loads((run / "step_000004/training.json").read_text()) for run in (one, two)]
    assert files[0]["files"] == files[1]["files"]
    rows = [read_metrics(run / "metrics.jsonl") for run in (one, two)]
    for a, b in zip(*rows, strict=True):
        for name in ("loss", "auxiliary", "max_logit", "load_layers"):
            assert a[name] == b[name]
    assert not (tmp_path / "odd").exists()


def loses(rank: int, folder: str) -> None:
    """Rank 1 ends while the second checkpoint is written."""
    root = Path(folder)
    ranks = Ranks(dist.group.WORLD, 2, timeout=20.0)
    send, sent = checkpoint.send_checkpoint, []

    def send_or_end(*arguments) -> None:
        sent.append(1)
        if len(sent) == 2:
            os._exit(0)
        send(*arguments)

    loop.send_checkpoint = send_or_end
    begin = time.monotonic()
    with pytest.raises(
        RankError, match=r"the process of rank 1 has ended .* start all ranks again"
    ):
        run(root / "run", ranks, checkpoint_every=4, steps=8)
    assert time.monotonic() - begin < 20
    (root / "ended").touch()
    os._exit(0)  # the group is broken


@pytest.mark.slow
def test_a_rank_lost_during_a_save_leaves_the_checkpoint_before(tmp_path: Path):
    text(tmp_path)
    launch(loses, tmp_path, 2)
    assert (tmp_path / "ended").exists()
    assert checkpoint.find_checkpoint(tmp_path / "run").name == "step_000004"
    checkpoint.read_state(tmp_path / "run" / "step_000004")
    assert not list((tmp_path / "run").glob(".*.tmp"))
    assert run(tmp_path / "run", None, resume=True).step == 8


def hangs(rank: int, folder: str) -> None:
    """Rank 1 does not come to its second step."""
    ranks = Ranks(dist.group.WORLD, 2, timeout=3.0)
    step = Trainer.step

    def late(self: Trainer, batch: torch.Tensor, number: int):
        if number == 1 and rank == 1:
            time.sleep(8.0)
            os._exit(0)
        return step(self, batch, number)

    Trainer.step = late
    begin = time.monotonic()
    with pytest.raises(RankError, match="kimi-ops: rank 1 did not come within 3 s"):
        run(Path(folder) / "run", ranks)
    assert 2 < time.monotonic() - begin < 20
    (Path(folder) / "told").touch()
    os._exit(0)


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_in_time(tmp_path: Path):
    text(tmp_path)
    launch(hangs, tmp_path, 2)
    assert (tmp_path / "told").exists()


def command(out: Path, *more: str) -> list[str]:
    options = {**TINY, "steps": 2000, "checkpoint_every": 5, "validate_every": 2000}
    given = [f"--{k.replace('_', '-')}={v}" for k, v in options.items()]
    given = [option for option in given if not option.startswith("--validation-sequences")]
    where = (f"--out={out}", f"--data={text(out.parent)}", "--device=cpu", "--no-progress")
    return ["-m", "kimi_ops", "train", *where, *given, *more]


def wait_for(path: Path, process: subprocess.Popen) -> None:
    limit = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None and time.monotonic() < limit, process.communicate()[0]
        time.sleep(0.05)


def workers_of(process: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    lines = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
    return [child for child, line in lines.items() if b"kimi_ops" in line]


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_torchrun_saves_when_it_is_ended_and_ends_with_a_lost_rank(tmp_path: Path, sent: int):
    process = started(2, *command(tmp_path / "run", "--expert-parallel=2", "--timeout=20"))
    wait_for(tmp_path / "run" / "step_000005", process)
    workers = workers_of(process)
    assert len(workers) == 2
    os.kill(process.pid if sent == signal.SIGTERM else workers[1], sent)
    printed, _ = process.communicate(timeout=40)
    assert process.returncode != 0 and "experts over 2 by" in printed
    saved = checkpoint.find_checkpoint(tmp_path / "run")
    step = checkpoint.read_state(saved)["step"]
    if sent == signal.SIGTERM:
        again = f"torchrun --nproc-per-node 2 -m kimi_ops train --out {tmp_path / 'run'} --resume"
        assert re.search(rf"stopped after step {step}; go on with: {again} --device cpu", printed)
        assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == step
    else:
        assert re.search(r"error: .*kimi-ops: the process of rank [01] has ended", printed)
        assert "Traceback" not in printed.partition("torch/distributed/elastic")[0]


HOSTS = r"""
set -e
ip link set lo up
unshare --net --pid --fork --mount-proc --kill-child sleep 100 >/dev/null 2>&1 &
trap 'kill $(jobs -p)' EXIT
for turn in $(seq 100); do other=$(pgrep -P $! || true); [ -n "$other" ] && break; sleep 0.05; done
ip link add eth0 type veth peer name eth0 netns "$other"
ip addr add 10.77.0.1/24 dev eth0 && ip link set eth0 up
in_other="nsenter --target $other --net --pid"
$in_other ip addr add 10.77.0.2/24 dev eth0 && $in_other ip link set eth0 up
"""


def hosts(script: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["unshare", "--map-root-user", "--net", "bash", "-c", HOSTS + script],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"},
    )


@pytest.mark.slow
def test_two_hosts_are_two_network_namespaces(tmp_path: Path):
    if any(shutil.which(tool) is None for tool in ("unshare", "nsenter", "ip", "pgrep")):
        pytest.skip("no unshare, nsenter, ip or pgrep")
    tried = hosts("true")
    if tried.returncode:
        pytest.skip(f"this machine forbids network namespaces: {tried.stderr.strip()}")
    words = command(tmp_path / "run", "--expert-parallel=2", "--timeout=30", "--steps=6")
    start = "WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 MASTER_ADDR=10.77.0.1 MASTER_PORT=29400"
    train_there = f"env {start} RANK=$rank {sys.executable} {' '.join(words)}"
    done = hosts(
        f"rank=1; $in_other {train_there} & second=$!\nrank=0; {train_there}\nwait $second\n"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ranks  2 processes, experts over 2 by gloo" in done.stdout
    assert done.stdout.count("checkpoint ") == 1
    run(tmp_path / "one", None, **{"steps": 6, "checkpoint_every": 5, "validate_every": 2000})
    losses, alone = (
        [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("run", "one")
    )
    assert losses == pytest.approx(alone, abs=LOSS) and len(losses) == 6


def cannot_write(rank: int, folder: str) -> None:
    """The lead has no room for the metrics of a step that is saved."""
    root = Path(folder)
    ranks = Ranks(dist.group.WORLD, timeout=20.0)
    write = MetricsWriter.write

    def full(self: MetricsWriter, row: dict) -> None:
        if row["step"] == 4:
            raise MetricsError("no room")
        write(self, row)

    MetricsWriter.write = full  # type: ignore[method-assign]
    begin = time.monotonic()
    expected, told = (PeerError, "rank 0") if rank else (MetricsError, "no room; .*step_000004")
    with pytest.raises(expected, match=told):
        run(root / "run", ranks, checkpoint_every=4, steps=8)
    assert time.monotonic() - begin < 15


@pytest.mark.slow
def test_metrics_that_cannot_be_written_at_a_checkpoint_lose_nothing(tmp_path: Path):
    text(tmp_path)
    launch(cannot_write, tmp_path, 2)
    assert run(tmp_path / "run", None, resume=True).step == 8
