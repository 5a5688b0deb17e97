# SPDX-License-Identifier: MIT
"""The bounds of rounding.py: sums by their rules stay below, near, and a fault goes beyond."""

import pytest
import torch
from rounding import error, rounded_sum, truncated_sum
from torch import Tensor


def towards_zero(x: Tensor) -> Tensor:
    near = x.float()
    return torch.where(near.double().abs() > x.abs(), near.nextafter(near.new_zeros(())), near)


def summed(products: Tensor, at_once: int, truncate: bool) -> Tensor:
    """fp64 products [depth, n] in fp32, `at_once` of them exactly at a time."""
    total = torch.zeros(products.shape[1])
    for step in products.split(at_once):
        exact = total.double() + step.sum(0)
        total = towards_zero(exact) if truncate else exact.float()
    return total


@pytest.mark.parametrize("depth", [48, 512, 12_000])
@pytest.mark.parametrize("at_once", [1, 8, 16])
def test_bounds_hold_and_are_near(depth, at_once):
    generator = torch.Generator().manual_seed(depth + at_once)
    a, b = (torch.randn(depth, 320, generator=generator).bfloat16().double() for _ in range(2))
    products, truncate = a * b, at_once > 1
    bound = truncated_sum(depth, at_once) if truncate else rounded_sum(depth)
    exact, found = products.sum(0), summed(products, at_once, truncate)
    assert bound / 8 < error(found, exact) < bound
    assert error(summed(products[: depth - at_once], at_once, truncate), exact) > 100 * bound
    lossy = summed(products, at_once, truncate).bfloat16()
    assert error(lossy, exact) > 5 * bound
