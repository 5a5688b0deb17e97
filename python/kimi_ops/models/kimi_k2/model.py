# SPDX-License-Identifier: MIT
"""The Kimi K2 language model: the decoder, its checkpoints and its continuations."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kimi_ops.models.kimi_k2.attention import LatentCache
from kimi_ops.models.kimi_k2.config.field_checks import check_tokens
from kimi_ops.models.kimi_k2.decoder import Decoder
from kimi_ops.models.kimi_k2.expert_ranks import ExpertRanks
from kimi_ops.models.kimi_k2.generate import Decodes, Ending, Prompt, Streamer, generate
from kimi_ops.models.kimi_k2.pretrained import (
    keep_quantized,
    load_weights,
    read_config,
    save_weights,
    whole,
)
from kimi_ops.models.kimi_k2.sampling import Processor, Sampling

__all__ = ["KimiK2"]


class KimiK2(Decoder):
    """A decoder of the Kimi K2 family.

    Parameters
    ----------
    config : KimiK2Config
    expert_ranks : ExpertRanks, optional
        Spread the routed experts over these ranks: each has its own of them and all the rest, and
        brings its own tokens. All of them call the model, in the same order.
    device, dtype
        Of the parameters; the defaults are torch's. On ``device="meta"`` nothing is allocated,
        elsewhere the weights are those of ``init_weights(0)``. The router's bias and the statistics
        of attention stay fp32 whatever `dtype` is.

    Raises
    ------
    TypeError
        A `dtype` other than bfloat16, float16 and float32.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config
    >>> model = KimiK2(KimiK2Config.tiny())
    >>> model(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 64])
    """

    def generate(
        self,
        input_ids: Tensor,
        *,
        max_new_tokens: int,
        attention_mask: Tensor | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        logits_processor: Sequence[Processor] = (),
        num_return_sequences: int = 1,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        stop_strings: str | Sequence[str] = (),
        tokenizer: Decodes | None = None,
        cache: LatentCache | None = None,
        use_cache: bool = True,
        prefill_chunk: int | None = None,
        streamer: Streamer | None = None,
        cuda_graph: bool = False,
    ) -> Tensor:
        """Continue every sequence by up to `max_new_tokens` tokens.

        Parameters
        ----------
        input_ids : Tensor [B, S] int64
        max_new_tokens : int
        attention_mask : Tensor [B, S] bool or int64, optional
            0 is padding, on the left, for prompts of different lengths.
        do_sample : bool, optional
            False takes the most likely token, True draws at temperature 1 where none is given.
        temperature : float, optional
            Tokens are drawn from softmax(logits / temperature); 0, the default, takes the most
            likely one.
        top_k, top_p, min_p : int, float, float
            Draw only among the k most likely tokens (0: all), among the most likely ones whose
            probabilities reach the sum p, and among those of at least min_p times the largest
            probability; in this order.
        repetition_penalty : float
            Divides logits above 0 of tokens that are there already and multiplies those below.
        logits_processor : sequence of callables
            (ids [B, n], logits [B, V]) -> logits, after the penalty.
        num_return_sequences : int
            Continuations of every prompt, side by side.
        seed, generator : int or torch.Generator, optional
            Source of randomness; without either torch's own generator is used.
        eos_token_id : int or list of int, optional
            Ends of a sequence, from the config where absent. Generation stops when all are
            finished.
        pad_token_id : int, optional
            What fills a finished sequence; the first of the ends where absent.
        stop_strings, tokenizer : str or sequence of str, anything with ``decode(list of int)``
            A sequence ends with the token that completes one of them in what is generated.
        cache : LatentCache, optional
            Kept and filled: `input_ids` begins with the tokens that it holds already, which are not
            computed again. Afterwards it holds all but the last token.
        use_cache : bool
            Keep latents of the tokens so far instead of computing them again.
        prefill_chunk : int, optional
            Compute the prompt in pieces of so many tokens, in less memory.
        streamer : object with ``put(ids)`` and ``end()``, optional
            Given the prompt, then the tokens [B] of each step, as transformers' streamers are.
        cuda_graph : bool
            On a GPU: replay a step of one token from a CUDA graph, made once for each power of two
            of tokens in the cache.

        Returns
        -------
        Tensor [B num_return_sequences, S + new] int64

        Raises
        ------
        TypeError, ValueError
            As `forward`; also a number out of its range.

        Examples
        --------
        >>> import torch
        >>> from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config
        >>> model = KimiK2(KimiK2Config.tiny())
        >>> model.generate(torch.tensor([[1, 2]]), max_new_tokens=3).shape
        torch.Size([1, 5])
        """
        if seed is not None and generator is not None:
            raise ValueError(
                "generate: seed: expected none beside a generator, got both; pass one of them"
            )
        if seed is not None:
            generator = torch.Generator(device=input_ids.device).manual_seed(seed)
        if temperature is None:
            temperature = 1.0 if do_sample else 0.0
        elif do_sample is not None and do_sample != (temperature != 0):
            raise ValueError(
                f"generate: do_sample: expected {temperature != 0} beside temperature "
                f"{temperature}, got {do_sample}; leave one of them out"
            )
        strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        if strings and tokenizer is None:
            raise ValueError(
                f"generate: tokenizer: expected one beside stop_strings {strings}, got None; pass "
                "the tokenizer that made input_ids"
            )
        if "" in strings:
            raise ValueError(
                "generate: stop_strings: expected no empty string, got one; it is in every text"
            )
        for name, ids in (("eos_token_id", eos_token_id), ("pad_token_id", pad_token_id)):
            vocabulary, several = self.config.vocab_size, name == "eos_token_id"
            check_tokens(name, ids, vocabulary, several=several, op="generate")
        eos = eos_token_id if eos_token_id is not None else self.config.eos_token_id
        ends = torch.tensor([] if eos is None else eos, device=input_ids.device).long().view(-1)
        filler = pad_token_id
        if filler is None:
            filler = int(ends[0]) if len(ends) else 0
        return generate(
            self,
            Prompt(input_ids, attention_mask),
            max_new_tokens=max_new_tokens,
            sampling=Sampling(
                temperature, top_k, top_p, min_p, repetition_penalty, logits_processor, generator
            ),
            ending=Ending(ends, filler, strings, tokenizer),
            copies=num_return_sequences,
            cache=cache,
            use_cache=use_cache,
            prefill_chunk=prefill_chunk,
            streamer=streamer,
            cuda_graph=cuda_graph,
        )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        experts: str | None = None,
        expert_ranks: ExpertRanks | None = None,
        text_only: bool = False,
    ) -> "KimiK2":
        """Load a Hugging Face checkpoint of the Kimi K2 / DeepSeek-V3 layout.

        Parameters
        ----------
        folder : path
            Holds ``config.json`` and one or more safetensors files. FP8 weights with block scales
            (``weight_scale_inv``) and packed INT4 weights (``weight_packed``) are dequantised.
        device : torch.device or str
        dtype : torch.dtype, optional
            Of the parameters; `torch_dtype` of the config where absent. The router's bias stays
            fp32.
        experts : {"fp8", "int4"}, optional
            Keep the routed experts in this form, which must be the checkpoint's. The model comes in
            eval mode and is for inference on a CPU: training forwards, `init_weights` and
            `save_pretrained` refuse it.
        expert_ranks : ExpertRanks, optional
            Spread the routed experts over these ranks; each reads its own.
        text_only : bool
            Of a model that sees (Kimi K2.5: ``text_config``, tensors ``language_model.*``) load the
            language model and leave out ``vision_tower.*`` and ``mm_projector.*``; without it such
            a folder is refused. What `save_pretrained` writes of it is a language model alone.

        Raises
        ------
        TypeError
            A `dtype` other than bfloat16, float16 and float32.
        ValueError
            Files that are missing, damaged, belong to another model or do not fit each other, and
            values that are not finite; the message names file and tensor.

        Notes
        -----
        Memory rises by the model and a few MiB. `load_layer` reads a layer alone.
        """
        config, dtype = read_config(folder, dtype, text_only=text_only)
        model = cls(config, device="meta", dtype=dtype, expert_ranks=expert_ranks)
        if experts is not None:
            keep_quantized(whole(model), experts)
        load_weights(model, folder, device=device, text_only=text_only)
        return model

    def save_pretrained(self, folder: str | Path, *, max_shard_bytes: int = 5_000_000_000) -> None:
        """Write ``config.json`` and safetensors in the Hugging Face layout, one tensor an expert.

        Files are written in a hidden folder, made durable and renamed when all are complete; shards
        have names of their own in every save, and the index or single file that leads to the new
        weights comes last. An error leaves the folder as it was. A process that dies leaves the old
        weights or the new ones, never some of both; what else it left the next save removes. (Only
        a `config.json` with other content is renamed just before them.) One process at a time may
        save into a folder. Where ranks share the experts all of them call this; rank 0 writes what
        one process would, and holds the experts of one shard at a time.

        Parameters
        ----------
        folder : path
            Made where absent.
        max_shard_bytes : int
            Above this size the weights are split into shards with an index.

        Raises
        ------
        OSError
            The folder cannot be written.
        TypeError, ValueError
            Weights in a dtype that is not served or on the meta device, experts that are kept
            quantised, a limit below 1.
        """
        save_weights(self, folder, max_shard_bytes=max_shard_bytes)
