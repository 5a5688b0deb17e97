# SPDX-License-Identifier: MIT
"""The layouts that a number of GPUs allows, the one to take, what would help, what it hangs on."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from kimi_ops import _check
from kimi_ops.models.kimi_k2.config import KimiK2Config
from kimi_ops.plan.counts import WEIGHT_BYTES, Counts, count
from kimi_ops.plan.estimate import Estimate, estimate
from kimi_ops.plan.hardware import HARDWARE, Hardware
from kimi_ops.plan.work import RECOMPUTE, Layout, Work

__all__ = ["Plan", "plan"]

PRESETS = ("k2", "mini", "tiny")
MOST_GPUS = 16384
Change = tuple[str, dict[str, Any]]  # what it is called, fields of Work


def _divisors(number: int, most: int) -> list[int]:
    return [d for d in range(1, min(number, most) + 1) if number % d == 0]


def layouts(counts: Counts, work: Work, gpus: int) -> Iterator[Layout]:
    """Every pp x dp with every ep that divides dp; serving has no pipeline."""
    config = counts.config
    for pp in _divisors(gpus, config.num_hidden_layers if work.training else 1):
        for ep in _divisors(gpus // pp, config.n_routed_experts):
            for recompute in RECOMPUTE if work.training else ("none",):
                yield Layout(ep, pp, gpus // pp, recompute)


@dataclass(frozen=True)
class Sensitivity:
    """What a changed assumption does to the chosen layout, and which one it would make the best."""

    change: str
    ratio: float  # tokens a second of the chosen layout, by those before
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

    def _changes(self) -> list[Change]:
        tokens, context = self.work.tokens, self.work.context
        if not self.work.training:
            what = "sequences" if self.work.decoding else "tokens"
            changes: list[Change] = [(f"half the {what} a rank", {"tokens": max(1, tokens // 2)})]
            if self.work.decoding:
                changes.append(("half the context", {"context": max(1, context // 2)}))
            if self.work.weights != "int4":
                changes.insert(0, ("INT4 experts", {"weights": "int4"}))
            return changes
        return [
            ("momentum in bf16", {"momentum_bytes": 2}),
            ("optimizer state in the host's memory", {"offload": True}),
            ("gradients in bf16", {"gradient_bytes": 2}),
            ("half the tokens of a micro-batch", {"tokens": max(1, tokens // 2)}),
        ]

    @cached_property
    def remedies(self) -> list[Remedy]:
        """What is left to try where nothing fits: one change more each time, until it does."""
        tried: list[Remedy] = []
        names: tuple[str, ...] = ()
        plan = self
        for name, fields in [] if self.chosen.fits else self._changes():
            names, plan = (*names, name), plan._with(**fields)
            tried.append(Remedy(names, plan.chosen))
            if tried[-1].best.fits:
                break
        return tried

    def fewest_gpus(self, *, remedies: bool = False) -> int | None:
        """The smallest power of two times a node that is enough, as asked or with all remedies."""
        plan = self
        for _, fields in self._changes() if remedies else ():
            plan = plan._with(**fields)
        gpus = self.hardware.domain
        while gpus <= MOST_GPUS:
            if plan._with(gpus=gpus).chosen.fits:
                return gpus
            gpus *= 2
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
        found = []
        for name, fields in changes:
            other = self._with(**fields)
            same = next(e for e in other.estimates if e.layout == self.chosen.layout)
            ratio = same.tokens_per_gpu / self.chosen.tokens_per_gpu
            best = other.chosen
            found.append(Sensitivity(name, ratio, best.layout if best.fits else None))
        return found


def plan(
    model: str | Path | KimiK2Config = "k2",
    hardware: str | Hardware = "h200",
    gpus: int = 256,
    *,
    mode: str = "train",
    tokens_per_rank: int | None = None,
    skew: float = 1.0,
    context: int = 4096,
    batch_tokens: int = 2**26,
    weights: str | None = None,
    wire: str | None = None,
) -> Plan:
    """Predict how a model trains or serves on a number of GPUs, for every way to spread it.

    Parameters
    ----------
    model : str, Path or KimiK2Config
        ``"k2"``, ``"mini"``, ``"tiny"`` or a ``config.json``.
    hardware : str or Hardware
        A name in `HARDWARE`, or a machine of one's own.
    gpus : int
    mode : {"train", "prefill", "decode"}
        A training step (1F1B pipeline, ZeRO-1 MuonClip); or serving, attention by data and experts
        by expert parallelism: a step that reads prompts, or one that adds a token to sequences.
        ``"serve"`` is ``"decode"``, which needs the most memory.
    tokens_per_rank : int, optional
        Of a micro-batch or prompts (4096), or sequences that a rank decodes (128).
    skew : float
        Rows of the busiest rank by the mean, at least 1; scales expert products, copies and links.
    context : int
        Tokens of a sequence, in the cache of each where one decodes.
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
    if isinstance(hardware, str):
        _check.choice("plan", "hardware", hardware, tuple(HARDWARE))
        hardware = HARDWARE[hardware]
    _check.choice("plan", "mode", mode, ("train", "serve", "prefill", "decode"))
    mode = "decode" if mode == "serve" else mode
    training = mode == "train"
    tokens = (128 if mode == "decode" else 4096) if tokens_per_rank is None else tokens_per_rank
    sizes = {"gpus": gpus, "tokens_per_rank": tokens, "context": context}
    for name, value in {**sizes, "batch_tokens": batch_tokens}.items():
        _check.between("plan", name, value, 1, 2**40)
    if not 1 <= _check.number("plan", "skew", skew) < float("inf"):
        raise ValueError(
            f"plan: skew: expected at least 1, busiest rank by mean, got {skew}; 1 is balanced"
        )
    weights = weights or ("bf16" if training else "fp8")
    _check.choice("plan", "weights", weights, ("bf16",) if training else tuple(WEIGHT_BYTES))
    wire = wire or ("bf16" if training else "fp8")
    _check.choice("plan", "wire", wire, ("bf16", "fp8"))
    work = Work(mode, tokens, context, float(skew), weights, wire, batch_tokens)
    return Plan(count(_config(model)), hardware, gpus, work)


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
