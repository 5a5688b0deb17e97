# SPDX-License-Identifier: MIT
"""The needles: a small model learns to find them, and what it is asked for are some."""

import torch

from benchmarks.experiments import needle
from kimi_ops.models.kimi_k2 import KimiK2


def test_a_haystack_holds_its_needle_at_the_depth():
    generator = torch.Generator().manual_seed(0)
    for depth, first in ((0.0, 0), (1.0, 101 - 12), (0.5, 44)):
        ids = needle.haystacks(3, 100, generator, depth)
        assert ids.shape == (3, 101) and (ids == needle.WORDS).sum() == 6
        assert torch.equal(ids[:, first : first + 6], ids[:, -6:])


def test_needles_are_found_after_training_and_not_before():
    model = KimiK2(needle.config())
    share = needle.found
    assert share(model, 24, 0.5, 16) == 0
    assert needle.train(model.train(), 10, 24) == 24  # minutes, of which few seconds are needed
    assert share(model.eval(), 24, 0.5, 16) >= 0.75
