# SPDX-License-Identifier: MIT
"""Replica placement: DeepSeek's published example, one worked by hand, what always holds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_ops import eplb
from tests.routing import zipf_loads

# The example of DeepSeek's EPLB: two layers of 12 experts in 4 groups, 16 replicas on 2 nodes of 4.
LOADS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
PUBLISHED = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def loads_of_gpus(weights, placement, gpus):
    """[L, G] sums of the replicas' shares."""
    weights = weights.double()
    shares = (weights / placement.counts).gather(1, placement.phy2log)
    return shares.unflatten(1, (gpus, -1)).sum(-1), shares


def test_the_published_example():
    assert eplb(torch.tensor(LOADS), 16, 4, 2, 8).phy2log.tolist() == PUBLISHED


def test_an_example_by_hand():
    """Groups of 9, 15, 7 and 1: 1 goes to node 0, 0 and 2 to node 1, 3 to node 0.

    Node 0 (experts 2, 3, 6, 7; loads 12, 3, 1, 0) has two replicas to give, both to expert 2: 6, 4.
    Shares 4, 3, 1, 0, 4, 4 on two GPUs of three: 4 | 4, 4 |, | 3, | 1 (full), 0 |.
    Node 1 (experts 0, 1, 4, 5; loads 5, 4, 7, 0) gives one to expert 4, one to expert 0.
    Shares 2.5, 4, 3.5, 0, 3.5, 2.5: 4 | 3.5, | 3.5, 2.5 |, 2.5 | (full), | 0.
    """
    loads = torch.tensor([[5, 4, 12, 3, 7, 0, 1, 0]])
    placement = eplb(loads, 12, 4, 2, 4)
    assert placement.phy2log.tolist() == [[2, 2, 7, 2, 3, 6, 1, 0, 0, 4, 4, 5]]
    assert placement.counts.tolist() == [[2, 1, 3, 1, 2, 1, 1, 1]]
    assert placement.log2phy[0].tolist()[:3] == [[7, 8, -1], [6, -1, -1], [0, 1, 3]]
    assert loads_of_gpus(loads, placement, 4)[0].tolist() == [[8.0, 8.0, 9.0, 7.0]]


