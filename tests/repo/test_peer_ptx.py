# SPDX-License-Identifier: MIT
"""Kernels that read what other GPUs write: no load that may pass by it, flags at system scope."""

import re
import subprocess
from pathlib import Path

import pytest
from test_ptxas_budget import ROOT, object_of
from test_sass import find_tool

PEERS = sorted((ROOT / "csrc/all_to_all").glob("*.cu"))
ORDERED = re.compile(r"\b(ld|st|red)\.(?:acquire|release|relaxed)\.(\w+)")


def complaints(ptx: str) -> list[str]:
    found = re.findall(r"\bldu?\.global(?:\.[\w:]+)*\.nc[\w.:]*|\bldu\.[\w.]+", ptx)
    found += [f"{match[0]}: not .sys" for match in ORDERED.finditer(ptx) if match[2] != "sys"]
    wanted = ("ld.acquire.sys", "st.release.sys", "atom.acq_rel.gpu")
    return found + [f"no {name}" for name in wanted if name not in ptx]


@pytest.mark.parametrize("source", PEERS, ids=lambda path: path.stem)
def test_loads_are_coherent_and_flags_are_the_systems(source: Path) -> None:
    object_file = object_of(source)
    ptx = subprocess.check_output([find_tool("cuobjdump"), "-ptx", object_file], text=True)
    assert ".entry" in ptx
    assert complaints(ptx) == []


def test_what_is_wrong_is_seen() -> None:
    good = "ld.acquire.sys.global.u64\nst.release.sys.global.u64\natom.acq_rel.gpu.global.add.u32\n"
    assert complaints(good) == []
    assert complaints(good + "ld.global.nc.L1::no_allocate.v4.u32 {%r1}, [%rd1];") != []
    assert complaints(good + "ld.global.L1::no_allocate.nc.u32 %r1, [%rd1];") != []
    assert complaints(good + "st.release.gpu.global.u64 [%rd1], %rd2;") != []
    assert complaints(good.replace("st.release", "st.relaxed")) == ["no st.release.sys"]
