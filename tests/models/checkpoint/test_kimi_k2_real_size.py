# SPDX-License-Identifier: MIT
"""Kimi K2's checkpoints at their real size: what a layer costs in memory, and what stays packed.

The files are those of the releases by name, shape and dtype, and sparse on the disk. Every load
runs in a process of its own, which says how far its memory rose.
"""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kimi_ops.models.kimi_k2 import KimiK2Config, load_layer
from kimi_ops.models.kimi_k2.rope import rotary_tables
from tests.models.checkpoint import sparse_k2

ROOT = Path(__file__).parents[3]
SLACK = 64 << 20  # beside what is loaded: less than 1 % of a file of 16 GB
FILES = 1.1  # of what is loaded lies mapped: what was read of the files
RANK, RANKS = 2, 96
NAME = "model.layers.30.mlp.experts.9.up_proj.weight"  # the second of rank 2


def memory(field: str) -> int:
    """VmRSS or VmHWM, the most so far, in bytes.

    Not ru_maxrss, which a process inherits from the one that starts it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise AssertionError(field)


def measured(function, *arguments) -> tuple[object, int]:
    """Its result, and how far memory rose on the way."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before = memory("VmRSS")
    result = function(*arguments)
    return result, memory("VmHWM") - before


def size(layer) -> int:
    return sum(value.nbytes for value in layer.state_dict().values())


def share(folder: str) -> dict:
    """Layer 30 as one rank of 96 has it."""
    per = 384 // RANKS
    ranks = SimpleNamespace(
        experts=range(RANK * per, (RANK + 1) * per), count=384, rank=RANK, owner=lambda e: e // per
    )
    layer, rise = measured(lambda: load_layer(folder, 30, expert_ranks=ranks))
    stack = layer.mlp.experts.gate_up_proj
    return {
        "rise": rise,
        "size": size(layer),
        "shape": list(stack.shape),
        "planted": stack[1, 2048, :200].tolist(),
        "sum": stack.float().abs().sum().item(),
        "dtype": str(stack.dtype),
    }


def packed(folder: str, form: str) -> dict:
    """Layer 30 with its experts as they are stored, and a forward of it."""
    torch.set_num_threads(2)
    layer, rise = measured(lambda: load_layer(folder, 30, experts=form))
    config = KimiK2Config.from_file(Path(folder) / "config.json")
    cos, sin = rotary_tables(config, torch.arange(4)[None])
    x = torch.ones(1, 4, 7168, dtype=torch.bfloat16)
    with torch.no_grad():
        y, forward = measured(layer, x, cos, sin)
    return {
        "rise": rise,
        "forward": forward,
        "size": size(layer),
        "experts": sum(buffer.nbytes for buffer in layer.mlp.experts.buffers()),
        "finite": bool(y.isfinite().all()),
    }


def alone(function: str, *arguments: str) -> dict:
    """function(*arguments) of this file in a process of its own."""
    here = Path(__file__)
    code = f"import json; from {here.stem} import *; print(json.dumps({function}(*{arguments!r})))"
    paths = [str(ROOT / "python"), str(ROOT), str(here.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def on_disk(folder: Path) -> int:
    return sum(512 * path.stat().st_blocks for path in folder.iterdir())


def test_a_rank_loads_its_share_of_a_layer_of_the_trillion(tmp_path):
    counts = sparse_k2.write(tmp_path, "fp8")
    assert counts == {  # of the released files
        "tensors": 139_644,
        "elements": 1_026_470_731_056,
        "bytes": 1_029_173_256_720,
    }
    assert on_disk(tmp_path) < 64 << 20
    values = torch.arange(200).float().sub(100).to(torch.float8_e4m3fn)
    sparse_k2.plant(tmp_path, NAME, values.view(torch.uint8).numpy().tobytes())
    sparse_k2.plant(tmp_path, f"{NAME}_scale_inv", struct.pack("<2f", 0.5, 2.0))
    done = alone("share", str(tmp_path))
    assert done["shape"] == [4, 4096, 7168] and done["dtype"] == "torch.bfloat16"
    expected = values.float() * torch.tensor([0.5, 2.0]).repeat_interleave(128)[:200]
    assert done["planted"] == expected.bfloat16().tolist()
    assert done["sum"] == pytest.approx(expected.abs().sum().item())  # and nothing else
    assert done["rise"] < (1 + FILES) * done["size"] + SLACK


@pytest.mark.parametrize(("form", "bits"), [("fp8", 8.01), ("int4", 4.51)])
def test_packed_experts_stay_packed(tmp_path, form, bits):
    """Loading and a forward of 8 experts of K2's size: 353 M weights."""
    sparse_k2.write(tmp_path, form, experts=8)
    assert on_disk(tmp_path) < 64 << 20
    done = alone("packed", str(tmp_path), form)
    assert done["experts"] * 8 <= 8 * 3 * 2048 * 7168 * bits
    assert done["rise"] < (1 + FILES) * done["size"] + SLACK
    assert done["forward"] < SLACK and done["finite"]
