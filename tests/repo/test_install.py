# SPDX-License-Identifier: MIT
"""`pip install .` in pip's isolated build, without torch there and without CUDA kernels, and what
later builds of the same tree keep of it."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# -O0 compiles in half the time.
BUILD = os.environ | {
    **{"KIMI_OPS_CUDA": "off", "KIMI_OPS_TESTS": "OFF"},
    "CMAKE_ARGS": "-DCMAKE_CXX_FLAGS_RELEASE='-O0 -DNDEBUG'",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A copy of the tracked tree, installed into a folder of its own."""
    folder = tmp_path_factory.mktemp("install")
    tree, target = folder / "tree", folder / "target"
    tree.mkdir()
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    subprocess.run(
        ["tar", "-cf", folder / "tree.tar", "--files-from=-"],
        cwd=ROOT, input="\n".join(n for n in names if n and (ROOT / n).exists()), text=True,
        check=True,
    )  # fmt: skip
    subprocess.run(["tar", "-xf", folder / "tree.tar", "-C", tree], check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target]
    subprocess.run([*pip, tree], check=True, env=BUILD)
    return target


def build_again(tree, **changed):
    """Builds in place; the object files that were written, by name, and what was printed."""
    build = tree / "build" / f"python-{sys.implementation.cache_tag}"
    before = {path: path.stat().st_mtime_ns for path in build.rglob("*.o")}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    result = subprocess.run(
        command, cwd=tree, env=BUILD | changed, capture_output=True, text=True, check=True
    )
    after = {path: path.stat().st_mtime_ns for path in build.rglob("*.o")}
    assert before.keys() <= after.keys(), "object files were thrown away"
    return {p.name for p, time in after.items() if before.get(p) != time}, result.stdout


def run(target, code):
    environment = os.environ | {"PYTHONPATH": str(target)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=target, capture_output=True, text=True
    )


def test_installed_package_runs(installed):
    code = (
        "import torch, kimi_ops; print(kimi_ops.__file__, kimi_ops.topk_gate(torch.randn(3, 9), 2))"
    )
    result = run(installed, code)
    assert result.returncode == 0, result.stderr
    assert str(installed) in result.stdout
    assert (installed / "kimi_ops" / "include" / "kimi_ops.h").exists()


def test_cpu_only_build_refuses_cuda_tensors_and_says_what_to_do(installed):
    code = """
import torch, kimi_ops
from kimi_ops import _C
assert _C.cuda_architectures() == ""
_C.serve_cpu_tensors_by_cuda(True)
kimi_ops.topk_gate(torch.zeros(4, 16), 2)
"""
    result = run(installed, code)
    assert "RuntimeError: topk_gate: device: expected cpu, got cuda" in result.stderr
    assert "KIMI_OPS_CUDA=on" in result.stderr


@pytest.fixture(scope="module")
def prefixes(installed, tmp_path_factory):
    """A system installation of the same build, and the Python package: both moved once more."""
    folder = tmp_path_factory.mktemp("prefixes")
    build = installed.parent / "tree/build" / f"python-{sys.implementation.cache_tag}"
    subprocess.run(
        ["cmake", "--install", build, "--prefix", folder / "before"], check=True,
        capture_output=True,
    )  # fmt: skip
    (folder / "before").rename(folder / "system")
    shutil.copytree(installed / "kimi_ops", folder / "package")
    return {
        "system": (folder / "system", folder / "system/lib"),
        "package": (folder / "package", folder / "package"),
    }


