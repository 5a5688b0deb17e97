# SPDX-License-Identifier: MIT
"""Layers stacked to a language model, without what reads and writes files."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from kimi_ops.models.kimi_k2.attention import Attention, LatentCache
from kimi_ops.models.kimi_k2.config import KimiK2Config
from kimi_ops.models.kimi_k2.expert_ranks import ExpertRanks
from kimi_ops.models.kimi_k2.layers import MLP, RMSNorm, check_dtype
from kimi_ops.models.kimi_k2.moe import MoE
from kimi_ops.models.kimi_k2.quantized_experts import QuantizedExperts
from kimi_ops.models.kimi_k2.rope import rotary_tables

__all__ = ["Decoder", "DecoderLayer"]


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the MLP is dense or a mixture of experts."""

    def __init__(
        self, config: KimiK2Config, layer: int, ranks: ExpertRanks | None, **factory: Any
    ) -> None:
        super().__init__()
        self.layer = layer
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps, **factory)
        self.self_attn = Attention(config, **factory)
        self.post_attention_layernorm = RMSNorm(size, eps, **factory)
        self.mlp: MoE | MLP
        if config.is_moe_layer(layer):
            self.mlp = MoE(config, ranks, **factory)
        else:
            self.mlp = MLP(config, config.intermediate_size, **factory)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LatentCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, self.layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """Embedding, layers and final norm: the part under ``model.`` in a checkpoint."""

    def __init__(self, config: KimiK2Config, ranks: ExpertRanks | None, **factory: Any) -> None:
        super().__init__()
        # without a draw, which on meta would load torch._dynamo: seconds for nothing
        table = torch.empty(config.vocab_size, config.hidden_size, **factory)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(DecoderLayer(config, n, ranks, **factory) for n in layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)


