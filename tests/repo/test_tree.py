# SPDX-License-Identifier: MIT
"""The rules of the tree: one name everywhere, asm and intrinsics in their places, short files."""

import ast
import pkgutil
import re
import subprocess
from pathlib import Path

import pytest

import kimi_ops
from kimi_ops import _native
from kimi_ops.info import CUDA_OPS, OPS

ROOT = Path(__file__).resolve().parents[2]
# Ops with kernels; those with CUDA kernels are checked on the host too.
# gemm and fp8_rows are no ops of their own: they serve grouped_gemm and fused_experts. all_to_all
# serves ExpertParallel, whose other backends have no kernels.
PARTS = {"gemm", "fp8_rows", "all_to_all"}
NATIVE = sorted({p.stem for p in (ROOT / "csrc").glob("*/*.h") if p.stem == p.parent.name} - PARTS)
CUDA = sorted({path.parent.name for path in (ROOT / "csrc").glob("*/*.cu")} - PARTS)
SOURCES = {".py", ".pyi", ".h", ".c", ".cpp", ".cu", ".cuh", ".cmake", ".toml"}


def tracked(*suffixes):
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listing.stdout.split()]
    return [f for f in files if f.suffix in (suffixes or SOURCES) and f.exists()]


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_python_function_an_operator_a_twin_and_tests(op):
    package = ROOT / "python/kimi_ops"
    assert [f for f in ("moe", "optim") if (package / f / f"{op}.py").exists()], op
    for place in (
        "python/kimi_ops/operators/{}.py", "python/kimi_ops/reference/{}.py",
        "tests/ops/test_{}.py",
    ):  # fmt: skip
        assert (ROOT / place.format(op)).exists(), place.format(op)


@pytest.mark.parametrize("op", NATIVE)
def test_native_ops_mirror_their_name_everywhere(op):
    for place in (
        "csrc/{0}/{0}.h", "csrc/{0}/{0}.cpp", "csrc/bindings/{0}.cpp", "benchmarks/bench_{0}.py",
        "docs/ops/{0}.md", "tests/ops/test_{0}_torch.py",
    ):  # fmt: skip
        assert (ROOT / place.format(op)).exists(), place.format(op)
    assert op in OPS and _native._C.cpu_engine(op), f"{op}: not in info.OPS or kimi_cpu_engine"
    header = "".join(path.read_text() for path in (ROOT / "csrc").glob("kimi_ops*.h"))
    assert f"- {op}" in header or f" {op}:" in header
    assert re.search(rf"^\| \[?`{op}`", (ROOT / "README.md").read_text(), re.MULTILINE)


def test_tests_lie_where_their_code_does():
    package = ROOT / "python/kimi_ops"
    modules = [p.stem for f in ("moe", "optim", "operators") for p in (package / f).glob("*.py")]
    aspects = "|_torch|_memory|_optimizer|_aol|_plan|_forms"
    for path in (ROOT / "tests/ops").glob("test_*.py"):
        assert re.fullmatch(rf"test_({'|'.join(modules)})({aspects})", path.stem), path
    assert not list((ROOT / "tests").glob("test_*.py")), "tests of no folder"


@pytest.mark.parametrize("op", CUDA)
def test_cuda_kernels_have_their_places(op):
    for place in ("csrc/{0}/{0}.cu", "tests/simt/test_{0}.cpp"):
        assert (ROOT / place.format(op)).exists(), place.format(op)
    assert op in CUDA_OPS


def test_the_readme_names_the_ops_that_are_there():
    """Its first paragraph and its status table name every op and nothing else; what the table says
    of engines is what the tree holds."""
    text = (ROOT / "README.md").read_text()
    named = re.search(r"Ops: ((?:`\w+`[,;]?\s+)+)composed", text)
    assert named and sorted(re.findall(r"`(\w+)`", named[1])) == sorted(OPS)
    status = text[text.index("## Status") : text.index("## Install")]
    rows = [line.split("|")[1:-1] for line in status.splitlines() if line.startswith("| `")]
    told = {}
    for name, cpu, cuda, *_ in rows:
        for function in re.findall(r"`(\w+)`", name):
            assert function in OPS or hasattr(kimi_ops, function), function
        told.setdefault(re.findall(r"`(\w+)`", name)[0], (cpu.strip(), cuda.strip()))
    assert sorted(told) == sorted(OPS)
    for op, (cpu, cuda) in told.items():
        assert (cuda == "torch twin") == (op not in CUDA_OPS), op
        if not cpu.startswith(("as ", "the same")):
            best = [
                isa for isa in ("avx2", "avx512") if list((ROOT / "csrc" / op).glob(f"*_{isa}.*"))
            ]
            assert [isa for isa in ("AVX2", "AVX-512") if isa in cpu.split(", ")] == [
                {"avx2": "AVX2", "avx512": "AVX-512"}[isa] for isa in best
            ], op
    assert ("Expert parallelism is not there yet" in text) == (
        not hasattr(kimi_ops, "ExpertParallel")
    )


