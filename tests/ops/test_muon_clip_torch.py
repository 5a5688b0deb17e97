# SPDX-License-Identifier: MIT
"""The native passes of MuonClip: every engine against the twin, bit for bit where torch rounds the
same way, and the operators as citizens of torch."""

import pytest
import torch
from torch import Tensor

from kimi_ops import MuonClip
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


def counters(*steps: int) -> list[Tensor]:
    return [torch.tensor(float(step)) for step in steps]


def copies(*lists: list[Tensor]) -> list[list[Tensor]]:
    return [[x.clone() for x in tensors] for tensors in lists]


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_momentum_has_the_bits_of_the_twin(engine, grad_dtype, dtype, nesterov, maximize):
    grads, buffers = tensors(grad_dtype), tensors(dtype)
    for momentum in (0.95, 0.3, 0.0):
        (mine, theirs) = (copies(buffers)[0], copies(buffers)[0])
        keys = {"momentum": momentum, "nesterov": nesterov, "maximize": maximize}
        updates = passes.momenta_(grads, mine, **keys)
        expected = [twin.momentum_(g, b, **keys) for g, b in zip(grads, theirs, strict=True)]
        assert equal(mine, theirs) and equal(updates, expected)
        assert all(update.dtype == torch.float32 for update in updates)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cautious", [False, True])
def test_update_has_the_bits_of_the_twin(engine, dtype, direction_dtype, cautious):
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
    passes.apply_(params, directions, rates, **keys)
    assert equal(params, expected) and torch.equal(wide[:, 38:], before)
    assert wide._version > version


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_adamw_follows_the_twin(engine, dtype, cautious, maximize):
    """The moments bit for bit; the step to an ulp, for torch's square root is not rounded exactly
    everywhere."""
    params, grads = tensors(dtype), tensors(dtype)
    first, second = tensors(torch.float32), [x.square() for x in tensors(torch.float32)]
    mine, theirs = copies(params, first, second), copies(params, first, second)
    keys = {
        "lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "maximize": maximize,
        "cautious": cautious,
    }  # fmt: skip
    for step in (0, 1, 29):
        steps, others = counters(*[step] * 5), counters(*[step] * 5)
        passes.adamw_(mine[0], grads, *mine[1:], steps, **keys)
        for one in zip(theirs[0], grads, *theirs[1:], others, strict=True):
            twin.adamw_(*one, **keys)
        assert steps == others == counters(*[step + 1] * 5)
        assert equal(mine[1], theirs[1]) and equal(mine[2], theirs[2])
        for a, b, old in zip(mine[0], theirs[0], params, strict=True):
            ulp = torch.finfo(dtype).eps * torch.maximum(old.abs(), torch.tensor(1.0)).float()
            assert ((a.float() - b.float()).abs() <= ulp).all()
        mine[0], theirs[0] = copies(theirs[0], theirs[0])


def test_updates_have_the_shapes_of_their_gradients(engine):
    shapes = [(2, 3), (0, 4), (1, 0, 5), (4, 1, 1), ()]
    grads, buffers = ([torch.ones(shape) for shape in shapes] for _ in range(2))
    updates = passes.momenta_(grads, buffers, momentum=0.5, nesterov=False, maximize=False)
    assert [tuple(update.shape) for update in updates] == shapes
    assert equal(updates, grads)


def squared_norms(x: list[Tensor]) -> Tensor:
    """The sum of squares of each tensor."""
    found = torch.zeros(len(x)).double()
    places = [range(i, i + 1) for i in range(len(x))]
    passes.squares_(found, x, places, [[y.numel()] for y in x])
    return found


def test_threads_and_repeats_show_in_no_bit(engine, two_thread_counts):
    results = []
    for threads in two_thread_counts:
        torch.set_num_threads(threads)
        for _ in range(10):
            torch.manual_seed(1)
            grads, buffers = tensors(torch.bfloat16), tensors(torch.float32)
            keys = {"momentum": 0.9, "nesterov": True, "maximize": False}
            updates = passes.momenta_(grads, buffers, **keys)
            results.append([*updates, *buffers, squared_norms(updates)])
    assert all(equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_squares(engine, dtype):
    x = tensors(dtype)
    found = squared_norms(x)
    exact = torch.stack([y.double().square().sum() for y in x])
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=0)
    huge = torch.full((3,), 3e38) if dtype == torch.float32 else x[0]
    assert torch.isfinite(squared_norms([huge])).all()
    x[2].view(-1)[7] = torch.inf
    x[1][3] = torch.nan
    assert torch.isfinite(squared_norms(x)).tolist() == [True, False, False, True, True]


