# SPDX-License-Identifier: MIT
"""Everything that decides what a training run computes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from kimi_ops.models.kimi_k2.config import KimiK2Config, presets
from kimi_ops.models.kimi_k2.recompute import check_storage
from kimi_ops.train.data import VOCABULARY

PRESETS = tuple(name for name in presets.NAMES if name != "k2")
DTYPES = ("float32", "bfloat16")
WINDOW = 256
MAX_THREADS = 1024
# What a resumed run may not change, and why; nor the windows of a step, sequences times accumulate.
# The rest it may: learning rate, length, clipping, ...
FIXED = {
    "preset": "the weights have the shape of that model",
    "weights": "the optimizer has masters or has none",
    "seed": "it decides which text every step sees",
    "window": "it decides which text every step sees",
    "validation_sequences": "the losses so far were taken on that many windows",
}


@dataclass(frozen=True)
class TrainSettings:
    """Numbers of a run; two runs with equal settings, data and thread count give equal bits.

    Attributes
    ----------
    preset : str
        Shape of the model, a preset of KimiK2Config with 256 byte values as its vocabulary.
    dtype : str
        Of the products of forward and backward: float32, or bfloat16. Gradients, moments, router
        scores and the loss are fp32 either way.
    weights : str
        float32; beside dtype bfloat16 (torch.autocast casts them) also bfloat16, with fp32 masters
        in the optimizer, on the rank that owns a matrix.
    recompute : str
        What backwards compute again instead of keeping it, at the same bits: none, selective
        (norms, expansions of latents, SwiGLU) or full (whole layers).
    fp8_activations : bool
        The inputs of the routed experts' products and SwiGLU are kept in FP8 for the backward.
    steps : int
        Optimizer steps in all.
    sequences, window, accumulate : int
        Sequences of a micro-batch, bytes of a sequence, micro-batches of a step. Window 0: 256,
        or as many as the model has positions.
    lr, weight_decay : float
        Peak learning rate, shared by Muon (scaled to AdamW's update size) and AdamW.
    warmup, decay : float
        Shares of the run.
    ns_dtype : str
        Arithmetic of Newton-Schulz. "auto" is float32 on a CPU, as fast as bf16 at these sizes and
        fast on every one, and float16 on a GPU, whose tensor cores have it.
    tau : float
        Largest attention logit that QK-Clip allows.
    bias_rate : float
        Step of the expert bias; it falls with the learning rate at the end.
    clip_norm : float
        Largest gradient norm of the AdamW groups (Muon does not see the scale of a gradient).
    validate_every, validation_sequences : int
        Steps between validations, windows of each.
    checkpoint_every, keep_checkpoints : int
        Steps between checkpoints, how many stay.
    seed, threads : int
        Threads 0: as many as torch has; a resumed run keeps its number.
    """

    preset: str = "mini"
    dtype: str = "float32"
    weights: str = "float32"
    recompute: str = "none"
    fp8_activations: bool = False
    steps: int = 350
    sequences: int = 16
    window: int = 0
    accumulate: int = 1
    lr: float = 0.012
    weight_decay: float = 0.1
    warmup: float = 0.05
    decay: float = 0.3
    ns_dtype: str = "auto"
    tau: float = 100.0
    bias_rate: float = 0.02
    clip_norm: float = 1.0
    validate_every: int = 50
    validation_sequences: int = 64
    checkpoint_every: int = 50
    keep_checkpoints: int = 2
    seed: int = 0
    threads: int = 0

    def __post_init__(self) -> None:
        self._require("preset", self.preset in PRESETS, f"one of {', '.join(PRESETS)}")
        positions = getattr(KimiK2Config, self.preset)().max_position_embeddings
        if self.window == 0:
            object.__setattr__(self, "window", min(WINDOW, positions))
        self._require(
            "window", 1 <= self.window <= positions,
            f"1 to {positions} bytes, the positions of {self.preset}",
        )  # fmt: skip
        for name in ("steps", "sequences", "accumulate", "validate_every"):
            self._require(name, getattr(self, name) >= 1, "a number >= 1")
        for name in ("validation_sequences", "checkpoint_every", "keep_checkpoints"):
            self._require(name, getattr(self, name) >= 1, "a number >= 1")
        for name in ("weight_decay", "bias_rate"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "a number >= 0")
        self._require("threads", 0 <= self.threads <= MAX_THREADS, f"0 to {MAX_THREADS}")
        self._require("seed", 0 <= self.seed < 2**63, "a number from 0 to 2**63 - 1")
        for name in ("lr", "tau", "clip_norm"):
            self._require(name, 0 < getattr(self, name) < math.inf, "a positive number")
        for name, choices in (("dtype", DTYPES), ("ns_dtype", ("auto", "float16", *DTYPES))):
            self._require(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        fitting = ("float32",) if self.dtype == "float32" else DTYPES
        self._require(
            "weights", self.weights in fitting, f"{' or '.join(fitting)} beside dtype {self.dtype}"
        )
        check_storage("train", self.recompute, self.fp8_activations)
        for name in ("warmup", "decay"):
            self._require(name, 0 <= getattr(self, name) <= 0.5, "a share of 0 to 0.5")

    def _require(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise ValueError(
                f"train: {name}: expected {expected}, got {getattr(self, name)}; change it"
            )

    def model_config(self) -> KimiK2Config:
        """The preset with one token for each byte value, and no others."""
        none = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        return dataclasses.replace(
            getattr(KimiK2Config, self.preset)(),
            vocab_size=VOCABULARY,
            torch_dtype=self.weights,
            **none,
        )

    @property
    def windows_per_step(self) -> int:
        return self.sequences * self.accumulate

    @property
    def tokens_per_step(self) -> int:
        return self.windows_per_step * self.window

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)
