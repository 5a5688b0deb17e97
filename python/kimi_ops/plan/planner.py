# SPDX-License-Identifier: MIT
"""The layouts that a number of GPUs allows, the one to take, what would help, what it hangs on."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from kimi_ops.models.kimi_k2.recompute import RECOMPUTE
from kimi_ops.plan.counts import Counts
from kimi_ops.plan.estimate import Estimate, estimate
from kimi_ops.plan.hardware import Hardware
from kimi_ops.plan.memory import memory
from kimi_ops.plan.skew import busiest
from kimi_ops.plan.work import Layout, Work

__all__ = ["MOST_TOKENS", "Plan", "divisors"]

MOST_GPUS, MOST_TOKENS = 16384, 2**40
Change = tuple[str, dict[str, Any]]  # what it is called, fields of Work
TRAINING: list[Change] = [
    ("momentum in bf16", {"momentum_bytes": 2}),
    ("optimizer state in the host's memory", {"offload": True}),
    ("gradients in bf16", {"gradient_bytes": 2}),
]


def divisors(number: int, most: int) -> list[int]:
    return [d for d in range(1, min(number, most) + 1) if number % d == 0]


def layouts(counts: Counts, work: Work, gpus: int) -> Iterator[Layout]:
    """Every pp x dp with every ep that divides dp; serving has no pipeline.

    A step that trains has a micro-batch at least for each rank, or two at once; replicas fill all
    ranks alike.
    """
    config = counts.config
    ways = [w for w in RECOMPUTE if not (work.overlap and w == "full")]  # `forward_two` refuses it
    if not work.training:
        ways = ["none"]
    for pp in divisors(gpus, config.num_hidden_layers if work.training else 1):
        if work.training and gpus // pp * work.at_once * work.tokens > work.batch_tokens:
            continue
        for ep in divisors(gpus // pp, config.n_routed_experts):
            if work.redundant and work.slots(config.n_routed_experts) % ep:
                continue
            for recompute in ways:
                yield Layout(ep, pp, gpus // pp, recompute)


@dataclass(frozen=True)
class Sensitivity:
    """What a changed assumption does to the chosen layout, and which one it would make the best."""

    change: str
    ratio: float  # tokens a second of the chosen layout, by those before
    fits: bool  # whether that still does
    layout: Layout | None  # the best then; None where nothing fits


@dataclass(frozen=True)
class Remedy:
    """Changes that were tried, one more each time, and the best layout with them."""

    changes: tuple[str, ...]
    best: Estimate


@dataclass(frozen=True)
class Plan:
    """The answer of :func:`plan`; all of it is a model but for rates that are called measured."""

    counts: Counts
    hardware: Hardware
    gpus: int
    work: Work

    @cached_property
    def estimates(self) -> list[Estimate]:
        """Of every layout."""
        return [
            estimate(self.hardware, self.counts, self.work, layout)
            for layout in layouts(self.counts, self.work, self.gpus)
        ]

    @cached_property
    def chosen(self) -> Estimate:
        """The layout that fits with most tokens a second; where none fits, that which lacks least.

        Ties go to the smaller pipeline, then to the smaller group of ranks.
        """
        return self._best(self.estimates)

    @staticmethod
    def _best(found: list[Estimate]) -> Estimate:
        fitting = [e for e in found if e.fits]
        if fitting:
            return max(fitting, key=lambda e: e.tokens_per_gpu)
        return min(found, key=lambda e: e.missing)

    @cached_property
    def by_ep(self) -> list[Estimate]:
        """The best layout of each size of expert-parallel groups."""
        sizes = sorted({e.layout.ep for e in self.estimates})
        return [self._best([e for e in self.estimates if e.layout.ep == ep]) for ep in sizes]

    def _with(self, **changes: Any) -> "Plan":
        work = {k: v for k, v in changes.items() if k in Work.__dataclass_fields__}
        fields = {k: v for k, v in changes.items() if k not in work}
        return replace(self, work=replace(self.work, **work), **fields)

    def most_tokens(self, layout: Layout) -> int:
        """The most tokens of a step, or sequences, of a rank that fit; 0 where one does not."""

        def fits(tokens: int) -> bool:
            skew = busiest(self.counts.config, self.work, layout.ep, self.hardware.domain)
            work = replace(self.work, tokens=tokens, skew=skew)
            return memory(self.counts, work, layout).total <= self.hardware.memory

        low, high = 0, 1
        while fits(high) and high < MOST_TOKENS:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    @cached_property
    def most(self) -> int:
        """The same in the layout that has most room."""
        return max(map(self.most_tokens, {e.layout for e in self.estimates}))

    def _changed(self) -> "Iterator[tuple[str, Plan]]":
        """What is left to try, one change more each."""
        plan, work = self, self.work
        if work.training:
            for name, fields in TRAINING:
                plan = plan._with(**fields)
                yield name, plan
            if work.tokens // 2 >= work.context:  # a sequence stays on one rank
                yield "half the tokens of a micro-batch", plan._with(tokens=work.tokens // 2)
            return
        if work.weights != "int4":
            plan = plan._with(weights="int4")
            yield "INT4 experts", plan
        most = plan.most
        plan = plan._with(tokens=min(work.tokens, most or 1))
        yield f"{work.items} a rank: {plan.work.tokens:,}{', the most' * (most > 0)}", plan
        plan = plan._with(context=max(1, work.context // 2))
        yield "half the context", plan

    @cached_property
    def remedies(self) -> list[Remedy]:
        """What is left to try where nothing fits: one change more each time, until it does."""
        tried: list[Remedy] = []
        for name, plan in () if self.chosen.fits else self._changed():
            tried.append(Remedy((*(tried[-1].changes if tried else ()), name), plan.chosen))
            if tried[-1].best.fits:
                break
        return tried

    def fewest_gpus(self, *, remedies: bool = False) -> int | None:
        """Of 1, 2, 4, ... GPUs of a node, then 1, 2, 4, ... nodes: the fewest that are enough.

        As asked, or with the remedies.
        """
        node = self.hardware.domain
        inside = [2**n for n in range(node.bit_length()) if 2**n < node]
        for gpus in [*inside, *(node * 2**n for n in range(15) if node * 2**n <= MOST_GPUS)]:
            plan = self._with(gpus=gpus)
            if not plan.estimates:
                continue
            if plan.chosen.fits or (remedies and any(p.chosen.fits for _, p in plan._changed())):
                return gpus
        return None

    @cached_property
    def sensitivity(self) -> list[Sensitivity]:
        """The chosen layout, and the choice, under other assumptions."""
        hardware, work = self.hardware, self.work
        changes: list[Change] = [
            ("skew x 1.5", {"skew": 1.5 * work.skew}),
            ("skew x 2", {"skew": 2 * work.skew}),
            ("network x 0.8", {"hardware": replace(hardware, network=0.8 * hardware.network)}),
            ("network x 1.25", {"hardware": replace(hardware, network=1.25 * hardware.network)}),
            ("NVLink x 0.8", {"hardware": replace(hardware, nvlink=0.8 * hardware.nvlink)}),
            ("NVLink x 1.25", {"hardware": replace(hardware, nvlink=1.25 * hardware.nvlink)}),
            ("tokens a rank x 0.5", {"tokens": max(1, work.tokens // 2)}),
            ("tokens a rank x 2", {"tokens": 2 * work.tokens}),
        ]
        if work.training and work.tokens // 2 < work.context:  # a sequence stays on one rank
            del changes[-2]
        found = []
        for name, fields in changes:
            other = self._with(**fields)
            same = estimate(other.hardware, self.counts, other.work, self.chosen.layout)
            ratio = same.tokens_per_gpu / self.chosen.tokens_per_gpu
            best = other.chosen if other.estimates else same
            layout = best.layout if best.fits else None
            found.append(Sensitivity(name, ratio, same.fits, layout))
        return found
