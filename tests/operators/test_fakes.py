# SPDX-License-Identifier: MIT
"""What compilers are told of every operator's results: shapes, dtypes and strides of the real ones,
for tensors that lie in memory as they may."""

import contextlib

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import kimi_ops
from kimi_ops.operators import fp8, muon_clip, newton_schulz
from tests.operators.calls import CALLS, OFFSETS, WEIGHT, f, flat, i
from tests.repo import messages
from tests.repo.interfaces import operators

LAYOUTS = {
    "dense": lambda x: x,
    "columns": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "padded": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]] if x.dim() else x,
    "one row": lambda x: x[:1].expand(x.shape) if x.dim() == 2 else x,
}
ROWS = fp8.fp8_rows(f(6, 8))
EDGES = torch.tensor([-1.0, 1.0])
MORE = {
    "gate_plan": (lambda x: kimi_ops.gate_plan(x, 2), lambda: [f(4, 16)]),
    "topk_gate_given": (
        lambda x: kimi_ops.topk_gate(x, ids=messages.ids()), lambda: [f(4, 16)],
    ),
    "sequence_balance_loss": (
        lambda x: kimi_ops.sequence_balance_loss(x, messages.ids()), lambda: [f(4, 16)],
    ),
    "quantile_histogram": (
        lambda x: kimi_ops.quantile_histogram_(i([0] * 5).repeat(16, 1), x, 2, bounds=EDGES),
        lambda: [f(4, 16)],
    ),
    "z_loss": (kimi_ops.z_loss, lambda: [f(4, 16)]),
    "sort_chunks": (lambda x: kimi_ops.sort_chunks(x, i(2, 2), i(1, 0)), lambda: [f(4, 6)]),
    "wgrad": (
        lambda a, dc: kimi_ops.grouped_gemm_wgrad(a, dc, OFFSETS), lambda: [f(6, 8), f(6, 5)],
    ),
    "fp8": (
        lambda s: fp8.grouped_gemm_fp8(
            ROWS[0], s, *WEIGHT.tensors().values(), OFFSETS, None, torch.bfloat16
        ),
        lambda: [ROWS[1]],
    ),
    "fp8 out": (
        lambda out: fp8.grouped_gemm_fp8_out(
            *ROWS, *WEIGHT.tensors().values(), OFFSETS, None, out
        ),
        lambda: [f(6, 5)],
    ),
    "matrix_product": (
        lambda a, b: newton_schulz.matrix_product(a, b, None, 1.0, 0.0, False),
        lambda: [f(4, 6), f(6, 4)],
    ),
    "attention_max_logits": (
        lambda q, k: kimi_ops.attention_max_logits(q, k, 1.0), lambda: [f(1, 2, 4, 8)] * 2,
    ),
    "squares": (
        lambda x: muon_clip.squares_(torch.zeros(1).double(), [x], [0, 1], [24]), lambda: [f(4, 6)],
    ),
    "adamw": (
        lambda p, g, m, v: muon_clip.adamw_(
            [p], [g], [m], [v], [torch.ones(())], 0.1, 0.9, 0.99, 1e-8, 0.1, False, True, None, [],
            False, None, None, None,
        ),
        lambda: [f(4, 6) for _ in range(4)],
    ),
    "clip_factor": (lambda x: muon_clip.clip_factor(x, [0, 1], 1.0), lambda: [f(2).double()]),
}  # fmt: skip


class Compared(TorchDispatchMode):
    """Runs every operator of this library a second time, on shapes alone."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        real = function(*args, **(kwargs or {}))
        if function.namespace != "kimi_ops":
            return real
        self.seen.add(function._schema.name.removeprefix("kimi_ops::"))
        with FakeTensorMode() as mode:
            convert = mode.from_tensor
            fakes = tree_map(lambda x: convert(x) if isinstance(x, Tensor) else x, args)
            fake = function(*fakes)
        pairs = zip(tree_flatten(real)[0], tree_flatten(fake)[0], strict=True)
        for n, (mine, other) in enumerate((a, b) for a, b in pairs if isinstance(a, Tensor)):
            said = (other.shape, other.stride(), other.dtype)
            assert said == (mine.shape, mine.stride(), mine.dtype), f"{function}, result {n}"
        return real


def run(name, layout):
    """The operators that a call and its gradient went through."""
    function, make = (CALLS | MORE)[name]
    inputs = [LAYOUTS[layout](x) for x in make()]
    refused = () if layout == "dense" else (TypeError, ValueError)
    with Compared() as compared, contextlib.suppress(*refused):
        function(*inputs)
        leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
        # given outputs take no gradient, nor do some operators
        with contextlib.suppress(ValueError, RuntimeError):
            result = function(*leaves)
            wanted = [x for x in leaves if x.requires_grad]
            for y in [] if result is None else flat(result):
                if y.requires_grad and not y.is_leaf:
                    dy = LAYOUTS[layout](torch.ones_like(y))
                    options = {"retain_graph": True, "allow_unused": True}
                    torch.autograd.grad(y, wanted, dy, **options)
    return compared.seen


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CALLS | MORE)
def test_results_lie_as_compilers_are_told(name, layout):
    assert run(name, layout) or layout != "dense"


def test_every_operator_is_compared():
    seen = set().union(*(run(name, "dense") for name in CALLS | MORE))
    names = {name.removesuffix("_forward") for name in operators()}
    assert names - {name.removesuffix("_forward") for name in seen} == {"count_once_"}
