# SPDX-License-Identifier: MIT
"""What other code is compiled or written against, and what checkpoints hold."""

import inspect
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

import kimi_ops
from kimi_ops import _native
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config

ROOT = Path(__file__).resolve().parents[2]
HEADERS = sorted((ROOT / "csrc").glob("kimi_ops*.h"))


def operators() -> list[str]:
    """The names in torch.ops.kimi_ops."""
    names = map(str, torch._C._dispatch_get_all_op_names())
    return sorted(n.removeprefix("kimi_ops::") for n in names if n.startswith("kimi_ops::"))


def schemas() -> dict[str, str]:
    """Schemas of the operators; names, kinds and defaults of the parameters of public functions."""
    found = {f"ops.{n}": str(getattr(torch.ops.kimi_ops, n).default._schema) for n in operators()}
    for name in kimi_ops.__all__:
        value = getattr(kimi_ops, name)
        found[name] = _signature(value)
        for key in filter(lambda key: key[0] != "_", dir(value) if inspect.isclass(value) else ()):
            member = getattr(value, key)
            if isinstance(member, property):
                found[f"{name}.{key}"] = "property"
            elif getattr(member, "__module__", "").startswith(
                "kimi_ops"
            ):  # not torch's or Python's
                found[f"{name}.{key}"] = _signature(member)
    return found


def states() -> dict[str, Any]:
    """What checkpoints hold: names, shapes and dtypes of tensors, and the keys around them."""
    config = KimiK2Config.tiny()
    model = KimiK2(config)
    ours = kimi_ops.MuonClip(kimi_ops.muon_param_groups(model))
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    ours.step()
    state = ours.state_dict()
    kept = {tuple(sorted(entry)) for entry in state["state"].values()}
    return {
        "config.json": config.to_dict(),
        "model": {name: _described(x) for name, x in model.state_dict().items()},
        "optimizer group": sorted(state["param_groups"][0]),
        "optimizer state": [list(keys) for keys in sorted(kept)],
    }


def _described(x: torch.Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def _signature(function: Any) -> str:
    signature = inspect.signature(function)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


def layouts() -> dict[str, Any]:
    """Sizes and offsets of every struct of the C headers, their constants, the exported symbols."""
    text = re.sub(r"/\*.*?\*/", "", "".join(p.read_text() for p in HEADERS), flags=re.DOTALL)
    rows = []
    for name, body in re.findall(r"typedef struct (\w+) \{([^}]*)\}", text):
        rows.append(f'"{name}", "sizeof", (double)sizeof({name})')
        for field in re.findall(r"(\w+)\s*[,;]", body):
            rows.append(f'"{name}", "{field}", (double)offsetof({name}, {field})')
    constants = re.findall(r"(KIMI_\w+) = ", text)
    constants += re.findall(r"#define (KIMI_\w+) [\d(]", text)
    rows += [f'"constants", "{name}", (double)({name})' for name in constants]
    lines = "\n".join(f'printf("%s %s %.9g\\n", {row});' for row in rows)
    included = "".join(f'#include "{header.name}"\n' for header in HEADERS)
    source = f"#include <stdio.h>\n{included}int main(void) {{\n{lines}\nreturn 0;\n}}\n"
    found: dict[str, Any] = {}
    for line in _run_c(source).splitlines():
        struct, field, number = line.split()
        found.setdefault(struct, {})[field] = json.loads(number)
    library = next(Path(_native.__file__).parent.glob("libkimi_ops.*"))
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", library], capture_output=True, text=True
    )
    found["exported"] = sorted(re.findall(r"\bkimi_\w+", symbols.stdout))
    return found


def _run_c(source: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/layouts"
        command = ["cc", "-std=c99", f"-I{ROOT}/csrc", "-xc", "-", "-o", program]
        subprocess.run(command, input=source, text=True, check=True)
        return subprocess.run([program], capture_output=True, text=True, check=True).stdout
