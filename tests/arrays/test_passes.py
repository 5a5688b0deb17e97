# SPDX-License-Identifier: MIT
"""MuonClip's passes over lists: NumPy and JAX give the bits of torch.ops.kimi_ops."""

import numpy as np
import pytest
import torch

import kimi_ops  # noqa: F401  (registers torch.ops.kimi_ops)
import kimi_ops.numpy as kn

OPS = torch.ops.kimi_ops
RANDOM = np.random.default_rng(0)
SHAPES, F32, F64 = ((4, 6), (3, 5)), np.float32, np.float64
PIECES, LENGTHS = [(0, 2), (2, 3)], [10, 14, 15]
FLAT = [edge for piece in PIECES for edge in piece]
SUMS = np.array([1.0, np.inf, 2.0])  # the first array is left alone


BF16 = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
MIXED = pytest.mark.parametrize("kinds", [(F32, F32), (BF16, F32), (F32, BF16)], ids=str)


def arrays(low=-1.0, dtype=F32):
    return [RANDOM.uniform(low, 1, shape).astype(dtype) for shape in SHAPES]


def tensor(x):
    x = np.array(x)
    return (
        torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        if x.dtype == BF16
        else torch.from_numpy(x)
    )


# Each pass on copies, by three modules: everything that it returns or changes, as one list.


class Torch:
    def new(self, x):
        if isinstance(x, list):
            return [tensor(one) for one in x]
        return None if x is None else tensor(x)

    def squares(self, x):
        sums = torch.zeros(3, dtype=torch.float64)
        OPS.squares_(sums, self.new(x), FLAT, LENGTHS)
        return [sums]

    def clip_factor(self, sums, most):
        return [OPS.clip_factor(self.new(sums), FLAT, most)]

    def momentum(self, grads, buffers, *options):
        buffers = self.new(buffers)
        updates = OPS.muon_momentum_(self.new(grads), buffers, *options, self.new(SUMS), FLAT)
        return [*updates.split([24, 15]), *buffers]

    def update(self, params, directions, rates, decay, cautious, *factors):
        params = self.new(params)
        flags, factors = (self.new(SUMS), FLAT), [self.new(x) for x in factors]
        OPS.muon_update_(params, self.new(directions), rates, decay, cautious, *flags, *factors)
        return params

    def adamw(self, lists, numbers, scale, factors, measure):
        lists, sums = [self.new(x) for x in lists], self.new(SUMS)
        rest = self.new(scale), *(self.new(x) for x in factors)
        OPS.adamw_(*lists, *numbers, sums, FLAT, measure, *rest)
        return [x for part in (*lists[:1], *lists[2:]) for x in part] + [sums] * measure

    def clip_rows(self, weights, maxima, *geometry):
        weights = self.new(weights)
        return [OPS.clip_rows_(weights, self.new(maxima), *geometry), *weights]


class NumPy:
    def copied(self, x):
        return [one.copy() for one in x]

    def squares(self, x):
        sums = np.zeros(3)
        assert kn.squares_(sums, x, PIECES, LENGTHS) is sums
        return [sums]

    def clip_factor(self, sums, most):
        return [kn.clip_factor(sums, PIECES, most)]

    def momentum(self, grads, buffers, momentum, nesterov, maximize):
        buffers = self.copied(buffers)
        updates = kn.muon_momentum_(grads, buffers, momentum, nesterov, maximize, SUMS, PIECES)
        return [*updates, *buffers]

    def update(self, params, directions, rates, decay, cautious, *factors):
        params = self.copied(params)
        kn.muon_update_(params, directions, rates, decay, cautious, SUMS, PIECES, *factors)
        return params

    def adamw(self, lists, numbers, scale, factors, measure):
        lists, sums = [self.copied(x) for x in lists], SUMS.copy()
        kn.adamw_(*lists, *numbers, sums, PIECES, measure, scale, *factors)
        return [x for part in (*lists[:1], *lists[2:]) for x in part] + [sums] * measure

    def clip_rows(self, weights, maxima, *geometry):
        weights = self.copied(weights)
        return [kn.clip_rows_(weights, maxima, *geometry), *weights]


class Jax:
    def __init__(self):
        self.jit = pytest.importorskip("jax").jit
        import kimi_ops.jax as kj

        self.k = kj

    def bits(self, x):
        return np.ascontiguousarray(x).view(np.uint32).reshape(-1, 2)

    def wide(self, x):
        return np.asarray(x).view(F64).ravel()

    def squares(self, x):
        start = self.bits(np.zeros(3))
        return [self.wide(self.jit(lambda x: self.k.squares(start, x, PIECES, LENGTHS))(x))]

    def clip_factor(self, sums, most):
        return [self.k.clip_factor(self.bits(sums), PIECES, most)]

    def momentum(self, grads, buffers, momentum, nesterov, maximize):
        flags = self.bits(SUMS), PIECES
        updates, moved = self.jit(
            lambda g, b: self.k.muon_momentum(g, b, momentum, nesterov, maximize, *flags)
        )(grads, buffers)
        return [*updates, *moved]

    def update(self, params, directions, rates, decay, cautious, *factors):
        flags = self.bits(SUMS), PIECES
        return self.jit(
            lambda p, d, f: self.k.muon_update(p, d, rates, decay, cautious, *flags, *f)
        )(params, directions, [x if x is None else F32(x) for x in factors])

    def adamw(self, lists, numbers, scale, factors, measure):
        factors = [x if x is None else F32(x) for x in factors]
        *lists, sums = self.jit(
            lambda x, f: (
                *self.k.adamw(*x, *numbers, self.bits(SUMS), PIECES, measure, scale, *f),
                *([] if measure else [None]),
            )
        )(lists, factors)
        return [x for part in lists for x in part] + ([self.wide(sums)] if measure else [])

    def clip_rows(self, weights, maxima, *geometry):
        gamma, clipped = self.jit(lambda w, m: self.k.clip_rows(w, m, *geometry))(weights, maxima)
        return [gamma, *clipped]


