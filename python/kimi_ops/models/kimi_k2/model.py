# SPDX-License-Identifier: MIT
"""The Kimi K2 language model: the decoder, its checkpoints and its continuations."""

from pathlib import Path

import torch
from torch import Tensor

from kimi_ops.models.kimi_k2 import checkpoint
from kimi_ops.models.kimi_k2.config import KimiK2Config
from kimi_ops.models.kimi_k2.decoder import Decoder
from kimi_ops.models.kimi_k2.expert_ranks import ExpertRanks
from kimi_ops.models.kimi_k2.generate import generate

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
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        eos_token_id: int | list[int] | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """Continue every sequence by up to `max_new_tokens` tokens.

        Parameters
        ----------
        input_ids : Tensor [B, S] int64
        max_new_tokens : int
        temperature : float
            0 takes the most likely token.
        top_p : float
            Draw only among the most likely tokens whose probabilities reach this sum.
        seed, generator : int or torch.Generator, optional
            Source of randomness; without either torch's own generator is used.
        eos_token_id : int or list of int, optional
            Ends of a sequence, from the config where absent. A finished sequence is filled with the
            first of them; generation stops when all are finished.
        use_cache : bool
            Keep latents of the tokens so far instead of computing them again.

        Returns
        -------
        Tensor [B, S + new] int64

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
        return generate(
            self,
            input_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            generator=generator,
            eos_token_id=eos_token_id,
            use_cache=use_cache,
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

        Raises
        ------
        TypeError
            A `dtype` other than bfloat16, float16 and float32.
        ValueError
            Files that are missing, truncated or belong to another model; named in the message.
        """
        config = KimiK2Config.from_file(Path(folder) / "config.json")
        if dtype is None:
            dtype = getattr(torch, config.torch_dtype or "float32")
        model = cls(config, device="meta", dtype=dtype, expert_ranks=expert_ranks)
        if experts is not None:
            checkpoint.keep_quantized(model, experts)
            model.eval()
        checkpoint.load_weights(model, folder, device=device)
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
        checkpoint.save(self, folder, max_shard_bytes=max_shard_bytes)
