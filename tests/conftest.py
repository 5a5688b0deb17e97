# SPDX-License-Identifier: MIT
"""The engines that the op tests run on: every instruction set of this machine, AMX on a model of
its tiles (amx_model), the CUDA kernels run on the host (simt; simt_sm80 without those of Hopper),
and a GPU where there is one. A test that takes `engine` runs on each."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kimi_ops import _native

# Before anything loads jax: two devices, of one processor.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")

ROOT = Path(__file__).resolve().parent.parent
ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")


def _load_simt() -> ModuleType | None:
    default = ROOT / "build" / f"python-{sys.implementation.cache_tag}"
    folder = Path(os.environ.get("KIMI_OPS_SIMT_DIR", default))
    for path in folder.glob("_simt*.so"):
        spec = importlib.util.spec_from_file_location("_simt", path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return _native.use(module)
    return None


SIMT = _load_simt()
AVAILABLE = ISAS[: ISAS.index(_native._C.detected_isa()) + 1]


@dataclass(frozen=True)
class Engine:
    name: str

    @property
    def device(self) -> str:
        return "cuda" if self.name.startswith("cuda") else "cpu"

    @property
    def slow(self) -> bool:
        """A fiber switch for every barrier: keep the shapes small."""
        return self.name.startswith("simt")


def _skip_reason(name: str) -> str | None:
    if name in ISAS and name not in AVAILABLE:
        return f"this machine has no {name}"
    if name.startswith(("simt", "amx_model")) and SIMT is None:
        return "no _simt module: build with KIMI_OPS_TESTS=ON (make test does)"
    if name == "amx_model" and SIMT is not None and SIMT.detected_isa() != "amx":
        return "the model of the AMX tiles needs a processor with avx512_bf16"
    if name.startswith("cuda") and not (
        _native._C.cuda_architectures() and torch.cuda.is_available()
    ):
        return "no GPU, or a build without CUDA kernels"
    if name == "cuda_sm80" and torch.cuda.get_device_capability()[0] != 9:
        return "no Hopper GPU: cuda runs the same kernels"
    return None


@contextmanager
def _engine(name: str) -> Iterator[Engine]:
    if reason := _skip_reason(name):
        pytest.skip(reason)
    isa, engine = _native._C.current_isa(), _native.engine
    module = SIMT if name.startswith("simt") else _native._C
    if name in ISAS:
        _native._C.set_isa(name)
    elif name.startswith("simt"):
        assert SIMT is not None
        SIMT.serve_cpu_tensors_by_cuda(True)
        _native.engine = SIMT
    elif name == "amx_model":
        assert SIMT is not None
        SIMT.set_isa("amx")
        SIMT.serve_cpu_tensors_by_cuda(False)
        _native.engine = SIMT
    if name.endswith("_sm80"):
        module.set_max_sm(80)
    yield Engine(name)
    module.set_max_sm(0)
    _native._C.set_isa(isa)
    _native.engine = engine


@pytest.fixture(params=[*ISAS, "amx_model", "simt", "cuda"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with _engine(request.param) as engine:
        yield engine


@pytest.fixture(params=[*ISAS, "amx_model"])
def cpu_engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """`engine` for what CPU kernels alone do or promise."""
    with _engine(request.param) as engine:
        yield engine


@pytest.fixture(params=[*ISAS, "amx_model", "simt", "simt_sm80", "cuda", "cuda_sm80"])
def gemm_engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """`engine` for ops with kernels of their own for Hopper; new tensors lie on its device."""
    with _engine(request.param) as engine, torch.device(engine.device):
        yield engine


@pytest.fixture
def simt_engine() -> Iterator[Engine]:
    """The CUDA kernels on the host alone."""
    with _engine("simt") as engine:
        yield engine


@pytest.fixture
def two_thread_counts() -> Iterator[tuple[int, int]]:
    """(1, more than 1); restores torch's number."""
    before = torch.get_num_threads()
    yield 1, max(2, before)
    torch.set_num_threads(before)