def test_squares_of_pieces_are_those_of_their_copies(engine):
    x = [torch.randn(50, 700), torch.randn(9).double(), torch.randn(3, 4)]
    cuts = [[8000, 12000, 15000], [9], [5, 7]]
    pieces, sums = [range(3), range(3, 4), range(5, 7)], torch.full((7,), -1.0).double()
    passes.squares_(sums, x, pieces, cuts)
    parts = [part.clone() for y, cut in zip(x, cuts, strict=True) for part in y.view(-1).split(cut)]
    alone = squared_norms(parts)
    assert sums[4] == -1 and torch.equal(sums[[0, 1, 2, 3, 5, 6]], alone)


def flags() -> tuple[Tensor, list[range]]:
    """Of five tensors, of which the second and the last are left alone."""
    squares = torch.tensor([1.0, 2.0, torch.nan, 3.0, 4.0, 5.0, 6.0, -torch.inf]).double()
    return squares, [range(1), range(1, 3), range(3, 4), range(4, 6), range(5, 8)]


@pytest.mark.parametrize("state", [torch.float32, torch.float64])
def test_what_is_not_finite_is_left_alone(engine, state):
    """State in fp64 goes to the twin."""
    squares, pieces = flags()
    alone = {"squares": squares, "pieces": pieces}
    dead, grads = (1, 4), tensors(torch.float32)
    buffers = [x.to(state) for x in tensors(torch.float32)]
    keys = {"momentum": 0.9, "nesterov": True, "maximize": False}
    moved, clean = copies(buffers, buffers)
    updates, expected = (
        passes.momenta_(grads, moved, **keys, **alone),
        passes.momenta_(grads, clean, **keys),
    )
    for i in range(5):
        if i in dead:
            assert torch.equal(moved[i], buffers[i]) and not updates[i].any()
        else:
            assert torch.equal(moved[i], clean[i]) and torch.equal(updates[i], expected[i])

    matrices, directions = ([x.reshape(1, -1) for x in tensors(torch.float32)] for _ in range(2))
    directions = [x.to(state) for x in directions]
    keys = {"lr": 0.1, "weight_decay": 0.1, "cautious": False}
    moved, clean = copies(matrices, matrices)
    passes.apply_(moved, directions, [0.1] * 5, **keys, **alone)
    passes.apply_(clean, directions, [0.1] * 5, **keys)
    for i in range(5):
        assert torch.equal(moved[i], matrices[i] if i in dead else clean[i])

    keys = {
        "lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "maximize": False,
        "cautious": False,
    }  # fmt: skip
    start = tensors(torch.float32), buffers, [x.square() for x in buffers], counters(*range(5))
    moved, clean = copies(*start), copies(*start)
    passes.adamw_(moved[0], grads, *moved[1:], **keys, **alone)
    passes.adamw_(clean[0], grads, *clean[1:], **keys)
    for i in range(5):
        for before, ours, theirs in zip(start, moved, clean, strict=True):
            assert torch.equal(ours[i], before[i] if i in dead else theirs[i])