@pytest.fixture(params=[NumPy, Jax])
def ours(request):
    return request.param()


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for got, want in zip(ours, theirs, strict=True):
        assert str(want.dtype).endswith(np.asarray(got).dtype.name)
        np.testing.assert_array_equal(np.ravel(got).astype(F64), np.ravel(want.double()))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_squares_and_the_factor_of_a_norm(ours, dtype):
    x = arrays(dtype=dtype)
    same(ours.squares(x), Torch().squares(x))
    sums = Torch().squares(x)[0].numpy()
    same(ours.clip_factor(sums, 0.5), Torch().clip_factor(sums, 0.5))
    assert Torch().clip_factor(sums, 0.5)[0] < 1


@MIXED
@pytest.mark.parametrize("options", [(0.95, True, False), (0.9, False, True)])
def test_momentum(ours, options, kinds):
    grads, buffers = (arrays(dtype=kind) for kind in kinds)
    same(ours.momentum(grads, buffers, *options), Torch().momentum(grads, buffers, *options))
    assert not np.any(ours.momentum(grads, buffers, *options)[0])


@MIXED
@pytest.mark.parametrize("cautious", [True, False])
@pytest.mark.parametrize("factors", [(None, None), (np.array(0.3, F32), np.array(0.7, F32))])
def test_update(ours, factors, cautious, kinds):
    factors = [x if x is None else x.astype(F64) for x in factors]
    both = (arrays(dtype=kind) for kind in kinds)
    arguments = *both, [0.1, 0.2], 0.01, cautious, *factors
    same(ours.update(*arguments), Torch().update(*arguments))


@MIXED
@pytest.mark.parametrize(
    ("measure", "maximize", "cautious"), [(False, True, True), (True, False, False)]
)
def test_adamw(ours, measure, maximize, cautious, kinds):
    params, grads = (arrays(dtype=kind) for kind in kinds)
    lists = [params, grads, arrays(), arrays(0.0), [np.array(n, F32) for n in (3, 7)]]
    numbers = 1e-3, 0.9, 0.95, 1e-3, 0.1, maximize, cautious
    factors = [np.array(F32(0.3), F64), None if measure else np.array(F32(0.7), F64)]
    arguments = lists, numbers, np.array(0.5, F32), factors, measure
    same(ours.adamw(*arguments), Torch().adamw(*arguments))


def test_clip_rows(ours):
    kinds = {(8, 3): F32, (5,): BF16, (6, 3): np.float16}  # a dtype and a number of columns each
    weights = [RANDOM.standard_normal(shape, F32).astype(kind) for shape, kind in kinds.items()]
    maxima = np.array([9, 40, 160], F32)
    places = [0, 2, 4, 0, 4, 0], [0, 2, 4, 3, 1, 3], [1, 1, 6, 0, 2, 4]
    geometry = [2, 1, 1, 1], [x for place in places for x in place], [0.5, 0.5, 0.25], 10.0
    theirs = Torch().clip_rows(weights, maxima, *geometry)
    same(ours.clip_rows(weights, maxima, *geometry), theirs)
    assert theirs[0].tolist() == [1.0, 0.25, 0.0625]
    assert not any(np.array_equal(new, old) for new, old in zip(theirs[1:], weights, strict=True))


def test_the_bits_of_a_number():
    pytest.importorskip("jax")
    from kimi_ops.jax.passes import _bits

    values = np.array([0, 1, -1.5, 3e-4, -7e30, 1.2e-38, np.inf], F32)
    for value in values:
        assert np.asarray(_bits(value)).view(F64)[0] == F64(value)


def test_what_is_refused():
    with pytest.raises(ValueError, match="pieces: expected first < end within"):
        kn.muon_momentum_(arrays(), arrays(), 0.9, True, False, SUMS, [(0, 9), (0, 1)])
    jax = Jax()
    with pytest.raises(ValueError, match="muon_momentum: pieces: expected first < end within 0..3"):
        flags = jax.bits(SUMS), [(0, 9), (0, 1)]
        jax.k.muon_momentum(arrays(), arrays(), 0.9, True, False, *flags)
    with pytest.raises(ValueError, match=r"muon_momentum: buffers\[1\]: expected the shape"):
        jax.k.muon_momentum(arrays(), arrays()[:1] * 2, 0.9)
    with pytest.raises(ValueError, match="grads: expected at least one array"):
        jax.k.muon_momentum([], [], 0.9)