def succeeds(*command, **options):
    """What the command printed; the processes see no path to the library but their own."""
    environment = {k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH"}
    environment |= options.pop("env", {})
    result = subprocess.run(command, capture_output=True, text=True, env=environment, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


C_EXAMPLES = ("topk_gate", "experts", "muon_clip")


@pytest.mark.parametrize("kind", ["system", "package"])
def test_c_examples_by_find_package(prefixes, kind, tmp_path):
    prefix, library = prefixes[kind]
    where = f"-DCMAKE_PREFIX_PATH={prefix}"
    if kind == "package":
        where = f"-Dkimi_ops_DIR={prefix / 'cmake'}"
    succeeds("cmake", "-S", ROOT / "examples/c", "-B", tmp_path, "-G", "Ninja", where)
    succeeds("cmake", "--build", tmp_path)
    for name in C_EXAMPLES:
        assert succeeds(tmp_path / name)
    assert str(library) in succeeds("readelf", "-d", tmp_path / "experts")
    wrong = tmp_path / "other/CMakeLists.txt"
    wrong.parent.mkdir()
    wrong.write_text("project(x LANGUAGES C)\nfind_package(kimi_ops 0.0.1 REQUIRED)\n")
    result = subprocess.run(
        ["cmake", "-S", wrong.parent, "-B", wrong.parent, where], capture_output=True, text=True
    )
    assert result.returncode and 'compatible with requested version "0.0.1"' in result.stderr


@pytest.mark.skipif(not shutil.which("pkg-config"), reason="this machine has no pkg-config")
@pytest.mark.parametrize("kind", ["system", "package"])
def test_c_examples_by_pkg_config(prefixes, kind, tmp_path):
    prefix, library = prefixes[kind]
    pkgconfig = library / "pkgconfig"
    environment = {"PKG_CONFIG_PATH": str(pkgconfig)}
    version = succeeds("pkg-config", "--modversion", "kimi_ops", env=environment).strip()
    assert f'"{version}"' in (prefix / "include/kimi_ops.h").read_text()
    succeeds("make", "-C", ROOT / "examples/c", f"OUT={tmp_path}", "--always-make", env=environment)
    for name in C_EXAMPLES:
        assert succeeds(tmp_path / name)
    flags = succeeds("pkg-config", "--cflags", "--libs", "kimi_ops", env=environment).split()
    (block,) = re.findall(r"```c\n(.*?)```", (ROOT / "docs/c.md").read_text(), re.DOTALL)
    (tmp_path / "page.c").write_text(block)
    for language in ("c", "c++"):  # the headers serve both
        program = tmp_path / f"page-{language}"
        strict = ["-x", language, tmp_path / "page.c", "-x", "none", "-pedantic", "-Werror"]
        succeeds("cc", *strict, *flags, "-o", program)
        assert subprocess.run([program]).returncode == 0


def test_source_distribution_holds_what_the_build_needs(installed, tmp_path):
    tree = installed.parent / "tree"
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", tmp_path]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.split("/", 1)[-1] for name in files.getnames()}
    for path in [*(ROOT / "csrc").rglob("*.*"), *(ROOT / "cmake").glob("*.cmake")]:
        assert str(path.relative_to(ROOT)) in names
    assert "CMakeLists.txt" in names


def test_a_dead_environment_costs_no_compilation(installed):
    """pip's isolated environment is gone, and with it CMake, Ninja and pybind11 of the cache."""
    tree = installed.parent / "tree"
    cache = tree / "build" / f"python-{sys.implementation.cache_tag}" / "CMakeCache.txt"
    dead = [line for line in cache.read_text().splitlines() if "pip-build-env" in line]
    assert any(line.startswith("CMAKE_MAKE_PROGRAM") for line in dead)
    written, _ = build_again(tree)
    module = [
        path for part in ("bindings", "comm") for path in (ROOT / "csrc" / part).rglob("*.cpp")
    ]
    bindings = {f"{path.name}.o" for path in module}
    assert written <= bindings - {"c_api.cpp.o"}  # the one path that they include is another
    assert "pip-build-env" not in cache.read_text()
    # Nothing changed: the cache is taken as it is, and nothing is compiled.
    written, printed = build_again(tree)
    assert not written and "no work to do" in printed and "Detecting" not in printed
    # A path of the cache is gone though the request is the same: it is found anew.
    text = cache.read_text()
    cache.write_text(re.sub(r"(?m)^(CMAKE_MAKE_PROGRAM:\w+)=.*$", r"\1=/gone", text))
    assert not build_again(tree)[0] and "/gone" not in cache.read_text()
    # An interrupted configuration left half a cache.
    cache.with_name("request.txt").unlink()
    cache.write_text(text[: len(text) // 2] + "\nhalf a line")
    assert not build_again(tree)[0]


def test_a_switch_holds_for_one_build(installed):
    """What an earlier build was told does not silently stay in CMake's cache."""
    tree = installed.parent / "tree"
    cache = tree / "build" / f"python-{sys.implementation.cache_tag}" / "CMakeCache.txt"
    arguments = BUILD["CMAKE_ARGS"]
    build_again(tree, CMAKE_ARGS=f"{arguments} -DKIMI_OPS_GENERIC_ARCHITECTURES=90")
    assert "KIMI_OPS_GENERIC_ARCHITECTURES:STRING=90" in cache.read_text()
    build_again(tree)
    assert "KIMI_OPS_GENERIC_ARCHITECTURES:STRING=80" in cache.read_text()


def test_missing_native_module_is_explained(installed):
    for path in (installed / "kimi_ops").glob("_C*.so"):
        path.rename(path.with_suffix(".moved"))
    result = run(installed, "import kimi_ops")
    assert "native module kimi_ops._C" in result.stderr and "pip install ." in result.stderr


def test_cuda_on_without_nvcc_is_an_error(tmp_path):
    own = ("CUDACXX", "CUDA_PATH", "CMAKE_C_COMPILER_LAUNCHER", "CMAKE_CXX_COMPILER_LAUNCHER")
    environment = {k: v for k, v in os.environ.items() if k not in own}
    environment["PATH"] = f"{Path(sys.executable).parent}:{tmp_path}"
    for tool in ("cc", "c++", "g++", "gcc", "ld", "as", "ar", "ranlib", "nm", "cmake", "ninja"):
        found = subprocess.run(["which", tool], capture_output=True, text=True).stdout.strip()
        if found and not (tmp_path / tool).exists():
            (tmp_path / tool).symlink_to(found)
    result = subprocess.run(
        ["cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja", "-DKIMI_OPS_CUDA=on",
         "-DKIMI_OPS_PYTHON=off", "-DCMAKE_CUDA_COMPILER="],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode != 0 and "no CUDA compiler was found" in result.stderr
