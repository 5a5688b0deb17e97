# SPDX-License-Identifier: MIT
"""The Hopper primitives of csrc/device on a GPU against their host models, word for word.

The same scheme as test_primitives.py, from primitives_sm90.cu: TMA, wgmma, stmatrix, clusters,
launches that overlap. The host build is held against numpy wherever it runs.
"""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from test_primitives import build_gpu, build_host, gpu_missing

SOURCE = Path(__file__).with_name("primitives_sm90.cu")
N = 8192
POINTS = [(0, 0, 0), (1, 2, 1), (-2, -3, -1), (10, 9, 2), (40, 0, 0)]  # x counts 16 bytes
PLANES, ROWS, ROW_BYTES, ROW_STRIDE = 3, 11, 200, 208  # of the tensor
BOX_PLANES, BOX_ROWS = 2, 10
TENSOR_WORDS = PLANES * ROWS * ROW_STRIDE // 4
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "float": 4, "e4m3": 1}


def hopper_missing() -> str | None:
    """Why these cannot run on a GPU, or None."""
    if reason := gpu_missing():
        return reason
    driver = ctypes.CDLL("libcuda.so.1")
    device, major = ctypes.c_int(), ctypes.c_int()
    attribute_major = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    if driver.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return "no GPU: the driver finds no device 0"
    if driver.cuDeviceGetAttribute(ctypes.byref(major), attribute_major, device) != 0:
        return "the driver does not say what the GPU is"
    return None if major.value == 9 else f"no Hopper GPU: its compute capability is {major.value}.x"


def words_of(name: str) -> int:
    """How many words the kernel writes."""
    kind, *rest = name.split()
    if kind == "wgmma":
        return 64 * int(rest[1])
    if kind == "load":
        return len(POINTS) * placed(int(rest[1]), rest[2]).size // 4
    return {"stmatrix": 1024, "convert": 1024, "cluster": 492, "overlap": 256, "stage": 4608}.get(
        kind, TENSOR_WORDS
    )


def inputs(name: str) -> np.ndarray:
    return np.random.default_rng(len(name)).integers(0, 2**32, N, dtype=np.uint32)


def run(library: ctypes.CDLL, name: str) -> np.ndarray:
    words, out = inputs(name), np.zeros(words_of(name), np.uint32)
    pointer = ctypes.POINTER(ctypes.c_uint32)
    message = library.kimi_run_primitive(
        name.encode(), words.ctypes.data_as(pointer), N, out.ctypes.data_as(pointer), len(out)
    )
    assert message == b"", message.decode()
    return out


