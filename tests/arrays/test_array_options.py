# SPDX-License-Identifier: MIT
"""What torch's ops have, arrays have: each function and option stands in `kimi_ops.numpy` and
`kimi_ops.jax`, or in the table of docs/numpy.md with a reason."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

import kimi_ops

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/numpy.md").read_text()
PASSES = ("muon_momentum_", "muon_update_", "adamw_", "squares_", "clip_factor", "clip_rows_")
MODULES = {"NumPy": "kimi_ops.numpy", "JAX": "kimi_ops.jax"}


def exceptions(framework):
    """What the page says is not there, as `function` or `function(option)`."""
    found = set()
    for names, where, _ in re.findall(r"^\| (`.*?) \| (.*?) \| (.+?) \|$", PAGE, re.MULTILINE):
        if where in ("both", framework):
            found |= set(re.findall(r"`([\w()]+)`", names))
    return found


def options(function):
    """Names of parameters with their defaults; of the passes, by the operator, names alone."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters}


def of_torch():
    """Public functions and classes, and the operators of the optimizer's passes."""
    found = {}
    for name in kimi_ops.__all__:
        value = getattr(kimi_ops, name)
        found[name] = {} if inspect.isclass(value) else options(value)
    for name in PASSES:
        schema = getattr(torch.ops.kimi_ops, name).default._schema
        found[name] = {argument.name: ... for argument in schema.arguments}
    return found


def differences(framework):
    """Functions and options that one of the two lacks, and defaults that differ."""
    module, found = importlib.import_module(MODULES[framework]), set()
    for name, theirs in of_torch().items():
        function = getattr(module, name, None) or getattr(module, name.rstrip("_"), None)
        if function is None:
            found.add(name)
        elif not inspect.isclass(function):
            ours = options(function)
            found |= {f"{name}({one})" for one in theirs.keys() ^ ours.keys()}
            both = theirs.keys() & ours.keys()
            found |= {f"{name}({one})" for one in both
                      if theirs[one] is not ... and theirs[one] != ours[one]}  # fmt: skip
    return found


@pytest.mark.parametrize("framework", MODULES)
def test_every_option_is_there_or_in_the_table(framework):
    if framework == "JAX":
        pytest.importorskip("jax")
    found, told = differences(framework), exceptions(framework)
    assert found - told == set(), "add them, or say in docs/numpy.md why not"
    assert told - found == set(), "these are there now: take them off the table"


def test_both_have_the_same_names():
    kj, kn = pytest.importorskip("kimi_ops.jax"), importlib.import_module("kimi_ops.numpy")
    ours = {name.rstrip("_") for name in kn.__all__ if not name.endswith("_backward")}
    assert ours - set(kj.__all__) == {
        "num_threads", "set_num_threads", "fused_experts_planned", "stream",
    }  # fmt: skip
    assert set(kj.__all__) - ours == {"ragged_dot"}
    for name in ("Gate", "Plan", "Fp8BlockWeight"):
        assert getattr(kn, name) is getattr(kj, name)


@pytest.mark.parametrize("framework", MODULES)
def test_options_that_are_names_have_the_types_of_torch_s(framework):
    module, seen = pytest.importorskip(MODULES[framework]), set()
    for name in set(kimi_ops.__all__) & set(module.__all__):
        theirs = getattr(kimi_ops, name)
        if inspect.isclass(theirs):
            continue
        for option, parameter in inspect.signature(theirs).parameters.items():
            if names := re.findall(r"Literal\[.*?\]", str(parameter.annotation)):
                ours = inspect.signature(getattr(module, name)).parameters[option]
                assert re.findall(r"Literal\[.*?\]", str(ours.annotation)) == names, (name, option)
                seen.add(option)
    assert seen >= {"score_function", "select", "by", "restarts", "activation"}
