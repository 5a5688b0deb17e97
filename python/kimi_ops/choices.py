# SPDX-License-Identifier: MIT
"""The names that options take, as types: ``score_function: ScoreFunction``.

Where Python checks a name it reads it here; a test holds the others against what native functions
take. Activations are in `kimi_ops.activations`.
"""

from typing import Literal

# Routers and experts
ScoreFunction = Literal["sigmoid", "softmax", "sqrtsoftplus"]
Selection = Literal["scores", "logits"]  # what experts are chosen by
DropRule = Literal["weights", "position"]  # which pairs stay
StoredForm = Literal["fp8", "int4"]  # of weights

# The optimizer
Algorithm = Literal["muon", "adamw"]
Method = Literal["standard", "symmetric", "gram"]  # of Newton-Schulz
AnyMethod = Literal["auto", Method]
Schedule = Literal["aol", "cans", "cubic", "deepseek_v4", "polar_express", "quintic", "you"]
BatchDims = Literal["leading", "flatten"]
ExpertLayout = Literal["rows", "columns", "rows_interleaved", "columns_interleaved"]
AttentionLayout = Literal["mla", "mha", "gqa"]
GqaMode = Literal["query_only", "group_max"]

# Ranks
Backend = Literal["shm", "gloo", "nccl", "cuda"]
AnyBackend = Literal["auto", Backend, "reference"]
DispatchLayout = Literal["rank_dedup", "expert_direct"]
Overflow = Literal["raise", "drop", "grow"]

# Programs
Recompute = Literal["none", "selective", "full"]
PipelineSchedule = Literal["1F1B", "GPipe"]  # of torch.distributed.pipelining
PlanMode = Literal["train", "serve", "prefill", "decode"]
Wire = Literal["bf16", "fp8"]