class Decoder(nn.Module):
    """The network: ids in, logits out, with what training reads of its layers. See `KimiK2`."""

    def __init__(
        self,
        config: KimiK2Config,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        expert_ranks: ExpertRanks | None = None,
    ) -> None:
        super().__init__()
        self.config, self.expert_ranks = config, expert_ranks
        if expert_ranks is not None and expert_ranks.count != config.n_routed_experts:
            raise ValueError(
                f"KimiK2: expert_ranks: expected ranks of {config.n_routed_experts} experts, got "
                f"ranks of {expert_ranks.count}; make them from this config"
            )
        dtype = dtype or torch.get_default_dtype()
        check_dtype("KimiK2", dtype)
        factory = {"device": torch.device("meta"), "dtype": dtype}
        self.model = Backbone(config, expert_ranks, **factory)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, **factory)
        self._tie()
        device = torch.device(device) if device is not None else torch.get_default_device()
        if device.type != "meta":
            self.allocate(device)
            self.init_weights(0)

    def _tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def allocate(self, device: torch.device | str) -> None:
        """Give a model on the meta device uninitialised memory; statistics and biases are reset."""
        # as to_empty, whose empty_like of a meta tensor loads sympy
        self._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))
        self._tie()
        self.reset_statistics()
        for moe in self.moe_layers():
            moe.gate.e_score_correction_bias.zero_()

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw the matrices from normal(0, initializer_range); gains 1, biases 0.

        Parameters
        ----------
        seed : int
            The same seed gives the same weights on every device and for any number of expert ranks:
            all are drawn on the CPU in fp32, in the order of `named_parameters`.

        Raises
        ------
        ValueError
            Experts that are kept quantised: they come from a checkpoint.
        """
        if self.experts_form is not None:
            raise ValueError(
                f"init_weights: model: expected plain experts, got {self.experts_form}; build the "
                "model from its configuration"
            )
        generator, spread = torch.Generator().manual_seed(seed), self.expert_stacks()
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                rows, here = len(parameter), slice(None)
                if self.expert_ranks is not None and parameter in spread:
                    experts = self.expert_ranks.experts
                    rows, here = self.config.n_routed_experts, slice(experts.start, experts.stop)
                values = torch.empty(rows, *parameter.shape[1:], dtype=torch.float32, device="cpu")
                values.normal_(0.0, self.config.initializer_range, generator=generator)
                parameter.copy_(values[here])
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        for moe in self.moe_layers():
            moe.gate.e_score_correction_bias.zero_()
        self.reset_statistics()

    def forward(self, input_ids: Tensor, *, cache: LatentCache | None = None) -> Tensor:
        """Next-token logits.

        Parameters
        ----------
        input_ids : Tensor [B, S] int64
            Ids in 0 .. vocab_size - 1.
        cache : LatentCache, optional
            Tokens before these; S tokens are added to it. Only without gradients.

        Returns
        -------
        Tensor [B, S, vocab_size], the dtype of the parameters

        Raises
        ------
        TypeError, ValueError
            Wrong dtype or shape, ids outside the vocabulary (on the CPU), more positions than
            `max_position_embeddings`, a cache that is full or used with gradients, training mode
            beside experts that are kept quantised.
        """
        past = self._check(input_ids, cache)
        length = input_ids.shape[1]
        positions = torch.arange(past, past + length, device=input_ids.device)
        cos, sin = rotary_tables(self.config, positions)
        x = self.model.embed_tokens(input_ids)
        for layer in self.model.layers:
            x = layer(x, cos, sin, cache)
        if cache is not None:
            cache.length += length
        return self.lm_head(self.model.norm(x))

    def _check(self, input_ids: Tensor, cache: LatentCache | None) -> int:
        """Refuse bad input before anything changes; the number of tokens in the cache."""
        check_dtype("KimiK2", self.lm_head.weight.dtype)
        if self.training and self.experts_form is not None:
            raise ValueError(
                f"KimiK2: experts: expected eval mode beside experts kept in {self.experts_form}, "
                "got a forward in training mode; call model.eval(), or load with experts=None"
            )
        if input_ids.dtype != torch.int64:
            raise TypeError(
                f"KimiK2: input_ids: expected int64, got {input_ids.dtype}; use input_ids.long()"
            )
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise ValueError(
                "KimiK2: input_ids: expected shape [B, S] with B, S >= 1, got "
                f"{list(input_ids.shape)}; add a batch dimension"
            )
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (int(v) for v in input_ids.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"KimiK2: input_ids: expected ids in 0 .. {self.config.vocab_size - 1}, got "
                    f"{low} .. {high}; use this model's tokenizer"
                )
        past = 0 if cache is None else cache.length
        if past + input_ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"KimiK2: input_ids: expected at most {self.config.max_position_embeddings} "
                f"positions, got {past + input_ids.shape[1]}; shorten the sequence"
            )
        if cache is not None:
            if torch.is_grad_enabled():
                raise ValueError(
                    "KimiK2: cache: works without gradients only; call under torch.no_grad()"
                )
            batch, tokens = input_ids.shape
            cache.check(batch, tokens, self.lm_head.weight)
        return past

    def decoder_layers(self) -> Iterator[DecoderLayer]:
        for layer in self.model.layers:
            yield cast(DecoderLayer, layer)

    def attention_layers(self) -> list[Attention]:
        """The attention of every layer, first to last."""
        return [layer.self_attn for layer in self.decoder_layers()]

    def moe_layers(self) -> list[MoE]:
        """The mixture-of-experts layers, first to last."""
        return [layer.mlp for layer in self.decoder_layers() if isinstance(layer.mlp, MoE)]

    def expert_stacks(self) -> set[nn.Parameter]:
        """The parameters of which `expert_ranks` have a part each."""
        if self.expert_ranks is None:
            return set()
        return {stack for moe in self.moe_layers() for stack in moe.experts.parameters()}

    @property
    def experts_form(self) -> str | None:
        """ "fp8" or "int4" where the routed experts are kept quantised, else None."""
        experts = (moe.experts for moe in self.moe_layers())
        return next((e.form for e in experts if isinstance(e, QuantizedExperts)), None)

    def auxiliary_loss(self) -> Tensor:
        """Sum of the sequence balance losses of the last training forward, 0-dim fp32.

        Already multiplied by `aux_loss_alpha`; zero where that is 0.
        """
        losses = [moe.balance_loss for moe in self.moe_layers() if moe.balance_loss is not None]
        zero = torch.zeros((), device=self.lm_head.weight.device)
        return sum(losses, zero)

    def reset_statistics(self) -> None:
        """Forget the loads of the experts, the balance losses and the largest attention logits."""
        for moe in self.moe_layers():
            moe.reset_statistics()
        for attention in self.attention_layers():
            attention.reset_statistics()
