# SPDX-License-Identifier: MIT
"""Layers stacked to a language model, without what reads and writes files."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from kimi_ops.models.kimi_k2.attention import Attention, LatentCache
from kimi_ops.models.kimi_k2.config import KimiK2Config
from kimi_ops.models.kimi_k2.expert_ranks import ExpertRanks
from kimi_ops.models.kimi_k2.inputs import Inputs, check_inputs
from kimi_ops.models.kimi_k2.layers import MLP, Linear, RMSNorm, check_dtype
from kimi_ops.models.kimi_k2.moe import Leaving, MoE, Returning
from kimi_ops.models.kimi_k2.outputs import KimiK2Output, check_labels, next_token_loss, recorded
from kimi_ops.models.kimi_k2.recompute import Recomputes
from kimi_ops.models.kimi_k2.rope import rotary_tables
from kimi_ops.nn import StoredExperts

__all__ = ["Decoder", "DecoderLayer"]


class DecoderLayer(Recomputes):
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

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: LatentCache | None = None,
        documents: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        return self.whole(self._forward, x, cos, sin, cache, documents, valid)

    def leave(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Leaving | None]:
        """The first part of `forward`, as `MoE.leave`; a dense layer does all of it."""
        x = x + self.again(self._attended, x, cos, sin, None, None)
        if isinstance(self.mlp, MoE):
            return x, self.mlp.leave(x, None, self.post_attention_layernorm)
        return x + self.again(self._dense, x), None

    def compute(self, leaving: Leaving | None) -> Returning | None:
        """The second part."""
        return leaving and cast(MoE, self.mlp).compute(leaving)

    def arrive(self, x: Tensor, returning: Returning | None) -> Tensor:
        """The third part, of the x of the first."""
        return x if returning is None else x + cast(MoE, self.mlp).arrive(returning)

    def _forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: LatentCache | None,
        documents: Tensor | None,
        valid: Tensor | None,
    ) -> Tensor:
        x = x + self.again(self._attended, x, cos, sin, cache, documents)
        if isinstance(self.mlp, MoE):
            return x + self.mlp(x, valid, self.post_attention_layernorm)
        return x + self.again(self._dense, x)

    def _attended(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: LatentCache | None,
        documents: Tensor | None,
    ) -> Tensor:
        return self.self_attn(self.input_layernorm(x), cos, sin, cache, self.layer, documents)

    def _dense(self, x: Tensor) -> Tensor:
        return self.mlp(self.post_attention_layernorm(x))


class Backbone(Recomputes):
    """Embedding, layers and final norm: the part under ``model.`` in a checkpoint."""

    def __init__(self, config: KimiK2Config, ranks: ExpertRanks | None, **factory: Any) -> None:
        super().__init__()
        # without a draw, which on meta would load torch._dynamo: seconds for nothing
        table = torch.empty(config.vocab_size, config.hidden_size, **factory)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(DecoderLayer(config, n, ranks, **factory) for n in layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)


def allocate(part: nn.Module, device: torch.device | str) -> None:
    """Give a part on the meta device uninitialised memory; statistics and biases are reset."""
    # as to_empty, whose empty_like of a meta tensor loads sympy
    part._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))
    for module in part.modules():
        if isinstance(module, MoE | Attention):
            module.reset_statistics()
        if isinstance(module, MoE):
            module.gate.e_score_correction_bias.zero_()


class Decoder(nn.Module):
    """The network: ids in, logits out, with what training reads of its layers. See `KimiK2`."""

    prefixes: str | tuple[str, ...] = ""  # of its tensors' names in a checkpoint

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
        dtype = dtype or torch.get_default_dtype()
        check_dtype("KimiK2", dtype)
        factory = {"device": torch.device("meta"), "dtype": dtype}
        self.model = Backbone(config, expert_ranks, **factory)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, **factory)
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
        allocate(self, device)
        self._tie()

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw the matrices from normal(0, initializer_range); gains 1, biases 0.

        Parameters
        ----------
        seed : int
            The same seed gives the same weights on every device and for any number of expert ranks
            and stages: all are drawn on the CPU in fp32, in the order of the whole model.

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
        own = dict(self.named_parameters())
        for name, shape in self.shapes().items():
            parameter = own.get(name)
            if len(shape) >= 2:
                values = torch.empty(shape, dtype=torch.float32, device="cpu")
                values.normal_(0.0, self.config.initializer_range, generator=generator)
                if self.expert_ranks is not None and parameter in spread:
                    experts = self.expert_ranks.experts
                    values = values[experts.start : experts.stop]
                if parameter is not None:
                    parameter.copy_(values)
            elif parameter is not None:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        for moe in self.moe_layers():
            moe.gate.e_score_correction_bias.zero_()
        self.reset_statistics()

    def shapes(self) -> dict[str, torch.Size]:
        """Of the parameters of the whole model, in their order, whichever of them are here."""
        spread, experts = self.expert_stacks(), self.config.n_routed_experts
        return {
            name: torch.Size((experts, *p.shape[1:])) if p in spread else p.shape
            for name, p in self.named_parameters()
        }

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        cache: LatentCache | None = None,
        output_hidden_states: bool = False,
        output_router_logits: bool = False,
        return_dict: bool = False,
    ) -> Any:
        """Next-token logits.

        Parameters
        ----------
        input_ids : Tensor [B, S] int64
            Ids in 0 .. vocab_size - 1.
        attention_mask : Tensor [B, S] bool or int64, optional
            1 for tokens, 0 for padding at either end, which nobody sees and no expert computes.
            With a cache its columns may also be those of all tokens so far.
        position_ids : Tensor [B, S] int64, optional
            Of the rotary positions, 0 .. S - 1 by default. Without a mask and a cache they also say
            where a packed sequence goes on with another document: where they do not go on by one.
        inputs_embeds : Tensor [B, S, hidden_size], optional
            In place of ids.
        labels : Tensor [B, S] int64, optional
            Usually `input_ids`: the loss is the mean of -log p(labels[:, t + 1] | tokens to t) in
            fp32 over labels that are not -100.
        logits_to_keep : int
            Logits of so many last tokens only; 0 keeps all.
        cache : LatentCache, optional
            Tokens before these; S tokens are added to it. Only without gradients.
        output_hidden_states, output_router_logits, return_dict : bool

        Returns
        -------
        Tensor [B, S, vocab_size], the dtype of the parameters
            Or, where labels or more outputs or `return_dict` are asked for, a `KimiK2Output` of
            ``logits``, ``loss``, ``hidden_states`` (the embeddings, then what each layer gives; the
            last one normed) and ``router_logits`` ([B S, E] fp32 of each layer with experts).

        Raises
        ------
        TypeError, ValueError
            Wrong dtype or shape, ids outside the vocabulary (on the CPU), more positions than
            `max_position_embeddings`, a cache that is full or used with gradients, training mode
            beside experts that are kept quantised.
        """
        past = 0 if cache is None else cache.length
        given = input_ids, inputs_embeds, attention_mask, position_ids
        inputs = check_inputs(self.config, past, *given)
        self.check(inputs, cache, labels, logits_to_keep)
        documents = inputs.documents
        valid = None if documents is None or attention_mask is None else documents >= 0
        if cache is not None:
            documents = cache.see(documents, inputs.shape[1])
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x = x.to(self.lm_head.weight.dtype)
        cos, sin = rotary_tables(self.config, inputs.positions)
        states = [x]
        with recorded(self.moe_layers() if output_router_logits else []) as router_logits:
            for layer in self.model.layers:
                x = layer(x, cos, sin, cache, documents, valid)
                if output_hidden_states:
                    states.append(x)
        if cache is not None:
            cache.length += inputs.shape[1]
        x = self.model.norm(x)
        logits = self.lm_head(x[:, -logits_to_keep:])
        loss = None if labels is None else next_token_loss(logits, labels)
        if loss is None and not (output_hidden_states or output_router_logits or return_dict):
            return logits
        return KimiK2Output(
            logits,
            loss,
            (*states[:-1], x) if output_hidden_states else None,
            tuple(router_logits) if output_router_logits else None,
        )

    def check(
        self,
        inputs: Inputs,
        cache: LatentCache | None,
        labels: Tensor | None,
        logits_to_keep: int,
    ) -> None:
        """Refuse what does not go with this model, before anything changes."""
        check_dtype("KimiK2", self.lm_head.weight.dtype)
        self.check_mode()
        if type(logits_to_keep) is not int or logits_to_keep < 0:
            raise ValueError(
                f"KimiK2: logits_to_keep: expected an int >= 0, got {logits_to_keep!r}; 0 keeps all"
            )
        if labels is not None:
            check_labels(labels, inputs.shape, logits_to_keep)
        if cache is not None:
            if torch.is_grad_enabled():
                raise ValueError(
                    "KimiK2: cache: works without gradients only; call under torch.no_grad()"
                )
            cache.check(*inputs.shape, self.lm_head.weight)

    def check_mode(self) -> None:
        """Refuse a way of running that these layers do not have."""
        if self.recompute != "none" and torch.compiler.is_compiling():
            raise ValueError(
                f"KimiK2: recompute: expected none in a compiled forward, got {self.recompute}; "
                "the compiler plans what its backward keeps: "
                "torch._functorch.config.activation_memory_budget"
            )
        if self.training and self.experts_form is not None:
            raise ValueError(
                f"KimiK2: experts: expected eval mode beside experts kept in {self.experts_form}, "
                "got a forward in training mode; call model.eval(), or load with experts=None"
            )

    @property
    def recompute(self) -> str:
        """What backwards compute again, to keep less: ``"none"``, ``"selective"`` (norms,
        expansions of latents, SwiGLU) or ``"full"``. May be set; bits stay the same."""
        return self.model.recompute

    @recompute.setter
    def recompute(self, way: str) -> None:
        self.model.recompute = way

    @property
    def fp8_activations(self) -> bool:
        """Whether the inputs of the routed experts' products and SwiGLU are kept in FP8 for the
        backward. May be set; it rounds what the experts' gradients are made of, and with them those
        of all that comes before, and nothing of the forward."""
        return self.model.fp8_activations

    @fp8_activations.setter
    def fp8_activations(self, wanted: bool) -> None:
        self.model.fp8_activations = wanted

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
        return next((e.form for e in experts if isinstance(e, StoredExperts)), None)

    def auxiliary_loss(self) -> Tensor:
        """Sum of the sequence balance losses of the last training forward, 0-dim fp32.

        Already multiplied by `aux_loss_alpha`; zero where that is 0.
        """
        losses = [moe.balance_loss for moe in self.moe_layers() if moe.balance_loss is not None]
        zero = torch.zeros((), dtype=torch.float32, device=self.lm_head.weight.device)
        return sum(losses, zero)

    def reset_statistics(self) -> None:
        """Forget the loads of the experts, the balance losses and the largest attention logits."""
        for moe in self.moe_layers():
            moe.reset_statistics()
        for attention in self.attention_layers():
            attention.reset_statistics()