def names(library: ctypes.CDLL) -> list[str]:
    library.kimi_primitives.restype = ctypes.c_char_p
    return library.kimi_primitives().decode().split("\n")[:-1]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build_host(SOURCE, tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if reason := hopper_missing():
        pytest.skip(reason)
    architecture = "-gencode=arch=compute_90a,code=sm_90a"
    return build_gpu(SOURCE, tmp_path_factory.mktemp("gpu"), architecture)


def placed(rank: int, swizzle: str) -> np.ndarray:
    """Where each byte [plane, row, byte] of a box lies in shared memory."""
    row_bytes, planes = (128 if swizzle == "k128" else 48), (BOX_PLANES if rank == 3 else 1)
    row = np.arange(planes * BOX_ROWS).reshape(planes, BOX_ROWS, 1)
    byte = np.arange(row_bytes)
    if swizzle == "k128":
        return row * 128 + ((byte // 16) ^ (row % 8)) * 16 + byte % 16
    return row * row_bytes + byte


def elements(point: tuple[int, int, int], rank: int, swizzle: str, size: int) -> np.ndarray:
    """Bytes of the box in the order of `placed` -> byte of the tensor, or -1 out of bounds."""
    shape = placed(rank, swizzle).shape
    z, y, byte = np.ogrid[: shape[0], : shape[1], : shape[2]]
    x = point[0] * (16 // size) + byte // size
    y = point[1] + y
    z = (point[2] + z) if rank == 3 else z
    inside = (x >= 0) & (x < ROW_BYTES // size) & (y >= 0) & (y < ROWS) & (z >= 0) & (z < PLANES)
    return np.where(inside, (z * ROWS + y) * ROW_STRIDE + x * size + byte % size, -1)


def small_integers(words: np.ndarray) -> np.ndarray:
    return (words % 9).astype(np.int64) - 4


def encoded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes of small integers in the storage type."""
    if dtype == "e4m3":
        magnitudes = np.array([0, 0x38, 0x40, 0x44, 0x48])
        return (magnitudes[np.abs(values)] | np.where(values < 0, 0x80, 0)).astype(np.uint8)
    bits = values.astype(np.float16 if dtype == "fp16" else np.float32)
    if dtype == "bf16":
        bits = (bits.view(np.uint32) >> 16).astype(np.uint16)
    return np.ascontiguousarray(bits).view(np.uint8)


def test_hopper_primitives_agree_with_their_host_models(
    gpu: ctypes.CDLL, host: ctypes.CDLL
) -> None:
    wrong = [name for name in names(host) if (run(gpu, name) != run(host, name)).any()]
    assert not wrong


def test_host_model_of_tma_loads(host: ctypes.CDLL) -> None:
    checked = 0
    for name in names(host):
        kind, *rest = name.split()
        if kind != "load":
            continue
        dtype, rank, swizzle = rest[0], int(rest[1]), rest[2]
        tensor = np.append(inputs(name).view(np.uint8), 0)  # -1 is a zero
        place = placed(rank, swizzle)
        out = run(host, name).view(np.uint8).reshape(len(POINTS), place.size)
        for i, point in enumerate(POINTS):
            want = tensor[elements(point, rank, swizzle, ELEMENT_BYTES[dtype])]
            np.testing.assert_array_equal(out[i][place], want, f"{name} at {point}")
        checked += 1
    assert checked == 9


def test_host_model_of_tma_stores_and_sums(host: ctypes.CDLL) -> None:
    checked = 0
    for name in names(host):
        kind, *rest = name.split()
        if kind not in ("store", "add"):
            continue
        dtype, rank, swizzle = rest[0], int(rest[1]), rest[2]
        size, place = ELEMENT_BYTES[dtype], placed(rank, swizzle)
        sums = np.zeros(TENSOR_WORDS * 4 // size + 1, np.int64)
        touched = np.zeros(len(sums), bool)
        for i, point in enumerate(POINTS):
            count = place.size // size
            tile = small_integers(inputs(name)[i * count : (i + 1) * count])
            first = slice(None, None, size)  # the first byte of each element
            values = tile[place[..., first] // size]
            at = elements(point, rank, swizzle, size)[..., first]
            at = np.where(at < 0, len(sums) - 1, at // size)
            sums[at] = sums[at] + values if kind == "add" else values
            touched[at] = True
        want = np.where(np.repeat(touched[:-1], size), encoded(sums[:-1], dtype), 0)
        np.testing.assert_array_equal(run(host, name).view(np.uint8), want, name)
        checked += 1
    assert checked == 13


def test_host_model_of_wgmma(host: ctypes.CDLL) -> None:
    checked = 0
    for name in names(host):
        kind, *rest = name.split()
        if kind != "wgmma":
            continue
        depth, n = 128 // ELEMENT_BYTES[rest[0]], int(rest[1])
        words = inputs(name)
        a = small_integers(words[np.arange(64 * depth) % N]).reshape(64, depth)
        b = small_integers(words[(np.arange(n * depth) + 1000) % N] // 9).reshape(n, depth)
        start = (np.arange(64)[:, None] + np.arange(n)) % 16 if n % 16 == 0 else 0
        out = run(host, name).view(np.float32).reshape(64, n)
        np.testing.assert_array_equal(out, a @ b.T + start, name)
        checked += 1
    assert checked == 56


def test_host_model_of_conversion_to_e4m3(host: ctypes.CDLL) -> None:
    words = inputs("convert")[:1024]
    number = (0x3A000000 + words % 0x0A000000).astype(np.uint32).view(np.float32)
    pairs = words.view(np.float32), np.where(words % 2, -number, number)
    for x, shift in zip(pairs, (0, 8), strict=True):
        got = run(host, "convert") >> shift & 0xFF
        near = torch.from_numpy(np.clip(x, -448, 448)).to(torch.float8_e4m3fn)
        want = np.where(np.isnan(x), 0x7F, near.view(torch.uint8).numpy())
        np.testing.assert_array_equal(got, want)


def test_host_model_of_launches_that_overlap(host: ctypes.CDLL) -> None:
    words = inputs("overlap")[:256]
    want = np.zeros_like(words)
    for _ in range(40 * 200):
        want = 5 * want + words
    np.testing.assert_array_equal(run(host, "overlap"), want)


def test_host_model_of_a_stage(host: ctypes.CDLL) -> None:
    rows = inputs("stage").view(np.uint8).reshape(128, 2, 128)  # [depth, plane, byte]
    box = np.zeros((2, 64, 128), np.uint8)
    box[:, :28] = rows[100:].transpose(1, 0, 2)
    plane, row, byte = np.ogrid[:2, :64, :128]
    place = (plane * 64 + row) * 128 + ((byte // 16) ^ (row % 8)) * 16 + byte % 16
    out = run(host, "stage").view(np.uint8)
    np.testing.assert_array_equal(out[place], box)
    turned = inputs("stage")[:512].view(np.uint8).reshape(128, 16)[::-1]
    np.testing.assert_array_equal(out[2 * 64 * 128 :].reshape(128, 16), turned)


def test_host_model_of_stmatrix_and_clusters(host: ctypes.CDLL) -> None:
    halves = inputs("stmatrix")[:1024].view(np.uint16).reshape(2, 4, 32, 4, 2)
    # [form, warp, lane, matrix, half] -> [form, warp, matrix, row, column]
    matrices = halves.transpose(0, 1, 3, 2, 4).reshape(2, 4, 4, 8, 8)
    matrices[1] = matrices[1].transpose(0, 1, 3, 2)
    rows = matrices.reshape(2, 4, 32, 8)[:, :, np.arange(32) ^ 5]
    out = run(host, "stmatrix").view(np.uint16).reshape(2, 4, 32, 8)
    np.testing.assert_array_equal(out, rows)

    tensor = np.append(inputs("cluster").view(np.uint8), 0)
    boxes = [tensor[elements((r, r, 0), 2, "kNone", 1)].ravel() for r in range(2)]
    out = run(host, "cluster").reshape(2, 246)
    for rank in range(2):
        np.testing.assert_array_equal(out[rank, :240].view(np.uint8), np.concatenate(boxes))
        np.testing.assert_array_equal(out[rank, 240:242], [rank, 2])
        np.testing.assert_array_equal(out[rank, 242:], inputs("cluster")[4 - 4 * rank :][:4])
