# SPDX-License-Identifier: MIT
"""`kimi_ops.numpy` and `kimi_ops.jax` give what `kimi_ops` gives, option by option: values of both,
gradients of JAX."""

import numpy as np
import pytest
import torch

import kimi_ops
import kimi_ops.numpy as kn
from tests.arrays.cases import CASES

try:
    import jax
    import jax.numpy as jnp

    import kimi_ops.jax as kj
except ImportError:
    jax = None
needs_jax = pytest.mark.skipif(jax is None, reason="no jax")


def tensors(case, wrt=()):
    found = {name: torch.from_numpy(value.copy()) for name, value in case.inputs.items()}
    for name in wrt:
        found[name].requires_grad_()
    return found


def leaves(tree):
    if isinstance(tree, (tuple, list)):
        return [leaf for item in tree for leaf in leaves(item)]
    return [tree]


def numbers(x):
    """float64, or the whole numbers, of anybody's array."""
    if isinstance(x, torch.Tensor):
        x = x.detach()
        wide = x.double() if x.is_floating_point() else x
        return wide.numpy()
    x = np.asarray(x)
    return x if x.dtype.kind in "iub" else x.astype(np.float64)


def same(ours, theirs, tolerance):
    ours, theirs = leaves(ours), leaves(theirs)
    assert len(ours) == len(theirs)
    for got, want in zip(ours, theirs, strict=True):
        assert str(got.dtype) == str(want.dtype).removeprefix("torch.")
        got, want = numbers(got), numbers(want)
        assert got.shape == want.shape
        if tolerance == 0 or got.dtype.kind != "f":
            np.testing.assert_array_equal(got, want)
        else:
            assert np.linalg.norm(got - want) <= tolerance * (np.linalg.norm(want) + 1e-6)


@pytest.mark.parametrize("name", CASES)
def test_numpy(name):
    case = CASES[name]
    copies = {key: value.copy() for key, value in case.inputs.items()}
    same(case.function(kn, **copies), case.function(kimi_ops, **tensors(case)), case.tolerance)


@needs_jax
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.jax])
def test_jax(name):
    """Values and gradients of one program; along the gradient's way every element counts."""
    case = CASES[name]
    theirs = tensors(case, case.wrt)
    expected = case.function(kimi_ops, **theirs)
    given = {key: jnp.asarray(value) for key, value in case.inputs.items()}
    fixed = {key: value for key, value in given.items() if key not in case.wrt}

    def weighed(chosen):
        values = case.function(kj, **fixed, **chosen)
        along = lambda y: jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)  # noqa: E731
        return sum((y * along(y)).sum() for y in floats(values)), values

    if not case.wrt:
        same(jax.jit(lambda x: case.function(kj, **x))(given), expected, case.tolerance)
        return
    chosen = {key: given[key] for key in case.wrt}
    (_, values), gradients = jax.jit(jax.value_and_grad(weighed, has_aux=True))(chosen)
    same(values, expected, case.tolerance)
    along = lambda y: torch.cos(torch.arange(y.numel())).view_as(y)  # noqa: E731
    sum((y * along(y)).sum() for y in floats(expected)).backward()
    for key in case.wrt:
        same(gradients[key], theirs[key].grad, max(case.tolerance, 1e-5))


def floats(tree):
    return [y for y in leaves(tree) if "float" in str(y.dtype)]
