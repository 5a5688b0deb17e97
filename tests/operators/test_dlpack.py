# SPDX-License-Identifier: MIT
"""The structs that csrc/bindings/dlpack.h declares are those of the header that torch carries."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
HEADER = Path(torch.__file__).parent / "include" / "ATen" / "dlpack.h"

# ours -> (theirs, {our member: their member})
STRUCTS = {
    "Version": ("DLPackVersion", {"major": "major", "minor": "minor"}),
    "Device": ("DLDevice", {"type": "device_type", "id": "device_id"}),
    "DataType": ("DLDataType", {"code": "code", "bits": "bits", "lanes": "lanes"}),
    "Tensor": (
        "DLTensor",
        {name: name for name in ("data", "device", "ndim", "dtype", "shape", "strides")}
        | {"byte_offset": "byte_offset"},
    ),
    "Managed": (
        "DLManagedTensor",
        {"tensor": "dl_tensor", "context": "manager_ctx", "deleter": "deleter"},
    ),
    "ManagedVersioned": (
        "DLManagedTensorVersioned",
        {
            "version": "version", "context": "manager_ctx", "deleter": "deleter", "flags": "flags",
            "tensor": "dl_tensor",
        },
    ),
    "ExchangeHeader": ("DLPackExchangeAPIHeader", {"version": "version", "previous": "prev_api"}),
    "Exchange": (
        "DLPackExchangeAPI",
        {
            "header": "header", "allocate": "managed_tensor_allocator",
            "to_managed": "managed_tensor_from_py_object_no_sync",
            "to_object": "managed_tensor_to_py_object_no_sync",
            "view": "dltensor_from_py_object_no_sync", "current_stream": "current_work_stream",
        },
    ),
}  # fmt: skip
CONSTANTS = {
    "kMajor": "DLPACK_MAJOR_VERSION", "kCpu": "kDLCPU", "kCuda": "kDLCUDA", "kInt": "kDLInt",
    "kUInt": "kDLUInt", "kFloat": "kDLFloat", "kBfloat": "kDLBfloat", "kComplex": "kDLComplex",
    "kBool": "kDLBool", "kFloat8_e4m3fn": "kDLFloat8_e4m3fn",
    "kFloat8_e4m3fnuz": "kDLFloat8_e4m3fnuz", "kFloat8_e5m2": "kDLFloat8_e5m2",
    "kFloat8_e5m2fnuz": "kDLFloat8_e5m2fnuz", "kFloat8_e8m0fnu": "kDLFloat8_e8m0fnu",
    "kFloat4_e2m1fn": "kDLFloat4_e2m1fn", "kReadOnly": "DLPACK_FLAG_BITMASK_READ_ONLY",
}  # fmt: skip


def _compiles(assertions: list[str], folder: Path) -> str:
    """The compiler's errors for a file with these static assertions; empty for none."""
    source = folder / "layout.cpp"
    lines = [
        "#include <cstddef>", f'#include "{HEADER}"', '#include "bindings/dlpack.h"',
        "namespace ours = kimi::dlpack;",
        *(f'static_assert({condition}, "");' for condition in assertions),
    ]  # fmt: skip
    source.write_text("\n".join(lines))
    command = ["c++", "-std=c++20", "-fsyntax-only", f"-I{ROOT / 'csrc'}", str(source)]
    return subprocess.run(command, capture_output=True, text=True).stderr


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_structs_and_constants_are_those_of_torch(tmp_path):
    sizes = [f"sizeof(ours::{our}) == sizeof({their})" for our, (their, _) in STRUCTS.items()]
    offsets = [
        f"offsetof(ours::{our}, {ours}) == offsetof({their}, {theirs})"
        for our, (their, members) in STRUCTS.items()
        for ours, theirs in members.items()
    ]
    constants = [f"int(ours::{our}) == int({their})" for our, their in CONSTANTS.items()]
    assert not _compiles(sizes + offsets + constants, tmp_path)
    assert _compiles([sizes[0].replace("==", "!=")], tmp_path), "the assertions cannot fail"


@pytest.mark.parametrize("our", STRUCTS)
def test_every_member_is_compared(our):
    text = (ROOT / "csrc/bindings/dlpack.h").read_text()
    body = text.split(f"struct {our} {{", 1)[1].split("\n};", 1)[0]
    members = set()
    for line in body.splitlines():
        statement = line.split("//")[0].strip()
        if "(*" in statement:
            members.add(statement.split("(*", 1)[1].split(")")[0])
        elif statement.endswith(";") and "operator" not in statement:
            names = statement[:-1].split(",")
            members |= {name.split()[-1].lstrip("*") for name in names}
    assert members == set(STRUCTS[our][1])
