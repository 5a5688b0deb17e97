# SPDX-License-Identifier: MIT
"""Each primitive of csrc/device on a GPU against its host model, word for word.

primitives.cu is built twice: by nvcc and for the host runner. The host build is also held against
numpy here, so that the comparison has something true to compare with. test_primitives_sm90.py does
the same with what only Hopper has.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("primitives.cu")
RUNNER = ROOT / "tests" / "simt"
LIMITS = ROOT / "csrc" / "common" / "sm.cpp"  # what launch() asks
N = 4096
OUTPUTS = {
    "warp": 12 * N,
    "math": 8 * N,
    "score": 5 * N,
    "reciprocal": 2,
    "filter": 2,
    "dtype": 8 * N,
    "atomic": 11,
    "vec": 2 * N,
    "barrier": N,
    "mbarrier": 128,
    "cp_async": 2 * N,
    "matrix": 16 * N,
}


def gpu_missing() -> str | None:
    """Why no GPU test can run, or None."""
    if shutil.which("nvcc") is None:
        return "no nvcc on the PATH"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no GPU: libcuda.so.1 cannot be loaded"
    count = ctypes.c_int()
    if (
        driver.cuInit(0) != 0
        or driver.cuDeviceGetCount(ctypes.byref(count)) != 0
        or not count.value
    ):
        return "no GPU: the driver finds no device"
    return None


def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.kimi_run_primitive.restype = ctypes.c_char_p
    return library


def runner() -> list[str]:
    """The host runner: the build's, or its sources where it is missing or older than they are."""
    sources = [p for p in RUNNER.glob("*.cpp") if not p.name.startswith(("test_", "bench_"))]
    sources.append(LIMITS)
    python = f"python-{sys.implementation.cache_tag}"
    archive = ROOT / "build" / python / "tests" / "simt" / "libkimi_simt.a"
    newest = max(p.stat().st_mtime for p in [*sources, *RUNNER.glob("*.h")])
    fresh = archive.exists() and archive.stat().st_mtime > newest
    return [str(archive)] if fresh else [str(p) for p in sources]


def compile_host(source: Path, folder: Path) -> Path:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler: {compiler}")
    path = folder / f"{source.stem}_host.so"
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas"]
    flags += ["-Wno-psabi", "-DKIMI_HOST_SIMT", f"-I{RUNNER}", f"-I{ROOT / 'csrc'}"]
    command = [compiler, *flags, "-x", "c++", str(source), "-x", "none", *runner(), "-o", str(path)]
    subprocess.run(command, check=True)
    return path


def build_host(source: Path, folder: Path) -> ctypes.CDLL:
    return load(compile_host(source, folder))


