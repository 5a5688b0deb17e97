# SPDX-License-Identifier: MIT
"""What ptxas made of the Hopper kernels: the instructions that they are for, and nothing in local
memory."""

import importlib.metadata
import itertools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from test_ptxas_budget import ROOT, object_of, readable, usage_of

SOURCES = sorted((ROOT / "csrc").rglob("*_sm90.cu"))


WGMMA = ("HGMMA", "QGMMA")  # of 16-bit and of FP8 operands
WAIT = ("ACQBULK",)  # for the kernel before: griddepcontrol.wait
ALSO = {  # beside wgmma: what comes into the L2 ahead, copies that a barrier counts
    "activate_bf16": ("ARRIVES.LDGSTSBAR",),
    "activate_fp16": ("ARRIVES.LDGSTSBAR",),
    "activate_fp8": ("F2FP.SATFINITE.E4M3", "UTMASTG"),
    "store_k": ("UTMAPF", "ARRIVES.LDGSTSBAR"),
    "store_m": ("ARRIVES.LDGSTSBAR",),
}
WANTED = {  # of other kernels than products
    "fp8_rows_sm90": ("F2FP.SATFINITE.E4M3",),
    "gate_plan_sm90": WAIT,
    "on_chip_sm90": ("ST.E.128",),  # into the shared memory of another block
    "permute_plan_sm90": WAIT,
    "unpermute_sm90": WAIT,
}


def find_tool(name: str) -> str:
    """A program on the PATH, or that of the package nvidia-cuda-<name>; skips without either."""
    if found := shutil.which(name):
        return found
    try:
        files = importlib.metadata.files(f"nvidia-cuda-{name}") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    paths = [str(file.locate()) for file in files if file.name == name]
    if not paths:
        pytest.skip(f"no {name}: neither on the PATH nor the package nvidia-cuda-{name}")
    return paths[0]


def kernels_of(sass: str) -> dict[str, list[str]]:
    """Opcodes of every kernel in the output of ``nvdisasm -c``."""
    sections = re.split(r"^\s*\.section\s+\.text\.(\w+)", sass, flags=re.MULTILINE)
    opcode = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
    return {
        readable(name): opcode.findall(body)
        for name, body in zip(sections[1::2], sections[2::2], strict=True)
    }


def before_the_wait(opcodes: list[str]) -> list[str]:
    """What goes to global memory, perhaps that of the kernel before, ahead of the wait for it."""
    ahead = itertools.takewhile(lambda opcode: not opcode.startswith(WAIT), opcodes)
    return [opcode for opcode in ahead if opcode.split(".")[0] in ("LDG", "LD", "STG", "ST")]


def complaints(kernels: dict[str, list[str]], wanted: tuple[str, ...] = WGMMA) -> list[str]:
    found = []
    for name, opcodes in kernels.items():
        if not any(o.startswith(wanted) for o in opcodes):
            found.append(f"{name}: no {wanted[0]}")
        if wanted == WAIT and (early := before_the_wait(opcodes)):
            found.append(f"{name}: {early[0]} before {WAIT[0]}")
        local = {o.split(".")[0] for o in opcodes} & {"LDL", "STL"}
        found += [f"{name}: {o}" for o in sorted(local)]
    return found


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_wgmma_and_no_local_memory(source: Path) -> None:
    extract = [find_tool("cuobjdump"), "--extract-elf", "all", str(object_of(source))]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(extract, cwd=folder, check=True, capture_output=True)
        (cubin,) = Path(folder).iterdir()
        sass = subprocess.check_output([find_tool("nvdisasm"), "-c", cubin], text=True)
    kernels = kernels_of(sass)
    assert len(kernels) == len(usage_of(source))
    assert not complaints(kernels, WANTED.get(source.stem, WGMMA))
    stem = source.stem.removesuffix("_sm90")
    for wanted in ALSO.get(stem, ALSO.get(stem.rsplit("_", 1)[0], ())):
        without = [
            name for name, ops in kernels.items() if not any(o.startswith(wanted) for o in ops)
        ]
        assert not without, f"no {wanted}"


def test_parser_sees_opcodes() -> None:
    sass = """
\t.section\t.text._Z1aPf,"ax",@progbits
        /*0010*/              @!P0 BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0020*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR20], R24, UP0 ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
\t.section\t.text._Z1bPf,"ax",@progbits
        /*14a60*/             @UP1 STL.64 [R1+0x8], R2 ;
        /*14a70*/                  LDL R3, [R1] ;
"""
    kernels = kernels_of(sass)
    first, second = kernels.values()
    assert first == ["BAR.SYNC.DEFER_BLOCKING", "HGMMA.64x256x16.F32.BF16", "WARPGROUP.DEPBAR.LE"]
    assert second == ["STL.64", "LDL"]
    assert [text.split(": ")[1] for text in complaints(kernels)] == ["no HGMMA", "LDL", "STL"]
    early = {"a": ["LDC", "ACQBULK", "LDG.E"], "b": ["LDG.E", "ACQBULK"]}
    assert complaints(early, WAIT) == ["b: LDG.E before ACQBULK"]
