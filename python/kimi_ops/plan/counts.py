# SPDX-License-Identifier: MIT
"""Parameters of a layer's parts, from the configuration alone."""

from dataclasses import dataclass

from kimi_ops.models.kimi_k2.config import KimiK2Config
from kimi_ops.models.kimi_k2.parameters import parameter_report

__all__ = ["WEIGHT_BYTES", "Counts", "count"]

# Bytes a parameter of the routed experts and of the other matrices that are stored quantised.
# FP8 has an fp32 scale for 128 x 128, INT4 (experts alone, as Kimi K2 Thinking) a bf16 one for 32.
WEIGHT_BYTES = {
    "bf16": (2.0, 2.0),
    "fp8": (1 + 4 / 128**2, 1 + 4 / 128**2),
    "int4": (0.5 + 2 / 32, 2.0),
}


@dataclass(frozen=True)
class Counts:
    """Parameters: of one layer's matrices, of one expert, of the embedding or head."""

    config: KimiK2Config
    attention: int
    up_projections: int  # the part of attention that expands the latents
    expert: int
    shared: int
    router: int
    dense: int
    norms: int  # vectors of one layer
    table: int
    total: int

    def stage(self, layers: range, ep: int, redundant: int = 0) -> tuple[int, int, int]:
        """Of a pipeline stage: its routed experts on one rank, other matrices of Muon, the rest."""
        config = self.config
        sparse = sum(config.is_moe_layer(n) for n in layers)
        held = -(-(config.n_routed_experts + redundant) // ep)
        matrices = len(layers) * self.attention + sparse * self.shared
        matrices += (len(layers) - sparse) * self.dense
        ends = (0 in layers) + (config.num_hidden_layers - 1 in layers)
        if config.tie_word_embeddings and len(layers) == config.num_hidden_layers:
            ends = 1
        rest = sparse * self.router + len(layers) * self.norms + ends * self.table
        return sparse * held * self.expert, matrices, rest


def count(config: KimiK2Config) -> Counts:
    """Count without building the model."""
    if not any(config.is_moe_layer(n) for n in range(config.num_hidden_layers)):
        raise ValueError(
            "plan: model: expected layers with experts, got none; lower first_k_dense_replace"
        )
    report = parameter_report(config)
    each = {part.name: part.each for part in report.parts}
    heads = config.num_attention_heads
    up = heads * (config.qk_nope_head_dim + config.v_head_dim) * config.kv_lora_rank
    up += heads * config.qk_head_dim * (config.q_lora_rank or 0)
    return Counts(
        config,
        attention=each["attention"],
        up_projections=up,
        expert=each["routed experts"],
        shared=each.get("shared experts", 0),
        router=each["routers"],
        dense=each["dense MLP"],
        norms=each["attention norms"] + each["layer norms"],
        table=each["embed_tokens"],
        total=report.total,
    )