@pytest.mark.parametrize("dtype", DTYPES)
def test_adamw_measures_before_it_moves(engine, dtype):
    """The same bits as a pass of its own before, whatever the threads have in their caches."""
    sizes = [3, 40000, 0, 150000, 9, 300000] if not engine.slow else [3, 9000, 0, 17000, 9, 5]
    grads = [torch.randn(n).to(dtype) for n in sizes]
    grads[1][700] = torch.nan
    grads[5][-1] = torch.inf
    params, first = ([torch.randn(n) for n in sizes] for _ in range(2))
    start = params, first, [x.square() for x in first], counters(*range(6))
    ours, theirs = copies(*start), copies(*start)
    keys = {
        "lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "maximize": True,
        "cautious": True,
    }  # fmt: skip
    pieces = [range(i, i + 1) for i in range(6)]
    squares = torch.ones(6).double()
    alone = {"squares": squared_norms(grads), "pieces": pieces}
    passes.adamw_(theirs[0], grads, *theirs[1:], **keys, **alone)
    alone = {"squares": squares, "pieces": pieces}
    passes.adamw_(ours[0], grads, *ours[1:], **keys, **alone, measure=True)
    assert torch.isfinite(squares).tolist() == [True, False, True, True, True, False]
    assert torch.equal(squares.nan_to_num(), torch.zeros_like(squares))
    assert all(equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(ours[0][1], params[1]) and not torch.equal(ours[0][3], params[3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_looked_at_to_the_last_element(cpu_engine, two_thread_counts, dtype):
    """A thread updates some 2^17 elements while it looks at the gradients of the next: block beside
    block, of which either may be the longer or missing."""
    torch.set_num_threads(two_thread_counts[0])
    sizes = [140_001, 3, 11_000, 1, 190_002, 9]
    params = [torch.ones(n) for n in sizes]
    first, second = copies(params, params)
    pieces = [range(i, i + 1) for i in range(6)]
    keys = {
        "lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "maximize": False,
        "cautious": False, "pieces": pieces, "measure": True,
    }  # fmt: skip
    grads = [torch.ones(n, dtype=dtype) for n in sizes]
    for t, place in [
        (0, 0), (0, 8191), (0, 140_000), (1, 2), (2, 2), (2, 3), (2, 8191), (2, 10_999), (3, 0),
        (4, 0), (4, 2815), (4, 100_001), (4, 185_000), (4, 190_001), (5, 8),
    ]:  # fmt: skip
        squares, before = torch.ones(6).double(), params[t].clone()
        grads[t][place] = torch.inf
        passes.adamw_(params, grads, first, second, counters(*range(6)), squares=squares, **keys)
        assert torch.isfinite(squares).logical_not().nonzero().tolist() == [[t]], (t, place)
        assert torch.equal(params[t], before)
        grads[t][place] = 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_on_the_device_are_factors(engine, dtype):
    """lr, weight decay and scale as tensors give what they give as numbers; fp64 is the twin's."""
    params, grads = [torch.randn(4, 30, dtype=dtype)], [torch.randn(4, 30, dtype=dtype)]
    lr, decay = 0.125, 0.25  # exact products: the same bits
    keys = {"cautious": False}
    ours, theirs = copies(params, params)
    as_tensors = {"lr": torch.tensor(lr), "weight_decay": torch.tensor([decay])}
    passes.apply_(ours, grads, [2.0], **as_tensors, **keys)
    passes.apply_(theirs, grads, [2.0 * lr], lr=lr, weight_decay=decay, **keys)
    tolerance = {} if dtype == torch.float64 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(ours, theirs, **tolerance)

    keys = {"betas": (0.9, 0.95), "eps": 1e-8, "maximize": True, "cautious": False}
    start = params, grads, [g.square() for g in grads], counters(3)
    ours, theirs = copies(*start), copies(*start)
    scale = torch.tensor(0.5)
    passes.adamw_(ours[0], grads, *ours[1:], **as_tensors, **keys, scale=scale)
    halved = [g * 0.5 for g in grads]
    passes.adamw_(theirs[0], halved, *theirs[1:], lr=lr, weight_decay=decay, **keys)
    torch.testing.assert_close(ours, theirs, **tolerance)


def test_the_factor_that_clips_counts_no_tensor_that_is_left_alone(engine):
    squares, pieces = flags()
    norm = (1.0 + 3.0 + 4.0 + 5.0) ** 0.5
    factor = passes.clip_factor(squares, pieces, 1.0)
    assert factor.shape == () and factor.dtype == torch.float32
    torch.testing.assert_close(factor, torch.tensor(1 / norm))
    assert passes.clip_factor(squares, pieces, 4.0) == 1
    assert passes.clip_factor(squares, pieces[1:2], 4.0) == 1  # nothing is left
    many = torch.rand(100).double()
    pieces = [range(i, i + 1) for i in range(100)]
    torch.testing.assert_close(
        passes.clip_factor(many, pieces, 0.1), twin.clip_factor(many, pieces, 0.1)
    )


def test_opcheck():
    x, y = [torch.randn(3, 4), torch.randn(5, 6)], [torch.randn(3, 4), torch.randn(5, 6)]
    z = [torch.rand(3, 4), torch.rand(5, 6)]
    squares, pieces = torch.tensor([1.0, 2.0]).double(), [0, 1, 1, 2]
    for op, arguments in (
        (ops.muon_momentum_.default, (x, y, 0.9, True, False, squares, pieces)),
        (ops.muon_update_.default, (x, y, [0.1, 0.2], 0.01, False, squares, pieces, None, None)),
        (ops.adamw_.default,
         (x, y, z, [t.clone() for t in z], counters(1, 2), 0.1, 0.9, 0.95, 1e-8, 0.1, False, False,
          squares, pieces, True, torch.tensor(0.5), None, torch.tensor(0.5).double())),
        (ops.squares_.default, (squares, x, pieces, [12, 30])),
        (ops.clip_factor.default, (squares, pieces, 0.5)),
    ):  # fmt: skip
        torch.library.opcheck(op, arguments)


@pytest.mark.filterwarnings("ignore")  # of the compiler, on what it leaves out of its graphs
def test_a_compiled_step_is_the_step():
    results = []
    for compiled in (False, True):
        torch.manual_seed(3)
        params = [torch.nn.Parameter(torch.randn(s)) for s in ((6, 8), (2, 4, 6), (9,))]
        groups = [{"params": params[:2]}, {"params": params[2:], "algorithm": "adamw"}]
        optimizer = MuonClip(groups, lr=0.1, ns_dtype="float32")
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        for _ in range(3):
            for param in params:
                param.grad = torch.randn_like(param)
            step()
        state = optimizer.state
        results.append([*params, *(x for p in params for x in state[p].values())])
    assert equal(*results)


X = [torch.ones(2, 3)]
ADAMW = (0.1, 0.9, 0.95, 1e-8, 0.1, False, False, None, [], False, None, None, None)


@pytest.mark.parametrize(
    "error,text,call",
    [
        (ValueError, "muon_momentum: buffers: expected 1 tensors as grads, got 2",
         lambda: ops.muon_momentum_(X, X + X, 0.9, True, False, None, [])),
        (ValueError, r"muon_momentum: buffers\[0\]: expected shape \[2, 3\], got \[3, 2\]",
         lambda: ops.muon_momentum_(X, [X[0].mT], 0.9, True, False, None, [])),
        (TypeError, r"muon_momentum: grads\[1\]: expected float32, got bfloat16",
         lambda: ops.muon_momentum_(
             [X[0], X[0].bfloat16()], X + X, 0.9, True, False, None, [])),
        (ValueError, "muon_momentum: momentum: expected 0 to 1, got 1.5",
         lambda: ops.muon_momentum_(X, X, 1.5, True, False, None, [])),
        (ValueError, "muon_update: rates: expected 1 numbers, got 0",
         lambda: ops.muon_update_(X, X, [], 0.1, False, None, [], None, None)),
        (ValueError, r"muon_update: params\[0\]: expected shape \[m, n\], got \[3\]",
         lambda: ops.muon_update_(
             [X[0][0]], [X[0][0]], [0.1], 0.1, False, None, [], None, None)),
        (TypeError, r"adamw: steps\[0\]: expected float32, got int64",
         lambda: ops.adamw_(X, X, X, X, [torch.tensor(1)], *ADAMW)),
        (TypeError, "adamw: exp_avgs, exp_avg_sqs: expected float32, got bfloat16",
         lambda: ops.adamw_(X, X, [X[0].bfloat16()], X, counters(1), *ADAMW)),
        (ValueError, r"adamw: pieces: expected first < end within 0..1, got 0, 2",
         lambda: ops.adamw_(
             X, X, X, X, counters(1), *ADAMW[:7], torch.zeros(1).double(), [0, 2], *ADAMW[9:])),
        (TypeError, r"squares: x\[0\]: expected float32, bfloat16, float16, got float64",
         lambda: ops.squares_(torch.zeros(1).double(), [X[0].double()], [0, 1], [6])),
    ],
)  # fmt: skip
def test_bad_input_names_argument_and_cure(error, text, call):
    with pytest.raises(error, match=text):
        call()
