# SPDX-License-Identifier: MIT
"""The native passes of MuonClip: every engine against the twin, bit for bit where torch rounds the
same way, and the operators as citizens of torch."""

import pytest
import torch
from torch import Tensor

from kimi_ops.optim import engine as passes
from kimi_ops.reference import muon_clip as twin

ops = torch.ops.kimi_ops
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1,), (15,), (3, 40), (0, 4), (70001,)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def tensors(dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(size).to(dtype) for size in SIZES]


def copies(*lists: list[Tensor]) -> list[list[Tensor]]:
    return [[x.clone() for x in tensors] for tensors in lists]


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_momentum_has_the_bits_of_the_twin(cpu_engine, grad_dtype, dtype, nesterov, maximize):
    grads, buffers = tensors(grad_dtype), tensors(dtype)
    for momentum in (0.95, 0.3, 0.0):
        (mine, theirs) = (copies(buffers)[0], copies(buffers)[0])
        keys = {"momentum": momentum, "nesterov": nesterov, "maximize": maximize}
        updates = passes.momenta_(grads, mine, **keys, alive=[None] * len(grads))
        expected = [twin.momentum_(g, b, **keys) for g, b in zip(grads, theirs, strict=True)]
        assert equal(mine, theirs) and equal(updates, expected)
        assert all(update.dtype == torch.float32 for update in updates)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cautious", [False, True])
def test_update_has_the_bits_of_the_twin(cpu_engine, dtype, direction_dtype, cautious):
    wide = torch.randn(40, 100).to(dtype)
    stack = torch.randn(2, 6, 9).to(dtype)
    params = [wide[:, :37], wide[:, 37:38], wide[5:5], *stack.unbind(), torch.randn(300, 9).mT]
    params[-1] = params[-1].to(dtype)
    directions = [torch.randn(p.shape).to(direction_dtype) for p in params]
    directions[0] = directions[0].mT.contiguous().mT
    rates = [0.1 * (i + 1) for i in range(len(params))]
    keys = {"lr": 0.1, "weight_decay": 0.2, "cautious": cautious}
    expected = copies(params)[0]
    for param, direction, rate in zip(expected, directions, rates, strict=True):
        twin.apply_(param, direction, rate=rate, **keys)
    before, version = wide[:, 38:].clone(), wide._version
    passes.apply_(params, directions, rates, **keys, alive=[None] * len(params))
    assert equal(params, expected) and torch.equal(wide[:, 38:], before)
    assert wide._version > version


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_adamw_follows_the_twin(cpu_engine, dtype, cautious, maximize):
    """The moments bit for bit; the step to an ulp, for torch's square root is not rounded exactly
    everywhere."""
    params, grads = tensors(dtype), tensors(dtype)
    first, second = tensors(torch.float32), [x.square() for x in tensors(torch.float32)]
    mine, theirs = copies(params, first, second), copies(params, first, second)
    keys = {
        "lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "maximize": maximize,
        "cautious": cautious,
    }  # fmt: skip
    for step in (1, 2, 30):
        steps = [step] * len(params)
        passes.adamw_(mine[0], grads, *mine[1:], steps, **keys, alive=[None] * len(params))
        for i, grad in enumerate(grads):
            twin.adamw_(theirs[0][i], grad, theirs[1][i], theirs[2][i], step, **keys)
        assert equal(mine[1], theirs[1]) and equal(mine[2], theirs[2])
        for a, b, old in zip(mine[0], theirs[0], params, strict=True):
            ulp = torch.finfo(dtype).eps * torch.maximum(old.abs(), torch.tensor(1.0)).float()
            assert ((a.float() - b.float()).abs() <= ulp).all()
        mine[0], theirs[0] = copies(theirs[0], theirs[0])


