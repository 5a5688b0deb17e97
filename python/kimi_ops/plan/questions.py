# SPDX-License-Identifier: MIT
"""What may be asked of the planner, checked, in the words of its user."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from kimi_ops import _check
from kimi_ops.choices import PlanMode, StoredForm, Wire
from kimi_ops.models.kimi_k2.config import KimiK2Config, presets
from kimi_ops.plan.counts import WEIGHT_BYTES, count
from kimi_ops.plan.hardware import HARDWARE, Hardware
from kimi_ops.plan.planner import MOST_TOKENS, Plan, divisors
from kimi_ops.plan.skew import checked_loads
from kimi_ops.plan.work import Work

__all__ = ["plan"]


def plan(
    model: str | Path | KimiK2Config = "k2",
    hardware: str | Path | Hardware = "h200",
    gpus: int = 256,
    *,
    mode: PlanMode = "train",
    tokens_per_rank: int | None = None,
    skew: float = 1.0,
    loads: Tensor | Sequence[Any] | None = None,
    redundant: int = 0,
    context: int | None = None,
    batch_tokens: int = 2**26,
    weights: Literal["bf16", StoredForm] | None = None,
    wire: Wire | None = None,
    overlap: bool = False,
) -> Plan:
    """Predict how a model trains or serves on a number of GPUs, for every way to spread it.

    Parameters
    ----------
    model : str, Path or KimiK2Config
        ``"k2"``, ``"moonlight"``, ``"moonlight_slice"``, ``"mini"``, ``"tiny"`` or a
        ``config.json``.
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
    overlap : bool
        Train on micro-batches in twos, side by side, as `forward_two` does: the messages of one
        travel while the other computes. Two take the memory of two.

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
    _check.choice("plan", "mode", mode, get_args(PlanMode))
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
    _check.choice("plan", "wire", wire, get_args(Wire))
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
    if overlap and not training:
        raise ValueError(
            f"plan: overlap: expected False to serve, got True in mode {mode!r}; it is of "
            "micro-batches, which train: take mode='train'"
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
        overlap=overlap,
    )
    made = Plan(counts, hardware, gpus, work)
    if not made.estimates:
        deepest = max(divisors(gpus, counts.config.num_hidden_layers))
        raise ValueError(
            "plan: batch_tokens: expected at least "
            f"{gpus // deepest * tokens * work.at_once}, {'two' if overlap else 'a'} micro-batch"
            f"{'es' * overlap} of {tokens} tokens on each rank, got {batch_tokens}; lower "
            "tokens_per_rank or gpus"
        )
    return made


def _config(model: str | Path | KimiK2Config) -> KimiK2Config:
    if isinstance(model, KimiK2Config):
        return model
    if str(model) in presets.NAMES:
        return getattr(KimiK2Config, str(model))()
    path = Path(model)
    if path.suffix != ".json" and not path.is_dir():
        raise ValueError(
            f"plan: model: expected {', '.join(presets.NAMES)} or a config.json, got {model}; name "
            "one"
        )
    return KimiK2Config.from_file(path / "config.json" if path.is_dir() else path)