def compile_gpu(source: Path, folder: Path, architecture: str) -> Path:
    path = folder / f"{source.stem}_gpu.so"
    flags = ["-std=c++20", "-O3", "-shared", "-Xcompiler=-fPIC", architecture, "-cudart=static"]
    flags += ["--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["nvcc", *flags, str(source), str(LIMITS), "-o", str(path)], check=True)
    return path


def build_gpu(source: Path, folder: Path, architecture: str) -> ctypes.CDLL:
    return load(compile_gpu(source, folder, architecture))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build_host(SOURCE, tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if reason := gpu_missing():
        pytest.skip(reason)
    return build_gpu(SOURCE, tmp_path_factory.mktemp("gpu"), "-arch=native")


def inputs(name: str) -> np.ndarray:
    """Random words; floats of all magnitudes with the special ones for arithmetic."""
    random = np.random.default_rng(len(name))
    words = random.integers(0, 2**32, N, dtype=np.uint32)
    if name in ("math", "score", "dtype"):
        usual = random.normal(0, 4, N // 2).astype(np.float32)
        words[: N // 2] = usual.view(np.uint32)
        special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3.4e38, 88, -87])
        words[: len(special)] = special.astype(np.float32).view(np.uint32)
    if name in ("warp", "atomic"):
        words &= np.uint32(0x80000FFF)
    return words


def run(library: ctypes.CDLL, name: str) -> np.ndarray:
    words, out = inputs(name), np.zeros(OUTPUTS[name], np.uint32)
    pointer = ctypes.POINTER(ctypes.c_uint32)
    message = library.kimi_run_primitive(
        name.encode(), words.ctypes.data_as(pointer), N, out.ctypes.data_as(pointer), len(out)
    )
    assert message == b"", message.decode()
    return out


def one_nan(words: np.ndarray) -> np.ndarray:
    """The sign and payload of a NaN are the machine's own."""
    return np.where(np.isnan(words.view(np.float32)), np.uint32(0x7FC00000), words)


@pytest.mark.parametrize("name", OUTPUTS)
def test_device_half_agrees_with_host_model(name: str, gpu: ctypes.CDLL, host: ctypes.CDLL) -> None:
    on_gpu, on_host = run(gpu, name), run(host, name)
    if name == "reciprocal":  # the estimate is the chip's own: one ulp is what the model assumes
        assert on_gpu[0] == 0 and on_host[0] == 0
        assert on_gpu[1] <= 1
        return
    if name == "filter":  # estimates are the chip's own; the bound holds for every logit
        assert on_gpu[0] == 0 and on_host[0] == 0 and on_gpu[1] > 0
        return
    if name in ("math", "score"):
        on_gpu, on_host = one_nan(on_gpu), one_nan(on_host)
    np.testing.assert_array_equal(on_gpu, on_host)


def test_host_model_of_warp_operations(host: ctypes.CDLL) -> None:
    v, out = inputs("warp").reshape(-1, 32), run(host, "warp").reshape(-1, 32, 12)
    lanes = np.arange(32)
    for column, mask in enumerate((1, 16, 31)):
        np.testing.assert_array_equal(out[:, :, column], v[:, lanes ^ mask])
    np.testing.assert_array_equal(out[:, :, 3], np.repeat(v[:, :1], 32, axis=1))
    bits = np.uint32(1) << lanes.astype(np.uint32)
    np.testing.assert_array_equal(out[:, 0, 5], ((v & 1) * bits).sum(axis=1, dtype=np.uint32))
    equal = v[:, :, None] % 5 == v[:, None, :] % 5
    np.testing.assert_array_equal(out[:, :, 6], (equal * bits).sum(axis=2, dtype=np.uint32))
    np.testing.assert_array_equal(out[:, 0, 7], v.max(axis=1))
    np.testing.assert_array_equal(out[:, 0, 10].view(np.int32), v.view(np.int32).min(axis=1))


def test_host_model_of_arithmetic(host: ctypes.CDLL) -> None:
    a = inputs("math").view(np.float32)
    b, c = np.roll(a, -1), np.roll(a, -2)
    out = run(host, "math").reshape(N, 8)
    with np.errstate(all="ignore"):
        expected = [a + b, a - b, a * b, None, a / b, np.float32(1) / a, np.sqrt(a)]
        expected.append(np.maximum(a, b) + np.float32(0))
        exact = a.astype(np.longdouble) * b.astype(np.longdouble) + c.astype(np.longdouble)
        tiny = np.abs(exact) < 1e-30
    for column, want in enumerate(expected):
        if want is not None:
            got = one_nan(np.ascontiguousarray(out[:, column]))
            np.testing.assert_array_equal(got, one_nan(want.view(np.uint32)))
    with np.errstate(all="ignore"):
        fused, want = out[:, 3].copy().view(np.float32), exact.astype(np.float32)
    usual = np.isfinite(want) & ~tiny
    assert (np.abs(fused[usual].view(np.int32) - want[usual].view(np.int32)) <= 1).all()


def test_host_model_of_the_rest(host: ctypes.CDLL) -> None:
    np.testing.assert_array_equal(run(host, "reciprocal"), [0, 1])
    beyond, largest = run(host, "filter")
    assert beyond == 0 and 0 < largest <= 1.25 * 2**8  # of a bound of 1.25 * 2^-20
    v, out = inputs("dtype"), run(host, "dtype").reshape(N, 8)
    half = (v & 0xFFFF).astype(np.uint16).view(np.float16).astype(np.float32)
    nan = np.isnan(half)
    np.testing.assert_array_equal(out[~nan, 1], half.view(np.uint32)[~nan])
    np.testing.assert_array_equal(out[:, 0], v << 16)
    codes = np.arange(127)  # e4m3 without its sign, rising
    e4m3 = np.where(codes < 8, codes * 2.0**-9, (1 + codes % 8 / 8) * 2.0 ** (codes // 8 - 7))
    np.testing.assert_array_equal(
        np.abs(out[:, 4].view(np.float32)), np.append(e4m3, np.nan)[v & 127]
    )
    with np.errstate(invalid="ignore"):
        x = np.abs(v.view(np.float32).astype(np.float64))
    below = np.clip(np.searchsorted(e4m3, np.minimum(x, 448), side="right") - 1, 0, 125)
    middle = (e4m3[below] + e4m3[below + 1]) / 2
    code = below + ((x > middle) | ((x == middle) & (below % 2 == 1)))
    code = np.where(np.isnan(x), 127, code | (v >> 31 << 7))
    np.testing.assert_array_equal(out[:, 5], code)
    pair = np.where(np.isnan(x), 0x7FFF7FFF, out[:, [2, 3]].T * 0x10001 ^ 0x80000000)
    np.testing.assert_array_equal(out[:, [6, 7]].T, pair)
    v, out = inputs("atomic"), run(host, "atomic")
    np.testing.assert_array_equal(out[:7], [v[v % 7 == i].sum(dtype=np.uint32) for i in range(7)])
    assert out[9] == N
    assert out[10] == v.reshape(-1, 128).min(axis=1).sum(dtype=np.uint32)  # 128 threads a block
    v, out = inputs("vec"), run(host, "vec").reshape(2, -1, 4)
    np.testing.assert_array_equal(out[0].ravel(), v)
    np.testing.assert_array_equal(out[1, :, 0], v.reshape(-1, 4)[:, 0] ^ v.reshape(-1, 4)[:, 3])
    v, out = inputs("barrier").reshape(-1, 2, 64), run(host, "barrier").reshape(-1, 128)
    np.testing.assert_array_equal(out, v[:, ::-1].reshape(-1, 128))
    v, out = inputs("mbarrier").reshape(-1, 32), run(host, "mbarrier")
    lanes, total = np.arange(32), np.zeros(32, np.uint32)
    for i, row in enumerate(v):
        total = total * np.uint32(31) + row[(lanes + i) % 32]
    np.testing.assert_array_equal(out[:96], np.tile(total, 3))


def test_host_model_of_matrices(host: ctypes.CDLL) -> None:
    v, out = inputs("cp_async").reshape(-1, 128, 4), run(host, "cp_async").reshape(2, -1, 128, 4)
    np.testing.assert_array_equal(out[0], v[:, ::-1])
    rows = (np.arange(128) + 1) % 128
    np.testing.assert_array_equal(out[1], v[:, rows] * (rows % 3 != 0)[None, :, None])

    v, out = inputs("matrix").reshape(-1, 4, 32), run(host, "matrix").reshape(-1, 4, 32, 16)
    lanes = np.arange(32)
    g, t = lanes // 4, lanes % 4
    for block, got in zip(v, out, strict=True):
        raw = block.reshape(32, 4)  # rows of 16 bytes
        halves = raw.view(np.uint16)
        shifts = np.array([0, 16], np.uint32)
        m = ((block.reshape(-1, 1) >> shifts) & 15).astype(np.float32).reshape(16, 16) - 8
        for warp in range(4):
            for i in range(4):
                row = (8 * i + g + 5 * warp) % 32
                np.testing.assert_array_equal(got[warp, :, i], raw[row, t])
                low, high = (
                    halves[(8 * i + 2 * t + k + 5 * warp) % 32, g].astype(np.uint32) for k in (0, 1)
                )
                np.testing.assert_array_equal(got[warp, :, 4 + i], low | high << np.uint32(16))
            product = m @ m[(np.arange(16) + 3 * warp) % 16, :8]
            for i in range(4):
                old = (block[warp] >> np.uint32(8 * i)) & 63
                want = (product[g + i // 2 * 8, 2 * t + i % 2] + old).astype(np.float32)
                for first in (8, 12):
                    np.testing.assert_array_equal(got[warp, :, first + i].view(np.float32), want)