def test_threads_and_repeats_show_in_no_bit(cpu_engine, two_thread_counts):
    results = []
    for threads in two_thread_counts:
        torch.set_num_threads(threads)
        for _ in range(10):
            torch.manual_seed(1)
            grads, buffers = tensors(torch.bfloat16), tensors(torch.float32)
            keys = {"momentum": 0.9, "nesterov": True, "maximize": False}
            updates = passes.momenta_(grads, buffers, **keys, alive=[None] * len(grads))
            results.append([*updates, *buffers, passes.squares(updates)])
    assert all(equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_squares(cpu_engine, dtype):
    x = tensors(dtype)
    sums = passes.squares(x)
    exact = torch.stack([y.double().square().sum() for y in x])
    torch.testing.assert_close(sums, exact, rtol=1e-12, atol=0)
    huge = torch.full((3,), 3e38) if dtype == torch.float32 else x[0]
    assert torch.isfinite(passes.squares([huge])).all()
    x[2].view(-1)[7] = torch.inf
    x[1][3] = torch.nan
    assert torch.isfinite(passes.squares(x)).tolist() == [True, False, False, True, True]


def test_what_the_kernels_do_not_take_goes_to_the_twin():
    """fp64, and a flag that must not be read."""
    grads = [torch.randn(5, dtype=torch.float64), torch.randn(5), torch.randn(5)]
    buffers = [torch.randn_like(g) for g in grads]
    dead = buffers[1].clone()
    alive = [None, torch.tensor(False), torch.tensor(True)]
    keys = {"momentum": 0.9, "nesterov": True, "maximize": False}
    expected = copies(buffers)[0]
    theirs = [
        twin.momentum_(g, b, **keys, alive=a)
        for g, b, a in zip(grads, expected, alive, strict=True)
    ]
    updates = passes.momenta_(grads, buffers, **keys, alive=alive)
    assert equal(updates, theirs) and equal(buffers, expected) and torch.equal(buffers[1], dead)


def test_opcheck():
    checks = ("test_schema", "test_faketensor")
    x, y = [torch.randn(3, 4), torch.randn(5, 6)], [torch.randn(3, 4), torch.randn(5, 6)]
    z = [torch.rand(3, 4), torch.rand(5, 6)]
    for op, arguments in (
        (ops.muon_momentum_.default, (x, y, 0.9, True, False)),
        (ops.muon_update_.default, (x, y, [0.1, 0.2], 0.01, False)),
        (ops.adamw_.default,
         (x, y, z, [t.clone() for t in z], [1, 2], 0.1, 0.9, 0.95, 1e-8, 0.1, False, False)),
        (ops.squares.default, (x,)),
    ):  # fmt: skip
        torch.library.opcheck(op, arguments, test_utils=checks)


X = [torch.ones(2, 3)]


@pytest.mark.parametrize(
    "error,text,call",
    [
        (ValueError, "muon_momentum: buffers: expected 1 tensors as grads, got 2",
         lambda: ops.muon_momentum_(X, X + X, 0.9, True, False)),
        (ValueError, r"muon_momentum: buffers\[0\]: expected shape \[2, 3\], got \[3, 2\]",
         lambda: ops.muon_momentum_(X, [X[0].mT], 0.9, True, False)),
        (TypeError, r"muon_momentum: grads\[1\]: expected float32, got bfloat16",
         lambda: ops.muon_momentum_([X[0], X[0].bfloat16()], X + X, 0.9, True, False)),
        (ValueError, "muon_momentum: momentum: expected 0 to 1, got 1.5",
         lambda: ops.muon_momentum_(X, X, 1.5, True, False)),
        (ValueError, "muon_update: rates: expected 1 numbers, got 0",
         lambda: ops.muon_update_(X, X, [], 0.1, False)),
        (ValueError, r"muon_update: params\[0\]: expected shape \[m, n\], got \[3\]",
         lambda: ops.muon_update_([X[0][0]], [X[0][0]], [0.1], 0.1, False)),
        (ValueError, r"adamw: steps\[0\]: expected 1 or more, got 0",
         lambda: ops.adamw_(X, X, X, X, [0], 0.1, 0.9, 0.95, 1e-8, 0.1, False, False)),
        (TypeError, "adamw: exp_avgs, exp_avg_sqs: expected float32, got bfloat16",
         lambda: ops.adamw_(
             X, X, [X[0].bfloat16()], X, [1], 0.1, 0.9, 0.95, 1e-8, 0.1, False, False)),
        (TypeError, r"squares: x\[0\]: expected float32, bfloat16, float16, got float64",
         lambda: ops.squares([X[0].double()])),
    ],
)  # fmt: skip
def test_bad_input_names_argument_and_cure(error, text, call):
    with pytest.raises(error, match=text):
        call()