def test_public_names_exist_and_are_documented():
    for name in kimi_ops.__all__:
        assert getattr(kimi_ops, name).__doc__, name


def test_no_module_has_the_name_of_a_public_function():
    """Importing such a module later would put it in the function's place."""
    modules = {module.name for module in pkgutil.iter_modules(kimi_ops.__path__)}
    assert modules & set(kimi_ops.__all__) == {"info"}  # loaded before its function is bound


def test_every_package_is_installed():
    packages = {path.parent for path in (ROOT / "python").rglob("__init__.py")}
    folders = {path.parent for path in tracked(".py") if (ROOT / "python") in path.parents}
    assert folders == packages


def test_the_library_takes_public_names_from_its_twins():
    for path in tracked(".py"):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith("python/kimi_ops/") or "/reference/" in name:
            continue
        tree = ast.parse(path.read_text())
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        twins = set()
        for node in imports:
            if node.module and node.module.startswith("kimi_ops.reference"):
                assert not [a.name for a in node.names if a.name.startswith("_")], name
                twins |= {alias.asname or alias.name for alias in node.names}
        reads = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        for node in reads:
            if isinstance(node.value, ast.Name) and node.value.id in twins:
                assert not node.attr.startswith("_"), f"{name}: {node.value.id}.{node.attr}"


def test_asm_stands_in_device_headers_only():
    for path in tracked(".h", ".cpp", ".cu", ".cuh"):
        if path.relative_to(ROOT).parts[:2] in (("csrc", "device"), ("tests", "simt")):
            continue
        assert not re.search(r"\basm\b\s*(volatile)?\s*[({]", path.read_text()), path


# Loads that may pass by what this kernel's blocks write (ld.global.nc): by file and address, the
# struct of csrc/kimi_ops.h and its member that the memory belongs to.
NON_COHERENT_LOADS = {
    ("csrc/permute/permute.cu", "from + column + i * step"): ("kimi_permute_params", "x"),
    ("csrc/permute/sort_chunks.cu", "from + c"): ("kimi_sort_chunks_params", "x"),
    ("csrc/permute/unpermute_backward.cu", "y + h"): ("kimi_unpermute_backward_params", "y"),
}


def test_non_coherent_loads_read_inputs_that_no_block_writes():
    loads = re.compile(r"\b(?:load16_streaming|load_once|__ldg\w*|__ld[cl]\w+)\(([^()]*)\)")
    members = {}
    for header in (ROOT / "csrc").glob("kimi_ops*.h"):
        structs = re.finditer(r"typedef struct (\w+) \{(.*?)\n\}", header.read_text(), re.DOTALL)
        members |= {match[1]: match[2] for match in structs}
    found = set()
    for path in tracked(".cu", ".cuh"):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith("csrc/") or name == "csrc/device/vec.cuh":
            continue
        text = path.read_text()
        assert not re.search(r"ld\.global\.nc|__restrict", text), f"{name}: may load past writes"
        for match in loads.finditer(text):
            if name == "csrc/permute/permute.cuh" and match[1] in ("from", "const Unit* from"):
                continue  # load_once itself: its calls are looked at
            found.add((name, match[1]))
            # blocks that wait for each other, or for the kernel before, may read what those wrote
            assert not re.search(r"cooperative|const_cast|overlap", text), f"{name}: not read-only"
    assert found == set(NON_COHERENT_LOADS), "review the address, then list it here"
    for struct, member in NON_COHERENT_LOADS.values():
        declared = re.search(
            rf"^  const [\w ]+\* ?{member}; *(/\*.*)?$", members[struct], re.MULTILINE
        )
        assert declared, f"{struct}.{member} is not a const pointer"
        assert not (declared[1] or "").startswith("/* out"), f"{struct}.{member} is an output"


def test_intrinsics_stand_in_files_of_their_instruction_set():
    for path in tracked(".h", ".cpp", ".cu", ".cuh"):
        if path.parts[-3:-1] == ("tests", "simt") or "csrc" not in path.parts:
            continue
        if not re.search(r"_(x86|avx2|avx512|avx512_bf16|amx)\.(cpp|h)$", path.name):
            assert not re.search(r"\b_mm\d*_|immintrin", path.read_text()), path


def test_files_are_short_and_licensed():
    for path in tracked():
        text = path.read_text()
        assert len(text.splitlines()) <= 500, f"{path}: over 500 lines"
        if path.suffix != ".toml":
            assert "SPDX-License-Identifier: MIT" in text[:200], f"{path}: no SPDX line"


def test_the_c_header_stands_alone():
    source = (
        '#include "kimi_ops.h"\nint main(void) { kimi_topk_gate_params p = {0}; return p.top_k; }\n'
    )
    command = ["cc", "-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only"]
    subprocess.run([*command, f"-I{ROOT}/csrc", "-xc", "-"], input=source, text=True, check=True)