@st.composite
def cases(draw):
    nodes, per_node = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    groups = draw(st.integers(1, 3)) * (nodes if draw(st.booleans()) else 1)
    experts = groups * draw(st.integers(1, 6))
    gpus = nodes * per_node
    replicas = gpus * (-(-experts // gpus) + draw(st.integers(0, 3)))
    seed = draw(st.integers(0, 10**6))
    loads = torch.rand(2, experts, generator=torch.Generator().manual_seed(seed)) ** 4 * 1000
    return (loads.round() if draw(st.booleans()) else loads), replicas, groups, nodes, gpus


@settings(max_examples=150, deadline=None)
@given(cases())
def test_what_always_holds(case):
    loads, replicas, groups, nodes, gpus = case
    placement = eplb(*case)
    phy2log, log2phy, counts = placement
    for layer in range(2):
        assert torch.equal(counts[layer], torch.bincount(phy2log[layer], minlength=loads.shape[1]))
        for expert, places in enumerate(log2phy[layer].tolist()):
            found = [p for p in places if p >= 0]
            assert found == (phy2log[layer] == expert).nonzero().flatten().tolist()
    assert int(counts.min()) >= 1 and phy2log.shape == (2, replicas)
    on_gpu, shares = loads_of_gpus(loads, placement, gpus)
    assert torch.allclose(on_gpu.sum(1), loads.double().sum(1))
    hierarchical = groups % nodes == 0
    domains = nodes if hierarchical else 1
    per_node, node_shares = (x.unflatten(1, (domains, -1)) for x in (on_gpu, shares))
    bound = per_node.mean(-1) + node_shares.amax(-1)
    assert (per_node.amax(-1) <= bound * (1 + 1e-9)).all()
    if hierarchical:  # a group is on one node
        size = loads.shape[1] // groups
        for layer in range(2):
            where = [
                set((row // size).tolist()) for row in phy2log[layer].unflatten(0, (nodes, -1))
            ]
            assert sum(map(len, where)) == groups


def by_definition(loads, replicas, groups, nodes, gpus):
    """DeepSeek's three steps said with argmax and argmin alone; one layer."""

    def pack(sums, packs):
        room, found, totals = len(sums) // packs, [[] for _ in range(packs)], [0.0] * packs
        if room == 1:
            return [[n] for n in range(packs)]
        for item in sorted(range(len(sums)), key=lambda n: (-sums[n], n)):
            free = [p for p in range(packs) if len(found[p]) < room]
            best = min(free, key=lambda p: (totals[p], p))
            found[best].append(item)
            totals[best] += sums[item]
        return found

    if groups % nodes:
        groups = nodes = 1
    size = len(loads) // groups
    of_groups = [sum(loads[g * size : (g + 1) * size]) for g in range(groups)]
    rows = []
    for here in pack(of_groups, nodes):
        experts = [g * size + n for g in here for n in range(size)]
        copies, counts = list(experts), dict.fromkeys(experts, 1)
        while len(copies) < replicas // nodes:
            most = max(loads[e] / counts[e] for e in experts)
            chosen = next(e for e in experts if loads[e] / counts[e] == most)
            copies.append(chosen)
            counts[chosen] += 1
        for items in pack([loads[e] / counts[e] for e in copies], gpus // nodes):
            rows += [copies[n] for n in items]
    return rows


@settings(max_examples=80, deadline=None)
@given(cases())
def test_it_is_the_published_algorithm(case):
    loads, *sizes = case
    found = eplb(*case).phy2log.tolist()
    assert found == [by_definition(row, *sizes) for row in loads.double().tolist()]


@settings(max_examples=60, deadline=None)
@given(cases())
def test_no_replica_is_better_elsewhere(case):
    """Inside a node, a replica taken from one expert leaves more on it than any other has."""
    loads, _, groups, nodes, _ = case
    placement = eplb(*case)
    domains = nodes if groups % nodes == 0 else 1
    for layer in range(2):
        for node in placement.phy2log[layer].view(domains, -1):
            experts = node.unique()
            load, count = loads[layer].double()[experts], placement.counts[layer][experts].double()
            most = (load / count).max()
            several = count > 1
            assert (load[several] / (count[several] - 1) >= most * (1 - 1e-12)).all()


def test_a_skewed_load_becomes_even():
    """Zipf loads over K2's 384 experts: one more replica a rank takes 7.1x the mean to a few %."""
    loads = 1.0 / torch.arange(1, 385).double()
    loads = loads[torch.randperm(384, generator=torch.Generator().manual_seed(0))][None]
    before = loads.unflatten(1, (64, -1)).sum(-1)
    placement = eplb(loads, 448, 1, 1, 64)
    after = loads_of_gpus(loads, placement, 64)[0]
    assert float(before.max() / before.mean()) > 7
    assert float(after.max() / after.mean()) < 1.05


def test_nothing_to_place():
    placement = eplb(torch.empty(0, 4), 4, 1, 1, 2)
    assert [list(t.shape) for t in placement] == [[0, 4], [0, 4, 0], [0, 4]]
    alone = eplb(torch.tensor([[1, 5, 3]]), 3, 1, 1, 3)  # nothing to gain by moving
    assert alone.phy2log.tolist() == [[0, 1, 2]]


# Busiest rank by mean with a replica more a rank, on loads of another sample of the same routing:
# K2's experts, Zipf's exponent by the size of the group
EVEN = {
    0.0: {8: 1.01, 16: 1.02, 32: 1.02, 64: 1.04, 128: 1.05},
    1.0: {8: 1.01, 16: 1.02, 32: 1.03, 64: 1.05, 128: 1.07},
}


@pytest.mark.parametrize("alpha", EVEN)
def test_zipf_loads_become_even_on_another_sample(alpha):
    seen, then = zipf_loads(alpha, 1)[None], zipf_loads(alpha, 0)[None]
    for gpus, known in EVEN[alpha].items():
        placement = eplb(seen, 384 + gpus, 1, 1, gpus)
        rows = loads_of_gpus(then, placement, gpus)[0]
        assert float(rows.max() / rows.mean()) < known + 0.02
