# SPDX-License-Identifier: MIT
"""Loads over steps: by hand, the same on every rank, through a checkpoint."""

import pytest
import torch

from kimi_ops import ExpertLoads, eplb


def test_totals_by_hand():
    """Two layers; layer 0 has counts of two ranks in two dispatches of a step."""
    loads = ExpertLoads(2, 3, decay=0.5)
    loads.add(0, torch.tensor([[1, 2, 3], [4, 0, 0]], dtype=torch.int32))
    loads.add(0, torch.tensor([1, 1, 1]))
    loads.add(1, torch.tensor([0.0, 8.0, 0.0]))
    assert loads.totals.sum() == 0  # the step is not over
    loads.step()
    assert loads.totals.tolist() == [[6, 3, 4], [0, 8, 0]]
    loads.add(1, torch.tensor([2, 0, 0]))
    loads.step()
    assert loads.totals.tolist() == [[3, 1.5, 2], [2, 4, 0]] and loads.steps == 2
    loads.step()
    assert loads.totals.tolist() == [[1.5, 0.75, 1], [1, 2, 0]]


def test_counts_of_replicas_are_those_of_their_experts():
    placement = eplb(torch.tensor([[6, 1, 1, 2], [1, 1, 9, 1]]), 6, 1, 1, 2)
    loads = ExpertLoads(2, 4, decay=0)
    counts = torch.tensor([[1, 2, 4, 8, 16, 32], [0, 0, 0, 0, 1, 0]])
    for layer in range(2):
        loads.add(layer, counts, placement)
    loads.step()
    for layer in range(2):
        exact = [0.0] * 4
        for replica, expert in enumerate(placement.phy2log[layer].tolist()):
            exact[expert] += float(counts[:, replica].sum())
        assert loads.totals[layer].tolist() == exact


def test_all_and_the_last_step_alone():
    for decay, total in ((0, 4), (1, 10)):
        loads = ExpertLoads(1, 1, decay=decay)
        for n in (1, 2, 3, 4):
            loads.add(0, torch.tensor([n]))
            loads.step()
        assert loads.totals.item() == total


def test_a_checkpoint_goes_on_with_the_same_bits():
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 1000, (6, 5), generator=generator)
    whole, first, second = (ExpertLoads(1, 5, decay=0.9) for _ in range(3))
    for step, row in enumerate(counts):
        whole.add(0, row)
        whole.step()
        if step == 3:
            second.load_state_dict(first.state_dict())
        (first if step < 3 else second).add(0, row)
        (first if step < 3 else second).step()
    assert torch.equal(whole.totals, second.totals) and second.steps == 6
    assert not torch.equal(first.totals, second.totals)  # what was saved is a copy


def test_counts_on_a_graph_are_only_numbers():
    loads = ExpertLoads(1, 2)
    loads.add(0, torch.ones(2, requires_grad=True))
    assert not loads.totals.requires_grad


def test_states_of_another_model_are_refused():
    with pytest.raises(ValueError, match=r"totals: expected shape \[1, 3\], got \[1, 2\]"):
        ExpertLoads(1, 3).load_state_dict(ExpertLoads(1, 2).state_dict())
