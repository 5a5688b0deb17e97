# SPDX-License-Identifier: MIT
"""Counts of parameters, bytes and active weights, from the configuration alone."""

from collections.abc import Iterator
from dataclasses import dataclass

from kimi_ops.models.kimi_k2.config import KimiK2Config

__all__ = ["ParameterReport", "Part", "parameter_report"]

_FP8_BLOCK = 128  # FP8 checkpoints hold one fp32 scale for each 128 x 128 block of a matrix


@dataclass(frozen=True)
class Part:
    """One kind of tensor group: `each` parameters, `count` times, `active` of them for a token."""

    name: str
    each: int
    count: int
    active: int
    quantized: bool = False  # FP8 in a quantised checkpoint
    scales: int = 0  # fp32 block scales beside one FP8 copy

    @property
    def total(self) -> int:
        return self.each * self.count


@dataclass(frozen=True)
class ParameterReport:
    """What a model of one configuration holds. Counts are parameters, sizes are bytes."""

    config: KimiK2Config
    parts: tuple[Part, ...]
    bias_buffers: int  # router selection biases, fp32, not trained by gradients

    @property
    def parameters(self) -> int:
        """Trainable parameters, without the router's bias buffers."""
        return sum(part.total for part in self.parts)

    @property
    def total(self) -> int:
        """Parameters and bias buffers."""
        return self.parameters + self.bias_buffers

    def _active(self, *excluded: str) -> int:
        chosen = (part for part in self.parts if part.name not in excluded)
        return sum(part.each * part.active for part in chosen) + self.bias_buffers

    @property
    def active(self) -> int:
        """Used for one token, input embedding table and output head included in full."""
        return self._active()

    @property
    def active_without_embedding(self) -> int:
        """Used for one token without the input embedding, of which one row is read."""
        return self._active("embed_tokens")

    @property
    def active_without_embedding_and_head(self) -> int:
        """Used for one token in the layers and the final norm."""
        return self._active("embed_tokens", "lm_head")

    @property
    def bf16_bytes(self) -> int:
        """Checkpoint in bfloat16, biases in fp32."""
        return 2 * self.parameters + 4 * self.bias_buffers

    @property
    def fp8_bytes(self) -> int:
        """Checkpoint with FP8 matrices and fp32 block scales; the rest bfloat16, biases fp32."""
        quantized = sum(part.total for part in self.parts if part.quantized)
        scales = sum(part.scales * part.count for part in self.parts)
        return quantized + 4 * scales + 2 * (self.parameters - quantized) + 4 * self.bias_buffers

    @property
    def kv_cache_bytes_per_token(self) -> int:
        """Latent cache of all layers in bfloat16."""
        width = self.config.kv_lora_rank + self.config.qk_rope_head_dim
        return 2 * width * self.config.num_hidden_layers

    def __str__(self) -> str:
        lines = [f"{'part':<18}{'each':>16}{'x':>7}{'total':>22}{'share':>9}"]
        for part in self.parts:
            share = f"{100 * part.total / self.total:.2f} %"
            lines.append(
                f"{part.name:<18}{part.each:>16,}{part.count:>7}{part.total:>22,}{share:>9}"
            )
        rows = (
            ("parameters", self.parameters),
            ("router bias buffers", self.bias_buffers),
            ("total", self.total),
            ("active for a token", self.active),
            ("  without embedding", self.active_without_embedding),
            ("  and without head", self.active_without_embedding_and_head),
        )
        lines += [f"{name:<41}{value:>22,}" for name, value in rows]
        sizes = (
            ("weights in bf16", self.bf16_bytes),
            ("weights in FP8 with block scales", self.fp8_bytes),
        )
        lines += [f"{name:<41}{value / 1e9:>19,.2f} GB" for name, value in sizes]
        lines.append(
            f"{'latent KV cache for a token in bf16':<41}{self.kv_cache_bytes_per_token:>20,} B"
        )
        return "\n".join(lines)


def _matrices(*shapes: tuple[int, int]) -> tuple[int, int]:
    """Elements and 128 x 128 blocks of some matrices."""
    elements = sum(rows * columns for rows, columns in shapes)
    blocks = sum(-(-r // _FP8_BLOCK) * -(-c // _FP8_BLOCK) for r, c in shapes)
    return elements, blocks


def _attention(config: KimiK2Config) -> tuple[int, int, int]:
    """Elements and blocks of the matrices of one layer, and its other parameters."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    kv_rank, kv_width = config.kv_lora_rank, config.kv_lora_rank + config.qk_rope_head_dim
    shapes = [
        (kv_width, hidden),
        (heads * (config.qk_nope_head_dim + config.v_head_dim), kv_rank),
        (hidden, heads * config.v_head_dim),
    ]
    others = kv_rank
    biases = kv_width + hidden
    if config.q_lora_rank is None:
        shapes.append((heads * config.qk_head_dim, hidden))
    else:
        shapes += [(config.q_lora_rank, hidden), (heads * config.qk_head_dim, config.q_lora_rank)]
        others += config.q_lora_rank
        biases += config.q_lora_rank
    return *_matrices(*shapes), others + biases * config.attention_bias


def _parts(config: KimiK2Config) -> Iterator[Part]:
    layers, hidden = config.num_hidden_layers, config.hidden_size
    sparse = sum(config.is_moe_layer(n) for n in range(layers))
    dense = layers - sparse
    table = config.vocab_size * hidden
    tied = config.tie_word_embeddings
    yield Part("embed_tokens", table, 1, 0 if tied else 1)
    if tied:  # one table in two roles: stored once, used as the head
        yield Part("lm_head", table, 0, 1)
    else:
        yield Part("lm_head", table, 1, 1)
    elements, blocks, others = _attention(config)
    yield Part("attention", elements, layers, layers, True, blocks)
    yield Part("attention norms", others, layers, layers)
    yield Part("layer norms", 2 * hidden, layers, layers)

    def mlp(name: str, width: int, count: int, active: int) -> Part:
        size, scales = _matrices((width, hidden), (width, hidden), (hidden, width))
        return Part(name, size, count, active, True, scales)

    width, shared = config.moe_intermediate_size, config.n_shared_experts
    yield mlp("dense MLP", config.intermediate_size, dense, dense)
    yield mlp(
        "routed experts",
        width,
        sparse * config.n_routed_experts,
        sparse * config.num_experts_per_tok,
    )
    if shared:
        yield mlp("shared experts", width * shared, sparse, sparse)
    yield Part("routers", config.n_routed_experts * hidden, sparse, sparse)
    yield Part("final norm", hidden, 1, 1)


def parameter_report(config: KimiK2Config) -> ParameterReport:
    """Count a model without building it.

    Parameters
    ----------
    config : KimiK2Config

    Returns
    -------
    ParameterReport
        Its parts, totals and sizes as numbers; `str` of it is a table.

    Examples
    --------
    >>> from kimi_ops.models.kimi_k2.config import KimiK2Config
    >>> from kimi_ops.models.kimi_k2.parameters import parameter_report
    >>> report = parameter_report(KimiK2Config.k2())
    >>> report.total, report.active, report.kv_cache_bytes_per_token
    (1026408232448, 32861500928, 70272)
    """
    sparse = sum(config.is_moe_layer(n) for n in range(config.num_hidden_layers))
    return ParameterReport(config, tuple(_parts(config)), sparse * config.n_routed_experts)
