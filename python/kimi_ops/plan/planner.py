# SPDX-License-Identifier: MIT
"""The layouts that a number of GPUs allows, the one to take, what would help, what it hangs on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from kimi_ops import _check
from kimi_ops.models.kimi_k2.config import KimiK2Config
from kimi_ops.plan.counts import WEIGHT_BYTES, Counts, count
from kimi_ops.plan.estimate import Estimate, estimate
from kimi_ops.plan.hardware import HARDWARE, Hardware
from kimi_ops.plan.memory import memory
from kimi_ops.plan.skew import busiest, checked_loads
from kimi_ops.plan.work import RECOMPUTE, Layout, Work

__all__ = ["Plan", "plan"]

PRESETS = ("k2", "mini", "tiny")
MOST_GPUS, MOST_TOKENS = 16384, 2**40
Change = tuple[str, dict[str, Any]]  # what it is called, fields of Work
TRAINING: list[Change] = [
    ("momentum in bf16", {"momentum_bytes": 2}),
    ("optimizer state in the host's memory", {"offload": True}),
    ("gradients in bf16", {"gradient_bytes": 2}),
]


def _divisors(number: int, most: int) -> list[int]:
    return [d for d in range(1, min(number, most) + 1) if number % d == 0]


def layouts(counts: Counts, work: Work, gpus: int) -> Iterator[Layout]:
    """Every pp x dp with every ep that divides dp; serving has no pipeline.

    A step that trains has a micro-batch at least for each rank; replicas fill all ranks alike.
    """
    config = counts.config
    for pp in _divisors(gpus, config.num_hidden_layers if work.training else 1):
        if work.training and gpus // pp * work.tokens > work.batch_tokens:
            continue
        for ep in _divisors(gpus // pp, config.n_routed_experts):
            if work.redundant and work.slots(config.n_routed_experts) % ep:
                continue
            for recompute in RECOMPUTE if work.training else ("none",):
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


def plan(
    model: str | Path | KimiK2Config = "k2",
    hardware: str | Path | Hardware = "h200",
    gpus: int = 256,
    *,
    mode: str = "train",
    tokens_per_rank: int | None = None,
    skew: float = 1.0,
    loads: Tensor | Sequence[Any] | None = None,
    redundant: int = 0,
    context: int | None = None,
    batch_tokens: int = 2**26,
    weights: str | None = None,
    wire: str | None = None,
) -> Plan:
    """Predict how a model trains or serves on a number of GPUs, for every way to spread it.

    Parameters
    ----------
    model : str, Path or KimiK2Config
        ``"k2"``, ``"mini"``, ``"tiny"`` or a ``config.json``.
    hardware : str, Path or Hardware
        A name in `HARDWARE`, or a machine of one's own, which may be a JSON file
        (`Hardware.from_file`).
    gpus : int
    mode : {"train", "prefill", "decode"}
        A training step (1F1B pipeline, ZeRO-1 MuonClip); or serving, attention by data and experts
        by expert parallelism: a step that reads prompts, or one that adds a token to sequences.
        ``"serve"`` is ``"decode"``, which needs the most memory.
    tokens_per_rank : int, optional
        Of a micro-batch or prompts (4096, or a longer context), or sequences that a rank decodes
        (128).
    skew : float
        Rows of the busiest rank by the mean, at least 1, in groups of every size in which it can
        be; scales expert products, copies and links.
    loads : Tensor [L, E] or [E], optional
        Tokens that each expert got, of each layer or one for all: what `ExpertLoads` counts. They
        say the skew for each size of groups; `skew` is what drift adds to it.
    redundant : int
        Replicas of busy experts that serve beside one of each, placed by `eplb`.
    context : int, optional
        Tokens of a sequence, in the cache of each where one decodes (4096, or what the model and
        `tokens_per_rank` allow). One that trains lies on one rank; a prompt may be longer than a
        step's tokens.
    batch_tokens : int
        Of a training step.
    weights : {"bf16", "fp8", "int4"}, optional
        What serves: fp8 unless given. Training has bf16.
    wire : {"bf16", "fp8"}, optional
        Dispatched rows: bf16 to train, fp8 to serve unless given.

    Returns
    -------
    Plan
        `chosen`, `by_ep`, `estimates`, `remedies`, `sensitivity`.

    Raises
    ------
    TypeError, ValueError
        What is not known, or numbers out of range.

    Examples
    --------
    >>> from kimi_ops.plan import plan
    >>> chosen = plan("k2", "h200", 16, mode="serve").chosen
    >>> chosen.fits, chosen.layout.ep
    (True, 16)
    """
    if isinstance(hardware, Path) or str(hardware).endswith(".json"):
        hardware = Hardware.from_file(hardware)  # type: ignore[arg-type]
    if not isinstance(hardware, Hardware):
        _check.choice("plan", "hardware", hardware, tuple(HARDWARE))
        hardware = HARDWARE[hardware]
    _check.choice("plan", "mode", mode, ("train", "serve", "prefill", "decode"))
    mode = "decode" if mode == "serve" else mode
    training = mode == "train"
    counts = count(_config(model))
    longest = counts.config.max_position_embeddings
    sizes = {"gpus": gpus, "batch_tokens": batch_tokens, "tokens_per_rank": tokens_per_rank}
    for name, value in sizes.items():
        if value is not None:
            _check.between("plan", name, value, 1, MOST_TOKENS)
    if context is None:
        context = min(4096, longest, tokens_per_rank or 4096 if training else 4096)
    _check.between("plan", "context", context, 1, longest, ", the model's positions")
    tokens = 128 if mode == "decode" else max(4096, context) if training else 4096
    tokens = tokens if tokens_per_rank is None else tokens_per_rank
    if not 1 <= _check.number("plan", "skew", skew) < float("inf"):
        raise ValueError(
            f"plan: skew: expected at least 1, busiest rank by mean, got {skew}; 1 is balanced"
        )
    weights = weights or ("bf16" if training else "fp8")
    _check.choice("plan", "weights", weights, ("bf16",) if training else tuple(WEIGHT_BYTES))
    wire = wire or ("bf16" if training else "fp8")
    _check.choice("plan", "wire", wire, ("bf16", "fp8"))
    if training and context > tokens:
        raise ValueError(
            f"plan: context: expected at most tokens_per_rank, {tokens}, got {context}; a sequence "
            f"trains on one rank: raise tokens_per_rank to {context}"
        )
    _check.between("plan", "redundant", redundant, 0, counts.config.n_routed_experts)
    if training and redundant:
        raise ValueError(
            f"plan: redundant: expected 0 to train, got {redundant}; replicas serve: take "
            "mode='decode' or 'prefill'"
        )
    work = Work(
        mode,
        tokens,
        context,
        float(skew),
        weights,
        wire,
        batch_tokens,
        redundant=redundant,
        loads=None if loads is None else checked_loads(counts.config, loads),
    )
    made = Plan(counts, hardware, gpus, work)
    if not made.estimates:
        deepest = max(_divisors(gpus, counts.config.num_hidden_layers))
        raise ValueError(
            f"plan: batch_tokens: expected at least {gpus // deepest * tokens}, a micro-batch of "
            f"{tokens} tokens on each rank, got {batch_tokens}; lower tokens_per_rank or gpus"
        )
    return made


def _config(model: str | Path | KimiK2Config) -> KimiK2Config:
    if isinstance(model, KimiK2Config):
        return model
    if str(model) in PRESETS:
        return getattr(KimiK2Config, str(model))()
    path = Path(model)
    if path.suffix != ".json" and not path.is_dir():
        raise ValueError(
            f"plan: model: expected {', '.join(PRESETS)} or a config.json, got {model}; name one"
        )
    return KimiK2Config.from_file(path / "config.json" if path.is_dir() else path)
