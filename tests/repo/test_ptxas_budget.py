# SPDX-License-Identifier: MIT
"""Every CUDA kernel stays within its register budget, without spills or local memory.

Nor may ptxas give up on what a kernel asks for: that it ignores setmaxnreg or lets one wgmma wait
for the other it says in a remark only.

What ptxas said while the library was built lies beside its object files (cmake/keep_ptxas.sh).
cmake/ptxas_budget.txt holds one line for each kernel. After a change that is meant, build, renew it
with ``python tests/repo/test_ptxas_budget.py > cmake/ptxas_budget.txt`` and look at the difference.
"""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from kimi_ops import _native

ROOT = Path(__file__).resolve().parents[2]
BUDGET = ROOT / "cmake" / "ptxas_budget.txt"
SOURCES = sorted((ROOT / "csrc").rglob("*.cu"))
BUILD = ROOT / "build" / f"python-{sys.implementation.cache_tag}" / "CMakeFiles"
HEADER = "# SPDX-License-Identifier: MIT\n# registers  architecture  kernel (ptxas of nvcc {})\n"


@dataclass(frozen=True)
class Usage:
    registers: int
    stack_bytes: int
    spill_bytes: int


def parse_ptxas(log: str, architecture: str) -> dict[str, Usage]:
    """Usage of every kernel (mangled name) of an architecture in the output of ``ptxas -v``."""
    pattern = re.compile(
        rf"Compiling entry function '(?P<name>\w+)' for '{architecture}'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    return {
        m["name"]: Usage(int(m["registers"]), int(m["stack"]), int(m["stores"]) + int(m["loads"]))
        for m in pattern.finditer(log)
    }


def performance_losses(log: str) -> list[str]:
    """What ptxas remarks that it did not do as asked."""
    return [line for line in log.splitlines() if "Potential Performance Loss" in line]


def readable(mangled: str) -> str:
    """``topk_gate_kernel<bf16, 32>`` of a mangled kernel name."""
    demangler = shutil.which("cu++filt") or shutil.which("c++filt")
    if demangler is None:
        return mangled
    name = subprocess.check_output([demangler, mangled], text=True).strip()
    name = re.sub(r"\b_GLOBAL__N__\w+::|\(anonymous namespace\)::|<unnamed>::", "", name)
    name = re.sub(r"\((?:int|bool|unsigned int|long)\)(?=-?\d)", "", name)  # cu++filt: (int)32
    name = name.replace("kimi::", "").removeprefix("void ")
    open_brackets = 0
    for at in range(len(name) - 1, 0, -1):  # the parameters: they may hold brackets of their own
        open_brackets += {")": 1, "(": -1}.get(name[at], 0)
        if open_brackets == 0:
            return name[:at] if name.endswith(")") else name
    return name


def architecture_of(source: Path) -> str:
    return "sm_90a" if source.stem.endswith("_sm90") else "sm_80"


def object_of(source: Path) -> Path:
    """The object file of a kernel file in the build that the tests run on; skips without one."""
    if not _native._C.cuda_architectures():
        pytest.skip("a build without CUDA kernels")
    target = "kimi_hopper.dir" if architecture_of(source) == "sm_90a" else "kimi_generic.dir"
    return BUILD / target / source.relative_to(ROOT).with_suffix(".cu.o")


def usage_of(source: Path) -> dict[tuple[str, str], Usage]:
    """Usage by (architecture, kernel), for the architecture that the file is built for."""
    log = object_of(source).with_suffix(".o.ptxas").read_text()
    if losses := performance_losses(log):
        raise RuntimeError(f"{source}: " + "\n".join(losses))
    architecture = architecture_of(source)
    parsed = parse_ptxas(log, architecture)
    return {(architecture, readable(name)): value for name, value in parsed.items()}


def usage_of_all() -> dict[tuple[str, str], Usage]:
    return {key: value for source in SOURCES for key, value in usage_of(source).items()}


