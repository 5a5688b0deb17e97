# SPDX-License-Identifier: MIT
"""The structs that csrc/bindings/xla/abi.h declares are those of the header that jaxlib carries."""

import subprocess
from pathlib import Path

import pytest

jax = pytest.importorskip("jax")

ROOT = Path(__file__).resolve().parents[2]
BASE = {"struct_size": "struct_size", "extension": "extension_start"}
LIST = BASE | {"size": "size", "types": "types"}
# ours -> (theirs, {our member: their member})
STRUCTS = {
    "Extension": ("Extension_Base", {n: n for n in ("struct_size", "type", "next")}),
    "Version": ("Api_Version", BASE | {"major": "major_version", "minor": "minor_version"}),
    "Metadata": (
        "Metadata",
        {"struct_size": "struct_size", "version": "api_version", "traits": "traits"},
    ),
    "MetadataExtension": ("Metadata_Extension", {"base": "extension_base", "metadata": "metadata"}),
    "CreateError": ("Error_Create_Args", BASE | {"message": "message", "code": "errc"}),
    "GetStream": ("Stream_Get_Args", BASE | {"context": "ctx", "stream": "stream"}),
    "Api": (
        "Api",
        BASE
        | {"version": "api_version", "internal": "internal_api"}
        | {"create_error": "XLA_FFI_Error_Create", "get_stream": "XLA_FFI_Stream_Get"},
    ),
    "Buffer": ("Buffer", BASE | {n: n for n in ("dtype", "data", "rank", "dims")}),
    "Span": ("ByteSpan", {"text": "ptr", "length": "len"}),
    "Scalar": ("Scalar", {"dtype": "dtype", "value": "value"}),
    "Array": ("Array", {n: n for n in ("dtype", "size", "data")}),
    "Buffers": ("Args", LIST | {"items": "args"}),
    "Attributes": ("Attrs", LIST | {"names": "names", "items": "attrs"}),
    "CallFrame": (
        "CallFrame",
        BASE
        | {"api": "api", "context": "ctx", "stage": "stage", "arguments": "args"}
        | {"results": "rets", "attributes": "attrs"},
    ),
}
NUMBERS = {
    "kMajor": "API_MAJOR",
    "kMetadata": "Extension_Metadata",
    "kCommandBufferCompatible": "HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE",
    "kInvalidArgument": "Error_Code_INVALID_ARGUMENT",
    "kUnimplemented": "Error_Code_UNIMPLEMENTED",
    "kInternal": "Error_Code_INTERNAL",
    "kArray": "AttrType_ARRAY",
    "kScalar": "AttrType_SCALAR",
    "kString": "AttrType_STRING",
} | {f"k{n}": f"DataType_{n}" for n in ("S32", "S64", "U8", "U32", "F16", "F32", "F64", "BF16")}
NUMBERS |= {"kPred": "DataType_PRED", "kF8": "DataType_F8E4M3FN"}


def test_our_structs_are_those_of_xla():
    lines = []
    for ours, (theirs, members) in STRUCTS.items():
        for mine, yours in members.items():
            lines += [
                f"static_assert(offsetof(kimi::xla::{ours}, {mine}) == "
                f"offsetof(XLA_FFI_{theirs}, {yours}));",
                f"static_assert(sizeof(kimi::xla::{ours}::{mine}) == "
                f"sizeof(XLA_FFI_{theirs}::{yours}));",
            ]  # fmt: skip
    # what XLA fills may be longer in a later version; what we fill is not
    for ours in ("CreateError", "GetStream"):
        theirs = STRUCTS[ours][0]
        lines.append(f"static_assert(sizeof(kimi::xla::{ours}) == sizeof(XLA_FFI_{theirs}));")
    lines += [
        f"static_assert(int(kimi::xla::{k}) == int(XLA_FFI_{v}));" for k, v in NUMBERS.items()
    ]
    source = '#include "xla/ffi/api/c_api.h"\n#include "bindings/xla/abi.h"\n' + "\n".join(lines)
    command = ["c++", "-std=c++20", "-fsyntax-only", "-Wno-invalid-offsetof", "-x", "c++", "-"]
    folders = [f"-I{jax.ffi.include_dir()}", f"-I{ROOT}/csrc"]
    result = subprocess.run(command + folders, input=source, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