def read_budget() -> dict[tuple[str, str], int]:
    lines = [line for line in BUDGET.read_text().splitlines() if line and line[0] != "#"]
    rows = [line.split(maxsplit=2) for line in lines]
    return {(architecture, kernel): int(registers) for registers, architecture, kernel in rows}


def complaints(
    usage: dict[tuple[str, str], Usage],
    budget: dict[tuple[str, str], int],
    compare_registers: bool = True,
) -> list[str]:
    """One line for each kernel that spills, breaks the budget, is not in it, or is gone."""
    found = []
    for key, used in sorted(usage.items()):
        name = f"{key[1]} ({key[0]})"
        if used.spill_bytes or used.stack_bytes:
            found.append(f"{name}: {used.spill_bytes} spill, {used.stack_bytes} stack bytes")
        if key not in budget:
            found.append(f"{name}: {used.registers} registers, not in {BUDGET.name}")
        elif compare_registers and used.registers > budget[key]:
            found.append(f"{name}: {used.registers} registers, the budget is {budget[key]}")
    return found + [f"{k[1]} ({k[0]}): in {BUDGET.name}, not built" for k in budget.keys() - usage]


def release() -> str:
    """Of the nvcc that built the library."""
    compilers = BUILD.glob("*/CMakeCUDACompiler.cmake")
    match = re.search(r'CUDA_COMPILER_VERSION "(\d+\.\d+)', next(compilers).read_text())
    return match[1] if match else "unknown"


def test_budget() -> None:
    # another nvcc allocates registers its own way, but must not spill either
    same_release = f"nvcc {release()})" in BUDGET.read_text().splitlines()[1]
    assert not complaints(usage_of_all(), read_budget(), compare_registers=same_release)


def test_parser_sees_spills_and_registers() -> None:
    log = """
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_80'
ptxas info    : Function properties for _Z1aPf
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 37 registers, used 1 barriers, 456 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_80'
ptxas info    : Function properties for _Z1bPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers
"""
    usage = parse_ptxas(log, "sm_80")
    assert usage == {"_Z1aPf": Usage(37, 8, 16), "_Z1bPf": Usage(255, 0, 0)}
    keyed = {("sm_80", name): value for name, value in usage.items()}
    budget = {("sm_80", "_Z1aPf"): 40, ("sm_80", "_Z1bPf"): 128, ("sm_80", "gone"): 1}
    text = "\n".join(complaints(keyed, budget))
    assert "_Z1aPf (sm_80): 16 spill, 8 stack bytes" in text
    assert "255 registers, the budget is 128" in text
    assert "gone (sm_80): in ptxas_budget.txt, not built" in text
    assert "not in ptxas_budget.txt" in "\n".join(complaints(keyed, {}))
    text = "\n".join(complaints(keyed, budget, compare_registers=False))
    assert "_Z1aPf (sm_80): 16 spill, 8 stack bytes" in text and "gone (sm_80)" in text
    assert "the budget is" not in text
    assert not performance_losses(log)
    remark = (
        "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to ..."
    )
    assert performance_losses(log + remark) == [remark]


def test_names_end_where_the_parameters_begin() -> None:
    mangled = "_Z1fI1AIL5Major0EEEvNT_1PE"  # void f<A<(Major)0> >(A<(Major)0>::P)
    assert readable(mangled) in ("f<A<(Major)0> >", mangled)  # without a demangler as it is


def test_spills_fail_with_any_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[__name__]
    key = next(iter(read_budget()))
    built = {k: Usage(255, 0, 0) for k in read_budget()}
    monkeypatch.setattr(module, "release", lambda: "99.9")
    monkeypatch.setattr(module, "usage_of_all", lambda: built)
    test_budget()  # only the registers differ
    built[key] = Usage(16, 0, 4)
    with pytest.raises(AssertionError, match="4 spill"):
        test_budget()


if __name__ == "__main__":
    rows = sorted((a, k, u.registers) for (a, k), u in usage_of_all().items())
    sys.stdout.write(HEADER.format(release()))
    sys.stdout.writelines(f"{registers:3} {a} {kernel}\n" for a, kernel, registers in rows)
